"""The cut: new modules and new shape arguments for the units that stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from .analysis import Analysis
from .attention import Heads
from .convolution import Convolution, foldable, grouped, is_depthwise, summed
from .modules import (
    Attention,
    InputsFirst,
    PartialGroupNorm,
    PartialLayerNorm,
    SelectLinear,
    matrix,
)
from .normalisation import BatchNorm, InstanceNorm
from .recurrent import cut_recurrent
from .rules import per_dimension, select_columns
from .units import Units, axis_masks, entry_mask, varies

Replaced = dict[str, nn.Module | nn.Parameter | Tensor]


def smaller_parts(analysis: Analysis, keep: Tensor) -> Replaced:
    """The modules and tensors of the units that stay, by the names of those they replace."""
    graph = analysis.graph
    replaced: Replaced = {}
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in analysis.tied:
            module = graph.get_submodule(target)
            rule = next((_CUTS[kind] for kind in type(module).__mro__ if kind in _CUTS), None)
            if rule is not None and node not in analysis.refused:
                part = rule(module, node, analysis, keep)
                _keep_what_else_it_holds(module, part)
                replaced[target] = part
        elif node.op == "get_attr" and isinstance(analysis.units[node], Units):
            replaced[target] = _cut_tensor(attrgetter(target)(graph), node, analysis, keep)
    # parents first
    return dict(sorted(replaced.items(), key=lambda part: part[0].count(".")))


def cut(analysis: Analysis, keep: Tensor, replaced: Replaced) -> fx.GraphModule:
    """The graph with the smaller parts, and shapes of the units that stay."""
    graph = analysis.graph
    for node in graph.graph.nodes:
        if node.op in ("call_method", "call_function"):
            _reshape_arguments(node, analysis, keep)
    for target, part in replaced.items():
        parent, _, name = target.rpartition(".")
        setattr(graph.get_submodule(parent), name, part)
    graph.recompile()
    return graph


def _keep_what_else_it_holds(old: nn.Module, new: nn.Module) -> None:
    """What a layer of the model's own holds besides its weights, for other calls; and what of it
    is frozen."""
    if new is old:
        return
    for name in getattr(old, "extra_members", ()):
        for store in ("_parameters", "_buffers", "_modules"):
            if name in getattr(old, store):
                getattr(new, store)[name] = getattr(old, store)[name]
    trainable = {name: p.requires_grad for name, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))


def _inputs(node: fx.Node, analysis: Analysis, position: int = 0) -> Units:
    argument = node.args[position] if len(node.args) > position else None
    return analysis.units[argument]  # type: ignore[index]


def _axis_mask(units: Units, axis: int, keep: Tensor) -> Tensor:
    return axis_masks(entry_mask(keep, units.ids))[axis]


def _cut_linear(
    module: nn.Linear | InputsFirst, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    return _cut_columns(module, _inputs(node, analysis), analysis.units[node], analysis, keep)


def _cut_select(
    module: SelectLinear, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    whole, out = _inputs(node, analysis), analysis.units[node]
    source = select_columns(module, whole)
    inner = _cut_columns(module.linear, source, out, analysis, keep)
    place = _axis_mask(whole, -1, keep).cumsum(0) - 1  # of a column in the cut input
    columns = place[module.columns[_axis_mask(source, -1, keep)]]
    if isinstance(inner, SelectLinear):
        return SelectLinear(inner.linear, columns[inner.columns])
    assert isinstance(inner, nn.Linear)
    return SelectLinear(inner, columns)


def _cut_columns(
    module: nn.Linear | InputsFirst, source: Units, out: Units, analysis: Analysis, keep: Tensor
) -> nn.Module:
    rows, columns = _axis_mask(out, -1, keep), _axis_mask(source, -1, keep)
    fixed, value = source.uniform(-1)
    weight = matrix(module)
    bias = _folded_bias(module, weight.double(), fixed & ~columns, value)
    read = (weight[rows] != 0).any(0) & columns
    from_input = torch.tensor(
        [analysis.registry.pinned.get(int(u)) == "input" for u in source.columns(-1)[0]]
    )
    ignored = columns & from_input & ~read
    if bool(ignored.any()) and bool(read.any()):
        index = torch.nonzero(~ignored[columns]).flatten()
        return SelectLinear(_linear(weight[rows][:, columns & ~ignored], bias, rows), index)
    return _linear(weight[rows][:, columns], bias, rows)


def _folded_bias(
    module: nn.Linear | InputsFirst | Convolution, whole: Tensor, fixed: Tensor, value: Tensor
) -> Tensor | None:
    """The bias with the constants of the absent columns in it, float64."""
    bias = None if module.bias is None else module.bias.detach().double()
    folded = whole @ torch.where(fixed, value, 0.0)
    if bias is None:
        return folded if bool((folded != 0).any()) else None
    return bias + folded


def _linear(weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone())
    if bias is not None:
        new.bias = nn.Parameter((bias if rows is None else bias[rows]).to(weight.dtype))
    return new


def _cut_convolution(
    module: Convolution, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    source, out = _inputs(node, analysis), analysis.units[node]
    rows, columns = _axis_mask(out, 1, keep), _axis_mask(source, 1, keep)
    weight, bias, groups = module.weight.detach(), None, int(rows.sum())
    if is_depthwise(module):
        weight, bias = weight[rows], module.bias
    else:
        fixed, value = foldable(module, source)
        blocks = grouped(module, weight)
        bias = _folded_bias(module, summed(blocks), fixed & ~columns, value)
        parts = [
            block[out_of][:, in_of]
            for block, out_of, in_of in zip(
                blocks, rows.view(module.groups, -1), columns.view(module.groups, -1), strict=True
            )
            if bool(out_of.any())
        ]
        weight = torch.cat([part.transpose(0, 1) if module.transposed else part for part in parts])
        groups = len(parts)
    kind = cast("Callable[..., nn.Module]", type(module))
    new = kind(
        int(columns.sum()),
        int(rows.sum()),
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=groups,
        bias=bias is not None,
        padding_mode=module.padding_mode,
        device="meta",
        **({"output_padding": module.output_padding} if module.transposed else {}),
    )
    new.weight = nn.Parameter(weight.clone())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach()[rows].to(weight.dtype))
    return new


def _cut_prelu(module: nn.PReLU, node: fx.Node, analysis: Analysis, keep: Tensor) -> nn.Module:
    if module.num_parameters == 1:
        return module
    rows = _axis_mask(analysis.units[node], 1, keep)
    new = nn.PReLU(int(rows.sum())).to(module.weight)
    new.weight = nn.Parameter(module.weight.detach()[rows].clone())
    return new


def _cut_channel_norm(
    module: BatchNorm | InstanceNorm, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    rows = _axis_mask(analysis.units[node], 1, keep)
    if bool(rows.all()):
        return module
    new = type(module)(
        int(rows.sum()),
        eps=module.eps,
        momentum=cast(float, module.momentum),
        affine=module.affine,
        track_running_stats=module.track_running_stats,
    )
    state = {k: v[rows] if v.ndim else v for k, v in module.state_dict().items()}
    for value in list(state.values())[:1]:
        new = new.to(value)
    new.load_state_dict(state)
    return new


def _cut_layer_norm(
    module: nn.LayerNorm | nn.RMSNorm, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    source = _inputs(node, analysis)
    rows = _axis_mask(source, -1, keep)
    if bool(rows.all()):
        return module
    weight, bias = _affine(module, rows)
    constants = source.uniform(-1)[1][~rows]
    if isinstance(module, nn.RMSNorm):
        return PartialLayerNorm(weight, None, constants, eps=_eps(module), centred=False)
    return PartialLayerNorm(weight, bias, constants, eps=module.eps)


def _cut_group_norm(
    module: nn.GroupNorm, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    source = _inputs(node, analysis)
    rows = _axis_mask(source, 1, keep)
    if bool(rows.all()):
        return module
    weight, bias = _affine(module, rows)
    stays = rows.view(module.num_groups, -1)
    stays = stays[stays.any(1)]
    groups = len(stays)
    if bool(stays.all()):
        new = nn.GroupNorm(groups, stays.numel(), eps=module.eps, affine=module.affine)
        new.weight = None if weight is None else nn.Parameter(weight)  # type: ignore[assignment]
        new.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
        return new
    whole = rows.view(module.num_groups, -1).any(1).repeat_interleave(stays.shape[1])
    constants = source.uniform(1)[1][whole]
    return PartialGroupNorm(
        weight, bias, constants, missing=~stays.flatten(), groups=groups, eps=module.eps
    )


def _eps(module: nn.RMSNorm) -> float:
    dtype = torch.get_default_dtype() if module.weight is None else module.weight.dtype
    return torch.finfo(dtype).eps if module.eps is None else module.eps


def _affine(
    module: nn.LayerNorm | nn.RMSNorm | nn.GroupNorm, rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of the entries that stay."""
    weight, bias = module.weight, getattr(module, "bias", None)
    return tuple(None if t is None else t.detach()[rows].clone() for t in (weight, bias))  # type: ignore


def _cut_embedding(
    module: nn.Embedding, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    columns = _axis_mask(analysis.units[node], -1, keep)
    return nn.Embedding.from_pretrained(
        module.weight.detach()[:, columns].clone(),
        freeze=not module.weight.requires_grad,
        padding_idx=module.padding_idx,
    )


def _cut_multihead(
    module: nn.MultiheadAttention, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    heads = entry_mask(keep, analysis.heads[str(node.target)])
    rows = _axis_mask(analysis.units[node][0], -1, keep)
    inputs = [_inputs(node, analysis, position) for position in range(3)]
    columns = [_axis_mask(units, -1, keep) for units in inputs]
    if all(bool(mask.all()) for mask in (heads, rows, *columns)):
        return module
    parts = Heads.of(module, inputs[2])
    entries = heads.repeat_interleave(module.head_dim)
    projections = []
    for weight, bias, units, mask in zip(parts.inputs, parts.biases, inputs, columns, strict=True):
        fixed, value = units.uniform(-1)
        folded = bias.double() + weight.double() @ torch.where(fixed & ~mask, value, 0.0)
        projections.append(_linear(weight[entries][:, mask], folded, entries))
    bias = parts.bias + parts.out.double() @ torch.where(~entries, parts.value, 0.0)
    out = _linear(parts.out[rows][:, entries], bias, rows)
    query, key, value = projections
    options = {"batch_first": module.batch_first, "dropout": module.dropout}
    return Attention(query, key, value, out, heads=int(heads.sum()), **options)


def _cut_recurrent(
    module: nn.RNNBase, node: fx.Node, analysis: Analysis, keep: Tensor
) -> nn.Module:
    source = _inputs(node, analysis)
    cells = analysis.cells[str(node.target)]
    states = analysis.units[node][1] is not None
    return cut_recurrent(module, source, cells, _axis_mask(source, -1, keep), keep, states=states)


def _cut_tensor(tensor: Tensor, node: fx.Node, analysis: Analysis, keep: Tensor) -> Tensor:
    new = tensor.detach()
    for axis, mask in enumerate(axis_masks(entry_mask(keep, analysis.units[node].ids))):
        new = new.movedim(axis, 0)[mask].movedim(0, axis)
    new = new.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new


_SHAPES = {"view": 1, "reshape": 1, "expand": 1, torch.reshape: 1}


def _reshape_arguments(node: fx.Node, analysis: Analysis, keep: Tensor) -> None:
    """Literal sizes of the axes that hold units become their new sizes."""
    if node.target in _SHAPES and isinstance(analysis.units[node], Units):
        size, old = analysis.new_shape(node, keep), analysis.shapes[node]
        nested = len(node.args) == 2 and isinstance(node.args[1], (tuple, list))
        dims = list(node.args[1] if nested else node.args[1:])  # type: ignore[arg-type]
        if len(dims) < len(old):  # one node that computes them all
            with node.graph.inserting_before(node):
                parts = [(dims[0], axis) for axis in range(len(old))]
                dims = [node.graph.call_function(operator.getitem, part) for part in parts]
        ids = analysis.units[node].ids
        new = [
            _new_size(d, s, o, ids, axis)
            for axis, (d, s, o) in enumerate(zip(dims, size, old, strict=True))
        ]
        if new != dims and node.target != "expand" and new.count(-1) > 1:
            raise ValueError(f"{node.name}: sizes that mix units and the batch cannot be cut")
        if new != dims:
            node.args = (node.args[0], tuple(new)) if nested else (node.args[0], *new)
    elif node.target == "unflatten":
        axis, sizes = int(node.args[1]), node.args[2]  # type: ignore[arg-type, misc]
        axis %= len(analysis.shapes[node.args[0]])  # type: ignore[index]
        new_sizes = analysis.new_shape(node, keep)[axis : axis + len(sizes)]  # type: ignore
        node.args = (node.args[0], axis, tuple(new_sizes))
    elif node.target in ("split", torch.split) and isinstance(node.args[1], int | fx.Node):
        given: Any = node.args
        axis: Any = node.kwargs.get("dim", given[2] if len(given) > 2 else 0)
        first = analysis.units[node][0]
        if isinstance(given[1], int) or varies(first.ids, axis):
            node.args = (given[0], int(_axis_mask(first, axis, keep).sum()), *given[2:])


def _new_size(given: Argument, size: int, old: int, ids: Tensor, axis: int) -> Argument:
    """The size of an axis: a number for units alone, whatever the forward computed it from."""
    if isinstance(given, int) and (given == -1 or size == old):
        return given
    if isinstance(given, int):
        return size
    if not varies(ids, axis):
        return given
    line = ids.movedim(axis, 0).flatten(1)[:, 0]
    return size if len(line.unique()) == len(line) else -1


_CUTS: dict[type, Callable[..., nn.Module]] = {
    nn.Linear: _cut_linear,
    InputsFirst: _cut_linear,
    SelectLinear: _cut_select,
    nn.LayerNorm: _cut_layer_norm,
    nn.RMSNorm: _cut_layer_norm,
    nn.GroupNorm: _cut_group_norm,
    **dict.fromkeys(per_dimension("Conv", "ConvTranspose"), _cut_convolution),
    BatchNorm: _cut_channel_norm,
    **dict.fromkeys(per_dimension("InstanceNorm"), _cut_channel_norm),
    nn.PReLU: _cut_prelu,
    nn.Embedding: _cut_embedding,
    nn.MultiheadAttention: _cut_multihead,
    nn.RNNBase: _cut_recurrent,
}
