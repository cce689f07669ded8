"""What the `diagnose_*` examples share: ask, treat, and run both programs in full."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tikhon as tk


def digits() -> tuple[Any, Any]:
    """Images of digits, 8 x 8, 0 to 1: (training, validation)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(y)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def show(
    text: str | None,
    data: Callable[[], tuple[Any, Any]],
    build: Callable[[], nn.Module],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int,
    batch_size: int = 64,
    budget: str = "60s",
) -> None:
    """Diagnose the program, cure it, train both for `steps`, and keep the page if asked to."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--budget", default=budget)
    parser.add_argument("--output", help="folder for the report; tikhon report shows it")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, valid = data()
    model, loss = build(), nn.CrossEntropyLoss()
    program = dict(
        optimizer=optimizer(model.parameters()), valid=valid, steps=options.steps,
        batch_size=batch_size,
    )  # fmt: skip
    found = tk.diagnose(model, train, loss, **program)
    print(found)
    cured = tk.cure(model, train, loss, diagnosis=found, budget=options.budget, **program)
    print(cured)
    before, (_, after) = found.record.points[-1], cured.train(options.steps)
    print(f"validation accuracy {before.valid_metric:.2f} -> {after.valid_metric:.2f}")
    if options.output:
        cured.save(options.output, overwrite=True)
        print(f"page: {tk.report.write(options.output)}")
