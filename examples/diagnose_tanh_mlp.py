"""A tanh network of 30 layers with PyTorch's default weights: the signal dies on its way back."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import tikhon as tk


def data():
    """Images of digits, 0 to 1: (training, validation)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def build() -> nn.Module:
    """Thirty tanh layers."""
    hidden = [m for _ in range(30) for m in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def main() -> None:
    """Diagnose, cure, and keep the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", default="60s")
    parser.add_argument("--output", help="folder for the report; tikhon report shows it")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, valid, model = *data(), build()
    program = dict(
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1), valid=valid, steps=options.steps
    )
    found = tk.diagnose(model, train, nn.CrossEntropyLoss(), **program)
    print(found)
    cured = tk.cure(
        model, train, nn.CrossEntropyLoss(), diagnosis=found, budget=options.budget, **program
    )
    print(cured)
    if options.output:
        cured.save(options.output, overwrite=True)
        print(f"page: {tk.report.write(options.output)}")


if __name__ == "__main__":
    main()
