"""A residual network without normalisation: its size doubles block by block."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import tikhon as tk


def data():
    """Images of digits, 0 to 1: (training, validation)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


class Block(nn.Module):
    """x + conv(relu(conv(x))), He weights, no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU()
        self.last = nn.Conv2d(width, width, 3, padding=1)
        for layer in (self.first, self.last):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.act(self.first(x)))


def build() -> nn.Module:
    """Twenty blocks of eight channels."""
    blocks = [Block(8) for _ in range(20)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(512, 10))


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
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05), valid=valid, steps=options.steps
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
