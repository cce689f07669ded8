"""Rules for attention: a head is a unit."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .analysis import Analysis, Operation
from .units import Units, entry_mask, varies


def attention(call: Operation, module: None, analysis: Analysis) -> object:
    """softmax(q k') v of (batch, heads, length, size): a head is a unit."""
    parts = call.inputs[:3]
    if call.out.ndim != 4 or len(call.args) < 3 or len({p.ids.shape[1] for p in parts}) > 1:
        return analysis.refuse(call, "not (batch, heads, length, size) with as many heads each")
    if any(mask.ids.ndim > 2 and mask.ids.shape[-3] > 1 for mask in call.inputs[3:]):
        return analysis.refuse(call, "a mask for each head")
    _keep_masks(call, analysis)
    for units in parts:
        heads = units.columns(1)
        analysis.registry.merge(heads, heads[:1])
        analysis.registry.merge(heads[0], parts[2].ids[0, :, 0, 0])
    v = parts[2]
    fixed = (v.const & (v.value == v.value[:1, :, :1])).all(2, keepdim=True).all(0, keepdim=True)
    shape, ids, value = call.out.shape, v.ids[:1, :, :1], v.value[:1, :, :1]
    return Units.of(ids.expand(shape), fixed.expand(shape), value.expand(shape))


def _keep_masks(call: Operation, analysis: Analysis) -> None:
    """What follows query, key and value has positions, not units: all of it stays."""
    for mask in call.inputs[3:]:
        analysis.registry.needed.update(mask.ids.unique().tolist())


def product(call: Operation, module: None, analysis: Analysis) -> object:
    """q k' or a v of (..., rows, columns): all of a matrix is one unit, which a head is then."""
    a, *others = call.inputs
    b = others[0] if others else a
    matrices = len(call.args) == 2 and all(isinstance(x, Tensor) for x in call.args)
    if not matrices or min(a.ids.ndim, b.ids.ndim) < 3 or a.ids.shape[:-2] != b.ids.shape[:-2]:
        return analysis.refuse(call, "a product other than of (..., rows, columns) matrices")
    for units in (a, b):
        analysis.registry.merge(units.ids, units.ids[..., :1, :1])
    ids = b.ids[..., :1, :].expand(call.out.shape)
    analysis.registry.merge(ids[..., :1, :1], a.ids[..., :1, :1])
    zero = (a.const & (a.value == 0)).all(-1, keepdim=True)
    zero = zero | (b.const & (b.value == 0)).all(-2, keepdim=True)
    known = a.const.all(-1, keepdim=True) & b.const.all(-2, keepdim=True)
    value = torch.where(known, a.value @ b.value, 0.0)
    first: object = call.node.args
    if first[0] in analysis.averaging:  # the average of equal rows is that row
        level = (b.const & (b.value == b.value[..., :1, :])).all(-2, keepdim=True)
        value = torch.where(level, b.value[..., :1, :].expand(call.out.shape), value)
        known = known | level
    const = (known | zero).expand(call.out.shape)
    return Units.of(ids, const, torch.where(zero, 0.0, value))


def softmax(call: Operation, module: nn.Module | None, analysis: Analysis) -> object:
    """Along an axis of one unit; the last axis then sums to one."""
    (source,) = call.inputs
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    dim = getattr(module, "dim", dim)
    if dim is None or varies(source.ids, dim):
        return analysis.refuse(call, "it normalises over units")
    if dim in (-1, call.out.ndim - 1):
        analysis.averaging.add(call.node)
    const = source.const.all(dim, keepdim=True).expand(source.ids.shape)
    return source.with_value(const, call.evaluate(module, source.value))


def masked_fill(call: Operation, module: None, analysis: Analysis) -> object:
    """masked_fill with a mask that is a constant and the same for all units."""
    source = call.inputs[0]
    if len(call.inputs) != 2 or not is_broadcast_constant(call.inputs[1], source):
        return analysis.refuse(call, "its mask is computed or differs between units")
    analysis.registry.needed.update(call.inputs[1].ids.unique().tolist())
    mask, value = call.inputs[1].value.bool(), call.args[2]
    const, filled = source.const | mask, torch.where(mask, float(value), source.value)
    return Units(source.ids, const, filled)


def is_broadcast_constant(other: Units, units: Units) -> bool:
    """Whether `other` is a constant that is broadcast along every axis on which units differ."""
    if not bool(other.const.all()) or other.ids.ndim > units.ids.ndim:
        return False
    missing = units.ids.ndim - other.ids.ndim
    sizes = (1,) * missing + tuple(other.ids.shape)
    return all(size == 1 or not varies(units.ids, axis) for axis, size in enumerate(sizes))


def multihead(call: Operation, module: nn.MultiheadAttention, analysis: Analysis) -> object:
    """nn.MultiheadAttention: its heads are units of its own, its output columns are new ones."""
    reason = _unsupported(call, module)
    if reason:
        return analysis.refuse(call, reason)
    _keep_masks(call, analysis)
    parts = Heads.of(module, call.inputs[2])
    heads = analysis.produce(f"{call.name} heads", 0, torch.Size([module.num_heads]))
    ids = analysis.produce(call.name, -1, call.out[0].shape)
    rows = ids.reshape(-1, ids.shape[-1])[0]
    analysis.heads[call.name] = heads

    def wanted(keep: Tensor) -> Tensor:
        columns = (parts.out[entry_mask(keep, rows)] != 0).any(0) & ~parts.const
        return heads[columns.view(len(heads), -1).any(1)]

    analysis.readers.append(wanted)
    for weight, source in zip(parts.inputs, call.inputs, strict=False):
        analysis.reads(source.columns(-1), _head_reader(weight, source, heads))
    const = ~((parts.out != 0) & ~parts.const).any(1)
    value = parts.out.double() @ parts.value + parts.bias
    return (Units(ids, const.expand(ids.shape), value.expand(ids.shape)), None)


def _unsupported(call: Operation, module: nn.MultiheadAttention) -> str:
    weights_used = any(
        user.target is operator.getitem and user.args[1] == 1 and user.users
        for user in call.node.users
    )
    mask = call.kwargs.get("attn_mask", call.args[5] if len(call.args) > 5 else None)
    cases = {
        "its attention weights are used": weights_used,
        "key and value sizes of their own": module.in_proj_weight is None,
        "bias_k or add_zero_attn": module.bias_k is not None or module.add_zero_attn,
        "a mask for each head": mask is not None and mask.ndim > 2,
        "keyword or unbatched inputs": len(call.args) < 3 or call.out[0].ndim != 3,
    }
    return next((reason for reason, holds in cases.items() if holds), "")


def _head_reader(weight: Tensor, source: Units, heads: Tensor) -> Callable[[Tensor], Tensor]:
    fixed, _ = source.uniform(-1)
    live = (weight != 0).view(len(heads), -1, weight.shape[1]).any(1)
    return lambda keep: live[entry_mask(keep, heads)].any(0) & ~fixed


@dataclass(frozen=True)
class Heads:
    """The weights of an attention block, and what its value projection is constant at."""

    inputs: tuple[Tensor, Tensor, Tensor]  # query, key, value: (embedding, embedding)
    biases: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    bias: Tensor  # of the output, float64
    const: Tensor  # (embedding,) columns of `out` that see a constant
    value: Tensor

    @classmethod
    def of(cls, module: nn.MultiheadAttention, source: Units) -> Heads:
        """The parts of a module whose value argument is `source`."""
        weight, size = module.in_proj_weight.detach(), module.embed_dim
        bias = torch.zeros(3 * size) if module.in_proj_bias is None else module.in_proj_bias
        fixed, value = source.uniform(-1)
        wv, bv = weight[2 * size :], bias[2 * size :].detach().double()
        const = ~((wv != 0) & ~fixed).any(1)
        value = wv.double() @ torch.where(fixed, value, 0.0) + bv
        out = module.out_proj
        last = torch.zeros(size) if out.bias is None else out.bias.detach()
        return cls(
            weight.split(size),  # type: ignore[arg-type]
            bias.detach().split(size),  # type: ignore[arg-type]
            out.weight.detach(),
            last.double(),
            const,
            torch.where(const, value, 0.0),
        )
