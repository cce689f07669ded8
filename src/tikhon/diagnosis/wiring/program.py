"""The program under test: a replica, a few rows of data, outputs on request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.forward import call_model
from tikhon.data.nested import Batch, batch_length, map_tensors, take_rows, tensors
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.torch_calls import CallTrace, WithoutDropout

Facts = dict[str, object]
ROWS = (13, 11, 7, 17, 5, 3)  # primes, so that the size identifies the axis of the rows


@dataclass(frozen=True)
class Program:
    """A replica with `rows` rows to test, and as many others to replace them."""

    replica: Replica
    batch: Batch
    others: Batch
    rows: int

    @property
    def model(self) -> nn.Module:
        """The copy of the user's model."""
        return self.replica.model

    def outputs(self, batch: Batch, *, seed: int = 0, dropout: bool = False) -> list[Tensor]:
        """Return the float outputs of the model in evaluation mode, without gradients.

        With `dropout`, a functional dropout drops as the program calls it.
        """
        calm = nullcontext() if dropout else WithoutDropout()
        with torch.no_grad(), undisturbed(self.model, training=False, seed=seed), calm:
            return float_tensors(self.forward(batch))

    def forward(self, batch: Batch) -> Any:
        """Return the output of the model on a batch, in the current modes."""
        if not self.replica.whole:
            return call_model(self.model, self.replica.given(batch)[0])
        found, _ = self.outputs_and_loss(batch)
        return found[-1] if found else None

    def by_row(self, values: Iterable[Tensor]) -> list[Tensor]:
        """Return the tensors that have one entry per row."""
        return [t for t in values if t.ndim and len(t) == self.rows]

    def trace_forward(self) -> CallTrace:
        """Return the calls of a forward pass in evaluation mode."""
        with torch.no_grad(), undisturbed(self.model, training=False):
            with CallTrace(self.model) as trace:
                self.forward(self.batch)
        return trace

    def outputs_and_loss(self, batch: Batch) -> tuple[list[object], Tensor]:
        """Return the outputs of all calls of the model in one pass, and the loss."""
        found: list[object] = []
        with self.model.register_forward_hook(lambda m, a, output: found.append(output)):
            return found, self.replica.value(batch)


def make_program(replica: Replica, source: Samples) -> Program:
    """Return a program with a prime number of rows if the data has twice as many."""
    total = batch_length(source.probe)
    sizes = {s for t in tensors(source.probe) for s in t.shape[1:]}
    rows = next((n for n in ROWS if 2 * n <= total and n not in sizes), max(1, total // 2))
    first, second = torch.arange(rows), torch.arange(rows, 2 * rows) % total
    return Program(replica, take_rows(source.probe, first), take_rows(source.probe, second), rows)


# of a network of fixed sequence length
FIXED_LENGTH_ERRORS = (RuntimeError, IndexError, ValueError)


def truncated(batch: Batch, size: int, to: int) -> Batch:
    """Truncate sequences of `size` steps in inputs and targets to the first `to`."""

    def cut(t: Tensor) -> Tensor:
        return t[:, :to] if t.ndim >= 2 and t.shape[1] == size else t

    return map_tensors(batch[0], cut), map_tensors(batch[1], cut)


def float_tensors(value: object) -> list[Tensor]:
    """Return the float tensors of a nested value."""
    return [t for t in tensors(value) if t.is_floating_point() and t.numel()]


def relative_change(before: list[Tensor], after: list[Tensor], index: Any = slice(None)) -> float:
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
def restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Context that restores the values of parameters at its end."""
    kept = [(p, p.detach().clone()) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


@contextmanager
def record_modules(model: nn.Module) -> Iterator[list[tuple[str, list[Tensor], list[Tensor]]]]:
    """Context that records inputs and outputs of all modules in the order of the calls."""
    seen: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def hook(name: str) -> Any:
        def leave(module: nn.Module, args: object, output: object) -> None:
            kept = [[t.detach().clone() for t in float_tensors(v)] for v in (args, output)]
            seen.append((name, kept[0], kept[1]))

        return leave

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(hook(name)))
        yield seen
