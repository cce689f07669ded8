"""Convert a loss that calls the model into one of an output and a target.

Most losses `loss(model, batch)`, and models that compute their own loss, pass parts of the batch
to the model, and its output with another part to a loss function of torch. One pass shows which
parts, and how both are rearranged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.nested import Batch, batch_length, join_batch, tensors
from tikhon.diagnosis.functions import JUDGES, Function
from tikhon.diagnosis.modes import LOSS, Args, Located, Options, function_name
from tikhon.diagnosis.penalty import DataLoss
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.samples import Samples

REARRANGING = set(
    "view reshape flatten transpose permute movedim swapaxes contiguous __getitem__ squeeze "
    "unsqueeze unflatten T mT long float to clone pad".split()
)


Step = tuple[Function, Args, Options]
Steps = tuple[Step, ...]  # applied to a tensor in order


def rearrange(steps: Steps, value: Tensor) -> Tensor:
    """Apply the steps to a tensor."""
    for func, args, kwargs in steps:
        value = func(value, *args, **kwargs)
    return value


@dataclass(frozen=True)
class LossCall:
    """A call of a loss function, and whether the model itself made it."""

    func: Function
    args: Args
    kwargs: Options
    value: object
    by_model: bool


@dataclass(frozen=True)
class ExtractedLoss:
    """The loss function, and the steps that lead to its output and target arguments."""

    loss_call: LossCall
    output_steps: Steps
    target_steps: Steps

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a model output."""
        call, target = self.loss_call, rearrange(self.target_steps, target)
        output = rearrange(self.output_steps, output.contiguous())  # required by view
        return call.func(output, target, *call.args[2:], **call.kwargs)


class _Recorder(Located):
    """Records what is passed to the model and to loss functions, and how it is rearranged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model_inputs: list[object] = []
        self.outputs: list[object] = []
        self.loss_calls: list[LossCall] = []
        self._steps: dict[int, tuple[object, Step]] = {}
        self._kept_alive: list[object] = []  # keeps ids unique

    def enter(self, name: str, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        """Record the arguments of the model; None if both positional and keyword."""
        super().enter(name, module, args, kwargs)
        if module is self.model:
            one = args[0] if len(args) == 1 else args
            self.model_inputs.append(None if args and kwargs else kwargs or one)

    def leave(self, name: str, module: nn.Module, args: Args, output: object) -> None:
        """Record the output of the model."""
        super().leave(name, module, args, output)
        if module is self.model:
            self.outputs.append(output)

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Record rearrangements and loss functions, and return the result."""
        result = func(*args, **kwargs)
        name, first, rest = function_name(func), next(iter(args), None), args[1:]
        if name in JUDGES and rest:
            self.loss_calls.append(LossCall(func, args, kwargs, result, self.stack[-1] != LOSS))
        elif name in REARRANGING and isinstance(result, Tensor) and result is not first:
            if not tensors((rest, dict(kwargs))):
                self._steps[id(result)] = (first, (func, rest, kwargs))
                self._kept_alive.append(result)
        return result

    def path(self, tensor: object, known: list[Tensor]) -> tuple[int, Steps]:
        """Return the index of the known tensor that one was rearranged from, and the steps."""
        places = {id(t): k for k, t in enumerate(known)}
        steps: Steps = ()
        while id(tensor) not in places:
            if id(tensor) not in self._steps:
                raise LookupError
            tensor, step = self._steps[id(tensor)]
            steps = (step, *steps)
        return places[id(tensor)], steps


def extract_loss(replica: Replica, source: Samples) -> tuple[Replica, Samples]:
    """Return replica and fixed batch with a loss of outputs and targets, if a pass shows one.

    Both are unchanged if the loss has that form already, calls the model more than once, computes
    its targets, or adds terms. The model of the replica may get a hook.
    """
    if not replica.whole:
        return replica, source
    model, hooks = replica.model, len(replica.model._forward_hooks)
    try:
        with undisturbed(model, training=False), torch.no_grad(), _Recorder(model) as recorder:
            value = replica.value(source.probe)
        separated = isinstance(replica.loss, DataLoss)
        batch, loss = _extract(model, recorder, source.probe, value, separated=separated)
        found = replace(replica, loss=loss)
        with undisturbed(model, training=False), torch.no_grad():
            if torch.allclose(found.value(batch), value, rtol=1e-4):
                return found, Samples(batch, batch, batch_length(batch), True, source.batch)
    except Exception:  # the user's loss may raise anything
        pass
    while len(model._forward_hooks) > hooks:
        model._forward_hooks.popitem()
    return replica, source


def _extract(
    model: nn.Module, recorder: _Recorder, batch: Batch, value: Tensor, *, separated: bool
) -> tuple[Batch, ExtractedLoss]:
    rows, parts = batch_length(batch), tensors(join_batch(batch))
    if len(recorder.model_inputs) != 1 or len(recorder.loss_calls) != 1:
        raise LookupError
    model_inputs, loss_call = recorder.model_inputs[0], recorder.loss_calls[0]
    model_outputs = [t for t in tensors(recorder.outputs[0]) if t is not loss_call.value]
    output_index, output_steps = recorder.path(loss_call.args[0], model_outputs)
    target_index, target_steps = recorder.path(loss_call.args[1], parts)
    other_tensors = tensors((loss_call.args[2:], dict(loss_call.kwargs)))
    if any(t.ndim and len(t) == rows for t in other_tensors):  # a third part of the batch
        raise LookupError
    own = loss_call.value
    same = isinstance(own, Tensor) and own.data_ptr() == value.data_ptr()
    if not same and not separated:
        raise LookupError  # something is added to it, even if this is 0 at the start
    target = parts[target_index]
    if loss_call.by_model and isinstance(model_inputs, Mapping):
        model_inputs = {k: v for k, v in model_inputs.items() if v is not target and v is not None}
    if model_inputs is None or any(not t.ndim or len(t) != rows for t in tensors(model_inputs)):
        raise LookupError
    if not loss_call.by_model:  # targets that the model rearranges itself stay as given
        target, target_steps = _arrange_rows(target, target_steps, rows)
    output = model_outputs[output_index]
    same = rearrange(output_steps, output).shape == output.shape
    flat = same and _flattens_rows(target_steps, target, output)

    def select_output(module: nn.Module, args: Args, kwargs: Options, output: object) -> Tensor:
        found = tensors(output)[output_index]
        return found.unflatten(0, (len(tensors((args, dict(kwargs)))[0]), -1)) if flat else found

    if flat or not isinstance(recorder.outputs[0], Tensor):
        model.register_forward_hook(select_output, with_kwargs=True)
    steps = ((torch.flatten, (0, 1), {}),) if flat else output_steps
    return (model_inputs, target), ExtractedLoss(loss_call, steps, target_steps)


def _arrange_rows(target: Tensor, steps: Steps, rows: int) -> tuple[Tensor, Steps]:
    """Apply steps to the target while rows stay on the first axis; return it and the rest."""
    reached, values = 0, [target]
    for count in range(1, len(steps) + 1):
        values.append(rearrange(steps[count - 1 : count], values[-1]))
        if values[-1].ndim and len(values[-1]) == rows:
            reached = count
    return values[reached], steps[reached:]


def _flattens_rows(steps: Steps, target: Tensor, output: Tensor) -> bool:
    """Whether outputs (by the model) and targets per position are flattened row by row."""
    if target.ndim != 2 or len(output) != target.numel():
        return False
    order = torch.arange(target.numel(), device=target.device).reshape(target.shape)
    return torch.equal(rearrange(steps, order), order.flatten())
