"""Rounds of federated averaging: clients train from the same weights, their mean is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_TENSORS = 4  # matrices that are compared
PARTS = 8  # of each matrix, whose sums are compared
MAX_CLIENTS = 64  # of a first round that is waited for
TOLERANCE = 1e-4  # of the largest sum


class FederatedRounds:
    """Whether each loaded state is a mean of client states, as in federated averaging.

    A mean lies between the states that it is made of, in every sum over entries. The state of a
    client is requested (`state_dict()`) before the next one begins.
    """

    def __init__(self) -> None:
        self.state_requested = False  # since the last was loaded
        self.steps = 0  # between the last two loads
        self._loaded: Tensor | None = None
        self._client_states: list[Tensor] = []  # trained on from the one that was loaded
        self._averages = 0
        self._is_other_load = False  # something was loaded that is neither

    def is_averaging(self, *, ended: bool) -> bool:
        """Whether all that was loaded is such a mean, or the last one again."""
        is_first_round = not ended and 0 < len(self._client_states) < MAX_CLIENTS
        return not self._is_other_load and (self._averages > 0 or is_first_round)

    def record_load(self, parameters: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """A state is given for the model's own tensors."""
        matrices = [name for name, p in parameters.items() if p.ndim > 1][:MAX_TENSORS]
        if self._is_other_load or not matrices:
            return
        current = [parameters[name] for name in matrices]
        loaded = [g for name in matrices if isinstance(g := state[name], Tensor)]
        shapes_match = [g.shape for g in loaded] == [m.shape for m in current]
        if not shapes_match or any(hasattr(m, "to_local") for m in current):
            self._is_other_load = True
        else:
            self._compare(_partial_sums(current), _partial_sums(loaded))

    def _compare(self, client_sums: Tensor, loaded: Tensor) -> None:
        if torch.equal(client_sums, loaded):
            self._loaded = loaded
            return
        self._client_states.append(client_sums)
        is_other = False
        if self._loaded is not None and not torch.equal(loaded, self._loaded):
            start = [self._loaded] if self.steps > 1 else []  # part of the way, as in Reptile
            is_other = not _lies_between(loaded, [*start, *self._client_states])
            if not is_other:
                self._averages, self._client_states = self._averages + 1, []
        self._is_other_load = is_other or not self.state_requested
        self._loaded, self.state_requested = loaded, False


def _partial_sums(tensors: list[Tensor]) -> Tensor:
    parts = [t.detach().reshape(-1)[k::PARTS] for t in tensors for k in range(PARTS)]
    return torch.stack([part.double().sum().cpu() for part in parts])


def _lies_between(mean: Tensor, states: list[Tensor]) -> bool:
    """Whether it lies in the box around two states or more."""
    if len(states) < 2:
        return False
    low, high = torch.stack(states).amin(0), torch.stack(states).amax(0)
    tolerance = TOLERANCE * torch.stack(states).abs().amax()
    return bool(((mean >= low - tolerance) & (mean <= high + tolerance)).all())
