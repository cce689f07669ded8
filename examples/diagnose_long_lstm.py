"""An LSTM that must remember 500 steps: its gates forget half at each."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import tikhon as tk


def data():
    """The class is in the first step, 499 steps of noise follow: (training, validation)."""
    y = torch.randint(4, (512,))
    x = 0.1 * torch.randn(512, 500, 4)
    x[:, 0] += nn.functional.one_hot(y, 4)
    return (x[:384], y[:384]), (x[384:], y[384:])


class Reader(nn.Module):
    """An LSTM and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(4, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(x)[0][:, -1])


def build() -> nn.Module:
    """PyTorch's default weights: forget gates at one half."""
    return Reader()


def main() -> None:
    """Diagnose, cure, and keep the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--budget", default="60s")
    parser.add_argument("--output", help="folder for the report; tikhon report shows it")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, valid, model = *data(), build()
    program = dict(
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        valid=valid,
        steps=options.steps,
        batch_size=32,
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
