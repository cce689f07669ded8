"""The program under test: a replica, a few rows of data, outputs on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.rows import Batch, call, each, length, take, tensors
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.samples import Samples

ROWS = (13, 11, 7, 17, 5, 3)  # primes, so that the size identifies the axis of the rows


@dataclass(frozen=True)
class Subject:
    """A replica with `rows` rows to test, and as many others to replace them."""

    replica: Replica
    batch: Batch
    others: Batch
    rows: int

    @property
    def model(self) -> nn.Module:
        """The copy of the user's model."""
        return self.replica.model

    def outputs(self, batch: Batch, *, seed: int = 0) -> list[Tensor]:
        """Return the float outputs of the model in evaluation mode, without gradients."""
        with torch.no_grad(), undisturbed(self.model, training=False, seed=seed):
            return floats(self.answer(batch))

    def answer(self, batch: Batch) -> Any:
        """Return the output of the model on a batch, in the current modes."""
        if not self.replica.whole:
            return call(self.model, batch[0])
        found, _ = self.outputs_and_loss(batch)
        return found[-1] if found else None

    def outputs_and_loss(self, batch: Batch) -> tuple[list[object], Tensor]:
        """Return the outputs of all calls of the model in one pass, and the loss."""
        found: list[object] = []
        handle = self.model.register_forward_hook(lambda m, a, output: found.append(output))
        try:
            return found, self.replica.value(batch)
        finally:
            handle.remove()


def subject_of(replica: Replica, source: Samples) -> Subject:
    """Return a subject with a prime number of rows if the data has twice as many."""
    total = length(source.probe)
    sizes = {s for t in tensors(source.probe) for s in t.shape[1:]}
    rows = next((n for n in ROWS if 2 * n <= total and n not in sizes), max(1, total // 2))
    first, second = torch.arange(rows), torch.arange(rows, 2 * rows) % total
    return Subject(replica, take(source.probe, first), take(source.probe, second), rows)


ONE_LENGTH = (RuntimeError, IndexError, ValueError)  # of a network of fixed sequence length


def shortened(batch: Batch, size: int, to: int) -> Batch:
    """Truncate sequences of `size` steps in inputs and targets to the first `to`."""

    def cut(t: Tensor) -> Tensor:
        return t[:, :to] if t.ndim >= 2 and t.shape[1] == size else t

    return each(batch[0], cut), each(batch[1], cut)


def floats(value: object) -> list[Tensor]:
    """Return the float tensors of a nested value."""
    return [t for t in tensors(value) if t.is_floating_point() and t.numel()]


def difference(before: list[Tensor], after: list[Tensor], index: Any) -> float:
    """Return the largest rms change of an indexed part / rms of the whole; 0 for no match."""
    worst = 0.0
    for a, b in zip(before, after):
        if a.shape != b.shape or a.ndim == 0:
            continue
        size = float(a.double().square().mean().sqrt())
        part = a[index].double() - b[index].double()
        if size > 0 and part.numel():
            worst = max(worst, float(part.square().mean().sqrt()) / size)
    return worst


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[str, list[Tensor], list[Tensor]]]]:
    """Context that records inputs and outputs of all modules in the order of the calls."""
    seen: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def hook(name: str) -> Any:
        def leave(module: nn.Module, args: object, output: object) -> None:
            kept = [[t.detach().clone() for t in floats(v)] for v in (args, output)]
            seen.append((name, kept[0], kept[1]))

        return leave

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
