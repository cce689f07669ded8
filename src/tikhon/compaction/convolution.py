"""Rules for convolutions, pooling and resizing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .analysis import Analysis, Operation, in_double
from .units import Units, entry_mask

Convolution = nn.modules.conv._ConvNd


def convolution(call: Operation, module: Convolution, analysis: Analysis) -> object:
    """A convolution: over all channels, in groups, or one filter a channel."""
    (source,) = call.inputs
    weight = module.weight.detach()
    if call.out.ndim != weight.ndim:
        return analysis.refuse(call, "its input has no batch axis")
    if is_depthwise(module):
        return _depthwise(call, module, source)
    blocks = grouped(module, weight)
    fixed, value = foldable(module, source)
    ids = analysis.produce(call.name, 1, call.out.shape)
    rows = ids.movedim(1, -1).reshape(-1, ids.shape[1])[0]
    live = torch.block_diag(*(blocks != 0).flatten(3).any(3))
    columns = source.columns(1)
    analysis.reads(columns, lambda keep: live[entry_mask(keep, rows)].any(0) & ~fixed)
    if module.groups > 1:
        analysis.shape_constraints.append(_keep_equal_groups(rows, columns, module.groups))
    const = ~(live & ~fixed).any(1)
    folded = summed(blocks) @ torch.where(fixed, value, 0.0)
    if module.bias is not None:
        folded = folded + module.bias.detach().double()
    shape = (-1,) + (1,) * (ids.ndim - 2)
    return Units(ids, const.view(shape).expand(ids.shape), folded.view(shape).expand(ids.shape))


def is_depthwise(module: Convolution) -> bool:
    """One filter a channel."""
    return module.groups == module.in_channels == module.out_channels > 1


def grouped(module: Convolution, weight: Tensor) -> Tensor:
    """The weight as (groups, out, in, ...), channels of one group each."""
    blocks = weight.unflatten(0, (module.groups, -1))
    return blocks.transpose(1, 2) if module.transposed else blocks


def summed(blocks: Tensor) -> Tensor:
    """What a constant input is multiplied by: (all out, all in), float64."""
    return torch.block_diag(*blocks.double().flatten(3).sum(3))


def _keep_equal_groups(rows: Tensor, ids: Tensor, groups: int) -> Callable[[Tensor], Tensor]:
    """Groups of one size: of those that stay, the smaller ones keep a few units more."""

    def wanted(keep: Tensor) -> Tensor:
        out = keep[rows].view(groups, -1)
        inputs = entry_mask(keep, ids).any(0).view(groups, -1)
        stays = out.any(1) | inputs.any(1)
        outputs, columns = _equalized(out, stays), _equalized(inputs, stays)
        return torch.cat([rows[outputs], ids[:, columns].flatten()])

    return wanted


def _equalized(flags: Tensor, stays: Tensor) -> Tensor:
    """The flags, with as many in every group that stays as in the largest one."""
    count = flags.sum(1).max().clamp(min=1)
    order = flags.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    return (flags | ((ranks < count) & stays[:, None])).flatten()


def foldable(module: Convolution, source: Units) -> tuple[Tensor, Tensor]:
    """Channels whose constant a convolution turns into a constant: the border sees zeros."""
    fixed, value = source.uniform(1)
    padded = module.padding_mode == "zeros" and module.padding not in ("valid",)
    padded = padded and (module.padding == "same" or any(module.padding))
    return (fixed & (value == 0) if padded or module.transposed else fixed), value


def _depthwise(call: Operation, module: Convolution, source: Units) -> Units:
    dead = (module.weight.detach() == 0).flatten(1).all(1)
    bias = torch.zeros(len(dead)) if module.bias is None else module.bias.detach()
    shape = (-1,) + (1,) * (call.out.ndim - 2)
    with torch.no_grad():
        value = in_double(module)(source.value)
    fixed, _ = source.uniform(1)
    ids = _channel_ids(source, call.out.shape)
    value = torch.where(dead.view(shape), bias.double().view(shape), value)
    return Units.of(ids, (dead | fixed).view(shape).expand(ids.shape), value)


def _channel_ids(source: Units, shape: torch.Size) -> Tensor:
    first = source.ids.flatten(2)[:, :, 0]
    return first.view(*first.shape, *(1,) * (len(shape) - 2)).expand(shape)


def channelwise(call: Operation, module: nn.Module | None, analysis: Analysis) -> object:
    """Pooling, resizing: each channel for itself, over the axes after the second."""
    source = call.inputs[0]
    if not isinstance(call.out, Tensor):
        return analysis.refuse(call, "more than one result")
    flat = source.ids.flatten(2) if source.ids.ndim > 2 else None
    if flat is None or call.out.ndim < 3 or call.out.shape[:2] != source.ids.shape[:2]:
        return analysis.refuse(call, "its input is not (batch, channels, ...)")
    if bool((flat != flat[:, :, :1]).any()):
        return analysis.refuse(call, "units differ inside a channel")
    value = call.evaluate(module, source.value)
    const = source.const.flatten(2).all(2)
    const = const.view(*const.shape, *(1,) * (call.out.ndim - 2)).expand(call.out.shape)
    return Units.of(_channel_ids(source, call.out.shape), const, value)
