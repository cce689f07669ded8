"""Pairs of programs that differ in one fault, as the tests of `diagnose` write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tikhon.diagnosis import Diagnosis, diagnose

Listed = dict[str, tuple[str, Callable[[bool], "Parts"]]]


@dataclass
class Parts:
    """What `diagnose` is given."""

    model: nn.Module
    data: Any
    loss: Callable[..., Any]
    rate: float = 1e-2
    steps: int = 8
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    options: tuple[tuple[str, Any], ...] = ()


def asked(parts: Parts) -> Diagnosis:
    optimizer = parts.optimizer(parts.model.parameters(), lr=parts.rate, **dict(parts.options))
    return diagnose(
        parts.model, parts.data, parts.loss, optimizer=optimizer, steps=parts.steps, batch_size=32
    )


def into(pairs: Listed) -> Callable[[str], Callable[[Callable[[bool], Parts]], Any]]:
    """A decorator that lists `make(wrong)` under the code of its fault."""

    def pair(code: str) -> Callable[[Callable[[bool], Parts]], Any]:
        def note(make: Callable[[bool], Parts]) -> Callable[[bool], Parts]:
            pairs[make.__name__] = (code, make)
            return make

        return note

    return pair
