"""Batches that the model or the loss changes in place, so that the next pass sees others."""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.data.nested import Batch, map_tensors, tensors
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Functions, Options, user_line
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.wiring.program import Facts, relative_change

SAME = 1e-6  # relative change of a second pass due to rounding


class _WriteTrace(Functions):
    """Context that records the line of the first call that writes into one of some tensors."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.watched, self.place = watched, ""

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the function's own result."""
        before = _versions(self.watched)
        result = func(*args, **kwargs)
        if not self.place and _versions(self.watched) != before:
            self.place = user_line()
        return result


def _versions(values: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in values]


def batch_changes(replica: Replica, batch: Batch) -> Facts:
    """Return `batch_changed` if every pass changes the batch further, on a copy of it.

    `part` is the position of the changed tensor, `times` the size of its entries after two passes
    / before, `place` the line. A change that a second pass repeats, as by `clamp_`, is harmless.
    """
    copy = map_tensors(batch, torch.clone)
    parts = tensors(copy)
    states = [[t.clone() for t in parts]]
    trace = _WriteTrace(parts)
    for _ in range(2):
        with undisturbed(replica.model, training=True), trace, torch.enable_grad():
            replica.value(copy)
        states.append([t.clone() for t in parts])
    for part, (first, second, third) in enumerate(zip(*states)):
        moved = relative_change([second.double()], [third.double()])
        if moved > SAME and not torch.equal(first, second):
            sizes = [float(t.double().square().mean().sqrt()) for t in (first, third)]
            times = sizes[1] / sizes[0] if sizes[0] else 0.0
            return {"batch_changed": {"part": part, "times": times, "place": trace.place}}
    return {}
