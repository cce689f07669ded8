"""Running statistics of frozen normalisation layers, which move in train mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.history import Sample, Streak
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.laws import ENOUGH, Alarm

DRIFT = 0.3  # standard deviations, over the channels of a layer (convention)
LITTLE = 0.05  # the same, if a batch has FEW values per channel
FEW = 16  # values that give mean and standard deviation to within a quarter

Norm = nn.modules.batchnorm._NormBase


class FrozenNorms:
    """Running statistics of trained and then frozen layers."""

    def __init__(self, model: nn.Module) -> None:
        self._first: dict[str, tuple[Norm, Tensor, Tensor]] = {}
        self._streak, self._where, self._most = Streak(), "", 0.0
        self._values = math.inf  # per channel, in the last of the layers
        self._handle: RemovableHandle | None = None
        parents = {
            f"{path}.{name}".strip("."): parent
            for path, parent in model.named_modules()
            for name, _ in parent.named_children()
        }
        for name, layer in model.named_modules():
            parent = parents.get(name, layer)
            if isinstance(layer, Norm) and _frozen(layer, parent) and _trained(layer):
                mean, var = layer.running_mean, layer.running_var
                assert mean is not None
                assert var is not None
                self._first[name] = (layer, mean.clone(), var.clone())

        if self._first:
            last = list(self._first.values())[-1][0]
            self._handle = last.register_forward_pre_hook(Hook(self._count))

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def _count(self, layer: Norm, args: tuple[Any, ...]) -> None:
        if layer.training and args:
            self._values = args[0].numel() // max(1, layer.num_features)

    def numbers(self) -> list[Tensor]:
        """Return per layer the drift of its statistics in standard deviations."""
        return [_drift(*kept) for kept in self._first.values()]

    def take(self, values: Sequence[float], sample: Sample) -> None:
        """Process the readings."""
        drifts = {
            name: value
            for (name, (layer, _, _)), value in zip(self._first.items(), values)
            if layer.training and all(not p.requires_grad for p in layer.parameters())
        }
        most = max(drifts.values(), default=0.0)
        if most > self._most:
            self._most, self._where = most, max(drifts, key=drifts.__getitem__)
        self._streak.add(most > 0, sample.step)

    def alarms(self) -> list[Alarm]:
        """Report statistics that move: a warning if far, else info."""
        if self._streak.count < ENOUGH:
            return []
        few = self._values < FEW
        return [
            Alarm(
                "frozen_norms_move",
                self._streak.first,
                "the layer is frozen, but in train mode: its running statistics follow the new "
                f"batches and were {self._most:.2g} standard deviations from where they began"
                + (f"; a batch has {self._values} values of a channel" if few else ""),
                "call .eval() on the frozen part, after every model.train()",
                (self._where,),
                "warning" if self._most > (LITTLE if few else DRIFT) else "info",
            )
        ]


def _frozen(layer: Norm, parent: nn.Module) -> bool:
    own = list(layer.parameters()) or list(parent.parameters())
    return bool(own) and not any(p.requires_grad for p in own)


def _trained(layer: Norm) -> bool:
    """Whether running statistics differ from their initial values and are updated."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or not layer.track_running_stats or layer.momentum == 0:
        return False
    return bool(mean.any()) or not bool((var == 1).all())


def _drift(layer: Norm, mean: Tensor, var: Tensor) -> Tensor:
    now, spread = layer.running_mean, layer.running_var
    assert now is not None
    assert spread is not None
    scale = (var + layer.eps).to(now.device)
    shift = (now - mean.to(now.device)).square() / scale
    stretch = ((spread + layer.eps).sqrt() - scale.sqrt()).square() / scale
    return torch.maximum(shift.mean(), stretch.mean()).sqrt().float()
