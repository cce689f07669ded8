"""Trainable tensors outside the model: loss weights, class centres, temperatures."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, alarm
from tikhon.monitoring.history import Sample, Streak
from tikhon.monitoring.passes import receives_gradients
from tikhon.monitoring.tensor_readings import rows

MAX_MODULE_TENSORS = 2  # tensors of a module: a network with more may well be left as it is
MAX_READ = 8  # tensors that are read


@dataclass
class UnoptimizedTensor:
    """One tensor, and the sampled steps in which it had a gradient and did not move."""

    name: str
    tensor: weakref.ref[Tensor]
    streak: Streak
    norm: float | None = None


class UnoptimizedTensors:
    """Tensors outside the model that get gradients but are never moved."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[int, UnoptimizedTensor] = {}
        self._read: list[UnoptimizedTensor] = []

    def find(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
        inputs: Iterable[int] = (),
    ) -> None:
        """Search the variables of the loop for tensors that are in no optimizer.

        `inputs` of the model, by identity, have gradients where a loss has their derivatives.
        """
        optimized = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        model_parameters = {*inputs, *(id(p) for p in self._model.parameters())}
        for name, tensor in _candidates(modules, tensors):
            if id(tensor) in optimized | model_parameters:
                self._found.pop(id(tensor), None)
            elif tensor.grad is not None and receives_gradients(tensor):
                new = UnoptimizedTensor(name, weakref.ref(tensor), Streak())
                self._found.setdefault(id(tensor), new)
        for key, entry in list(self._found.items()):
            if entry.tensor() is None:  # temporary, such as an adversarial input
                del self._found[key]

    def tensors_to_read(self) -> list[Tensor]:
        """Return the norms of gradient and value of each tensor."""
        self._read, found = list(self._found.values())[:MAX_READ], []
        for entry in self._read:
            tensor = entry.tensor()
            gradient = tensor.grad if tensor is not None else None
            for part in (gradient, tensor):
                if part is None or part.layout != torch.strided:
                    found.append(torch.zeros(()))
                else:
                    found.append(rows(part.detach()).norm())
        return found

    def update(self, values: Sequence[float], sample: Sample) -> None:
        """Process the readings."""
        for entry, gradient, norm in zip(self._read, values[::2], values[1::2]):
            unmoved = entry.norm is None or norm == entry.norm
            entry.streak.add(gradient > 0 and unmoved, sample.step)
            entry.norm = norm

    def alarms(self) -> list[Alarm]:
        """Report tensors that get gradients and do not move."""
        lasting = [s for s in self._found.values() if s.streak.count >= MIN_SAMPLES + 2]
        if not lasting:
            return []
        first, names = min(s.streak.first for s in lasting), [s.name for s in lasting]
        return [alarm("missing_from_optimizer", first, key="tensors_of_the_loss", where=names)]


def _candidates(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()
    for name, module in modules.items():
        model_parameters = list(module.named_parameters())
        if len(model_parameters) <= MAX_MODULE_TENSORS:
            yield from ((f"{name}.{part}", p) for part, p in model_parameters)
