"""Rounds of clients: each trains from the same weights, and their mean is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tikhon.monitoring.hooks import Hook

TENSORS, PARTS = 4, 8  # sums that are compared: of so many matrices, of so many parts of each
CLIENTS = 64  # of a first round that is waited for
SAME = 1e-4  # of the largest sum


class Rounds:
    """Hears of each state that is loaded, and whether it is a mean of those that were left.

    A mean lies between the states that it is made of, in every sum over entries. The state of a
    client is asked for (`state_dict()`) before the next one begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        matrices = [n for n, p in model.named_parameters() if p.ndim > 1]
        self._names = matrices[:TENSORS]
        self._taken = False  # a state was asked for since the last was loaded
        self._loaded: Tensor | None = None
        self._left: list[Tensor] = []  # states that trained on from the one that was loaded
        self._means = 0
        self._other = False  # something was loaded that is neither
        self._handles = [
            model.register_state_dict_post_hook(Hook(self._asked)),
            model.register_load_state_dict_pre_hook(Hook(self._loading)),
        ]

    def close(self) -> None:
        """Hear of no more states."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def meant(self, *, ended: bool) -> bool:
        """Whether all that was loaded is such a mean, or the last one again."""
        waits = not ended and 0 < len(self._left) < CLIENTS
        return not self._other and (self._means > 0 or waits)

    def _asked(self, module: nn.Module, *rest: object) -> None:
        self._taken = self._taken or module is self._model

    def _loading(self, module: nn.Module, state: Any, prefix: str, *rest: object) -> None:
        if module is not self._model or self._other or not self._names:
            return
        own = dict(module.named_parameters())
        given = [state.get(f"{prefix}{name}") for name in self._names]
        mine = [own[name] for name in self._names]
        fit = all(isinstance(g, Tensor) and g.shape == m.shape for g, m in zip(given, mine))
        if not fit or any(hasattr(m, "to_local") for m in mine):
            self._other = True
            return
        left, comes = _sums(mine), _sums(given)
        if torch.equal(left, comes):
            self._loaded = comes
            return
        self._left.append(left)
        again = self._loaded is not None and torch.equal(comes, self._loaded)
        if not again and self._loaded is not None and _between(comes, self._left):
            self._means, self._left = self._means + 1, []
        elif not again and self._loaded is not None:
            self._other = True
        self._other = self._other or not self._taken
        self._loaded, self._taken = comes, False


def _sums(tensors: list[Any]) -> Tensor:
    parts = [t.detach().reshape(-1)[k::PARTS] for t in tensors for k in range(PARTS)]
    return torch.stack([part.double().sum().cpu() for part in parts])


def _between(mean: Tensor, states: list[Tensor]) -> bool:
    """Whether it lies in the box around two states or more."""
    if len(states) < 2:
        return False
    low, high = torch.stack(states).amin(0), torch.stack(states).amax(0)
    room = SAME * torch.stack(states).abs().amax()
    return bool(((mean >= low - room) & (mean <= high + room)).all())
