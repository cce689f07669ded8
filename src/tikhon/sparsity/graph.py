"""Units of a traced model for `sparsify`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from tikhon.compaction.analysis import Analysis, Interpreter
from tikhon.compaction.convolution import is_depthwise
from tikhon.compaction.modules import InputsFirst
from tikhon.compaction.tracing import interpreter_of
from tikhon.compaction.transformer_layers import with_traceable_layers
from tikhon.sparsity.allocation import CostFunction, Counts
from tikhon.sparsity.units import Layer
from tikhon.wrappers import modes_restored

_LINEAR = (nn.Linear, InputsFirst)
_WEIGHTED = (*_LINEAR, nn.modules.conv._ConvNd)
_LAST = (nn.LayerNorm, nn.RMSNorm)  # normalise the last axis, over all its units
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # batch, instance and group norms


@dataclass(frozen=True, eq=False)
class Block:
    """A module or parameter, and the unit of each of its output (or input) positions."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    owners: Tensor  # (positions,)
    dim: int = 0  # of the weight, indexed by position
    own: bool = False  # a parameter that is not a module's weight
    shared: Tensor | None = None  # owners of the weight, where groups share its positions

    @property
    def weight_name(self) -> str:
        """Name of the parameter."""
        return self.name if self.own else f"{self.name}.weight"


@dataclass(frozen=True, eq=False)
class Graph:
    """Analysis of a model on one batch, where coupled units share an index."""

    model: nn.Module
    analysis: Analysis
    roots: Tensor

    @classmethod
    def of(cls, model: nn.Module, example: object) -> Graph:
        """Trace the model in evaluation mode, and restore its mode."""
        inputs = example if isinstance(example, tuple) else (example,)
        with modes_restored(model), torch.no_grad():
            model.eval()
            interpreter = interpreter_of(with_traceable_layers(model), inputs)
            _run(interpreter, inputs)
        analysis = interpreter.analysis
        for node in analysis.units:
            if node.op == "call_module" and node not in analysis.refused:
                _couple(node, analysis.graph.get_submodule(str(node.target)), analysis)
        return cls(model, analysis, analysis.registry.roots())

    # -- who makes which units ----------------------------------------------------------------

    def coupled(self) -> list[list[Block]]:
        """Return groups of linear and convolutional layers with the same output units."""
        found: dict[int, list[Block]] = defaultdict(list)
        for name, owners in self._origins():
            module = self._modules.get(name)
            if isinstance(module, _WEIGHTED) and name not in self.analysis.tied:
                found[int(owners.min())].append(_block(name, module, owners))
        return list(found.values())

    def is_removable(self, order: Sequence[int]) -> bool:
        """Return whether the units may be removed: not held by an output or unsupported operation.

        Embeddings, recurrent layers and attention outputs hold their units.
        """
        return self._pinned_units.isdisjoint(order)

    @cached_property
    def _pinned_units(self) -> set[int]:
        registry = self.analysis.registry
        held = {int(self.roots[unit]) for unit in registry.pinned}
        held |= {int(self.roots[unit]) for unit in registry.needed if unit >= 0}
        buffers = dict(self.model.named_buffers())
        for name, owners in self._origins():
            module = self._modules.get(name)
            loose = isinstance(module, _WEIGHTED) and name not in self.analysis.tied
            if not loose and name not in self._parameters and name not in buffers:
                held |= set(owners.tolist())
        return held

    @cached_property
    def channelwise(self) -> list[tuple[Block, bool]]:
        """Return norms and depthwise convolutions, with whether they rescale their input.

        A unit with zero scale and shift in a LayerNorm is zero after it.
        """
        found = []
        for node, units in self.analysis.units.items():
            module = self._called(node)
            deep = isinstance(module, _WEIGHTED[-1]) and is_depthwise(module)
            norm = isinstance(module, _NORMS) and module.weight is not None
            last = isinstance(module, _LAST) and module.weight is not None
            if units is None or not (deep or norm or last):
                continue
            axis = -1 if last else 1
            ids = units.ids.movedim(axis, 0).reshape(units.ids.shape[axis], -1)[:, 0]
            if (ids >= 0).all():
                found.append((_block(str(node.target), module, self.roots[ids]), norm))
        return found

    def parameters(self, order: Sequence[int]) -> Iterator[Block]:
        """Yield the model's own parameters that are added to, or multiply, these units."""
        for name, owners in self._origins():
            if name in self._parameters and set(owners.tolist()) == set(order):
                param = self._parameters[name]
                wide = [axis for axis, size in enumerate(param.shape) if size > 1]
                yield Block(name, param, None, owners, wide[-1], own=True)

    def units_of(self, targets: set[object]) -> set[int]:
        """Return the output units of these operations."""
        found: set[int] = set()
        for node, units in self.analysis.units.items():
            if node.op != "call_module" and node.target in targets and units is not None:
                found |= set(self.roots[units.ids[units.ids >= 0]].tolist())
        return found

    def why_refused(self, name: str) -> str:
        """Return why `compact` leaves this module as it is, "" if it does not."""
        found = self.analysis.refused.items()
        return next((why for node, why in found if node.target == name), "")

    # -- who reads the input ------------------------------------------------------------------

    def inputs(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names of inputs with two or more dimensions, and their units."""
        for node, units in self.analysis.units.items():
            if node.op == "placeholder" and units is not None and units.ids.ndim > 1:
                yield str(node.target), self.roots[units.ids.unique()].unique()

    def readers(self, inputs: Tensor) -> Iterator[Block]:
        """Yield linear and convolutional layers that read any of these units."""
        for node, owners in self._weighted_calls():
            module = self._called(node)
            grouped = getattr(module, "groups", 1) != 1
            linear, name = isinstance(module, _LINEAR), str(node.target)
            if grouped or (_is_transposed(module) and not linear) or name in self.analysis.tied:
                continue
            if torch.isin(owners, inputs).any():
                dim = int(not _is_transposed(module))
                yield Block(name, module.weight, None, owners, dim)  # type: ignore[arg-type, union-attr]

    def _weighted_calls(self) -> Iterator[tuple[fx.Node, Tensor]]:
        """Yield calls of linear and convolutional layers, with the unit of each input position."""
        for node in self.analysis.units:
            module = self._called(node)
            source: object = node.args[0] if node.args else None
            seen = self.analysis.units.get(source) if isinstance(source, fx.Node) else None
            if isinstance(module, _WEIGHTED) and seen is not None:
                ids = seen.columns(-1 if isinstance(module, _LINEAR) else 1).T
                units = torch.where(ids < 0, -1, self.roots[ids.clamp_min(0)])
                yield node, torch.where((units == units[:, :1]).all(1), units[:, 0], -1)

    # -- what it costs ------------------------------------------------------------------------

    def cost_function(self, layers: Sequence[Layer]) -> CostFunction:
        """Return the multiplications of linear and convolutional layers as a function of counts.

        Raises ValueError for a layer whose units cost none.
        """
        makers = {p.name: i for i, x in enumerate(layers) for p in x.parts if not p.dim}
        makers |= {p.name: i for i, x in enumerate(layers) for p in x.parts[:1]}
        single = {i for i, x in enumerate(layers) if x.parts[0].index is None}
        owner = {
            unit: makers[block.weight_name]
            for members in self.coupled()
            for block in members
            if block.weight_name in makers
            for unit in block.owners.tolist()
        }
        terms = [
            self._cost_term(node, owners, makers, {} if single else owner)
            for node, owners in self._weighted_calls()
        ]

        def cost_function(counts: Counts) -> float:
            shares = [k / x.units for k, x in zip(counts, layers)]
            return sum(
                whole
                * (1.0 if made is None else shares[made])
                * sum(part if i is None else part * shares[i] for i, part in read.items())
                for whole, made, read in terms
            )

        units = [x.units for x in layers]
        whole_cost = cost_function(units)
        for i, layer in enumerate(layers):
            if not cost_function([n - (i == j) for j, n in enumerate(units)]) < whole_cost:
                raise ValueError(
                    f"sparsify: cost='flops' counts linear and convolutional layers, and no unit "
                    f"of {layer.name} costs any; name a pattern without it"
                )
        return cost_function

    def _cost_term(
        self, node: fx.Node, owners: Tensor, makers: dict[str, int], owner: dict[int, int]
    ) -> tuple[float, int | None, dict[int | None, float]]:
        """Return multiplications of a call, the layer of its outputs, and shares of its inputs."""
        module: Any = self._called(node)
        counted = node.all_input_nodes[0] if _is_transposed(module) else node
        shape = self.analysis.shapes[counted]  # each of its positions meets every weight once
        whole = math.prod(shape[1:]) / module.weight.shape[0] * module.weight.numel()
        made = makers.get(f"{node.target}.weight")
        groups = getattr(module, "groups", 1)
        if groups > 1 and _same_in_rows(owners.view(groups, -1).T):  # its units are whole groups
            return whole, made, {None: 1.0}
        read: dict[int | None, float] = defaultdict(float)
        for unit in owners.tolist():
            read[owner.get(unit)] += 1 / len(owners)
        return whole, made, dict(read)

    def _origins(self) -> Iterator[tuple[str, Tensor]]:
        for first, last, name in self.analysis.origin:
            yield name, self.roots[first:last]

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.analysis.graph.named_modules())

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self._modules.get(str(node.target)) if node.op == "call_module" else None


def _run(interpreter: Interpreter, inputs: tuple[object, ...]) -> None:
    try:
        interpreter.run(*inputs)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"sparsify: the model does not run on example ({type(error).__name__}: {first}); give "
            "one batch of its inputs where the model is: a tensor, or a tuple of its arguments"
        ) from error


def _couple(node: fx.Node, module: nn.Module, analysis: Analysis) -> None:
    """Merge the units of channels that a convolution can only lose together.

    Its groups stay of one size: whole groups go, or as many channels of each. A channel of several
    units (after PixelShuffle) goes with all of them.
    """
    if not isinstance(module, nn.modules.conv._ConvNd) or is_depthwise(module):
        return
    merge = analysis.registry.merge
    columns = analysis.units[node.all_input_nodes[0]].columns(1)
    merge(columns, columns[:1])
    if module.groups > 1:
        read = columns[0].view(module.groups, -1)
        made = analysis.units[node].columns(1)[0].view(module.groups, -1)
        is_free = analysis.registry.pinned.keys().isdisjoint(read.flatten().tolist())
        if is_free and module.groups > min(read.shape[1], made.shape[1]):
            merge(read, read[:, :1])
            merge(made, read[:, :1])
        else:
            merge(read, read[:1])
            merge(made, made[:1])


def _same_in_rows(units: Tensor) -> bool:
    return bool((units == units[:1]).all())


def _block(name: str, module: Any, owners: Tensor) -> Block:
    bias, groups = getattr(module, "bias", None), getattr(module, "groups", 1)
    if not _is_transposed(module) or groups == 1 or is_depthwise(module):
        dim = int(_is_transposed(module) and not is_depthwise(module))
        return Block(name, module.weight, bias, owners, dim)
    # (in, out / groups, ...): a position of the second axis is of all groups
    each = owners.view(groups, -1)
    if _same_in_rows(each):
        return Block(name, module.weight, bias, owners, 1, shared=each[0])
    inputs = each[:, 0].repeat_interleave(module.in_channels // groups)
    whole = inputs if _same_in_rows(each.T) else torch.full_like(inputs, -1)
    return Block(name, module.weight, bias, owners, 0, shared=whole)


def _is_transposed(module: object) -> bool:
    """Return whether the weight stores inputs first."""
    return getattr(module, "transposed", False)
