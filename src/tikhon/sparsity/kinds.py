"""Kinds of units: weights, channels with their norms, heads, features, ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tikhon.compaction.attention import attention, product
from tikhon.compaction.rules import RULES
from tikhon.regularizer.audit import warn
from tikhon.regularizer.targets import EXCLUSION_REASONS, Pattern, entries_of, select
from tikhon.sparsity.allocation import CostFunction
from tikhon.sparsity.graph import Block, Graph
from tikhon.sparsity.thinning import Thinning
from tikhon.sparsity.units import Layer, Part, first_names

_HEADS = {target for target, rule in RULES.items() if rule in (attention, product)}


def find_layers(
    model: nn.Module, request: Thinning, example: object
) -> tuple[list[Layer], CostFunction]:
    """Return layers with removable units, and the price as a function of the units kept.

    Raises ValueError with the reason if there are none.
    """
    traced = request.of in ("channels", "features") or request.cost is not None
    if traced and example is None:
        what = "cost='flops'" if request.cost else f"of={request.of!r}"
        raise ValueError(
            f"sparsify: {what} traces the model once: give example, one batch of inputs"
        )
    graph = Graph.of(model, example) if traced or example is not None else None
    layers = _FINDERS[request.of](model, request.pattern, graph)
    if not layers:
        raise ValueError(f"sparsify: {_NOTHING_FOUND[request.of]}")
    if request.cost is None:
        return layers, sum
    if request.of in ("features", "ranks"):
        raise ValueError(
            "sparsify: cost='flops' counts weights, channels and heads, received "
            f"of={request.of!r}"
        )
    assert graph is not None
    return layers, graph.cost_function(layers)


_WHY_PINNED = (
    "what it makes is an output of the model, is shared with an embedding, a recurrent layer or a "
    "layer that is not named, or is held by an operation without a rule; tikhon.compact names them"
)
_NOTHING_FOUND = {
    "weights": "no weight may go",
    "channels": f"no layer may lose channels: {_WHY_PINNED}",
    "heads": (
        "no heads may go: the model has no nn.MultiheadAttention that matches (without kdim and "
        "vdim), and attention of your own is found in the traced model alone (give example, one "
        "batch of inputs), where each head has a query, a key and a value of its own"
    ),
    "features": (
        "no linear or convolutional layer that matches reads the model's input directly, or with "
        "no more than norms and activations between"
    ),
    "ranks": (
        "no pair of factors matches: name them lora_A and lora_B in one module, as peft does, or "
        "give a pattern of exactly two matrices"
    ),
}


def weights(model: nn.Module, pattern: Pattern, graph: Graph | None) -> list[Layer]:
    """Return one layer for each parameter, with a unit for each weight."""
    computed = {
        entry.name: entry.excluded
        for entry in entries_of(model)
        if entry.excluded and entry.excluded not in EXCLUSION_REASONS
    }
    if computed and pattern == "*":
        first = next(iter(computed))
        warn(
            f"sparsify leaves out {first_names(computed)}: {first} is {computed[first]}, and "
            "zeros in it are none of the weight; remove what computes the weight, or name a "
            "pattern"
        )
    return [
        Layer(target.name, target.params[0].numel(), (Part(target.name, target.params[0]),))
        for target in select(model, pattern)
        if target.params[0].numel()
    ]


def channels(model: nn.Module, pattern: Pattern, graph: Graph | None) -> list[Layer]:
    """Return output units of linear and convolutional layers, with their biases and norms.

    Coupled channels (residual sums, depthwise convolutions, norms) are one unit; those held by an
    output, an input or an unsupported operation are excluded, as are those of heads.
    """
    assert graph is not None
    heads = graph.units_of(_HEADS)
    found = [layer for order, layer in _coupled(model, pattern, graph) if not heads & set(order)]
    there = {part.name for layer in found for part in layer.parts}
    unmatched = sorted(_matching_names(model, pattern) - there) if pattern != "*" else []
    if unmatched and found:
        warn(
            f"sparsify leaves out {first_names(unmatched)}, which the pattern names: {_WHY_PINNED}"
        )
    return found


def heads(model: nn.Module, pattern: Pattern, graph: Graph | None) -> list[Layer]:
    """Return the heads of `nn.MultiheadAttention`, and of attention found by tracing."""
    found = _multihead_layers(model, pattern)
    if graph is not None:
        for layer in found:
            if reason := graph.why_refused(layer.name):
                warn(f"sparsify: compact will not remove heads of {layer.name}: {reason}")
        units = graph.units_of(_HEADS)
        found += [layer for order, layer in _coupled(model, pattern, graph) if units & set(order)]
    return found


def features(model: nn.Module, pattern: Pattern, graph: Graph | None) -> list[Layer]:
    """Return the model's inputs: their columns in all layers that read them."""
    assert graph is not None
    wanted = _matching_names(model, pattern)
    found = []
    for name, inputs in graph.inputs():
        order = inputs.tolist()
        parts = [
            Part(f"{block.name}.weight", block.weight, 1, index)
            for block in graph.readers(inputs)
            if f"{block.name}.weight" in wanted
            and (index := _positions(block.owners, order)) is not None
        ]
        if parts:
            found.append(Layer(name, len(order), tuple(parts)))
    return found


def ranks(model: nn.Module, pattern: Pattern, graph: Graph | None) -> list[Layer]:
    """Return pairs of factors (rows, r) and (r, columns), with one unit for each rank."""
    names = [name for name, _ in model.named_parameters() if ".lora_" in f".{name}"]
    if pattern == "*" and not names:
        return []
    chosen = tuple(names) if pattern == "*" else pattern
    found = []
    for target in select(model, chosen, rows="product"):
        left, right = target.params
        each = torch.arange(right.shape[0], device=right.device)[:, None]
        parts = (Part(target.names[0], left, 1, each), Part(target.names[1], right, 0, each))
        found.append(Layer(target.name, len(each), parts, product=True))
    return found


_Finder = Callable[[nn.Module, Pattern, "Graph | None"], list[Layer]]
_FINDERS: dict[str, _Finder] = {
    "weights": weights,
    "channels": channels,
    "heads": heads,
    "features": features,
    "ranks": ranks,
}


def _matching_names(model: nn.Module, pattern: Pattern) -> set[str]:
    return {name for target in select(model, pattern) for name in target.names}


def _coupled(model: nn.Module, pattern: Pattern, graph: Graph) -> list[tuple[list[int], Layer]]:
    """Return a layer for each set of coupled, removable producers, with its units in the graph."""
    wanted = _matching_names(model, pattern)
    found = []
    for members in graph.coupled():
        order = members[0].owners.unique().tolist()
        same = all(set(block.owners.tolist()) == set(order) for block in members)
        chosen = all(f"{block.name}.weight" in wanted for block in members)
        if not (same and chosen and graph.is_removable(order)):
            continue
        norms = [x for x in graph.channelwise if set(x[0].owners.tolist()) == set(order)]
        blocks = [*((block, False) for block in members), *norms]
        blocks += ((block, False) for block in graph.parameters(order))
        if any(_positions(_weight_owners(block), order) is None for block, _ in blocks):
            continue  # mixed unit sizes
        parts = [part for block, norm in blocks for part in _parts(block, order, scale=norm)]
        name = "+".join(block.name for block in members)
        found.append((order, Layer(name, len(order), tuple(parts))))
    return found


def _parts(block: Block, order: Sequence[int], *, scale: bool = False) -> list[Part]:
    """Return weight and bias of a module, by output position."""
    index = _positions(_weight_owners(block), order)
    parts = [Part(block.weight_name, block.weight, block.dim, index, scale)]
    if block.bias is not None:
        parts.append(Part(f"{block.name}.bias", block.bias, 0, _positions(block.owners, order)))
    return parts


def _weight_owners(block: Block) -> Tensor:
    return block.owners if block.shared is None else block.shared


def _positions(owners: Tensor, order: Sequence[int]) -> Tensor | None:
    """Return the positions of units, (units, positions); None if their numbers differ."""
    places = [(owners == unit).nonzero().flatten() for unit in order]
    if len({len(place) for place in places}) != 1 or not len(places[0]):
        return None
    return torch.stack(places)


def _multihead_layers(model: nn.Module, pattern: Pattern) -> list[Layer]:
    """Return heads of `nn.MultiheadAttention`: rows of projections, columns of the output."""
    wanted = _matching_names(model, pattern)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
            continue
        prefix = f"{name}." if name else ""
        if f"{prefix}in_proj_weight" not in wanted:
            continue
        size, count = module.head_dim, module.num_heads
        own = torch.arange(count * size, device=module.in_proj_weight.device).view(count, size)
        three = torch.cat([own + k * count * size for k in range(3)], dim=1)
        parts = [
            Part(f"{prefix}in_proj_weight", module.in_proj_weight, 0, three),
            Part(f"{prefix}out_proj.weight", cast(nn.Parameter, module.out_proj.weight), 1, own),
        ]
        if module.in_proj_bias is not None:
            parts.append(Part(f"{prefix}in_proj_bias", module.in_proj_bias, 0, three))
        found.append(Layer(name or "attention", count, tuple(parts)))
    return found
