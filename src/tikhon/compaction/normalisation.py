"""Rules for normalisations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .analysis import Analysis, Operation
from .units import Units, kept

BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm


def batch_norm(call: Operation, module: BatchNorm, analysis: Analysis) -> object:
    """An affine map of each channel (evaluation mode)."""
    (seen,) = call.seen
    if module.running_mean is None:
        return analysis.refuse(call, "it normalises by the batch even in evaluation")
    return _scaled(seen, module, seen.const, call.evaluate(module, seen.value))


def _scaled(
    seen: Units, module: BatchNorm | InstanceNorm | nn.GroupNorm, const: Tensor, value: Tensor
) -> Units:
    """The constants of a norm of channels: where its scale is zero they are its shifts."""
    if module.weight is not None:
        shape = (-1,) + (1,) * (value.ndim - 2)
        off = (module.weight.detach() == 0).view(shape)
        value = torch.where(off, module.bias.detach().double().view(shape), value)
        const = const | off
    return seen.with_value(const, value)


def layer_norm(call: Operation, module: nn.LayerNorm | nn.RMSNorm, analysis: Analysis) -> object:
    """LayerNorm, RMSNorm: each entry is read for the moments, unless it is a constant."""
    (seen,) = call.seen
    if len(module.normalized_shape) != 1:
        return analysis.refuse(call, "it normalises over more than one axis")
    fixed, _ = seen.uniform(-1)
    ids = seen.columns(-1)
    analysis.reads(ids, lambda keep: ~fixed & kept(keep, ids).any())
    const = torch.zeros(len(fixed), dtype=torch.bool)
    value = torch.zeros(len(fixed)).double()
    if module.weight is not None:
        const = module.weight.detach() == 0
        bias = getattr(module, "bias", None)
        value = value if bias is None else bias.detach().double()
    shape = seen.ids.shape
    return seen.with_value(const.expand(shape), value.expand(shape))


def group_norm(call: Operation, module: nn.GroupNorm, analysis: Analysis) -> object:
    """Every channel is read for the moments of its group, unless it is one constant."""
    (seen,) = call.seen
    columns, groups = seen.columns(1), module.num_groups
    fixed, _ = seen.uniform(1)

    def wanted(keep: Tensor) -> Tensor:
        stays = kept(keep, columns).any(0).view(groups, -1).any(1)
        return stays.repeat_interleave(len(fixed) // groups) & ~fixed

    analysis.reads(columns, wanted)
    # a group of constants alone is constant
    const = seen.const.unflatten(1, (groups, -1)).flatten(2).all(2)
    const = const.repeat_interleave(len(fixed) // groups, 1)
    value = call.evaluate(module, seen.value)
    const = const.view(*const.shape, *[1] * (call.out.ndim - 2)).expand(seen.ids.shape)
    return _scaled(seen, module, const, value)


def instance_norm(call: Operation, module: InstanceNorm, analysis: Analysis) -> object:
    """Every channel for itself: what is constant becomes the bias."""
    if call.out.ndim != _AXES[type(module)]:
        return analysis.refuse(call, "its input has no batch axis")
    (seen,) = call.seen
    const = seen.const.flatten(2).all(2)
    const = const.view(*const.shape, *[1] * (call.out.ndim - 2))
    const, value = const.expand(seen.ids.shape), call.evaluate(module, seen.value)
    return _scaled(seen, module, const, value)


_AXES = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
