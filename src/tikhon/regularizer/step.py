"""Moves of terms within an optimizer step, for many parameters at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn, optim

from tikhon.penalties import kernels
from tikhon.penalties.base import Proximable, is_metric
from tikhon.regularizer.controller import Controller, Reading
from tikhon.regularizer.metric import (
    Gain,
    as_number,
    decoupled_rate,
    group_of,
    has_gain,
    is_uniform,
    rule_of,
    stationary_gain,
)
from tikhon.regularizer.plan import FusedProx, StepPlan, convex_step_limit, is_euclidean
from tikhon.regularizer.rounding import HALF_TYPES
from tikhon.regularizer.targets import Product, local
from tikhon.regularizer.terms import Binding, Route

_torch: Any = torch  # its _foreach functions are public except by name
_NO_GAIN = "{} has no known stationary gain: tell it by tikhon.register_gain,"
_MIN_DIVISOR = 0.5  # remaining share of a weight above which division inverts shrinking
_STEADY = 1e-12  # relative lag of a buffer of gradients that is none
# with the weights before, unless division restores them
DecayRecord = tuple[Binding, Tensor | None]


def add_gradients(
    plan: StepPlan,
    scale: Tensor | None,
    before: dict[nn.Parameter, Tensor],
    *,
    measure: bool,
    own_decay: dict[int, float] | None = None,
) -> None:
    """Replace each `.grad` by a new tensor with the penalty's gradient added.

    Stores the user's gradients in `before`. `scale` is that of a GradScaler, if the optimizer
    divides by it. What the optimizer can add itself goes to `own_decay`, by parameter id.
    """
    plain: dict[float, dict[int, nn.Parameter]] = {}
    for binding in plan.routes["gradient"]:
        if not binding.is_active:
            continue
        params = binding.target.params
        if any(_gradient(param).is_sparse for param in params):
            raise TypeError(
                f"{binding.name} adds a gradient to {binding.target.name!r}, whose gradient "
                f'is sparse; use how="decoupled", or an Embedding with sparse=False'
            )
        factor: float | Tensor = -1.0 if plan.group(params[0]).get("maximize") else 1.0
        factor = factor if scale is None else factor * scale
        if measure:
            own, ours = (
                _norm([_gradient(p) for p in params]),
                _norm(_penalty_gradients(binding, factor)),
            )
            binding.share = ours / (ours + own)
        if own_decay is not None and binding in plan.like_own_decay and binding.live.is_number:
            key = id(params[0])
            own_decay[key] = own_decay.get(key, 0.0) + cast(float, binding.live.value)
            continue
        for param in params:
            before.setdefault(param, _gradient(param))
        alpha = factor * binding.live.value
        if binding.is_plain_decay and not isinstance(alpha, Tensor):
            (param,) = params
            if id(param) in plain.setdefault(alpha, {}):  # same penalty twice
                own = _gradient(param)
                total = torch.add(own.detach(), param.detach(), alpha=alpha)
                param.grad = attach_graph(total, own)
            plain[alpha][id(param)] = param
        else:
            _add_gradient(binding, factor)
    for alpha, by_id in plain.items():
        params = tuple(by_id.values())
        # the same operation as torch's weight_decay, hence bitwise equal
        gradients = [_gradient(param).detach() for param in params]
        totals = _torch._foreach_add(gradients, [p.detach() for p in params], alpha=alpha)
        for param, total in zip(params, totals):
            param.grad = attach_graph(total, _gradient(param))


def attach_graph(total: Tensor, gradient: Tensor) -> Tensor:
    """Return `total` as a gradient, keeping the gradient's graph if there is one.

    Second-order optimizers (AdaHessian, Sophia) differentiate `.grad`.
    """
    if not gradient.requires_grad:
        return total
    with torch.enable_grad():
        return gradient + (total - gradient).detach()


@torch.no_grad()
def _add_gradient(binding: Binding, factor: float | Tensor) -> None:
    totals = [_gradient(param).clone() for param in binding.target.params]
    added = False  # by a kernel, without full-size temporaries
    if binding.sees_own_shape and not isinstance(factor, Tensor):
        added = kernels.add_gradient_(binding.penalty, local(totals[0]), binding.read(), factor)
    if not added:
        for total, pull in zip(totals, _penalty_gradients(binding, factor)):
            local(total).add_(pull)
    for param, total in zip(binding.target.params, totals):
        param.grad = attach_graph(total, _gradient(param))


def _penalty_gradients(binding: Binding, factor: float | Tensor) -> list[Tensor]:
    """Return the penalty's gradient in the shapes of the parameters."""
    gradient, target = binding.penalty.grad(binding.read()) * factor, binding.target
    if binding.sees_own_shape:
        return [gradient]
    if isinstance(target, Product):
        return target.pull_back(gradient)
    pulls = [torch.empty_like(local(param), dtype=gradient.dtype) for param in target.params]
    target.place_(pulls, gradient)
    return pulls


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all local entries."""
    return torch.stack([local(tensor).norm() for tensor in tensors]).norm()


@torch.no_grad()
def bound_gains(plan: StepPlan, bindings: Sequence[Binding]) -> list[Binding]:
    """Bound the gain of weights under a prox where gradients vanish.

    Called before the optimizer's step, so that its move and the prox share the metric. Returns the
    bindings without optimizer state yet, to repeat after the step.
    """
    assert plan.rule and plan.rule.memory
    fresh: list[Binding] = []
    alike: dict[float, list[Tensor]] = {}
    for binding in bindings:
        if binding.live.is_zero:  # a closure may still set gradients
            continue
        fused = plan.fused.get(binding)
        if fused is not None and fused.is_bounded(plan.optimizer):
            continue
        params = binding.target.params
        if not all(plan.optimizer.state.get(param) for param in params):
            fresh.append(binding)
            continue
        slope = _min_denominator(binding, plan)
        if is_metric(slope):
            slopes = [torch.empty_like(local(param), dtype=slope.dtype) for param in params]
            if binding.sees_own_shape:
                slopes[0].copy_(slope)
            else:
                binding.target.place_(slopes, slope.expand_as(binding.read()))
        else:
            slopes = [slope] * len(params)
        for param, own in zip(params, slopes):
            memory = plan.rule.memory(plan.group(param), plan.optimizer.state[param])
            least = memory.least(own)
            held = local(memory.tensor)
            most = torch.finfo(held.dtype).max  # a 16-bit moment cannot hold every square
            if isinstance(least, float | int):
                alike.setdefault(min(least, most), []).append(held)
            else:
                held.clamp_min_(least.clamp_max(most).to(held))
    for least, tensors in alike.items():
        _torch._foreach_clamp_min_(tensors, least)
    return fresh


def _min_denominator(binding: Binding, plan: StepPlan) -> float | Tensor:
    """Return the lower bound of the denominators of the binding's gain."""
    slope, limit = binding.live.value * binding.steepness, convex_step_limit(binding.penalty)
    if limit is None:
        return slope
    param = binding.target.params[0]
    gain = stationary_gain(plan.optimizer, plan.group(param), plan.optimizer.state[param])
    most = gain.numerator / limit
    if isinstance(most, Tensor) or isinstance(slope, Tensor):
        return torch.maximum(*(torch.as_tensor(x).to(binding.read()) for x in (most, slope)))
    return max(most, slope)


@torch.no_grad()
def apply_decay(
    plan: StepPlan, skipped: Tensor | None, done: list[DecayRecord], *, measure: bool
) -> None:
    """Move against the penalties' gradients by lr, outside the optimizer's metric (AdamW).

    In objective mode (16-bit weights) by the gain instead. Records the moves in `done`.
    """
    # by parameter id; a launch must not write a parameter twice
    launches: list[dict[int, tuple[Binding, float]]] = []
    for binding in plan.active("decay"):
        param = binding.target.params[0]
        lr = _rate(binding, plan)
        lr = lr if skipped is None else lr * (1 - skipped)
        if measure:
            binding.share = (lr * binding.penalty.grad(binding.read())).norm()
        amount = lr * binding.live.value
        if (
            binding.is_plain_decay
            and not isinstance(amount, Tensor)
            and param.dtype not in HALF_TYPES
        ):
            free = next((launch for launch in launches if id(param) not in launch), None)
            if free is None:
                launches.append(free := {})
            free[id(param)] = binding, 1 - amount
            continue
        before = binding.read().clone()
        if binding.is_plain_decay:
            binding.write_(before * (1 - amount))
        else:
            binding.write_(before - lr * binding.penalty.grad(before))
        done.append((binding, before))
    for launch in launches:
        bindings, factors = zip(*launch.values())
        kept = [b.read().clone() if f < _MIN_DIVISOR else None for b, f in launch.values()]
        _torch._foreach_mul_([b.target.params[0] for b in bindings], factors)
        done += zip(bindings, kept)


@torch.no_grad()
def store_weights(plan: StepPlan) -> None:
    """Store the weights before the step, if cautious decay needs the optimizer's direction."""
    for binding in plan.active("cautious"):
        binding.weights_before = binding.read().clone()


@torch.no_grad()
def apply_cautious_decay(plan: StepPlan, skipped: Tensor | None, *, measure: bool) -> None:
    """Decay by lr the entries that the optimizer did not move against the decay.

    Chen et al. (2025), https://arxiv.org/abs/2510.12402.
    """
    for binding in plan.active("cautious"):
        before, binding.weights_before = binding.weights_before, None
        if before is None:  # its gradient appeared within the step
            continue
        lr = _rate(binding, plan)
        lr = lr if skipped is None else lr * (1 - skipped)
        w = binding.read()
        own, ours = before - w, lr * binding.penalty.grad(before)
        ours = torch.where(own * ours < 0, 0, ours)
        if measure:
            binding.share = ours.norm() / (ours.norm() + own.norm())
        binding.write_(w - ours)


@torch.no_grad()
def undo_decay(plan: StepPlan, shrunk: Sequence[DecayRecord]) -> None:
    """Undo `apply_decay` after a failed step, up to rounding."""
    for binding, before in reversed(shrunk):
        if before is None:
            before = binding.read() / (1 - _rate(binding, plan) * binding.live.value)
        binding.write_(before)


def apply_proxes(
    plan: StepPlan, route: Route, skipped: Tensor | None, moved: dict[str, Tensor]
) -> list[Exception]:
    """Replace the weights by their prox, unless the optimizer skipped this step.

    `moved` holds previous weights by binding name where shares are measured. Returns the
    exceptions of proxes, whose weights stay as the optimizer moved them.
    """
    errors: list[Exception] = []
    bindings = plan.active(route)
    kept = [b.read().clone() for b in bindings] if skipped is not None or moved else []
    paddings = [(row, row.clone()) for row in map(_padding_row, bindings) if row is not None]
    jobs: list[tuple[FusedProx, kernels.KernelJob]] = []
    for binding in bindings:
        # use a kernel wherever possible, measured or not: its rounding differs, and a resumed run
        # measures in other steps
        fused = plan.fused.get(binding)
        job = fused and fused.job(plan.optimizer)
        if fused and job:
            jobs.append((fused, job))
            continue
        try:
            _apply_prox(binding, plan)
        except Exception as error:
            errors.append(error)
    if jobs and kernels.run([job for _, job in jobs]):
        for fused, job in jobs:
            if job.min_moment:
                fused.record_bound(plan.optimizer)
    for row, before in paddings:
        row.copy_(before)
    for binding, before in zip(bindings, kept):
        after = binding.read()
        if skipped is not None:
            after = torch.where(skipped.bool(), before, after)
            binding.write_(after)
        if binding.name in moved:
            ours = (after - before).norm()
            binding.share = ours / (ours + (before - moved[binding.name]).norm())
    return errors


def _padding_row(binding: Binding) -> Tensor | None:
    """Return the padding row of an embedding, which no gradient would restore if moved."""
    param, padding = binding.target.params[0], binding.target.padding
    if padding is None:
        return None
    part = local(param)
    return None if part.shape != param.shape else part[padding]


@torch.no_grad()
def _apply_prox(binding: Binding, plan: StepPlan) -> None:
    """Apply one prox, by a kernel on a copy if possible, else by the penalty."""
    if not _prox_in_place(binding, plan):
        penalty = binding.penalty
        assert isinstance(penalty, Proximable)
        step, _ = _step_and_rate(binding, plan)
        w = binding.read()
        done = kernels.prox_in_blocks_(penalty, w, step)
        binding.write_(w if done else penalty.prox(w, step))


def _gain(binding: Binding, plan: StepPlan, param: nn.Parameter) -> Gain:
    """Return the gain of a term on one of its parameters."""
    if binding.how != "objective":
        return Gain(decoupled_rate(binding.how, plan.group(param), binding.peaks.get(param)))
    if param in binding.gains:
        return Gain(binding.gains[param])
    state = plan.optimizer.state[param]
    return binding.lagged(param, stationary_gain(plan.optimizer, plan.group(param), state))


def _rate(binding: Binding, plan: StepPlan) -> float | Tensor:
    """Return the step of a smooth term: a number, or a tensor in the penalty's view."""
    rates = [_gain(binding, plan, param).numerator for param in binding.target.params]
    return rates[0] if _all_equal(rates) else _expand_to_view(binding, rates)


def _all_equal(numbers: Sequence[float | Tensor]) -> bool:
    """Return whether these are one number, or the identical tensor."""
    first = numbers[0]
    plain = not any(isinstance(number, Tensor) for number in numbers)
    return all(number is first or (plain and number == first) for number in numbers)


def _expand_to_view(binding: Binding, numbers: Sequence[float | Tensor]) -> Tensor:
    """Expand a number or tensor for each parameter to the penalty's view of the weights."""
    full = []
    for number, param in zip(numbers, binding.target.params):
        dtype = torch.float32 if param.dtype in HALF_TYPES else param.dtype
        spread = torch.as_tensor(number, dtype=dtype, device=param.device)
        full.append(spread.expand(local(param).shape))
    return binding.arrange(full)


def _prox_in_place(binding: Binding, plan: StepPlan) -> bool:
    """Apply by a kernel without full-size temporaries; False if unsupported."""
    if not binding.has_kernel:
        return False
    (param,) = binding.target.params
    gain = Gain(0.0) if binding.base.constraint else _gain(binding, plan, param)
    if not gain.root:
        return False
    w = binding.read()
    moment = None if gain.moment is None else binding.arrange([gain.moment])
    limit = convex_step_limit(binding.base)
    most = math.inf if limit is None or moment is None else limit
    penalty, step, scale, eps = binding.penalty, gain.numerator, gain.scale, gain.eps
    if not kernels.prox_(penalty, w, step, moment=moment, scale=scale, eps=eps, max_step=most):
        return False
    if w.data_ptr() != local(param).data_ptr():  # a copy: rows="in", 16-bit weights
        binding.write_(w)
    return True


def _step_and_rate(binding: Binding, plan: StepPlan) -> tuple[float | Tensor, float | Tensor]:
    """Return the prox step, a number or tensor in the penalty's view, and its scale."""
    params = binding.target.params
    if is_euclidean(binding, plan.optimizer):
        rate = decoupled_rate(binding.how, plan.group(params[0]))
        return rate, rate
    gains = [_gain(binding, plan, param) for param in params]
    rate = gains[0].numerator
    dense = any(g.moment is not None or getattr(g.numerator, "ndim", 0) for g in gains)
    if not dense and _all_equal([g.numerator for g in gains]):
        return rate, rate
    step = _expand_to_view(binding, [gain.dense() for gain in gains])
    limit = convex_step_limit(binding.penalty)
    if is_metric(rate):
        rate = rate.mean()
    return step if limit is None else step.clamp_max(limit), rate


def reading_of(binding: Binding, plan: StepPlan, before: Tensor | None) -> Reading:
    """Return a controller's reading of a binding; `before` are its previous weights."""
    gain, rate = _step_and_rate(binding, plan)
    return Reading(
        name=binding.target.name,
        penalty=binding.penalty,
        how=cast(Literal["objective", "decoupled"], binding.how),  # others take no controller
        params=binding.target.params,
        weights=binding.read(),
        before=before,
        gain=gain,
        rate=rate,
        arrange=binding.arrange,
    )


def note_gains(plan: StepPlan) -> None:
    """Note the gains that the optimizer will use in this step and then renew."""
    key = plan.rule.renewed if plan.rule else ""
    for binding in plan.routes["prox"] if key else ():
        states = ((p, plan.optimizer.state.get(p)) for p in binding.target.params)
        binding.gains = {p: as_number(state[key].clone()) for p, state in states if state}


def note_lags(plan: StepPlan, momenta: Sequence[object]) -> None:
    """Follow the buffers of gradients while a scheduler moves the momentum, after a step.

    The buffer `b = m b + k g` of a constant gradient lags behind its steady `k g / (1 - m)`.
    """
    for binding in plan.bindings if plan.rule and plan.rule.buffered else ():
        for param in binding.target.params if binding.has_gradients else ():
            group = plan.group(param)
            now = group["momentum"]
            before, held, _ = binding.lags.get(param, (momenta[plan.groups[id(param)]], 1.0, 1.0))
            if now == before and abs(held - 1) < _STEADY:
                binding.lags.pop(param, None)
                continue
            held = (1 - now) * (1 + now * held / (1 - cast(float, before)))
            moved = (1 - now) + now * held if group.get("nesterov") else held
            binding.lags[param] = now, held, moved


def check_rates(plan: StepPlan) -> None:
    """Raise ValueError for a negative or non-finite learning rate."""
    for group in plan.active_groups:
        lr = group.get("lr")
        if lr is None or (isinstance(lr, Tensor) and not lr.is_cpu):
            continue  # computed by the rule; reading it would synchronise the device
        if not 0 <= lr < math.inf:
            kind = type(plan.optimizer).__name__
            raise ValueError(
                f"the learning rate of {kind} must be finite and >= 0, received lr={float(lr)}; "
                f"nothing has moved: look at the schedule that set it"
            )


def note_peaks(plan: StepPlan) -> None:
    """Note the largest learning rates so far, for independent decay; on a device the first."""
    for binding in plan.bindings:
        for param in binding.target.params if binding.how == "independent" else ():
            lr, peak = plan.group(param).get("lr"), binding.peaks.get(param)
            if isinstance(lr, Tensor) and not lr.is_cpu:  # a maximum would synchronise
                binding.peaks.setdefault(param, lr.clone())
            elif lr is not None:
                binding.peaks[param] = float(lr) if peak is None else max(float(lr), float(peak))


def refuse_unsupported(optimizer: optim.Optimizer, binding: Binding) -> None:
    """Raise TypeError if the optimizer's step cannot apply the term exactly."""
    kind, base = type(optimizer).__name__, binding.base
    source = binding.live.source
    if base.real and any(param.is_complex() for param in binding.target.params):
        raise TypeError(
            f"{binding.target.name!r} is complex, and {type(base).__name__} compares numbers, "
            f"which complex ones have no order for; use a penalty of sizes, such as L1 or L2Ball"
        )
    if isinstance(source, Controller) and binding.how in ("independent", "cautious"):
        raise TypeError(
            f"{type(source).__name__} of {binding.name} knows objective and decoupled terms, not "
            f"how={binding.how!r}"
        )
    rates = [group_of(optimizer, param).get("lr") for param in binding.target.params]
    if binding.how in ("decoupled", "cautious") and not base.constraint and None in rates:
        raise TypeError(
            f"{binding.name} would move weights by the learning rate, and {kind} finds its own "
            f'(lr is None): use how="objective" or "independent", or give {kind} an lr'
        )
    if binding.how == "cautious" and binding.route != "cautious" and not base.constraint:
        raise TypeError(
            f"{binding.name} acts by its prox, and cautious decay by the sign of a gradient: use "
            f"a smooth penalty, such as L2"
        )
    if isinstance(source, Controller) and binding.how == "objective" and not has_gain(optimizer):
        raise TypeError(
            f"{type(source).__name__} of {binding.name} works with the optimizer's gain, and "
            f'{_NO_GAIN.format(kind)} or give the term how="decoupled"'
        )
    if binding.route == "gradient":
        return
    if isinstance(optimizer, optim.LBFGS):
        raise TypeError(
            f"{binding.name} would move weights behind the line search of {kind}, whose curvature "
            f"pairs would be wrong; with {kind} use a smooth penalty in objective mode, such as L2"
        )
    if binding.how != "objective" or binding.route != "prox":
        return
    if not has_gain(optimizer):
        _refuse_without_orthant(optimizer, binding)
        return
    if is_uniform(optimizer):
        return
    group, rule = group_of(optimizer, binding.target.params[0]), rule_of(optimizer)
    if rule and rule.memory and 0 in (group.get("alpha"), group.get("betas", (1, 1))[-1]):
        raise TypeError(
            f"{binding.name} acts in the metric of {kind}, which with a decay of 0 of its squared "
            f"gradients is of one batch, without end where a gradient is 0; give {kind} a decay "
            f'above 0 (0.999 is usual), or use how="decoupled"'
        )
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


def _refuse_without_orthant(optimizer: optim.Optimizer, binding: Binding) -> None:
    """Raise TypeError for terms that require the optimizer's gain."""
    kind, name = type(optimizer).__name__, type(binding.base).__name__
    if isinstance(optimizer, optim.SparseAdam):
        raise TypeError(
            f"{binding.name} needs the gradient of every weight, and those of {kind} are sparse; "
            f'use how="decoupled", or an Embedding with sparse=False and Adam'
        )
    if getattr(type(binding.base), "slopes", None) is Proximable.slopes:
        raise TypeError(
            f"{name} holds zeros by more than a slope, so it needs the optimizer's gain, and "
            f'{_NO_GAIN.format(kind)} use how="decoupled", or an optimizer such as AdamW or SGD'
        )
    if any(param.is_complex() for param in binding.target.params):
        raise TypeError(
            f"{binding.target.name!r} is complex, and {_NO_GAIN.format(kind)} use "
            f'how="decoupled", or SGD'
        )


def _gradient(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad
