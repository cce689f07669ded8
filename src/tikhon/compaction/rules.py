"""One rule an operation: what it makes of units and constants, and which entries it reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .analysis import Analysis, Call
from .attention import attention, multihead
from .modules import SelectLinear
from .units import NO_UNIT, Units, kept


def linear(call: Call, module: nn.Linear, analysis: Analysis) -> Units:
    """y = W x + b over the last axis."""
    (seen,) = call.seen
    columns = seen.columns(-1)
    fixed, value = seen.uniform(-1)
    ids = analysis.produce(call.name, -1, call.out.shape)
    rows = ids.reshape(-1, ids.shape[-1])[0]
    live = module.weight.detach() != 0
    analysis.reads(columns.ids, lambda keep: live[kept(keep, rows)].any(0) & ~fixed)
    weight = module.weight.detach().double()
    bias = 0.0 if module.bias is None else module.bias.detach().double()
    const = ~(live & ~fixed).any(1)
    folded = weight @ torch.where(fixed, value, 0.0) + bias
    return Units(ids, const.expand(ids.shape), folded.expand(ids.shape))


def select_linear(call: Call, module: SelectLinear, analysis: Analysis) -> Units:
    """A linear layer of some columns of its input."""
    return linear(replace(call, seen=(selected(module, call.seen[0]),)), module.linear, analysis)


def selected(module: SelectLinear, seen: Units) -> Units:
    """What the inner layer sees."""
    return seen.map(lambda t: t.index_select(-1, module.columns.to(t.device)))


def convolution(call: Call, module: Any, analysis: Analysis) -> Any:
    """A convolution over all channels, or one filter a channel."""
    (seen,) = call.seen
    weight = module.weight.detach()
    if call.out.ndim != weight.ndim:
        return analysis.refuse(call, "its input has no batch axis")
    if module.groups == module.in_channels == module.out_channels:
        return _depthwise(call, module, seen)
    if module.groups != 1:
        return analysis.refuse(call, f"a convolution in {module.groups} groups")
    if module.transposed:
        weight = weight.transpose(0, 1)
    fixed, value = foldable(module, seen)
    ids = analysis.produce(call.name, 1, call.out.shape)
    rows = ids.movedim(1, -1).reshape(-1, ids.shape[1])[0]
    live = (weight != 0).flatten(2).any(2)
    columns = seen.columns(1)
    analysis.reads(columns.ids, lambda keep: live[kept(keep, rows)].any(0) & ~fixed)
    const = ~(live & ~fixed).any(1)
    folded = weight.double().flatten(2).sum(2) @ torch.where(fixed, value, 0.0)
    if module.bias is not None:
        folded = folded + module.bias.detach().double()
    shape = (-1,) + (1,) * (ids.ndim - 2)
    return Units(ids, const.view(shape).expand(ids.shape), folded.view(shape).expand(ids.shape))


def foldable(module: Any, seen: Units) -> tuple[Tensor, Tensor]:
    """Channels whose constant a convolution turns into a constant: the border sees zeros."""
    fixed, value = seen.uniform(1)
    padded = module.padding_mode == "zeros" and module.padding not in ("valid",)
    padded = padded and (module.padding == "same" or any(module.padding))
    return (fixed & (value == 0) if padded or module.transposed else fixed), value


def _depthwise(call: Call, module: Any, seen: Units) -> Units:
    dead = (module.weight.detach() == 0).flatten(1).all(1)
    bias = torch.zeros(len(dead)) if module.bias is None else module.bias.detach()
    shape = (-1,) + (1,) * (call.out.ndim - 2)
    with torch.no_grad():
        value = _double(module)(seen.value)
    fixed, _ = seen.uniform(1)
    ids = _channel_ids(seen, call.out.shape)
    value = torch.where(dead.view(shape), bias.double().view(shape), value)
    return Units(ids, torch.ones_like(ids, dtype=torch.bool), value).with_value(
        (dead | fixed).view(shape).expand(ids.shape), value
    )


def _double(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weights = {name: t.detach().double() for name, t in module.named_parameters()}
    weights |= {name: t.double() for name, t in module.named_buffers() if t.is_floating_point()}
    return lambda x: torch.func.functional_call(module, weights, (x.clone(),))


def _channel_ids(seen: Units, shape: torch.Size) -> Tensor:
    first = seen.ids.flatten(2)[:, :, 0]
    return first.view(*first.shape, *(1,) * (len(shape) - 2)).expand(shape)


def channelwise(call: Call, module: nn.Module | None, analysis: Analysis) -> Any:
    """Pooling, resizing: each channel for itself, over the axes after the second."""
    seen = call.seen[0]
    flat = seen.ids.flatten(2) if seen.ids.ndim > 2 else None
    if flat is None or call.out.ndim < 3 or call.out.shape[:2] != seen.ids.shape[:2]:
        return analysis.refuse(call, "its input is not (batch, channels, ...)")
    if bool((flat != flat[:, :, :1]).any()):
        return analysis.refuse(call, "units differ inside a channel")
    value = _apply(call, module, seen.value)
    const = seen.const.flatten(2).all(2)
    const = const.view(*const.shape, *(1,) * (call.out.ndim - 2)).expand(call.out.shape)
    return Units(_channel_ids(seen, call.out.shape), const, value).with_value(const, value)


def _apply(call: Call, module: nn.Module | None, first: Tensor) -> Tensor:
    """The operation with its first tensor replaced (and in double precision)."""
    with torch.no_grad():
        if module is not None:
            return _double(module)(first)
        if call.node.op == "call_method":
            return getattr(first.clone(), call.name)(*call.args[1:], **call.kwargs)
        return call.node.target(first.clone(), *call.args[1:], **call.kwargs)  # type: ignore


def batch_norm(call: Call, module: Any, analysis: Analysis) -> Any:
    """An affine map of each channel (evaluation mode)."""
    (seen,) = call.seen
    if module.running_mean is None:
        return analysis.refuse(call, "it normalises by the batch even in evaluation")
    shape = (-1,) + (1,) * (call.out.ndim - 2)
    value = _apply(call, module, seen.value)
    const = seen.const
    if module.weight is not None:
        off = (module.weight.detach() == 0).view(shape)
        value = torch.where(off, module.bias.detach().double().view(shape), value)
        const = const | off
    return seen.with_value(const, value)


def layer_norm(call: Call, module: nn.LayerNorm, analysis: Analysis) -> Any:
    """Every entry is read for the mean and the variance, unless it is a constant."""
    (seen,) = call.seen
    if len(module.normalized_shape) != 1:
        return analysis.refuse(call, "it normalises over more than one axis")
    fixed, _ = seen.uniform(-1)
    ids = seen.columns(-1).ids
    analysis.reads(ids, lambda keep: ~fixed & kept(keep, ids).any())
    const = torch.zeros(len(fixed), dtype=torch.bool)
    value = torch.zeros(len(fixed)).double()
    if module.weight is not None:
        const = module.weight.detach() == 0
        value = value if module.bias is None else module.bias.detach().double()
    shape = seen.ids.shape
    return seen.with_value(const.expand(shape), value.expand(shape))


def embedding(call: Call, module: nn.Embedding, analysis: Analysis) -> Units:
    """A table: a column of equal entries is a constant."""
    ids = analysis.produce(call.name, -1, call.out.shape)
    weight = module.weight.detach()
    const = (weight == weight[:1]).all(0).expand(ids.shape)
    return Units(ids, const, weight[0].double().expand(ids.shape))


def elementwise(call: Call, module: nn.Module | None, analysis: Analysis) -> Units:
    """A function of each entry."""
    seen = call.seen[0]
    return seen.with_value(seen.const, _apply(call, module, seen.value))


def arithmetic(call: Call, module: None, analysis: Analysis) -> Any:
    """Two operands: their units are merged; a zero factor is a constant whatever the other is."""
    tensors = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
    target = call.node.target
    name = (target if isinstance(target, str) else target.__name__).rstrip("_").lstrip("i")
    if len(tensors) < 2:
        if not isinstance(call.args[0], Tensor) or tensors[0].shape != call.out.shape:
            args = [call.seen[0].value if isinstance(a, Tensor) else a for a in call.args]
            value = getattr(operator, {"div": "truediv"}.get(name, name))(*args)
            return call.seen[0].with_value(call.seen[0].const, value)
        return elementwise(call, module, analysis)
    if call.kwargs:
        return analysis.refuse(call, "keyword arguments")
    a, b = (units.map(lambda t: t.expand(call.out.shape)) for units in call.seen)
    analysis.registry.merge(a.ids, b.ids)
    const = a.const & b.const
    if name == "mul":
        const = const | (a.const & (a.value == 0)) | (b.const & (b.value == 0))
    value = getattr(operator, {"div": "truediv"}.get(name, name))(a.value, b.value)
    return Units(torch.where(a.ids == NO_UNIT, b.ids, a.ids), const, value).with_value(
        const, torch.where(const, value, 0.0)
    )


def layout(call: Call, module: nn.Module | None, analysis: Analysis) -> Any:
    """Entries move and nothing else happens."""
    first = call.args[0]
    many = isinstance(first, (tuple, list))
    parts = list(call.seen) if many else [call.seen[0]]

    def move(pick: Callable[[Units], Tensor]) -> Any:
        moved = [pick(units) for units in parts]
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


def pieces(call: Call, module: None, analysis: Analysis) -> Any:
    """chunk, split, unbind: a position stays in all pieces if it stays in one."""
    sizes = {part.shape for part in call.out}
    if len(sizes) != 1:
        return analysis.refuse(call, "pieces of different sizes")
    parts = layout(call, module, analysis)
    ids = torch.stack([part.ids for part in parts])
    analysis.readers.append(
        lambda keep: ids[:, kept(keep, ids).any(0)].unique() if len(keep) else ids[:0]
    )
    return parts


def item(call: Call, module: None, analysis: Analysis) -> Any:
    """x[...]: an axis that is indexed stays whole."""
    if not isinstance(call.args[0], Tensor):
        return analysis.units[call.node.args[0]][call.args[1]]  # type: ignore[index]
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    seen = call.seen[0]
    if not all(isinstance(i, int | slice) or i is Ellipsis or i is None for i in index):
        return analysis.refuse(call, "an index of tensors")
    out = layout(call, module, analysis)
    axis = 0
    for position, i in enumerate(index):
        if i is Ellipsis:
            axis = seen.ids.ndim - sum(j is not None for j in index[position + 1 :])
        elif i is not None:
            if i != slice(None) and _varies(seen.ids, axis):
                columns = seen.columns(axis).ids
                if isinstance(i, slice):
                    analysis.registry.pin(seen.ids, f"{call.name}: a slice of its units")
                analysis.readers.append(_whole(columns))
            axis += 1
    return out


def _whole(columns: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda keep: columns[kept(keep, columns).any(1)].unique()


def _varies(ids: Tensor, axis: int) -> bool:
    return bool((ids != ids.narrow(axis, 0, 1)).any())


def reduce(call: Call, module: None, analysis: Analysis) -> Any:
    """mean, amax: constant where everything reduced is constant; sums of units merge them."""
    seen = call.seen[0]
    value = _apply(call, module, seen.value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return analysis.refuse(call, "it reduces over everything")
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    low, const = seen.ids.amin(dims, keepdim=True), seen.const
    if bool((seen.ids != low).any()):
        return analysis.refuse(call, "it reduces over units")
    for dim in dims:
        const = const.all(dim, keepdim=True)
    low, const = low.reshape(value.shape), const.reshape(value.shape)
    return Units(low, const, value).with_value(const, value)


_UNARY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus,
    nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.PReLU, nn.Identity, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_CHANNELWISE_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip
_UNARY = (
    torch.relu, torch.tanh, torch.sigmoid, torch.abs, torch.square, torch.neg, torch.exp,
    torch.clamp, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.tanh,
    F.sigmoid, F.softplus, F.hardtanh, F.hardswish, operator.neg, "relu", "tanh", "sigmoid",
    "abs", "square", "neg", "clamp", "relu_", "float", "type_as",
)  # fmt: skip
_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul,
    torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div", "add_", "mul_",
)  # fmt: skip
_LAYOUT = (
    nn.Flatten, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
    torch.unsqueeze, torch.cat, torch.concat, torch.stack, "flatten", "view", "reshape",
    "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "unflatten", "expand",
    "movedim", "clone", "detach",
)  # fmt: skip
_CHANNELWISE = (
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, torch.max_pool2d,
)  # fmt: skip

RULES: dict[Any, Callable[..., Any]] = {
    nn.Linear: linear,
    SelectLinear: select_linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: convolution,
    nn.ConvTranspose2d: convolution,
    nn.ConvTranspose3d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
    nn.MultiheadAttention: multihead,
    F.scaled_dot_product_attention: attention,
    operator.getitem: item,
    torch.mean: reduce,
    "mean": reduce,
    "chunk": pieces,
    "split": pieces,
    "unbind": pieces,
    torch.chunk: pieces,
    torch.split: pieces,
    torch.unbind: pieces,
    F.dropout: elementwise,
    **dict.fromkeys(_UNARY_MODULES + _UNARY, elementwise),
    **dict.fromkeys(_CHANNELWISE_MODULES + _CHANNELWISE, channelwise),
    **dict.fromkeys(_ARITHMETIC, arithmetic),
    **dict.fromkeys(_LAYOUT, layout),
}
