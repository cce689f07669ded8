"""A loss that calls the model, seen as one of an answer and a target.

Most losses `loss(model, batch)` hand parts of the batch to the model, and its answer and another
part to a loss function of torch; so do models that compute their loss themselves. A pass shows
which parts, and what is done to both on their way.
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
Steps = tuple[Step, ...]  # what is done to a tensor, one by one


def walk(steps: Steps, value: Tensor) -> Tensor:
    """A tensor at the end of the steps."""
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
    """The loss function that judges, and the steps to its answer and its target."""

    judged: Judged
    answer: Steps
    goal: Steps

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of an answer as the model gives it."""
        known, goal = self.judged, walk(self.goal, target)
        answer = walk(self.answer, output.contiguous())  # views are for those alone
        return known.func(answer, goal, *known.args[2:], **known.kwargs)


class _Followed(Located):
    """What a loss hands to the model and to a function that judges, and how it is rearranged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.given: list[object] = []
        self.outputs: list[object] = []
        self.judged: list[Judged] = []
        self._made: dict[int, tuple[object, Step]] = {}
        self._alive: list[object] = []  # an id is a name as long as what it names lives

    def enter(self, name: str, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        """Keep what the model is called with; None where it has arguments of both kinds."""
        super().enter(name, module, args, kwargs)
        if module is self.model:
            one = args[0] if len(args) == 1 else args
            self.given.append(None if args and kwargs else kwargs or one)

    def leave(self, name: str, module: nn.Module, args: Args, output: object) -> None:
        """Keep what the model answers."""
        super().leave(name, module, args, output)
        if module is self.model:
            self.outputs.append(output)

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Keep what rearranges and what judges, and answer as the function does."""
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
        """Of which of the tensors that are known one was made, by rearranging alone, and how."""
        places = {id(t): k for k, t in enumerate(known)}
        steps: Steps = ()
        while id(tensor) not in places:
            if id(tensor) not in self._made:
                raise LookupError
            tensor, step = self._made[id(tensor)]
            steps = (step, *steps)
        return places[id(tensor)], steps


def lifted(replica: Replica, source: Samples) -> tuple[Replica, Samples]:
    """The replica and the fixed batch with a loss of answers and targets, where a pass shows one.

    Both are as before where the loss is of that form already, calls the model more than once,
    makes its targets up, or adds something. The model of the replica may get a hook.
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
    except Exception:  # of the user's loss, which may do anything
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
    if not judged.inside:  # what a model moves by itself is the user's target as it was given
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
    """The target as far along its steps as it has its rows on the first axis, and what is left."""
    reached, values = 0, [target]
    for count in range(1, len(steps) + 1):
        values.append(walk(steps[count - 1 : count], values[-1]))
        if values[-1].ndim and len(values[-1]) == rows:
            reached = count
    return values[reached], steps[reached:]


def _row_by_row(steps: Steps, target: Tensor, answer: Tensor) -> bool:
    """Whether answer and target of positions are flattened row by row, the first by the model."""
    if target.ndim != 2 or len(answer) != target.numel():
        return False
    order = torch.arange(target.numel(), device=target.device).reshape(target.shape)
    return torch.equal(walk(steps, order), order.flatten())
