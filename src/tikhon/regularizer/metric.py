"""The stationary gain of an optimizer: the metric in which a prox keeps the objective's minimum.

The gain is the factor by which a constant gradient moves a weight once the optimizer's state is
steady, computed from hyper-parameters and state after the step. `register_gain` adds a rule for
a custom optimizer.

An adaptive gain is unbounded where gradients are zero: one prox step would erase embedding rows
that no batch contained. Second moments of weights under a penalty of slope `s` are therefore kept
large enough that the gain is at most lr / s (see `Memory`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn, optim

from tikhon.regularizer.targets import local

Number = float | Tensor
Group = dict[str, Any]
State = Any  # per-parameter state of an optimizer: a dict in torch


class Gain(NamedTuple):
    """`numerator / (sqrt(moment) / scale + eps)`, or just the numerator without a moment.

    Kept in parts for fused kernels; `dense()` is the number or full tensor. With `root=False` the
    moment enters without the square root.
    """

    numerator: Number
    moment: Tensor | None = None
    scale: Number = 1.0
    eps: float = 0.0
    root: bool = True

    def dense(self) -> Number:
        """Return the gain as a number or as a tensor of the parameter's (local) shape."""
        stiffness = self.stiffness()
        return self.numerator if stiffness is None else self.numerator / stiffness

    def stiffness(self) -> Tensor | None:
        """Return the denominator in the parameter's (local) shape; None without a moment."""
        if self.moment is None:
            return None
        moment = local(self.moment)
        return (moment.sqrt() if self.root else moment) / self.scale + self.eps


class Memory(NamedTuple):
    """An optimizer state tensor that must not vanish, and its change in a step.

    If every entry is at least `share * s**power (+ beyond)` before a step, no denominator of the
    gain is below `s` after it, whatever the gradient. The optimizer's move and the prox use the
    same tensor, so both metrics change alike and the minimum is kept; bounding only the prox would
    move it. Nothing changes where gradients exceed `s`; where they are smaller, weights shrink by
    about lr per step, as with the penalty in the loss.
    """

    tensor: Tensor
    share: Number
    power: int = 2
    beyond: Tensor | None = None

    def least(self, slope: Number) -> Number:
        """Return the lower bound of entries under a penalty of this slope."""
        least = self.share * slope**self.power
        return least if self.beyond is None else least + self.beyond


GainOf = Callable[[optim.Optimizer, Group, State], Gain]
MemoryOf = Callable[[Group, State], Memory]


class Rule(NamedTuple):
    """Known properties of a class of optimizers."""

    gain: GainOf
    memory: MemoryOf | None
    uniform: bool
    couples_decay: bool = False  # adds `weight_decay` to gradients, unless a group disables it
    buffered: bool = False  # `momentum` of a group fills a buffer of gradients
    renewed: str = ""  # key of the state's gain of the next step: a step uses it, then renews it


_rules: dict[type[optim.Optimizer], Rule] = {}


def register_gain(
    optimizer_class: type[optim.Optimizer],
    rule: Callable[[optim.Optimizer, Group, State], Gain | Number],
    *,
    uniform: bool = False,
    memory: MemoryOf | None = None,
) -> None:
    """Register the stationary gain of a custom optimizer, so that proxes act in its metric.

    The gain is the factor by which a constant gradient moves a weight once the optimizer's state
    is steady. A subclass that does not override `step` inherits the rule; others need their own.
    Without a rule, penalties with zeros use pseudo-gradients instead.

    Args:
        optimizer_class: the class.
        rule: called after a step with the optimizer, the parameter's group and its state; returns
            a number, a tensor of the parameter's shape, or a `Gain`.
        uniform: whether the gain is always one number for all weights of a parameter.
        memory: called with group and state; returns the `Memory` that bounds the gain where
            gradients were zero. Without it the gain is not bounded.

    >>> class Doubled(torch.optim.SGD):
    ...     def step(self, closure=None):
    ...         for group in self.param_groups:
    ...             for p in group["params"]:
    ...                 p.data.sub_(p.grad, alpha=2 * group["lr"])
    >>> tk.register_gain(Doubled, lambda optimizer, group, state: 2 * group["lr"], uniform=True)
    >>> model = nn.Linear(2, 1, bias=False)
    >>> optimizer = Doubled(model.parameters(), lr=0.1)
    >>> reg = tk.regularize(model, optimizer, tk.L1(0.5))
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> model.weight.grad = torch.zeros(1, 2)
    >>> optimizer.step()
    >>> model.weight.data
    tensor([[0.9000, 0.9000]])
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, optim.Optimizer)):
        raise TypeError(f"register_gain takes a class of optimizers, received {optimizer_class!r}")

    def gain(optimizer: optim.Optimizer, group: Group, state: object) -> Gain:
        found = rule(optimizer, group, state)
        return found if isinstance(found, Gain) else Gain(found)

    _rules[optimizer_class] = Rule(gain, memory, uniform)
    _rule_of.cache_clear()


def rule_of(optimizer: optim.Optimizer) -> Rule | None:
    """Return the rule of this optimizer; None if its class overrides `step` of a known class."""
    return _rule_of(type(optimizer))


@functools.lru_cache(maxsize=256)
def _rule_of(kind: type[optim.Optimizer]) -> Rule | None:
    known = next((base for base in kind.__mro__ if base in _rules), None)
    # torch wraps `step` in the class of the first instance, which is not an override
    if known is None or inspect.unwrap(kind.step) is not inspect.unwrap(known.step):
        return None
    return _rules[known]


def has_gain(optimizer: optim.Optimizer) -> bool:
    """Return whether the gain of this optimizer is known."""
    return rule_of(optimizer) is not None


def is_uniform(optimizer: optim.Optimizer) -> bool:
    """Return whether the gain is known and one number for all weights of a parameter."""
    rule = rule_of(optimizer)
    return rule is not None and rule.uniform


def has_coupled_decay(rule: Rule | None, group: Group) -> bool:
    """Return whether the optimizer itself adds `weight_decay * w` to gradients of the group."""
    coupled = rule is not None and rule.couples_decay and not group.get("decoupled_weight_decay")
    return coupled and isinstance(group.get("weight_decay"), float | int)


def group_of(optimizer: optim.Optimizer, param: nn.Parameter) -> Group:
    """Return the parameter group that holds the parameter."""
    return next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))


def decoupled_rate(how: str, group: Group, peak: Number | None = None) -> Number:
    """Return the move per step of a term outside the metric, divided by its strength.

    lr, as for AdamW in torch, times the factor `d` that D-Adaptation and Prodigy find; for
    "independent" 1, times the ratio of lr to its start (or peak), as in the AdamW paper. `peak` is
    the largest lr so far, used where no scheduler keeps the start.
    """
    rate = group.get("lr")
    if rate is None:  # computed by the rule
        return 1.0
    if how != "independent":
        return rate * group["d"] if "d0" in group else rate
    start = group.get("max_lr", group.get("initial_lr", peak))
    return rate / start if start else 1.0


def stationary_gain(optimizer: optim.Optimizer, group: Group, state: object) -> Gain:
    """Return the gain of one parameter, from its group and its state after the step.

    Raises TypeError for an optimizer whose step is not known to be a gain times the gradient.

    >>> import torch
    >>> w = nn.Parameter(torch.zeros(2))
    >>> sgd = optim.SGD([w], lr=0.1, momentum=0.9)
    >>> round(stationary_gain(sgd, sgd.param_groups[0], {}).dense(), 6)
    1.0
    """
    rule = rule_of(optimizer)
    if rule is None:
        raise TypeError(
            f"{type(optimizer).__name__} has no known stationary gain; if you know the factor by "
            f"which a constant gradient moves a weight, tell it by tikhon.register_gain"
        )
    return rule.gain(optimizer, group, state)


def _sgd(optimizer: optim.Optimizer, group: Group, state: object) -> Gain:
    kept = 1 - group["dampening"] if group["momentum"] else 1
    return Gain(group["lr"] * kept / (1 - group["momentum"]))


def _adam(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    correction = 1 - group["betas"][1] ** as_number(state["step"])
    return Gain(group["lr"], moment, correction**0.5, group["eps"])


def _nadam(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    beta1, beta2 = group["betas"]
    step, product = as_number(state["step"]), as_number(state["mu_product"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * group["momentum_decay"]))
    now = (1 - mu) / (1 - product)
    carried = mu_next * (1 - beta1**step) / (1 - product * mu_next)
    scale = (1 - beta2**step) ** 0.5
    return Gain(group["lr"] * (now + carried), state["exp_avg_sq"], scale, group["eps"])


def _radam(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    beta2, step = group["betas"][1], as_number(state["step"])
    correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    # until its variance estimate is long enough (about step 5), RAdam is SGD with momentum
    adaptive = length > 5
    if isinstance(adaptive, Tensor):
        adaptive = bool(adaptive)
    if not adaptive:
        return Gain(group["lr"])
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    numerator = group["lr"] * rectified**0.5 * correction**0.5
    return Gain(numerator, state["exp_avg_sq"], 1.0, group["eps"])


def _adamax(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    return Gain(group["lr"], state["exp_inf"], root=False)


def _rmsprop(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    moment = state["square_avg"]
    if group["centered"]:
        moment = moment.addcmul(state["grad_avg"], state["grad_avg"], value=-1).clamp_min_(0)
    return Gain(group["lr"] / (1 - group["momentum"]), moment, eps=group["eps"])


def _adagrad(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    lr = group["lr"] / (1 + (as_number(state["step"]) - 1) * group["lr_decay"])
    return Gain(lr, state["sum"], eps=group["eps"])


def _adadelta(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    # undo the last update of acc_delta, assuming a gradient of the size in square_avg
    rho, eps = group["rho"], group["eps"]
    square, after = local(state["square_avg"]), local(state["acc_delta"])
    relative = square / (square + eps)
    before = (after - (1 - rho) * eps * relative) / (rho + (1 - rho) * relative)
    return Gain(group["lr"] * (before.clamp_min(0) + eps).sqrt(), square + eps)


def _asgd(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    # unless lr changed: the state already has eta of the next step
    lr, steps = group["lr"], as_number(state["step"]) - 1
    return Gain(lr / (1 + group["lambd"] * lr * steps) ** group["alpha"])


def _adam_memory(decay: Callable[[Group], float]) -> MemoryOf:
    """Return the memory of a bias-corrected average of squares, as Adam's."""

    def memory(group: Group, state: State) -> Memory:
        kept = decay(group)
        held = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        return Memory(state[held], (1 - kept ** (as_number(state["step"]) + 1)) / kept)

    return memory


def _rmsprop_memory(group: Group, state: State) -> Memory:
    """Return the memory of RMSprop, without bias correction; the variance decays no faster."""
    mean = local(state["grad_avg"]).square() if group["centered"] else None
    return Memory(state["square_avg"], 1 / group["alpha"], beyond=mean)


_ADAM_MEMORY = _adam_memory(lambda group: group["betas"][1])
_rules.update(
    {
        optim.SGD: Rule(_sgd, None, uniform=True, couples_decay=True, buffered=True),
        optim.ASGD: Rule(_asgd, None, uniform=True, couples_decay=True, renewed="eta"),
        optim.Adam: Rule(_adam, _ADAM_MEMORY, uniform=False, couples_decay=True),
        optim.AdamW: Rule(_adam, _ADAM_MEMORY, uniform=False),
        optim.NAdam: Rule(_nadam, _ADAM_MEMORY, uniform=False, couples_decay=True),
        optim.RAdam: Rule(_radam, _ADAM_MEMORY, uniform=False, couples_decay=True),
        optim.Adamax: Rule(
            _adamax,
            lambda group, state: Memory(state["exp_inf"], 1 / group["betas"][1], power=1),
            uniform=False,
            couples_decay=True,
        ),
        optim.RMSprop: Rule(
            _rmsprop, _rmsprop_memory, uniform=False, couples_decay=True, buffered=True
        ),
        optim.Adagrad: Rule(
            _adagrad,
            lambda group, state: Memory(state["sum"], as_number(state["step"]) + 1),
            uniform=False,
            couples_decay=True,
        ),
        # no memory: its eps, 1e-6 in the root, bounds the gain
        optim.Adadelta: Rule(_adadelta, None, uniform=False, couples_decay=True),
    }
)


def as_number(counter: Any) -> Number:
    """Return a step counter as a float if that needs no device transfer."""
    if isinstance(counter, Tensor) and counter.is_cpu:
        return counter.item()
    return counter
