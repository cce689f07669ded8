"""A post-norm transformer at full learning rate from the first step, without warm-up."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import tikhon as tk


def data():
    """Images of digits, 0 to 1: (training, validation)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(y)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


class Reader(nn.Module):
    """Rows as tokens, six post-norm layers, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.02 * torch.randn(8, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 128, 0.0, batch_first=True) for _ in range(6)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x) + self.place
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


def build() -> nn.Module:
    """Six layers."""
    return Reader()


def main() -> None:
    """Diagnose, cure, and keep the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--budget", default="60s")
    parser.add_argument("--output", help="folder for the report; tikhon report shows it")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, valid, model = *data(), build()
    program = dict(
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02), valid=valid, steps=options.steps
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
