"""The stationary gain of an optimizer: the metric in which a prox keeps the objective's minimum.

The gain is the factor by which a constant gradient moves a weight once the optimizer's state is
steady, read from its hyper-parameters and state after the step. `register_gain` takes the rule of
an optimizer of your own.

Where gradients have been zero an adaptive gain has no bound: a prox in it would erase in one step
the rows of an embedding that no batch has held. So the second moments of weights under a penalty
of slope `s` are kept from falling to where the gain would exceed lr / s (see `Memory`).
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
State = Any  # what an optimizer keeps of a parameter: a dict in torch's own


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
        stiffness = self.stiffness()
        return self.numerator if stiffness is None else self.numerator / stiffness

    def stiffness(self) -> Tensor | None:
        """The denominator, of the parameter's (local) shape; None without a moment."""
        if self.moment is None:
            return None
        moment = local(self.moment)
        return (moment.sqrt() if self.root else moment) / self.scale + self.eps


class Memory(NamedTuple):
    """The tensor of an optimizer's state that must not vanish, and what becomes of it in a step.

    With every entry at least `share * s**power (+ beyond)` before a step, no denominator of the
    gain is below `s` after it, whatever the gradient. The optimizer's own move and the prox read
    the same tensor, so the metric of both is changed alike and the minimum stays where it is; a
    bound on the prox alone would move it. Where gradients exceed `s` nothing changes, and where
    they are smaller a weight shrinks by about lr a step, as it would with the penalty in the loss.
    """

    tensor: Tensor
    share: Number
    power: int = 2
    beyond: Tensor | None = None

    def least(self, slope: Number) -> Number:
        """What entries must be at least under a penalty of this slope."""
        least = self.share * slope**self.power
        return least if self.beyond is None else least + self.beyond


GainOf = Callable[[optim.Optimizer, Group, State], Gain]
MemoryOf = Callable[[Group, State], Memory]


class Rule(NamedTuple):
    """What is known of a class of optimizers."""

    gain: GainOf
    memory: MemoryOf | None
    uniform: bool
    couples: bool = False  # its `weight_decay` is added to the gradient, unless a group says no


_rules: dict[type[optim.Optimizer], Rule] = {}


def register_gain(
    optimizer_class: type[optim.Optimizer],
    rule: Callable[[optim.Optimizer, Group, State], Gain | Number],
    *,
    uniform: bool = False,
    memory: MemoryOf | None = None,
) -> None:
    """Tell the stationary gain of an optimizer of your own, so that proxes act in its metric.

    The gain is the factor by which a constant gradient moves a weight once the optimizer's state
    is steady. A subclass that does not override `step` shares the rule; one that does has a rule
    of its own or none. Without a rule penalties with zeros go another way, by pseudo-gradients.

    Args:
        optimizer_class: the class.
        rule: called after a step with the optimizer, the parameter's group and its state; gives a
            number, a tensor of the parameter's shape, or a `Gain`.
        uniform: whether the gain is always one number for all weights of a parameter.
        memory: called with group and state; gives the `Memory` that bounds the gain where
            gradients have been zero. Without it nothing does.

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
    """What is known of this optimizer; None where its class overrides a known class's `step`."""
    return _rule_of(type(optimizer))


@functools.lru_cache(maxsize=256)
def _rule_of(kind: type[optim.Optimizer]) -> Rule | None:
    known = next((base for base in kind.__mro__ if base in _rules), None)
    # torch wraps `step` in the class of the first instance, which is no override
    if known is None or inspect.unwrap(kind.step) is not inspect.unwrap(known.step):
        return None
    return _rules[known]


def has_gain(optimizer: optim.Optimizer) -> bool:
    """Whether the gain of this kind of optimizer is known."""
    return rule_of(optimizer) is not None


def is_uniform(optimizer: optim.Optimizer) -> bool:
    """Whether the gain is known and one number for all weights of a parameter."""
    rule = rule_of(optimizer)
    return rule is not None and rule.uniform


def decays(rule: Rule | None, group: Group) -> bool:
    """Whether the optimizer adds `weight_decay * w` to the gradients of the group itself."""
    coupled = rule is not None and rule.couples and not group.get("decoupled_weight_decay")
    return coupled and isinstance(group.get("weight_decay"), float | int)


def group_of(optimizer: optim.Optimizer, param: nn.Parameter) -> Group:
    """The parameter group that holds the parameter."""
    return next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))


def own_rate(how: str, group: Group) -> Number:
    """How far a term outside the metric moves a step, over its strength.

    By lr, as AdamW decays in torch; "independent" of lr by 1, times the share of its start (or
    its peak) that a scheduler has made of it, as in the paper of AdamW.
    """
    rate = group.get("lr")
    if rate is None:  # the rule finds its own
        return 1.0
    if how != "independent":
        return rate
    start = group.get("max_lr", group.get("initial_lr"))
    return rate / start if start else 1.0


def stationary_gain(optimizer: optim.Optimizer, group: Group, state: object) -> Gain:
    """The gain for one parameter, from its group and its state after the step.

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
    correction = 1 - group["betas"][1] ** number(state["step"])
    return Gain(group["lr"], moment, correction**0.5, group["eps"])


def _nadam(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    beta1, beta2 = group["betas"]
    step, product = number(state["step"]), number(state["mu_product"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * group["momentum_decay"]))
    now = (1 - mu) / (1 - product)
    carried = mu_next * (1 - beta1**step) / (1 - product * mu_next)
    scale = (1 - beta2**step) ** 0.5
    return Gain(group["lr"] * (now + carried), state["exp_avg_sq"], scale, group["eps"])


def _radam(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
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


def _adamax(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    return Gain(group["lr"], state["exp_inf"], root=False)


def _rmsprop(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    moment = state["square_avg"]
    if group["centered"]:
        moment = moment.addcmul(state["grad_avg"], state["grad_avg"], value=-1).clamp_min_(0)
    return Gain(group["lr"] / (1 - group["momentum"]), moment, eps=group["eps"])


def _adagrad(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    lr = group["lr"] / (1 + (number(state["step"]) - 1) * group["lr_decay"])
    return Gain(lr, state["sum"], eps=group["eps"])


def _adadelta(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    # undo the last update of acc_delta, by a gradient of the size that square_avg remembers
    rho, eps = group["rho"], group["eps"]
    square, after = local(state["square_avg"]), local(state["acc_delta"])
    relative = square / (square + eps)
    before = (after - (1 - rho) * eps * relative) / (rho + (1 - rho) * relative)
    return Gain(group["lr"] * (before.clamp_min(0) + eps).sqrt(), square + eps)


def _asgd(optimizer: optim.Optimizer, group: Group, state: State) -> Gain:
    # the state already holds the eta of the next step
    lr, steps = group["lr"], number(state["step"]) - 1
    return Gain(lr / (1 + group["lambd"] * lr * steps) ** group["alpha"])


def _second_moment(decay: Callable[[Group], float]) -> MemoryOf:
    """The memory of an average of squares that is corrected for its start, as Adam's."""

    def memory(group: Group, state: State) -> Memory:
        kept = decay(group)
        held = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        return Memory(state[held], (1 - kept ** (number(state["step"]) + 1)) / kept)

    return memory


def _square_avg(group: Group, state: State) -> Memory:
    """That of RMSprop, whose averages are not corrected; the variance decays no faster."""
    mean = local(state["grad_avg"]).square() if group["centered"] else None
    return Memory(state["square_avg"], 1 / group["alpha"], beyond=mean)


_ADAMS = _second_moment(lambda group: group["betas"][1])
_rules.update(
    {
        optim.SGD: Rule(_sgd, None, uniform=True, couples=True),
        optim.ASGD: Rule(_asgd, None, uniform=True, couples=True),
        optim.Adam: Rule(_adam, _ADAMS, uniform=False, couples=True),
        optim.AdamW: Rule(_adam, _ADAMS, uniform=False),
        optim.NAdam: Rule(_nadam, _ADAMS, uniform=False, couples=True),
        optim.RAdam: Rule(_radam, _ADAMS, uniform=False, couples=True),
        optim.Adamax: Rule(
            _adamax,
            lambda group, state: Memory(state["exp_inf"], 1 / group["betas"][1], power=1),
            uniform=False,
            couples=True,
        ),
        optim.RMSprop: Rule(_rmsprop, _square_avg, uniform=False, couples=True),
        optim.Adagrad: Rule(
            _adagrad,
            lambda group, state: Memory(state["sum"], number(state["step"]) + 1),
            uniform=False,
            couples=True,
        ),
        optim.Adadelta: Rule(
            _adadelta, None, uniform=False, couples=True
        ),  # its eps, 1e-6 in the root, is one
    }
)


def number(counter: Any) -> Number:
    """A step counter as a float where that needs no transfer from a device."""
    if isinstance(counter, Tensor) and counter.is_cpu:
        return counter.item()
    return counter
