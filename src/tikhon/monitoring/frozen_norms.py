"""Running statistics of frozen normalisation layers, which move in train mode."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, alarm
from tikhon.monitoring.history import Sample, Streak
from tikhon.monitoring.hooks import Hook

DRIFT = 0.3  # standard deviations, over the channels of a layer (convention)
DRIFT_OF_FEW = 0.05  # the same, if a batch has FEW values per channel
FEW_VALUES = 16  # values that give mean and standard deviation to within a quarter

Norm = nn.modules.batchnorm._NormBase


class FrozenNorms:
    """Running statistics of trained and then frozen layers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._names: set[str] = set()  # of networks beside the model
        self._layers: dict[str, tuple[Norm, Tensor, Tensor]] = {}
        self._streak, self._largest_layer, self._largest_drift = Streak(), "", 0.0
        self._values_per_channel = math.inf  # per channel, in the last of the layers
        self._handle: RemovableHandle | None = None
        self._add(model)
        if self._layers:
            last = list(self._layers.values())[-1][0]
            self._handle = last.register_forward_pre_hook(Hook(self._count))

    def find(self, modules: Mapping[str, nn.Module]) -> None:
        """Search the variables of the loop for frozen networks, such as a teacher."""
        own = {*self._model.modules()}
        for name, module in modules.items():
            if module not in own and not any(p.requires_grad for p in module.parameters()):
                self._versions.setdefault(module, _version(module))
                if self._versions[module] != _version(module):  # an average, or trained in turns
                    kept = self._layers.items()
                    self._layers = {n: v for n, v in kept if not n.startswith(f"{name}.")}
                elif name not in self._names:
                    self._names.add(name)
                    self._add(module, name)
                    own |= {*module.modules()}

    def _add(self, model: nn.Module, prefix: str = "") -> None:
        parents = {
            f"{path}.{name}".strip("."): parent
            for path, parent in model.named_modules()
            for name, _ in parent.named_children()
        }
        for name, layer in model.named_modules():
            parent = parents.get(name, layer)
            if isinstance(layer, Norm) and _frozen(layer, parent) and _has_statistics(layer):
                mean, var = layer.running_mean, layer.running_var
                assert mean is not None
                assert var is not None
                self._layers[f"{prefix}.{name}".strip(".")] = (layer, mean.clone(), var.clone())

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def _count(self, layer: Norm, args: tuple[Any, ...]) -> None:
        if layer.training and args:
            self._values_per_channel = args[0].numel() // max(1, layer.num_features)

    def tensors_to_read(self) -> list[Tensor]:
        """Return per layer the drift of its statistics in standard deviations."""
        return [_drift(*statistics) for statistics in self._layers.values()]

    def update(self, values: Sequence[float], sample: Sample) -> None:
        """Process the readings."""
        drifts = {
            name: value
            for (name, (layer, _, _)), value in zip(self._layers.items(), values)
            if layer.training and all(not p.requires_grad for p in layer.parameters())
        }
        largest = max(drifts.values(), default=0.0)
        if largest > self._largest_drift:
            self._largest_drift, self._largest_layer = largest, max(drifts, key=drifts.__getitem__)
        self._streak.add(largest > 0, sample.step)

    def alarms(self) -> list[Alarm]:
        """Report statistics that move: a warning if far, else info."""
        if self._streak.count < MIN_SAMPLES:
            return []
        is_few = self._values_per_channel < FEW_VALUES
        is_far = self._largest_drift > (DRIFT_OF_FEW if is_few else DRIFT)
        return [
            alarm(
                "frozen_norms_move",
                self._streak.first,
                where=(self._largest_layer,),
                severity="warning" if is_far else "info",
                drift=self._largest_drift,
            )
        ]


def _version(module: nn.Module) -> int:
    """A count of the writes to its weights."""
    return sum(p._version for p in module.parameters())


def _frozen(layer: Norm, parent: nn.Module) -> bool:
    parameters = list(layer.parameters()) or list(parent.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _has_statistics(layer: Norm) -> bool:
    """Whether running statistics differ from their initial values and are updated."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or not layer.track_running_stats or layer.momentum == 0:
        return False
    return bool(mean.any()) or not bool((var == 1).all())


def _drift(layer: Norm, mean: Tensor, var: Tensor) -> Tensor:
    running_mean, running_var = layer.running_mean, layer.running_var
    assert running_mean is not None
    assert running_var is not None
    scale = (var + layer.eps).to(running_mean.device)
    shift = (running_mean - mean.to(running_mean.device)).square() / scale
    stretch = ((running_var + layer.eps).sqrt() - scale.sqrt()).square() / scale
    return torch.maximum(shift.mean(), stretch.mean()).sqrt().float()
