"""Trainable tensors beside the model: loss weights, class centres, temperatures."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.monitoring.history import Sample, Streak
from tikhon.monitoring.laws import ENOUGH, Alarm
from tikhon.monitoring.reading import rows
from tikhon.monitoring.window import readable

FEW = 2  # tensors of a module: a network with more may well be left as it is
MANY = 8  # tensors that are read


@dataclass
class Stray:
    """One tensor, and the sampled steps in which it had a gradient and did not move."""

    name: str
    tensor: weakref.ref[Tensor]
    streak: Streak
    norm: float | None = None


class Strays:
    """Tensors beside the model that get gradients but are never moved."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[int, Stray] = {}
        self._read: list[Stray] = []

    def find(
        self,
        modules: Mapping[str, nn.Module],
        leaves: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
    ) -> None:
        """Search the variables of the loop for tensors that are in no optimizer."""
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        own = {id(p) for p in self._model.parameters()}
        for name, tensor in _candidates(modules, leaves):
            if id(tensor) in held | own:
                self._known.pop(id(tensor), None)
            elif id(tensor) not in self._known and tensor.grad is not None and readable(tensor):
                self._known[id(tensor)] = Stray(name, weakref.ref(tensor), Streak())
        for key, stray in list(self._known.items()):
            if stray.tensor() is None:  # temporary, such as an adversarial input
                del self._known[key]

    def numbers(self) -> list[Tensor]:
        """Return the norms of gradient and value of each tensor."""
        self._read, found = list(self._known.values())[:MANY], []
        for stray in self._read:
            tensor = stray.tensor()
            gradient = tensor.grad if tensor is not None else None
            for part in (gradient, tensor):
                if part is None or part.layout != torch.strided:
                    found.append(torch.zeros(()))
                else:
                    found.append(rows(part.detach()).norm())
        return found

    def take(self, values: Sequence[float], sample: Sample) -> None:
        """Process the readings."""
        for stray, gradient, norm in zip(self._read, values[::2], values[1::2]):
            unmoved = stray.norm is None or norm == stray.norm
            stray.streak.add(gradient > 0 and unmoved, sample.step)
            stray.norm = norm

    def alarms(self) -> list[Alarm]:
        """Report tensors that get gradients and do not move."""
        lasting = [s for s in self._known.values() if s.streak.count >= ENOUGH + 2]
        if not lasting:
            return []
        return [
            Alarm(
                "missing_from_optimizer",
                min(s.streak.first for s in lasting),
                "the loss has trained tensors of its own, which get gradients but are in no "
                "optimizer and never move",
                "give them to the optimizer: [*model.parameters(), *criterion.parameters()]",
                tuple(s.name for s in lasting),
            )
        ]


def _candidates(
    modules: Mapping[str, nn.Module], leaves: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    yield from leaves.items()
    for name, module in modules.items():
        own = list(module.named_parameters())
        if len(own) <= FEW:
            yield from ((f"{name}.{part}", p) for part, p in own)
