"""Networks that should follow the model: target networks, teachers, weight averages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.data.nested import tensors
from tikhon.monitoring.history import Sample
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.laws import ENOUGH, Alarm
from tikhon.monitoring.reading import fingerprint, lengths, norms, rows

MANY = 4  # followers that are read
LONG = 100  # steps after which a follower that never moved counts as forgotten
CLOSE = 0.1  # distance to the model / its last update: an average of few steps is farther
FAR = 0.01  # relative distance from the model
# parts of names of networks that are fixed on purpose, and of followers
FIXED = "teacher ref old prev frozen pretrain initial base anchor start".split()
MEANT = "target ema momentum average avg slow shadow swa".split()


@dataclass
class Follower:
    """One network with the model's parameter shapes, and its readings in sampled steps."""

    name: str
    module: nn.Module
    leader: nn.Module  # the model, or its part with these shapes
    first: Tensor  # norms of its tensors when it was found
    copied: bool = False  # it was equal to the model then
    free: bool = False  # all its tensors require a gradient
    calls: int = 0  # since the last reading began
    beside: Tensor | None = None  # fingerprint of its last inputs
    size: int = 0  # rows of its last inputs
    same: bool = False  # called with the inputs of the model: a reference, or a fixed teacher
    called: int = 0  # successive sampled steps that called it with other inputs than the model
    ever: int = 0  # all calls
    close: int = 0  # successive sampled steps that found it close to the model
    moved: bool = False
    distance: float = 0.0  # to the model, relative to its size
    since: int = 0


class Followers:
    """Finds followers, records their calls, and measures their distance to the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[int, Follower] = {}
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        self._listening = False
        self._numbers: list[Tensor] = []

    def find(self, modules: Mapping[str, nn.Module], optimizers: Iterable[Optimizer]) -> None:
        """Search the variables of the loop and the parts of the model."""
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        inside = [(n, m) for n, m in self._model.named_modules() if n]
        trained = [
            (shapes, m)
            for n, m in (("", self._model), *inside)
            if n.count(".") < 2 and len(shapes := _shapes(m)) > 1 and _holds(m, held)
        ]
        own = {m for _, m in inside} | {self._model}
        beside = [(n, m) for n, m in modules.items() if m not in own]
        for name, module in [*beside, *((n, m) for n, m in inside if n.count(".") < 2)]:
            if module in self._seen or len(self._known) >= MANY:
                continue
            self._seen.add(module)
            shapes = _shapes(module)
            leader = next((m for s, m in trained if s == shapes), None)
            if (
                leader is None
                or leader is module
                or any(id(p) in held for p in module.parameters())
            ):
                continue
            self._add(name, module, leader)

    def _add(self, name: str, module: nn.Module, leader: nn.Module) -> None:
        follower = Follower(name, module, leader, _norms(module))
        follower.copied = torch.equal(follower.first, _norms(leader))
        follower.free = all(p.requires_grad for p in module.parameters())
        self._known[id(module)] = follower

        def called(module: nn.Module, args: object, kwargs: object) -> None:
            follower.calls += 1
            follower.ever += 1
            if not self._listening:
                return
            inputs = [t for t in tensors([args, kwargs]) if t.numel()]
            if inputs and not torch.compiler.is_compiling():
                follower.beside = fingerprint([args, kwargs])
                follower.size = len(inputs[0]) if inputs[0].ndim else 1

        handle = module.register_forward_pre_hook(Hook(called), with_kwargs=True)
        self._handles.append(handle)

    def listen(self) -> None:
        """Begin a sampled step."""
        self._listening = True
        for follower in self._known.values():
            follower.calls, follower.beside = 0, None

    def numbers(self) -> list[Tensor]:
        """Return the results of `measure`, five numbers per follower."""
        return self._numbers

    def measure(self) -> None:
        """Measure inputs, distance to the model and change, just before the step."""
        self._numbers = found = list[Tensor]()
        for f in self._known.values():
            mine, other = list(f.module.parameters()), list(f.leader.parameters())
            gaps = [rows(a.detach()) - rows(b.detach()) for a, b in zip(mine, other)]
            now = _norms(f.module)
            none = torch.full((2,), torch.nan, device=now.device)
            seen = f.beside.to(now.device) if f.beside is not None else none
            gap = torch.stack(lengths(gaps)).norm()
            size = _norms(f.leader).norm()
            changed = (now != f.first).any().float()
            found += [seen[0], seen[1], gap, size, changed]

    def take(self, values: Sequence[float], sample: Sample) -> None:
        """Process the readings of a sampled step."""
        self._listening = False
        for f, k in zip(self._known.values(), range(0, len(values), 5)):
            first, second, gap, size, changed = values[k : k + 5]
            known = (first, second) in sample.prints  # a batch of the model's own
            f.same = f.same or (f.calls > 0 and known)
            apart = f.calls > 0 and not known
            f.called = f.called + 1 if apart else 0
            f.moved = f.moved or changed > 0
            f.distance = gap / size if size else 0.0
            alike = apart and f.calls == sample.forwards and f.size == sample.rows
            close = alike and sample.move > 0 and gap <= CLOSE * sample.move
            f.since = f.since if f.close and close else sample.step
            f.close = f.close + 1 if close else 0

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def alarms(self, steps: int, *, ended: bool) -> list[Alarm]:
        """Those that stay where they were, and those that keep nothing back."""
        return list(self._broken(steps, ended))

    def _broken(self, steps: int, ended: bool) -> Iterator[Alarm]:
        for f in self._known.values():
            if ended and steps >= LONG and not f.moved and f.distance > FAR and _forgotten(f):
                yield Alarm(
                    "target_never_updated",
                    0,
                    f"it has the weights that it began with after {steps} steps, while the model "
                    f"has moved {f.distance:.0%} of its size away",
                    "copy the model's weights into it every so many steps, or a small part of "
                    "them in every step",
                    (f.name,),
                    "info" if any(word in f.name.lower() for word in FIXED) else "warning",
                )
            elif f.close > ENOUGH + 2:
                yield Alarm(
                    "target_always_copied",
                    f.since,
                    "it has the model's own weights in every step, so that the model chases "
                    "itself",
                    "copy the weights every so many steps, or move it by a small part (tau, "
                    "1 - decay) of the difference",
                    (f.name,),
                )


def _forgotten(f: Follower) -> bool:
    """Whether such a network was meant to move: a teacher or a reference sees the same inputs."""
    if f.called > ENOUGH + 2:
        return f.copied or f.free
    named = any(word in f.name.lower() for word in MEANT)
    return named and f.copied and f.ever > 0 and not f.same


def _shapes(module: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(p.shape for p in module.parameters())


def _holds(module: nn.Module, held: set[int]) -> bool:
    return any(id(p) in held for p in module.parameters())


def _norms(module: nn.Module) -> Tensor:
    return torch.stack(norms([p.detach() for p in module.parameters()]))
