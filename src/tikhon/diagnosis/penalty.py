"""Separate a penalty on the weights, written into the loss, from the loss on the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.copying import copy_with_model
from tikhon.data.forward import LossFunction, call_model, call_with_gradients, loss_takes_model
from tikhon.data.nested import Batch, batch_length, join_batch, map_tensors, split_batch, take_rows
from tikhon.diagnosis.replica import scalar_loss, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.wrappers import modes_restored, unwrap

FEW = 16  # rows on which a penalty is measured
SAME = 1e-4  # relative difference of a penalty on two batches
SHOWN = 1e-5  # a penalty relative to the loss
DEGREES = (0.9, 2.1)  # of homogeneity: 1 for L1 and group lasso, 2 for L2, in between for a sum

Weights = Callable[[Tensor], Tensor]


@contextmanager
def lent(model: nn.Module, values: Mapping[str, Tensor], *, graded: bool) -> Iterator[None]:
    """Let the parameters of a model have the values of others, given by name, for a while."""
    own = {p: (p.data, p.requires_grad) for p in model.parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = values.get(name, parameter).detach()
            parameter.requires_grad_(parameter.requires_grad and graded)
        yield
    finally:
        for parameter, (data, required) in own.items():
            parameter.data = data
            parameter.requires_grad_(required)


def _parameters(model: nn.Module) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    return [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


@contextmanager
def weights_outside_forward(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let code outside the forward passes of `model` and its modules read `weights(parameter)`."""
    real = _parameters(model)
    other = {id(p): weights(p.detach()) for _, _, p in real}
    running = 0

    def put(shown: bool) -> None:
        for own, name, parameter in real:
            own[name] = parameter if shown else other[id(parameter)]

    def enter(module: nn.Module, args: object) -> None:
        nonlocal running
        running += 1
        if running == 1:
            put(True)

    def leave(module: nn.Module, args: object, output: object) -> None:
        nonlocal running
        running -= 1
        if not running:
            put(False)

    modules = list(model.modules())
    handles = [m.register_forward_pre_hook(enter, prepend=True) for m in modules]
    handles += [m.register_forward_hook(leave, always_call=True) for m in modules]
    try:
        put(False)
        yield
    finally:
        put(True)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Program:
    """The user's loss, with other weights in what it reads of them outside the forward pass."""

    loss: LossFunction
    user: nn.Module  # the model that a loss(output, target) refers to

    @property
    def whole(self) -> bool:
        """Whether the loss calls the model."""
        return loss_takes_model(self.loss)

    def run(self, model: nn.Module, batch: Batch, weights: Weights | None = None) -> Tensor:
        """Return the loss of `model` on a batch; the penalty is that of `weights(parameter)`."""
        if not self.whole:
            with torch.no_grad():
                output = call_model(model, batch[0])
            return self.judge(model, output, batch[1], weights)
        replaced = nullcontext() if weights is None else weights_outside_forward(model, weights)
        with replaced:
            return scalar_loss(call_with_gradients(lambda: self.loss(model, join_batch(batch))))

    def judge(
        self, model: nn.Module, output: Any, target: Any, weights: Weights | None = None
    ) -> Tensor:
        """Return the loss(output, target), in which the user's model has the weights of `model`.

        Its gradient reaches `model`, although the loss refers to the parameters of the user's.
        """
        values: dict[str, Tensor] = dict(model.named_parameters())
        if weights is not None:
            values = {name: weights(p.detach()) for name, p in values.items()}
        with lent(self.user, values, graded=weights is None):
            loss = scalar_loss(self.loss(output, target))
            if weights is not None or not loss.requires_grad:
                return loss
            own = {name: p for name, p in self.user.named_parameters() if name in values}
            slopes = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        found = [(values[name], slope) for name, slope in zip(own, slopes) if slope is not None]
        return sum(((p - p.detach()) * slope).sum() for p, slope in found) + loss.detach()


class _Loss:
    """A loss made from the user's, under the name of it."""

    def __init__(self, program: _Program) -> None:
        self.program = program
        self.__name__ = getattr(program.loss, "__name__", type(program.loss).__name__)


class DataLoss(_Loss):
    """A loss(model, batch) without its penalty on the weights."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of `model` on the data."""
        with weights_outside_forward(model, torch.zeros_like):
            return self.program.loss(model, batch)


class DataLossOfOutputs(_Loss):
    """A loss(output, target) without its penalty on the weights."""

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the loss of an output on the data."""
        return self.program.judge(self.program.user, output, target, torch.zeros_like)


class ReboundLoss(_Loss):
    """A loss(model, batch) from a loss(output, target) that reads the weights of one model."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of `model`, as if the loss read its weights."""
        inputs, target = split_batch(batch)
        output = call_model(model, inputs)
        fixed = map_tensors(output, Tensor.detach)
        weights = self.program.judge(model, fixed, target)
        return self.program.judge(model, output, target, Tensor.clone) + weights - weights.detach()


def separate_penalty(
    model: nn.Module, loss: LossFunction, penalty: Any, source: Samples
) -> tuple[LossFunction, Any]:
    """Return the loss on the data, and `penalty` with what the loss adds for the weights alone.

    A loss(output, target) may read the weights of the user's model (`sum(p.abs().sum() for p in
    model.parameters())`), where a diagnosis trains a copy. What is added must be the same on two
    batches, also for other weights, and grow with the weights like a sum of norms; otherwise the
    loss stays whole, and reads the weights of the copy.
    """
    program, size = _Program(loss, unwrap(model)), min(FEW, batch_length(source.probe)) // 2
    if not size or not callable(penalty or loss) or _is_torchs(loss):
        return loss, penalty
    halves = [take_rows(source.probe, torch.arange(k * size, (k + 1) * size)) for k in range(2)]
    with suppress(Exception):  # the user's loss may raise anything
        twin = copy_with_model(program.user, program.user)
        if not program.whole and not _reads_weights(program, twin, halves[0]):
            return loss, penalty
        if _adds_penalty(program, twin, halves):
            data = DataLoss(program) if program.whole else DataLossOfOutputs(program)
            return data, _added(program, halves[0], penalty)
        if not program.whole:
            return ReboundLoss(program), penalty
    return loss, penalty


def _is_torchs(loss: LossFunction) -> bool:
    """Whether a loss comes with torch, and reads no weights."""
    owner = type(loss) if isinstance(loss, nn.Module) else loss
    return (getattr(owner, "__module__", None) or "").startswith("torch.")


def _added(
    program: _Program, batch: Batch, given: Callable[[nn.Module], Any] | None
) -> Callable[[nn.Module], Tensor]:
    """Return the penalty of the loss as a function of the model, and the given one added."""

    def penalty(model: nn.Module) -> Tensor:
        with modes_restored(model):
            model.eval()
            total = program.run(model, batch)
            found = total - program.run(model, batch, torch.zeros_like)
        return found if given is None else found + given(model)

    return penalty


def _reads_weights(program: _Program, model: nn.Module, batch: Batch) -> bool:
    with undisturbed(model, training=False):
        with torch.no_grad():
            output = call_model(model, batch[0])
        return program.judge(model, output, batch[1]).requires_grad


@torch.no_grad()
def _adds_penalty(program: _Program, model: nn.Module, batches: list[Batch]) -> bool:
    """Whether the loss adds a sum of norms of the weights to a loss on the data."""

    def added(batch: Batch, scale: float = 1.0) -> float:
        with undisturbed(model, training=False):
            data = float(program.run(model, batch, torch.zeros_like))
        with undisturbed(model, training=False):
            total = float(program.run(model, batch, lambda p: scale * p))
        shown = abs(total - data) > SHOWN * abs(total)
        return total - data if shown else 0.0

    for _ in range(2):
        first, second = (added(batch) for batch in batches)
        if not math.isclose(first, second, rel_tol=SAME) or not math.isfinite(first):
            return False
        for parameter in model.parameters():  # what is zero at the start may depend on the batch
            size = float(parameter.square().mean().sqrt()) + 0.1
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * size)
    sizes = [added(batches[0], scale) for scale in (0.5, 1.0, 2.0)]
    if min(sizes) <= 0:
        return False
    degrees = [math.log2(after / before) for before, after in pairwise(sizes)]
    return all(DEGREES[0] <= degree <= DEGREES[1] for degree in degrees)
