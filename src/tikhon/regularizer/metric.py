"""The stationary gain of an optimizer: the metric in which a prox keeps the objective's minimum.

The gain is the factor by which a constant gradient moves a weight once the optimizer's state is
steady, read from its hyper-parameters and state after the step. `stationary_gain.register` takes
the rule of an optimizer of your own.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple

from torch import Tensor, optim

from tikhon.regularizer.targets import local

Number = float | Tensor
UNIFORM = (optim.SGD, optim.ASGD)  # the same gain for every weight of a parameter


class Gain(NamedTuple):
    """`numerator / (sqrt(moment) / scale + eps)`, or just the numerator without a moment.

    Kept in parts so that a kernel can fuse it; `dense()` is the number or the full tensor. With
    `root=False` the moment enters without the square root.
    """

    numerator: Number
    moment: Tensor | None = None
    scale: Number = 1.0
    eps: float = 0.0
    root: bool = True

    def dense(self) -> Number:
        """The gain as one number or as a tensor of the parameter's (local) shape."""
        if self.moment is None:
            return self.numerator
        moment = local(self.moment)
        denominator = (moment.sqrt() if self.root else moment) / self.scale + self.eps
        return self.numerator / denominator


@singledispatch
def stationary_gain(optimizer: optim.Optimizer, group: dict[str, Any], state: Any) -> Gain:
    """The gain for one parameter, from its group and its state after the step.

    Raises TypeError for an optimizer whose step is not a gain times the gradient.

    >>> import torch
    >>> w = nn.Parameter(torch.zeros(2))
    >>> sgd = optim.SGD([w], lr=0.1, momentum=0.9)
    >>> round(stationary_gain(sgd, sgd.param_groups[0], {}).dense(), 6)
    1.0
    """
    raise TypeError(
        f"{type(optimizer).__name__} has no known stationary gain, so a prox cannot keep the "
        f'objective\'s minimum; use how="decoupled", an optimizer such as AdamW or SGD, or '
        f"register its rule with tikhon.regularizer.metric.stationary_gain.register"
    )


@stationary_gain.register
def _(optimizer: optim.SGD, group: dict[str, Any], state: Any) -> Gain:
    kept = 1 - group["dampening"] if group["momentum"] else 1
    return Gain(group["lr"] * kept / (1 - group["momentum"]))


@stationary_gain.register
def _(optimizer: optim.Adam, group: dict[str, Any], state: Any) -> Gain:
    moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    correction = 1 - group["betas"][1] ** number(state["step"])
    return Gain(group["lr"], moment, correction**0.5, group["eps"])


@stationary_gain.register
def _(optimizer: optim.NAdam, group: dict[str, Any], state: Any) -> Gain:
    beta1, beta2 = group["betas"]
    step, product = number(state["step"]), number(state["mu_product"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * group["momentum_decay"]))
    now = (1 - mu) / (1 - product)
    carried = mu_next * (1 - beta1**step) / (1 - product * mu_next)
    scale = (1 - beta2**step) ** 0.5
    return Gain(group["lr"] * (now + carried), state["exp_avg_sq"], scale, group["eps"])


@stationary_gain.register
def _(optimizer: optim.RAdam, group: dict[str, Any], state: Any) -> Gain:
    beta2, step = group["betas"][1], number(state["step"])
    correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    # before the variance estimate is long enough (step 5 or so) RAdam is SGD with momentum
    adaptive = length > 5
    if isinstance(adaptive, Tensor):
        adaptive = bool(adaptive)
    if not adaptive:
        return Gain(group["lr"])
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    numerator = group["lr"] * rectified**0.5 * correction**0.5
    return Gain(numerator, state["exp_avg_sq"], 1.0, group["eps"])


@stationary_gain.register
def _(optimizer: optim.Adamax, group: dict[str, Any], state: Any) -> Gain:
    return Gain(group["lr"], state["exp_inf"], root=False)


@stationary_gain.register
def _(optimizer: optim.RMSprop, group: dict[str, Any], state: Any) -> Gain:
    moment = state["square_avg"]
    if group["centered"]:
        moment = moment.addcmul(state["grad_avg"], state["grad_avg"], value=-1).clamp_min_(0)
    return Gain(group["lr"] / (1 - group["momentum"]), moment, eps=group["eps"])


@stationary_gain.register
def _(optimizer: optim.Adagrad, group: dict[str, Any], state: Any) -> Gain:
    lr = group["lr"] / (1 + (number(state["step"]) - 1) * group["lr_decay"])
    return Gain(lr, state["sum"], eps=group["eps"])


@stationary_gain.register
def _(optimizer: optim.Adadelta, group: dict[str, Any], state: Any) -> Gain:
    # undo the last update of acc_delta, by a gradient of the size that square_avg remembers
    rho, eps = group["rho"], group["eps"]
    square, after = local(state["square_avg"]), local(state["acc_delta"])
    relative = square / (square + eps)
    before = (after - (1 - rho) * eps * relative) / (rho + (1 - rho) * relative)
    return Gain(group["lr"] * (before.clamp_min(0) + eps).sqrt(), square + eps)


@stationary_gain.register
def _(optimizer: optim.ASGD, group: dict[str, Any], state: Any) -> Gain:
    # the state already holds the eta of the next step
    lr, steps = group["lr"], number(state["step"]) - 1
    return Gain(lr / (1 + group["lambd"] * lr * steps) ** group["alpha"])


def has_gain(optimizer: optim.Optimizer) -> bool:
    """Whether a rule is registered for this kind of optimizer."""
    return stationary_gain.dispatch(type(optimizer)) is not stationary_gain.dispatch(object)


def number(counter: Any) -> Number:
    """A step counter as a float where that needs no transfer from a device."""
    if isinstance(counter, Tensor) and counter.is_cpu:
        return counter.item()
    return counter
