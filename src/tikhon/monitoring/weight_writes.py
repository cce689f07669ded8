"""Weights overwritten by something other than the optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from tikhon.monitoring.passes import receives_gradients
from tikhon.monitoring.tensor_readings import fingerprint

MIN_WRITES = 3  # times the same values


class WeightWrites:
    """Detects writes to one tensor of the optimizer between steps, and their values.

    Its `version` counter shows writes in every step without reading values; after a write, a
    fingerprint of two numbers is kept on its device and read with the next sampled step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        candidates = [p for p in parameters if receives_gradients(p) and p.ndim > 1]
        self.tensor = min(candidates, key=Tensor.numel) if candidates else None
        self.version = self.tensor._version if self.tensor is not None else 0
        self._writes: deque[tuple[int, Tensor]] = deque(maxlen=MIN_WRITES)

    def record_write(self, step: int) -> None:
        """Keep a fingerprint of the values written since the last step."""
        if step and (not self._writes or self._writes[-1][0] != step):
            self._writes.append((step, self._fingerprint()))

    def fingerprints(self) -> list[Tensor]:
        """Return the arguments of `reset_since`: fingerprints of the writes and of the present."""
        if len(self._writes) < MIN_WRITES:
            return []
        return [*(value for _, value in self._writes), self._fingerprint()]

    def reset_since(self, fingerprints: Sequence[float]) -> int | None:
        """Return the first step since which the same values are written, else None."""
        if not fingerprints:
            return None
        *writes, present = zip(fingerprints[::2], fingerprints[1::2])
        is_same = all(write == writes[0] for write in writes)
        return self._writes[0][0] if is_same and present != writes[0] else None

    def _fingerprint(self) -> Tensor:
        assert self.tensor is not None
        return fingerprint(self.tensor.detach())
