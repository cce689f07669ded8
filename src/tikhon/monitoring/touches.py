"""Weights overwritten by something other than the optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from tikhon.monitoring.reading import fingerprint
from tikhon.monitoring.window import readable

ENOUGH = 3  # times the same values


class Touches:
    """Detects writes to one tensor of the optimizer between steps, and their values.

    Its `version` counter shows writes in every step without reading values; after a write, a
    fingerprint of two numbers is kept on its device and read with the next sampled step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        held = [p for g in optimizer.param_groups for p in g["params"]]
        fit = [p for p in held if readable(p) and p.ndim > 1]
        self.tensor = min(fit, key=Tensor.numel) if fit else None
        self.version = self.tensor._version if self.tensor is not None else 0
        self._seen: deque[tuple[int, Tensor]] = deque(maxlen=ENOUGH)

    def written(self, step: int) -> None:
        """Keep a fingerprint of the values written since the last step."""
        if step and (not self._seen or self._seen[-1][0] != step):
            self._seen.append((step, self._print()))

    def prints(self) -> list[Tensor]:
        """Return the arguments of `set_back`: fingerprints of the writes and of the present."""
        if len(self._seen) < ENOUGH:
            return []
        return [*(print_ for _, print_ in self._seen), self._print()]

    def set_back(self, prints: Sequence[float]) -> int | None:
        """Return the first step since which the same values are written, else None."""
        if not prints:
            return None
        *writes, now = zip(prints[::2], prints[1::2])
        again = all(write == writes[0] for write in writes)
        return self._seen[0][0] if again and now != writes[0] else None

    def _print(self) -> Tensor:
        assert self.tensor is not None
        return fingerprint(self.tensor.detach())
