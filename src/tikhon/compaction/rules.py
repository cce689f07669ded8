"""One rule an operation: what it makes of units and constants, and which entries it reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .analysis import Analysis, Operation
from .attention import attention, is_broadcast_constant, masked_fill, multihead, product, softmax
from .convolution import channelwise, convolution
from .modules import AnyBatchNorm, InputsFirst, SelectLinear, matrix
from .normalisation import batch_norm, group_norm, instance_norm, layer_norm
from .recurrent import recurrent
from .units import NO_UNIT, Units, axes_of_variation, entry_mask, opaque, varies, without_repeats


def linear(call: Operation, module: nn.Linear | InputsFirst, analysis: Analysis) -> Units:
    """y = W x + b over the last axis."""
    (source,) = call.inputs
    columns = source.columns(-1)
    fixed, value = source.uniform(-1)
    ids = analysis.produce(call.name, -1, call.out.shape)
    rows = ids.reshape(-1, ids.shape[-1])[0]
    live, weight = matrix(module) != 0, matrix(module).double()
    analysis.reads(columns, lambda keep: live[entry_mask(keep, rows)].any(0) & ~fixed)
    bias = 0.0 if module.bias is None else module.bias.detach().double()
    const = ~(live & ~fixed).any(1)
    folded = weight @ torch.where(fixed, value, 0.0) + bias
    return Units(ids, const.expand(ids.shape), folded.expand(ids.shape))


def select_linear(call: Operation, module: SelectLinear, analysis: Analysis) -> Units:
    """A linear layer of some columns of its input."""
    selected = replace(call, inputs=(select_columns(module, call.inputs[0]),))
    return linear(selected, module.linear, analysis)


def select_columns(module: SelectLinear, source: Units) -> Units:
    """What the inner layer sees."""
    return source.map(lambda t: t.index_select(-1, module.columns.to(t.device)))


def embedding(call: Operation, module: nn.Embedding, analysis: Analysis) -> Units:
    """A table: a column of equal entries is a constant."""
    ids = analysis.produce(call.name, -1, call.out.shape)
    weight = module.weight.detach()
    const = (weight == weight[:1]).all(0).expand(ids.shape)
    return Units(ids, const, weight[0].double().expand(ids.shape))


def elementwise(call: Operation, module: nn.Module | None, analysis: Analysis) -> Units:
    """A function of each entry."""
    source = call.inputs[0]
    if call.node.args[0] in analysis.averaging and (
        module is None or isinstance(module, nn.Dropout)
    ):
        analysis.averaging.add(call.node)  # dropout is the identity here
    return source.with_value(source.const, call.evaluate(module, source.value))


def arithmetic(call: Operation, module: None, analysis: Analysis) -> object:
    """Two operands: their units are merged; a zero factor is a constant whatever the other is."""
    tensors = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
    target = call.node.target
    name = (target if isinstance(target, str) else target.__name__).rstrip("_").lstrip("i")
    if len(tensors) < 2:
        if not isinstance(call.args[0], Tensor) or tensors[0].shape != call.out.shape:
            args = [call.inputs[0].value if isinstance(a, Tensor) else a for a in call.args]
            value = getattr(operator, {"div": "truediv"}.get(name, name))(*args)
            return call.inputs[0].with_value(call.inputs[0].const, value)
        return elementwise(call, module, analysis)
    if call.kwargs:
        return analysis.refuse(call, "keyword arguments")
    given = [
        _merge_rotated_heads(one, call.inputs[1 - i], analysis)
        for i, one in enumerate(call.inputs)
    ]
    for one, other in (given, given[::-1]):
        # a mask or a scale that all units share stays whole
        if is_broadcast_constant(other, one):
            analysis.registry.needed.update(other.ids.unique().tolist())
            given = [
                g if g is not other else replace(g, ids=torch.full_like(g.ids, NO_UNIT))
                for g in given
            ]
            break
    a, b = (units.map(lambda t: t.expand(call.out.shape)) for units in given)
    analysis.registry.merge(a.ids, b.ids)
    const = a.const & b.const
    if name == "mul":
        const = const | (a.const & (a.value == 0)) | (b.const & (b.value == 0))
    value = getattr(operator, {"div": "truediv"}.get(name, name))(a.value, b.value)
    return Units.of(torch.where(a.ids == NO_UNIT, b.ids, a.ids), const, value)


def _merge_rotated_heads(units: Units, other: Units, analysis: Analysis) -> Units:
    """Units that meet a constant on the last axis and differ on more: a head under rotations.

    The constant serves all heads and stays whole, so that a head is one unit.
    """
    ids, sizes = units.ids, other.ids.shape
    if not (bool(other.const.all()) and 0 < len(sizes) <= ids.ndim and sizes[-1] > 1):
        return units
    beyond = any(sizes[axis] > 1 and varies(ids, axis) for axis in range(-len(sizes), -1))
    if beyond or not varies(ids, -1) or axes_of_variation(ids) < 2:
        return units
    analysis.registry.merge(ids, ids[..., :1])
    return replace(units, ids=ids[..., :1].expand(ids.shape))


def constant(call: Operation, module: None, analysis: Analysis) -> object:
    """A tensor that the forward makes by itself, or a comparison of such ones."""
    if not all(bool(units.const.all()) for units in call.inputs):
        return analysis.refuse(call, "it looks at the data")
    units = opaque(call.out.shape, analysis.registry, call.name)
    analysis.registry.needed.update(units.ids.unique().tolist())
    return Units(units.ids, torch.ones_like(units.const), call.out.double())


def attribute(call: Operation, module: None, analysis: Analysis) -> object:
    """x.T and x.mT; the parts of what max and min along an axis give."""
    name = call.args[1]
    if not isinstance(call.args[0], Tensor) and name in ("values", "indices"):
        parts = analysis.units[call.node.args[0]]  # type: ignore[index]
        return parts[("values", "indices").index(name)]
    if name not in ("T", "mT"):
        return analysis.refuse(call, f"no rule for .{name}")
    return call.inputs[0].map(lambda t: getattr(t, name))


def glu(call: Operation, module: nn.Module | None, analysis: Analysis) -> Units:
    """One half times the sigmoid of the other: position by position they are one unit."""
    (source,) = call.inputs
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
    dim = getattr(module, "dim", dim)
    one, gate = (source.map(lambda t, half=half: t.chunk(2, dim)[half]) for half in (0, 1))
    analysis.registry.merge(one.ids, gate.ids)
    const = (one.const & gate.const) | (one.const & (one.value == 0))
    value = one.value * torch.sigmoid(gate.value)
    return one.with_value(const, value)


def layout(
    call: Operation, module: nn.Module | None, analysis: Analysis
) -> Units | tuple[Units, ...]:
    """Entries move and nothing else happens."""
    first = call.args[0]
    many = isinstance(first, (tuple, list))
    parts = list(call.inputs) if many else [call.inputs[0]]

    def move(pick: Callable[[Units], Tensor]) -> Any:
        moved = [pick(units).contiguous() for units in parts]  # a repeated one has no `view`
        args = (moved if many else moved[0], *call.args[1:])
        if module is not None:
            return module(args[0])
        if call.node.op == "call_method":
            return getattr(args[0], call.name)(*args[1:], **call.kwargs)
        return call.node.target(*args, **call.kwargs)  # type: ignore[operator]

    moved = [move(lambda u: u.ids), move(lambda u: u.const), move(lambda u: u.value)]
    if isinstance(moved[0], Tensor):
        return Units(*moved)
    return tuple(Units(*parts) for parts in zip(*moved, strict=True))


def splitting(call: Operation, module: None, analysis: Analysis) -> object:
    """chunk, split, unbind: a position stays in all pieces if it stays in one."""
    sizes = {part.shape for part in call.out}
    if len(sizes) != 1:
        return analysis.refuse(call, "pieces of different sizes")
    parts = cast("tuple[Units, ...]", layout(call, module, analysis))
    ids = torch.stack(without_repeats(*(part.ids for part in parts)))
    analysis.readers.append(
        lambda keep: ids[:, entry_mask(keep, ids).any(0)].unique() if len(keep) else ids[:0]
    )
    return parts


def indexing(call: Operation, module: None, analysis: Analysis) -> object:
    """x[...]: an axis that is indexed stays whole."""
    if not isinstance(call.args[0], Tensor):
        return analysis.units[call.node.args[0]][call.args[1]]  # type: ignore[index]
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    source = call.inputs[0]
    if not all(isinstance(i, int | slice) or i is Ellipsis or i is None for i in index):
        return analysis.refuse(call, "an index of tensors")
    out = layout(call, module, analysis)
    axis = 0
    for position, i in enumerate(index):
        if i is Ellipsis:
            axis = source.ids.ndim - sum(j is not None for j in index[position + 1 :])
        elif i is not None:
            if i != slice(None) and varies(source.ids, axis):
                columns = source.columns(axis)
                if isinstance(i, slice) and axes_of_variation(source.ids) > 1:  # halves of a head
                    analysis.registry.merge(source.ids, source.ids.narrow(axis, 0, 1))
                elif isinstance(i, slice):
                    analysis.registry.pin(source.ids, f"{call.name}: a slice of its units")
                analysis.readers.append(_keep_whole(columns))
            axis += 1
    return out


def _keep_whole(columns: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda keep: columns[entry_mask(keep, columns).any(1)].unique()


def reduce(call: Operation, module: None, analysis: Analysis) -> object:
    """mean, sum, amax, max: constant where everything reduced is constant."""
    source = call.inputs[0]
    if len(call.inputs) > 1:
        return analysis.refuse(call, "it compares two tensors")
    value = call.evaluate(module, source.value)
    places = None
    if isinstance(value, tuple):  # the values, and where they are
        value, places = value[0], opaque(value[1].shape, analysis.registry, call.name)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return analysis.refuse(call, "it reduces over everything")
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    low, const = source.ids.amin(dims, keepdim=True), source.const
    if bool((source.ids != low).any()):
        return analysis.refuse(call, "it reduces over units")
    for dim in dims:
        const = const.all(dim, keepdim=True)
    low, const = low.reshape(value.shape), const.reshape(value.shape)
    units = Units.of(low, const, value)
    return units if places is None else (units, places)


def padding(call: Operation, module: nn.Module | None, analysis: Analysis) -> object:
    """More positions along axes of no units: constants, or copies of what is there."""
    source = call.inputs[0]
    ids, shape = source.ids, call.out.shape
    for axis in (a for a, size in enumerate(shape) if size != ids.shape[a]):
        if varies(ids, axis):
            return analysis.refuse(call, "it pads an axis of units")
        ids = ids.narrow(axis, 0, 1)
    varying = (~source.const).double()
    const = call.evaluate(module, varying) == call.evaluate(module, torch.zeros_like(varying))
    value = call.evaluate(module, source.value)
    return Units.of(ids.expand(shape), const, value)


def per_dimension(*kinds: str) -> list[type[nn.Module]]:
    """The modules of these kinds for one, two and three dimensions."""
    return [getattr(nn, f"{kind}{n}d") for kind in kinds for n in (1, 2, 3)]


def _modules(*names: str) -> list[object]:
    return [getattr(nn, name) for name in names]


def _operators(*names: str) -> list[object]:
    return [getattr(operator, name) for name in names]


def _ops(*names: str) -> list[object]:
    """What a graph may call these operations: torch's functions, and methods of a tensor."""
    functions = [getattr(home, name, None) for name in names for home in (torch, F)]
    methods = [name for name in names if hasattr(Tensor, name)]
    return [*(f for f in functions if callable(f)), *methods]


_ELEMENTWISE = [
    *_modules("ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Tanh"),
    *_modules("Sigmoid", "LogSigmoid", "Hardtanh", "Hardswish", "Hardsigmoid", "Softplus"),
    *_modules("Softsign", "Tanhshrink", "Hardshrink", "Softshrink", "PReLU", "Identity"),
    *_modules("Dropout", "AlphaDropout", "FeatureAlphaDropout"),
    *per_dimension("Dropout"),
    *_ops("relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "tanh"),
    *_ops("sigmoid", "softplus", "hardtanh", "hardswish", "relu_"),
    *_ops("abs", "square", "neg", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "clamp"),
    *_operators("neg"),
    F.dropout,
    "float",
    "to",
    "type_as",
]
_CHANNELWISE = [
    *per_dimension("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"),
    nn.Upsample,
    *_ops("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "interpolate"),
    *_ops("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
]
_ARITHMETIC = [
    *_ops("add", "sub", "mul", "div", "pow", "add_", "mul_"),
    *_operators("add", "sub", "mul", "truediv", "pow", "iadd", "imul"),
]
_CONSTANT = [
    *_ops("ones", "zeros", "full", "arange", "eye", "tril", "triu", "logical_not", "bool"),
    *_operators("invert", "eq", "ne", "lt", "le", "gt", "ge"),
]
_PADDING = [
    F.pad,
    *per_dimension("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"),
]
_LAYOUT = [
    *_modules("Flatten", "PixelShuffle", "PixelUnshuffle"),
    *_ops("flatten", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze"),
    *_ops("cat", "concat", "stack", "flip", "pixel_shuffle", "pixel_unshuffle"),
    *_ops("view", "expand", "contiguous", "clone", "detach"),
    "unflatten",
]

RULES: dict[object, Callable[..., object]] = {
    nn.Linear: linear,
    InputsFirst: linear,
    SelectLinear: select_linear,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.Embedding: embedding,
    nn.MultiheadAttention: multihead,
    nn.RNN: recurrent,
    nn.GRU: recurrent,
    nn.LSTM: recurrent,
    F.scaled_dot_product_attention: attention,
    nn.Softmax: softmax,
    nn.GLU: glu,
    F.glu: glu,
    operator.getitem: indexing,
    getattr: attribute,
    **dict.fromkeys(per_dimension("Conv", "ConvTranspose"), convolution),
    **dict.fromkeys([*per_dimension("BatchNorm"), AnyBatchNorm], batch_norm),
    **dict.fromkeys(per_dimension("InstanceNorm"), instance_norm),
    **dict.fromkeys(_ops("softmax"), softmax),
    **dict.fromkeys(_ops("masked_fill"), masked_fill),
    **dict.fromkeys(_ops("mean", "sum", "amax", "amin", "max", "min"), reduce),
    **dict.fromkeys(_ops("chunk", "split", "unbind"), splitting),
    **dict.fromkeys([*_ops("matmul", "bmm"), operator.matmul], product),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_CHANNELWISE, channelwise),
    **dict.fromkeys(_ARITHMETIC, arithmetic),
    **dict.fromkeys(_LAYOUT, layout),
    **dict.fromkeys(_PADDING, padding),
    **dict.fromkeys(_CONSTANT, constant),
}
