"""Rounds of clients: each trains from the same weights, and their mean is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TENSORS, PARTS = 4, 8  # sums that are compared: of so many matrices, of so many parts of each
CLIENTS = 64  # of a first round that is waited for
SAME = 1e-4  # of the largest sum


class Rounds:
    """Whether each state that is loaded is a mean of those that were left.

    A mean lies between the states that it is made of, in every sum over entries. The state of a
    client is asked for (`state_dict()`) before the next one begins.
    """

    def __init__(self) -> None:
        self.asked = False  # for a state, since the last was loaded
        self._loaded: Tensor | None = None
        self._left: list[Tensor] = []  # states that trained on from the one that was loaded
        self._means = 0
        self._other = False  # something was loaded that is neither

    def meant(self, *, ended: bool) -> bool:
        """Whether all that was loaded is such a mean, or the last one again."""
        waits = not ended and 0 < len(self._left) < CLIENTS
        return not self._other and (self._means > 0 or waits)

    def load(self, own: Mapping[str, Tensor], given: Mapping[str, object]) -> None:
        """A state is given for the model's own tensors."""
        matrices = [name for name, p in own.items() if p.ndim > 1][:TENSORS]
        if self._other or not matrices:
            return
        mine = [own[name] for name in matrices]
        comes = [g for name in matrices if isinstance(g := given[name], Tensor)]
        fit = [g.shape for g in comes] == [m.shape for m in mine]
        if not fit or any(hasattr(m, "to_local") for m in mine):
            self._other = True
        else:
            self._compare(_sums(mine), _sums(comes))

    def _compare(self, left: Tensor, comes: Tensor) -> None:
        if torch.equal(left, comes):
            self._loaded = comes
            return
        self._left.append(left)
        again = self._loaded is not None and torch.equal(comes, self._loaded)
        if not again and self._loaded is not None and _between(comes, self._left):
            self._means, self._left = self._means + 1, []
        elif not again and self._loaded is not None:
            self._other = True
        self._other = self._other or not self.asked
        self._loaded, self.asked = comes, False


def _sums(tensors: list[Tensor]) -> Tensor:
    parts = [t.detach().reshape(-1)[k::PARTS] for t in tensors for k in range(PARTS)]
    return torch.stack([part.double().sum().cpu() for part in parts])


def _between(mean: Tensor, states: list[Tensor]) -> bool:
    """Whether it lies in the box around two states or more."""
    if len(states) < 2:
        return False
    low, high = torch.stack(states).amin(0), torch.stack(states).amax(0)
    room = SAME * torch.stack(states).abs().amax()
    return bool(((mean >= low - room) & (mean <= high + room)).all())
