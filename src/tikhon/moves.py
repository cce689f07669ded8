"""The three moves by which a term acts within one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from tikhon.metric import UNIFORM, Gain, stationary_gain
from tikhon.penalties import kernels
from tikhon.penalties.base import Penalty, Proximable
from tikhon.penalties.constraints import TopK
from tikhon.penalties.elementwise import L2, MCP, SCAD
from tikhon.targets import local
from tikhon.terms import Binding

Group = dict[str, Any]
GroupOf = Callable[[nn.Parameter], Group]


def add_gradient(binding: Binding, group: Group, scale: Tensor | None, measure: bool) -> None:
    """Put `grad + gradient of the penalty` in the place of `.grad`, in a tensor of its own.

    `scale` is what a GradScaler has multiplied the gradients by, where the optimizer divides.
    """
    factor: float | Tensor = -1.0 if group.get("maximize") else 1.0
    factor = factor if scale is None else factor * scale
    params = binding.target.params
    for param in params:
        if param.grad is not None and param.grad.is_sparse:
            raise TypeError(
                f"{binding.name} adds a gradient to {binding.target.name!r}, whose gradient is "
                f'sparse; use how="decoupled", or an Embedding with sparse=False'
            )
    if measure:
        own = binding.arrange([_gradient(p) for p in params]).norm()
        ours = (binding.penalty.grad(binding.read()) * factor).norm()
        binding.share = ours / (ours + own)
    alpha = factor * binding.dial.value
    if is_plain_decay(binding) and not isinstance(alpha, Tensor):
        # the very operation of torch's own weight_decay, hence equal to it bit for bit
        params[0].grad = torch.add(_gradient(params[0]), params[0].detach(), alpha=alpha)
        return
    totals = [_gradient(param).clone() for param in params]
    added = binding.penalty.grad(binding.read()) * factor
    if binding.whole:
        local(totals[0]).add_(added)
    else:
        binding.target.place_(totals, binding.target.arrange(totals) + added)
    for param, total in zip(params, totals):
        param.grad = total


def shrink(binding: Binding, lr: float | Tensor, measure: bool) -> None:
    """Move against the penalty's gradient by lr, outside the optimizer's metric (AdamW)."""
    w = binding.read()
    if measure:
        binding.share = (lr * binding.penalty.grad(w)).norm()
    if is_plain_decay(binding):
        binding.write_(w.mul_(1 - lr * binding.dial.value))
    else:
        binding.write_(w - lr * binding.penalty.grad(w))


def settle(
    binding: Binding,
    optimizer: optim.Optimizer,
    group_of: GroupOf,
    skipped: Tensor | None,
    moved_from: Tensor | None,
) -> None:
    """Replace the weights by their prox, unless the optimizer has skipped this step."""
    before = None if skipped is None and moved_from is None else binding.read().clone()
    # a kernel wherever there is one, measured or not: it rounds in its own way, and a resumed run
    # measures in other steps
    if not _settle_in_place(binding, optimizer, group_of):
        penalty = binding.penalty
        assert isinstance(penalty, Proximable)
        step, _ = gain_of(binding, optimizer, group_of)
        binding.write_(penalty.prox(binding.read(), step))
    if before is None:
        return
    after = binding.read()
    if skipped is not None:
        after = torch.where(skipped.bool(), before, after)
        binding.write_(after)
    if moved_from is not None:
        ours = (after - before).norm()
        binding.share = ours / (ours + (before - moved_from).norm())


def _settle_in_place(binding: Binding, optimizer: optim.Optimizer, group_of: GroupOf) -> bool:
    """The same by a kernel without full-size temporaries; False if there is none for the case."""
    if binding.route != "prox" or len(binding.target.params) != 1:
        return False
    (param,) = binding.target.params
    if binding.how == "decoupled":
        gain = Gain(group_of(param)["lr"])
    else:
        gain = stationary_gain(optimizer, group_of(param), optimizer.state[param])
    if not gain.root:
        return False
    w = binding.read()
    moment = None if gain.moment is None else binding.arrange([gain.moment])
    step, scale, eps = gain.numerator, gain.scale, gain.eps
    if not kernels.prox_(binding.penalty, w, step, moment=moment, scale=scale, eps=eps):
        return False
    if w.data_ptr() != local(param).data_ptr():  # a copy: rows="in", 16-bit weights
        binding.write_(w)
    return True


def gain_of(
    binding: Binding, optimizer: optim.Optimizer, group_of: GroupOf
) -> tuple[float | Tensor, float | Tensor]:
    """The step of the prox, one number or a tensor as the penalty sees the weights; its scale."""
    params = binding.target.params
    if binding.how == "decoupled" or _ignores_metric(binding):
        lr = group_of(params[0])["lr"]
        return lr, lr
    gains = [stationary_gain(optimizer, group_of(p), optimizer.state[p]) for p in params]
    if all(gain.moment is None for gain in gains) and len({g.numerator for g in gains}) == 1:
        return gains[0].numerator, gains[0].numerator
    full = [
        torch.as_tensor(gain.dense(), dtype=p.dtype, device=p.device).expand(local(p).shape)
        for gain, p in zip(gains, params)
    ]
    step = binding.arrange(full)
    limit = _convex_limit(binding.penalty)
    return step if limit is None else step.clamp_max(limit), gains[0].numerator


def _convex_limit(penalty: Penalty) -> float | None:
    """For penalties with a flat part half of the step up to which the prox has one minimum.

    Where gradients vanish an adaptive step has no bound, and the prox would jump across the
    valley to zero. Weights in the flat part do not feel the limit.
    """
    if isinstance(penalty, MCP):
        return penalty.gamma / 2
    if isinstance(penalty, SCAD):
        return (penalty.a - 1) / 2
    return None


def refuse_unsupported(optimizer: optim.Optimizer, binding: Binding) -> None:
    """Raise TypeError where the optimizer's step cannot carry the term exactly."""
    kind, base = type(optimizer).__name__, binding.base
    if binding.route == "gradient":
        return
    if isinstance(optimizer, optim.LBFGS):
        raise TypeError(
            f"{binding.name} would move weights behind the line search of {kind}, whose curvature "
            f"pairs would be wrong; with {kind} use a smooth penalty in objective mode, such as L2"
        )
    if binding.how == "decoupled" or binding.route == "decay" or _ignores_metric(binding):
        return
    rule = stationary_gain.dispatch(type(optimizer))
    if rule is stationary_gain.dispatch(object):
        rule(optimizer, {}, {})
    if isinstance(optimizer, UNIFORM):
        return
    if not base.diagonal:
        raise TypeError(
            f"{type(base).__name__} has no exact prox in the metric of {kind} (a step of its own "
            f'for each weight); use Term(..., how="decoupled"), or an optimizer such as SGD'
        )
    if any(param.is_complex() for param in binding.target.params):
        raise TypeError(
            f"{kind} has separate steps for the real and imaginary parts of "
            f'{binding.target.name!r}, the modulus has none; use how="decoupled", or SGD'
        )


def _ignores_metric(binding: Binding) -> bool:
    """Whether the projection is the same in every metric, or TopK, which goes by size alone.

    In a metric whose steps grow where gradients vanish TopK would drop the weights that fit.
    """
    return binding.base.constraint and (binding.base.elementwise or isinstance(binding.base, TopK))


def is_plain_decay(binding: Binding) -> bool:
    """Whether the term is weight decay in torch's own sense."""
    base = binding.base
    return type(base) is L2 and base.center is None and base.weights is None


def _gradient(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad
