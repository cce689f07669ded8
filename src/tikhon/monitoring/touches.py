"""Weights that something else than the optimizer writes: seen in every step, read on few."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from tikhon.monitoring.reading import fingerprint
from tikhon.monitoring.window import readable

ENOUGH = 3  # times the same values


class Touches:
    """Whether one tensor of the optimizer is written between steps, and with which values.

    Its `version` as a step left it tells in every step, without a look at the numbers; what
    stands there after such a write is kept as two numbers on its device, and read with the
    sampled step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        held = [p for g in optimizer.param_groups for p in g["params"]]
        fit = [p for p in held if readable(p) and p.ndim > 1]
        self.tensor = min(fit, key=Tensor.numel) if fit else None
        self.version = self.tensor._version if self.tensor is not None else 0
        self._seen: deque[tuple[int, Tensor]] = deque(maxlen=ENOUGH)

    def written(self, step: int) -> None:
        """Something has written since the last step: keep what stands there now."""
        if step and (not self._seen or self._seen[-1][0] != step):
            self._seen.append((step, self._print()))

    def prints(self) -> list[Tensor]:
        """What `set_back` is to be told, two numbers each: the writes, and what stands now."""
        if len(self._seen) < ENOUGH:
            return []
        return [*(print_ for _, print_ in self._seen), self._print()]

    def set_back(self, prints: Sequence[float]) -> int | None:
        """The first step since which the same values are written, where steps lie in between."""
        if not prints:
            return None
        *writes, now = zip(prints[::2], prints[1::2])
        again = all(write == writes[0] for write in writes)
        return self._seen[0][0] if again and now != writes[0] else None

    def _print(self) -> Tensor:
        assert self.tensor is not None
        return fingerprint(self.tensor.detach())
