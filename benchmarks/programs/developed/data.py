"""Small tables, pictures and sequences that the programs learn from."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits() -> Pair:
    """1797 digits of 64 grey values from 0 to 1, in another order."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=seeded(3))
    return torch.tensor(x).float()[order] / 16, torch.tensor(y)[order]


def pictures() -> Pair:
    """The digits as (n, 1, 8, 8)."""
    x, y = digits()
    return x.reshape(-1, 1, 8, 8), y


def rows_of_digits() -> Pair:
    """The digits as sequences of 8 rows."""
    x, y = digits()
    return x.reshape(-1, 8, 8), y


@cache
def iris() -> Pair:
    x, y = load_iris(return_X_y=True)
    order = torch.randperm(len(x), generator=seeded(1))
    return torch.tensor(x).float()[order], torch.tensor(y)[order]


@cache
def cancer() -> Pair:
    """569 rows of 30 numbers as they are measured, and two classes."""
    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(x), generator=seeded(2))
    return torch.tensor(x).float()[order], torch.tensor(y)[order]


@cache
def diabetes() -> Pair:
    """442 rows of 10 scaled numbers, and a column of numbers around 152."""
    x, y = load_diabetes(return_X_y=True)
    inputs = torch.tensor(x).float()
    return inputs / inputs.std(0), torch.tensor(y).float()[:, None]


def scaled(x: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1."""
    return (x - x.mean(0)) / x.std(0)


def blobs(rows: int = 600, size: int = 12, classes: int = 4, seed: int = 0) -> Pair:
    """Gaussian clouds around as many centres as classes."""
    g = seeded(seed)
    y = torch.randint(classes, (rows,), generator=g)
    centres = 1.5 * torch.randn(classes, size, generator=g)
    return centres[y] + torch.randn(rows, size, generator=g), y


def rings(rows: int = 600, seed: int = 0) -> Pair:
    """Points in the plane, inside or outside of a circle."""
    x = torch.randn(rows, 2, generator=seeded(seed))
    return x, (x.square().sum(1) > 1.4).long()


def waves(rows: int = 600, seed: int = 0) -> Pair:
    """A bent function of four numbers with little noise, as a column."""
    g = seeded(seed)
    x = torch.randn(rows, 4, generator=g)
    y = torch.sin(1.5 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2].sign()
    return x, (y + 0.1 * torch.randn(rows, generator=g))[:, None]


def signals(rows: int = 500, time: int = 12, size: int = 3, seed: int = 0) -> Pair:
    """Sequences of numbers; the mean of one channel and the end of another tell the class."""
    g = seeded(seed)
    x = torch.randn(rows, time, size, generator=g)
    return x, (x[:, :, 0].mean(1) * time**0.5 + x[:, -1, 1] > 0).long()


def forecasts(rows: int = 500, time: int = 10, seed: int = 0) -> Pair:
    """Sines of random phase and speed, (n, time, 1), and the next value as a column."""
    g = seeded(seed)
    phase = 6.3 * torch.rand(rows, 1, generator=g)
    speed = 0.3 + 0.5 * torch.rand(rows, 1, generator=g)
    wave = torch.sin(phase + speed * torch.arange(time + 1))
    return wave[:, :-1, None], wave[:, -1:]


def counting(rows: int = 500, time: int = 9, words: int = 11, seed: int = 0) -> Pair:
    """Tokens that go round in steps of one to three, and the same one position later."""
    g = seeded(seed)
    start = torch.randint(0, words, (rows, 1), generator=g)
    step = torch.randint(1, 4, (rows, 1), generator=g)
    tokens = (start + step * torch.arange(time + 1)) % words
    return tokens[:, :-1], tokens[:, 1:]


def sentences(rows: int = 600, time: int = 14, words: int = 20, seed: int = 0) -> Pair:
    """Tokens from 1 on, padded with 0 to unequal lengths; the class is the larger half's."""
    g = seeded(seed)
    tokens = torch.randint(1, words, (rows, time), generator=g)
    length = torch.randint(3, time + 1, (rows,), generator=g)
    kept = torch.arange(time) < length[:, None]
    tokens = tokens * kept
    high = ((tokens > words // 2) & kept).sum(1)
    return tokens, (2 * high > length).long()


def tags(rows: int = 600, size: int = 16, labels: int = 5, seed: int = 0) -> Pair:
    """Several yes or no answers a row."""
    x = torch.randn(rows, size, generator=seeded(seed))
    return x, (x[:, :labels] + 0.5 * x[:, labels : 2 * labels] > 0).float()


def rare(rows: int = 1200, size: int = 10, share: float = 0.04, seed: int = 0) -> Pair:
    """Two classes of which one is rare."""
    g = seeded(seed)
    x = torch.randn(rows, size, generator=g)
    score = x[:, 0] + x[:, 1] + 2.5 * torch.randn(rows, generator=g)
    return x, (score > score.quantile(1 - share)).long()
