"""What the programs of this folder share: a way to list them, and small tasks to learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from programs.form import Loop, Parts, Program, Watch

Pair = tuple[Tensor, Tensor]


def into(
    programs: list[Program],
) -> Callable[..., Callable[[Callable[[bool], Parts]], Callable[[bool], Parts]]]:
    """A decorator that lists `make(wrong)` as a program: faulty if `wrong`, else repaired."""

    def faulty(name: str, source: str, cause: str, low: float, high: float, also=()):
        def note(make: Callable[[bool], Parts]) -> Callable[[bool], Parts]:
            wrong, right = partial(make, True), partial(make, False)
            programs.append(Program(name, source, cause, wrong, right, low, high, tuple(also)))
            return make

        return note

    return faulty


def loops_into(loops: list[Loop]) -> Callable[..., Callable]:
    """A decorator that lists `run(wrong, watch)` as a loop: broken if `wrong`, else healthy."""

    def broken(name: str, source: str, cause: str, low: float, high: float, also=()):
        def note(run: Callable[[bool, Watch], float]) -> Callable[[bool, Watch], float]:
            wrong, right = partial(run, True), partial(run, False)
            loops.append(Loop(name, source, cause, wrong, right, low, high, tuple(also)))
            return run

        return note

    return broken


@cache
def _digits() -> Pair:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(11))
    return torch.tensor(x).float()[order], torch.tensor(y)[order]


def digits(scale: float = 1 / 16) -> tuple[Pair, Pair]:
    """Handwritten digits of 8 x 8 pixels in random order: 1200 rows to train, 597 to test."""
    x, y = _digits()
    order = torch.randperm(len(x))
    x, y = scale * x[order], y[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def blobs(
    rows: int = 800, classes: int = 4, inputs: int = 12, apart: float = 1.0
) -> tuple[Pair, Pair]:
    """Clouds around random centres; three quarters of the rows to train."""
    centres = apart * torch.randn(classes, inputs)
    y = torch.randint(classes, (rows,))
    return split(centres[y] + torch.randn(rows, inputs), y)


def surface(rows: int = 800, inputs: int = 6, noise: float = 0.1) -> tuple[Pair, Pair]:
    """A bent surface with one number per row, of deviation 1; the target is a column."""
    x = torch.randn(rows, inputs)
    y = torch.sin(1.5 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.5 * x[:, 3]
    y = y + noise * torch.randn(rows)
    return split(x, ((y - y.mean()) / y.std())[:, None])


def waves(rows: int = 600, length: int = 16) -> tuple[Pair, Pair]:
    """Noisy sine waves of random pace; the target is the next value, one per row."""
    time = torch.arange(length + 1)
    pace, phase = 0.2 + 0.5 * torch.rand(rows, 1), 6.3 * torch.rand(rows, 1)
    wave = torch.sin(pace * time + phase) + 0.05 * torch.randn(rows, length + 1)
    return split(wave[:, :-1, None], wave[:, -1])


def shapes(rows: int = 600, size: int = 8) -> tuple[Tensor, Tensor]:
    """Noisy pictures of one bright square each, and where it is (0 or 1 for each pixel)."""
    mask = torch.zeros(rows, 1, size, size)
    for picture in mask:
        top, left = torch.randint(0, size - 3, (2,)).tolist()
        picture[0, top : top + 3, left : left + 3] = 1.0
    return mask + 0.4 * torch.randn(rows, 1, size, size), mask


def split(x: Tensor, y: Tensor) -> tuple[Pair, Pair]:
    """The first three quarters and the rest."""
    cut = 3 * len(y) // 4
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])
