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

from tikhon.data.rows import Batch, length, tensors, whole
from tikhon.diagnosis.functions import JUDGES, Function
from tikhon.diagnosis.modes import LOSS, Args, Located, Options, function_name
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.samples import Samples

ARRANGING = set(
    "view reshape flatten transpose permute movedim swapaxes contiguous __getitem__ squeeze "
    "unsqueeze unflatten T mT long float to clone pad".split()
)


Step = tuple[Function, Args, Options]
Steps = tuple[Step, ...]  # applied to a tensor in order


def walk(steps: Steps, value: Tensor) -> Tensor:
    """Apply the steps to a tensor."""
    for func, args, kwargs in steps:
        value = func(value, *args, **kwargs)
    return value


@dataclass(frozen=True)
class Judged:
    """A call of a loss function, and whether the model itself made it."""

    func: Function
    args: Args
    kwargs: Options
    value: object
    inside: bool


@dataclass(frozen=True)
class Lifted:
    """The loss function, and the steps that lead to its output and target arguments."""

    judged: Judged
    answer: Steps
    goal: Steps

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a model output."""
        known, goal = self.judged, walk(self.goal, target)
        answer = walk(self.answer, output.contiguous())  # required by view
        return known.func(answer, goal, *known.args[2:], **known.kwargs)


class _Followed(Located):
    """Records what is passed to the model and to loss functions, and how it is rearranged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.given: list[object] = []
        self.outputs: list[object] = []
        self.judged: list[Judged] = []
        self._made: dict[int, tuple[object, Step]] = {}
        self._alive: list[object] = []  # keeps ids unique

    def enter(self, name: str, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        """Record the arguments of the model; None if both positional and keyword."""
        super().enter(name, module, args, kwargs)
        if module is self.model:
            one = args[0] if len(args) == 1 else args
            self.given.append(None if args and kwargs else kwargs or one)

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
            self.judged.append(Judged(func, args, kwargs, result, self.stack[-1] != LOSS))
        elif name in ARRANGING and isinstance(result, Tensor) and result is not first:
            if not tensors((rest, dict(kwargs))):
                self._made[id(result)] = (first, (func, rest, kwargs))
                self._alive.append(result)
        return result

    def path(self, tensor: object, known: list[Tensor]) -> tuple[int, Steps]:
        """Return the index of the known tensor that one was rearranged from, and the steps."""
        places = {id(t): k for k, t in enumerate(known)}
        steps: Steps = ()
        while id(tensor) not in places:
            if id(tensor) not in self._made:
                raise LookupError
            tensor, step = self._made[id(tensor)]
            steps = (step, *steps)
        return places[id(tensor)], steps


def lifted(replica: Replica, source: Samples) -> tuple[Replica, Samples]:
    """Return replica and fixed batch with a loss of outputs and targets, if a pass shows one.

    Both are unchanged if the loss has that form already, calls the model more than once, computes
    its targets, or adds terms. The model of the replica may get a hook.
    """
    if not replica.whole:
        return replica, source
    model, hooks = replica.model, len(replica.model._forward_hooks)
    try:
        with undisturbed(model, training=False), torch.no_grad(), _Followed(model) as seen:
            value = replica.value(source.probe)
        batch, loss = _lift(model, seen, source.probe, value)
        found = replace(replica, loss=loss)
        with undisturbed(model, training=False), torch.no_grad():
            if torch.allclose(found.value(batch), value, rtol=1e-4):
                return found, Samples(batch, batch, length(batch), True, source.batch)
    except Exception:  # the user's loss may raise anything
        pass
    while len(model._forward_hooks) > hooks:
        model._forward_hooks.popitem()
    return replica, source


def _lift(model: nn.Module, seen: _Followed, batch: Batch, value: Tensor) -> tuple[Batch, Lifted]:
    rows, parts = length(batch), tensors(whole(batch))
    if len(seen.given) != 1 or len(seen.judged) != 1:
        raise LookupError
    given, judged = seen.given[0], seen.judged[0]
    answers = [t for t in tensors(seen.outputs[0]) if t is not judged.value]
    place, answer = seen.path(judged.args[0], answers)
    which, goal = seen.path(judged.args[1], parts)
    beside = tensors((judged.args[2:], dict(judged.kwargs)))
    if any(t.ndim and len(t) == rows for t in beside):  # a third part of the batch
        raise LookupError
    judgement = judged.value
    if not isinstance(judgement, Tensor) or judgement.data_ptr() != value.data_ptr():
        raise LookupError  # something is added to it, even if this is 0 at the start
    target = parts[which]
    if judged.inside and isinstance(given, Mapping):
        given = {k: v for k, v in given.items() if v is not target and v is not None}
    if given is None or any(not t.ndim or len(t) != rows for t in tensors(given)):
        raise LookupError
    if not judged.inside:  # targets that the model rearranges itself stay as given
        target, goal = _in_rows(target, goal, rows)
    same = walk(answer, answers[place]).shape == answers[place].shape
    flat = same and _row_by_row(goal, target, answers[place])

    def plain(module: nn.Module, args: Args, kwargs: Options, output: object) -> Tensor:
        found = tensors(output)[place]
        return found.unflatten(0, (len(tensors((args, dict(kwargs)))[0]), -1)) if flat else found

    if flat or not isinstance(seen.outputs[0], Tensor):
        model.register_forward_hook(plain, with_kwargs=True)
    steps = ((torch.flatten, (0, 1), {}),) if flat else answer
    return (given, target), Lifted(judged, steps, goal)


def _in_rows(target: Tensor, steps: Steps, rows: int) -> tuple[Tensor, Steps]:
    """Apply steps to the target while rows stay on the first axis; return it and the rest."""
    reached, values = 0, [target]
    for count in range(1, len(steps) + 1):
        values.append(walk(steps[count - 1 : count], values[-1]))
        if values[-1].ndim and len(values[-1]) == rows:
            reached = count
    return values[reached], steps[reached:]


def _row_by_row(steps: Steps, target: Tensor, answer: Tensor) -> bool:
    """Whether outputs (by the model) and targets per position are flattened row by row."""
    if target.ndim != 2 or len(answer) != target.numel():
        return False
    order = torch.arange(target.numel(), device=target.device).reshape(target.shape)
    return torch.equal(walk(steps, order), order.flatten())
