"""What can be zeroed together: single weights, output units with their norms, attention heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tikhon.compaction.analysis import Analysis, Interpreter, trace
from tikhon.compaction.rules import RULES
from tikhon.regularizer.targets import Pattern, select

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.GroupNorm)


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of a layer; `index[u]` are its positions along `dim` that belong to unit u.

    Without an index every entry is a unit of its own, and `dim` is not used.
    """

    name: str
    parameter: nn.Parameter
    dim: int = 0
    index: Tensor | None = None  # (units, positions a unit)
    scale: bool = False  # the weight of a norm: the size of a unit is read from it

    def sizes(self) -> Tensor:
        """The sum of squares of each unit, (units,)."""
        w = self.parameter.detach()
        if self.index is None:
            return w.square().reshape(-1)
        squares = w.square().movedim(self.dim, 0).reshape(w.shape[self.dim], -1).sum(1)
        return squares[self.index].sum(1)

    def mask(self, keep: Tensor) -> Tensor:
        """1 for what stays and 0 for what goes, broadcastable to the parameter."""
        w = self.parameter
        if self.index is None:
            return keep.view(w.shape).to(w.dtype)
        flags = torch.ones(w.shape[self.dim], dtype=w.dtype, device=w.device)
        flags[self.index[~keep].reshape(-1)] = 0
        shape = [1] * w.ndim
        shape[self.dim] = -1
        return flags.view(shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """Units that are alike: those of one layer, or of layers whose outputs are added."""

    name: str
    units: int
    parts: tuple[Part, ...]

    @torch.no_grad()
    def sizes(self) -> Tensor:
        """The sum of squares of each unit, (units,).

        Where a norm follows, of its weight alone: the scale of what stands before a norm is free.
        """
        scales = [part for part in self.parts if part.scale]
        return torch.stack([part.sizes().float() for part in scales or self.parts]).sum(0)

    def scores(self) -> Tensor:
        """Size over the sum of the sizes that are not smaller: comparable between layers.

        Removing the units of the smallest scores removes the smallest share of what each layer
        then still has (Lee et al. 2021).
        """
        sizes, order = self.sizes().sort()
        left = sizes.flip(0).cumsum(0).flip(0)
        return torch.empty_like(sizes).scatter_(0, order, sizes / left.clamp_min(1e-38))

    @torch.no_grad()
    def fade_(self, keep: Tensor, factor: float) -> None:
        """Multiply the units that are not kept by `factor`; 0 makes exact zeros."""
        for part in self.parts:
            mask = part.mask(keep)
            part.parameter.mul_(mask if factor == 0 else mask + (1 - mask) * factor)

    def zeros(self) -> int:
        """How many units are exactly zero."""
        return int((self.sizes() == 0).sum())


def weights(model: nn.Module, pattern: Pattern) -> list[Layer]:
    """Every weight a unit; a layer is a parameter."""
    found = select(model, pattern)
    return [
        Layer(target.name, target.params[0].numel(), (Part(target.name, target.params[0]),))
        for target in found
    ]


def channels(model: nn.Module, example: Any, pattern: Pattern) -> list[Layer]:
    """Output units of linear and convolutional layers, with their biases and norms.

    What stands or falls together (residual sums, depthwise convolutions, norms) is one unit;
    units that an output, an input or an unknown operation holds are left out.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    wanted = {name for target in select(model, pattern) for name in target.names}
    mode = model.training
    try:
        model.eval()
        with torch.no_grad():
            interpreter = Interpreter(trace(model), RULES)
            interpreter.run(*inputs)
    finally:
        model.train(mode)
    return _coupled(model, interpreter.analysis, wanted)


def _coupled(model: nn.Module, analysis: Analysis, wanted: set[str]) -> list[Layer]:
    """One layer for each set of coupled producers that may all go."""
    roots = analysis.registry.roots()
    held = {int(roots[unit]) for unit in analysis.registry.pinned}
    held |= {int(roots[unit]) for unit in analysis.registry.needed if unit >= 0}
    modules = dict(model.named_modules())
    blocks = [
        (name, roots[first:last])
        for first, last, name in analysis.origin
        if isinstance(modules.get(name), nn.Linear | nn.modules.conv._ConvNd)
    ]
    layers: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, owners in blocks:
        layers[int(owners.min())].append((name, owners))
    norms = _norms_of(model, analysis, roots)
    found = []
    for members in layers.values():
        order = members[0][1].unique().tolist()
        same = all(set(owners.tolist()) == set(order) for _, owners in members)
        free = not held & set(order)
        chosen = all(f"{name}.weight" in wanted for name, _ in members)
        if not (same and free and chosen) or any(analysis.tied & {name} for name, _ in members):
            continue
        parts = [p for name, owners in members for p in _parts(name, modules[name], owners, order)]
        scales = [
            part
            for name, owners in norms
            if set(owners.tolist()) == set(order)
            for part in _parts(name, modules[name], owners, order, scale=True)
        ]
        names = "+".join(name for name, _ in members)
        found.append(Layer(names, len(order), (*parts, *scales)))
    return found


def _norms_of(model: nn.Module, analysis: Analysis, roots: Tensor) -> list[tuple[str, Tensor]]:
    """Norms with a weight for each channel, and the unit that each channel belongs to."""
    modules = dict(model.named_modules())
    found = []
    for node, units in analysis.units.items():
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, _NORMS) or getattr(module, "weight", None) is None:
            continue
        ids = units.ids.movedim(1, 0).reshape(units.ids.shape[1], -1)[:, 0]
        if (ids >= 0).all():
            found.append((str(node.target), roots[ids]))
    return found


def _parts(
    name: str, module: nn.Module, owners: Tensor, order: Sequence[int], *, scale: bool = False
) -> list[Part]:
    """The weight and bias of a module, by output position."""
    positions = [(owners == unit).nonzero().flatten() for unit in order]
    index = torch.stack(positions)
    dim = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    parts = [Part(f"{name}.weight", module.weight, dim, index, scale)]  # type: ignore[arg-type]
    if isinstance(module.bias, nn.Parameter):
        parts.append(Part(f"{name}.bias", module.bias, 0, index))
    return parts


def heads(model: nn.Module, pattern: Pattern) -> list[Layer]:
    """The heads of `nn.MultiheadAttention`: their rows of the projections, columns of the last."""
    wanted = {name for target in select(model, pattern) for name in target.names}
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
            continue
        prefix = f"{name}." if name else ""
        if f"{prefix}in_proj_weight" not in wanted:
            continue
        size, count = module.head_dim, module.num_heads
        own = torch.arange(count * size).view(count, size)
        three = torch.cat([own + k * count * size for k in range(3)], dim=1)
        parts = [
            Part(f"{prefix}in_proj_weight", module.in_proj_weight, 0, three),
            Part(f"{prefix}out_proj.weight", cast(nn.Parameter, module.out_proj.weight), 1, own),
        ]
        if module.in_proj_bias is not None:
            parts.append(Part(f"{prefix}in_proj_bias", module.in_proj_bias, 0, three))
        found.append(Layer(name or "attention", count, tuple(parts)))
    return found
