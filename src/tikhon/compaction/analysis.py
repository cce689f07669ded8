"""Constant propagation and liveness over the units of a traced model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from tikhon.wrappers import own_parameters

from .modules import SelectLinear
from .units import (
    NO_UNIT,
    Registry,
    Units,
    axes_of_variation,
    axis_masks,
    bounding_box,
    entry_mask,
    fresh_ids,
    opaque,
    without_repeats,
)

Reader = Callable[[Tensor], Tensor]  # flags of the units that stay -> ids that must stay too


@dataclass(frozen=True)
class Operation:
    """One operation of the graph, with everything a rule may look at."""

    node: fx.Node
    name: str  # of the module, or of the node
    args: tuple[Any, ...]  # real values
    kwargs: dict[str, Any]
    inputs: tuple[Units, ...]  # the units of args (None where an argument is not a tensor)
    out: Any  # the real result

    def evaluate(self, module: nn.Module | None, first: Tensor) -> Tensor:
        """The operation with its first tensor replaced (and, of a module, in double precision)."""
        with torch.no_grad():
            if module is not None:
                return in_double(module)(first)
            if self.node.op == "call_method":
                return getattr(first.clone(), self.name)(*self.args[1:], **self.kwargs)
            return self.node.target(first.clone(), *self.args[1:], **self.kwargs)  # type: ignore


def in_double(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as a function in double precision."""
    weights = {name: t.detach().double() for name, t in module.named_parameters()}
    weights |= {name: t.double() for name, t in module.named_buffers() if t.is_floating_point()}
    return lambda x: torch.func.functional_call(module, weights, (x.clone(),))


@dataclass
class Analysis:
    """Units of every value of a graph, and what its operations read."""

    graph: fx.GraphModule
    registry: Registry = field(default_factory=Registry)
    units: dict[fx.Node, Any] = field(default_factory=dict)
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    shape_constraints: list[Reader] = field(default_factory=list)  # what stays for shapes alone
    origin: list[tuple[int, int, str]] = field(default_factory=list)  # units first..last, module
    tied: set[str] = field(default_factory=set)
    refused: dict[fx.Node, str] = field(default_factory=dict)  # and why
    heads: dict[str, Tensor] = field(default_factory=dict)  # of nn.MultiheadAttention
    cells: dict[str, list[Tensor]] = field(default_factory=dict)  # of RNN, GRU, LSTM
    averaging: set[fx.Node] = field(default_factory=set)  # values whose last axis sums to one

    def produce(self, name: str, axis: int, shape: torch.Size) -> Tensor:
        """Ids of an output whose units are new: one for each position of axis."""
        first = len(self.registry.parent)
        ids = fresh_ids(axis, shape, self.registry)
        self.origin.append((first, len(self.registry.parent), name))
        return ids

    def reads(self, ids: Tensor, needed: Callable[[Tensor], Tensor]) -> None:
        """Declare a reader: ids of shape (positions, size) whose columns `needed` are read."""
        self.readers.append(lambda keep: ids[:, needed(keep)].unique())

    def refuse(self, call: Operation, why: str) -> object:
        """Keep everything that the operation touches."""
        self.refused[call.node] = why
        for source in _all_units(call.inputs):
            self.registry.pin(source.ids, f"{call.name}: {why}")
            self.registry.needed.update(source.ids[~source.const].unique().tolist())
        for node in call.node.all_input_nodes:  # of a weight only what is zero would go
            if node.op == "get_attr" and self._is_weight(node):
                weight = self.units[node]
                self.registry.needed.update(weight.ids[weight.value != 0].unique().tolist())
        return _map_tensors(call.out, lambda t: opaque(t.shape, self.registry, call.name))

    def _is_weight(self, node: fx.Node) -> bool:
        tensor = attrgetter(str(node.target))(self.graph)
        return isinstance(tensor, nn.Parameter) and isinstance(self.units.get(node), Units)

    def solve(self, *, pins: bool = True) -> Tensor:
        """Flags of the units that must stay; without `pins`, what the weights alone would keep."""
        roots = self.registry.roots()
        keep = torch.zeros(len(roots), dtype=torch.bool)
        fixed = [u for u, why in self.registry.pinned.items() if pins or why in _ENDPOINTS]
        fixed += [u for u in self.registry.needed if u != NO_UNIT]
        keep[fixed] = True
        keep = _spread_over_merged(keep, roots)
        values = [
            without_repeats(units.ids)[0] for units in _all_units(tuple(self.units.values()))
        ]
        boxes = [ids for ids in values if axes_of_variation(ids) > 1]
        while True:
            before = int(keep.sum())
            for reader in reversed(self.readers):
                keep = _with_ids(keep, reader(keep), roots)
            for ids in boxes:
                keep[ids[bounding_box(entry_mask(keep, ids)) & (ids != NO_UNIT)]] = True
            keep = _spread_over_merged(keep, roots)
            if int(keep.sum()) == before:  # nobody reads more: only now even the groups out
                keep = self._with_shape_constraints(keep, values, roots)
                if int(keep.sum()) == before:
                    return keep

    def _with_shape_constraints(self, keep: Tensor, values: list[Tensor], roots: Tensor) -> Tensor:
        """With what must stay for the sake of shapes alone."""
        for ids in values:  # a layer of no units at all is more trouble than one unit
            if ids.numel() and not entry_mask(keep, ids).any():
                keep[ids.flatten()[0]] = True
        keep = _spread_over_merged(keep, roots)
        for constraint in self.shape_constraints:
            keep = _with_ids(keep, constraint(keep), roots)
        return keep

    def new_shape(self, node: fx.Node, keep: Tensor) -> list[int]:
        """Shape of the node's tensor after the cut."""
        return [int(m.sum()) for m in axis_masks(entry_mask(keep, self.units[node].ids))]


_ENDPOINTS = ("input", "output")
_TIED = "its weights are used in more than one place"


class Interpreter(fx.Interpreter):
    """Runs the model on the example and the rules along with it."""

    def __init__(self, graph: fx.GraphModule, rules: dict[Any, Callable]):
        super().__init__(graph)
        self.rules = rules
        self.analysis = Analysis(graph)
        calls = Counter(n.target for n in graph.graph.nodes if n.op == "call_module")
        owners = Counter(id(p) for m in graph.modules() for p in own_parameters(m))
        read = {
            str(n.target)
            for n in graph.graph.nodes
            if n.op == "get_attr" and not _is_metadata_only(n)
        }
        self.analysis.tied = {
            name
            for name, module in graph.named_modules()
            if list(module.parameters(recurse=isinstance(module, SelectLinear)))
            and (
                calls[name] > 1
                or (
                    calls[name]
                    and any(
                        f"{name}.{part}" in read
                        for part in module._parameters.keys()
                        - getattr(module, "extra_members", ())  # held for others
                    )
                )
                or any(owners[id(p)] > 1 for p in own_parameters(module))
            )
        }

    def run_node(self, n: fx.Node) -> object:
        """The real value; records its units."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.analysis.shapes[n] = out.shape
        self.analysis.units[n] = self._units(n, out)
        return out

    def _units(self, n: fx.Node, out: object) -> object:
        analysis = self.analysis
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        known = analysis.units
        source = map_arg((n.args, n.kwargs), lambda a: known[a])
        name = n.name if n.op == "call_function" else str(n.target)
        call = Operation(n, name, args, kwargs, tuple(_all_units(source)), out)
        if n.op == "placeholder":
            return _input(out, analysis)
        if n.op == "get_attr":
            if _is_metadata_only(n):
                return None
            if str(n.target).rpartition(".")[0] in analysis.tied:
                return analysis.refuse(call, _TIED)
            return _parameter(out, str(n.target), analysis)
        if n.op == "output":
            for units in call.inputs:
                analysis.registry.pin(units.ids, "output")
            return None
        if not _has_tensor(out):
            return None
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if module is not None and str(n.target) in analysis.tied:
            return analysis.refuse(call, _TIED)
        rule = _lookup(self.rules, module if module is not None else n.target)
        if rule is None:
            kind = type(module).__name__ if module is not None else _name(n.target)
            return analysis.refuse(call, f"no rule for {kind}")
        if not call.args:
            return analysis.refuse(call, "its input is given by keyword")
        return rule(call, module, analysis)


def _is_metadata_only(node: fx.Node) -> bool:
    """Whether a forward asks a tensor for its type or device alone."""
    calls = [user.target is getattr and user.args[1] in ("dtype", "device") for user in node.users]
    return bool(calls) and all(calls)


def _lookup(rules: dict[object, Callable], target: object) -> Callable | None:
    if not isinstance(target, nn.Module):
        return rules.get(target)
    if type(target).__module__.startswith("tikhon.layers"):
        return rules[nn.Dropout] if not list(target.parameters()) else None
    return next((rules[kind] for kind in type(target).__mro__ if kind in rules), None)


def _input(out: object, analysis: Analysis) -> object:
    """An input: a pinned unit for each channel, so that a reader can say which it ignores."""
    if not isinstance(out, Tensor):
        return None
    axis = 1 if out.ndim > 1 else 0
    if out.ndim == 0:
        return opaque(out.shape, analysis.registry, "input")
    ids = fresh_ids(axis, out.shape, analysis.registry)
    analysis.registry.pin(ids, "input")
    return Units(ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros(ids.shape).double())


def _parameter(out: object, name: str, analysis: Analysis) -> object:
    """A tensor of the model: constant; its longest axis may be cut."""
    if not isinstance(out, Tensor):
        return None
    const = torch.ones_like(out, dtype=torch.bool)
    wide = [axis for axis, size in enumerate(out.shape) if size > 1]
    if not wide:
        ids = torch.full(out.shape, NO_UNIT)
    else:
        ids = analysis.produce(name, wide[-1], out.shape)
    if not out.is_floating_point():  # positions and masks: no units, nothing of them goes
        analysis.registry.needed.update(ids.unique().tolist())
    return Units(ids, const, out.detach().double())


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _all_units(source: object) -> list[Units]:
    if isinstance(source, Units):
        return [source]
    if isinstance(source, dict):
        source = tuple(source.values())
    if isinstance(source, (tuple, list)):
        return [units for part in source for units in _all_units(part)]
    return []


def _map_tensors(out: object, make: Callable[[Tensor], Units]) -> object:
    if isinstance(out, Tensor):
        return make(out)
    if isinstance(out, (tuple, list)):
        return tuple(_map_tensors(part, make) for part in out)
    return None


def _has_tensor(out: object) -> bool:
    if isinstance(out, (tuple, list)):
        return any(_has_tensor(part) for part in out)
    return isinstance(out, Tensor)


def _with_ids(keep: Tensor, found: Tensor, roots: Tensor) -> Tensor:
    keep[found[found != NO_UNIT]] = True
    return _spread_over_merged(keep, roots)


def _spread_over_merged(keep: Tensor, roots: Tensor) -> Tensor:
    """A merged unit stays if any part of it stays."""
    whole = torch.zeros_like(keep)
    whole[roots[keep]] = True
    return whole[roots]
