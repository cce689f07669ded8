"""Rules for normalisations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .analysis import Analysis, Operation
from .units import Units, entry_mask

BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm


def batch_norm(call: Operation, module: BatchNorm, analysis: Analysis) -> object:
    """An affine map of each channel (evaluation mode)."""
    (source,) = call.inputs
    if module.running_mean is None:
        return analysis.refuse(call, "it normalises by the batch even in evaluation")
    return _scaled(source, module, source.const, call.evaluate(module, source.value))


def _scaled(
    source: Units, module: BatchNorm | InstanceNorm | nn.GroupNorm, const: Tensor, value: Tensor
) -> Units:
    """The constants of a norm of channels: where its scale is zero they are its shifts."""
    if module.weight is not None:
        shape = (-1,) + (1,) * (value.ndim - 2)
        off = (module.weight.detach() == 0).view(shape)
        value = torch.where(off, module.bias.detach().double().view(shape), value)
        const = const | off
    return source.with_value(const, value)


def layer_norm(call: Operation, module: nn.LayerNorm | nn.RMSNorm, analysis: Analysis) -> object:
    """LayerNorm, RMSNorm: of a row each entry is read for the moments, unless it is a constant."""
    (source,) = call.inputs
    if len(module.normalized_shape) != 1:
        return analysis.refuse(call, "it normalises over more than one axis")
    fixed, _ = source.uniform(-1)
    ids = source.columns(-1)
    analysis.readers.append(lambda keep: ids[entry_mask(keep, ids).any(1)][:, ~fixed].unique())
    const = torch.zeros(len(fixed), dtype=torch.bool)
    value = torch.zeros(len(fixed)).double()
    if module.weight is not None:
        const = module.weight.detach() == 0
        bias = getattr(module, "bias", None)
        value = value if bias is None else bias.detach().double()
    shape = source.ids.shape
    return source.with_value(const.expand(shape), value.expand(shape))


def group_norm(call: Operation, module: nn.GroupNorm, analysis: Analysis) -> object:
    """Every channel is read for the moments of its group, unless it is one constant."""
    (source,) = call.inputs
    columns, groups = source.columns(1), module.num_groups
    fixed, _ = source.uniform(1)

    def wanted(keep: Tensor) -> Tensor:
        stays = entry_mask(keep, columns).any(0).view(groups, -1).any(1)
        return stays.repeat_interleave(len(fixed) // groups) & ~fixed

    analysis.reads(columns, wanted)
    # a group of constants alone is constant
    const = source.const.unflatten(1, (groups, -1)).flatten(2).all(2)
    const = const.repeat_interleave(len(fixed) // groups, 1)
    value = call.evaluate(module, source.value)
    const = const.view(*const.shape, *[1] * (call.out.ndim - 2)).expand(source.ids.shape)
    return _scaled(source, module, const, value)


def instance_norm(call: Operation, module: InstanceNorm, analysis: Analysis) -> object:
    """Every channel for itself: what is constant becomes the bias."""
    if call.out.ndim != _AXES[type(module)]:
        return analysis.refuse(call, "its input has no batch axis")
    (source,) = call.inputs
    const = source.const.flatten(2).all(2)
    const = const.view(*const.shape, *[1] * (call.out.ndim - 2))
    const, value = const.expand(source.ids.shape), call.evaluate(module, source.value)
    return _scaled(source, module, const, value)


_AXES = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
