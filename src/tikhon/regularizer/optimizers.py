"""What kind of optimizer a Regularizer is given: wrappers around another one, copies of weights.

Kinds are told by what an optimizer holds and does, not by the names of classes.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from tikhon.regularizer.audit import warn
from tikhon.regularizer.targets import is_lazy, local
from tikhon.regularizer.terms import Binding, Route

_STEPS = 12  # of a probe: wrappers around torch's optimizers synchronise every 5 or 6
_RATE = 0.01
_PROBE = 100.0  # the size of a probe's weights, far from that of its gradients and moments


def stepping(optimizer: Any) -> optim.Optimizer:
    """The optimizer whose `step` moves the weights: the one inside Accelerate's, Lightning's, SAM.

    Any object that holds a torch optimizer of the same parameters is a wrapper around it.
    """
    wrapper = optimizer
    while inner := inside(wrapper):
        if len(inner) > 1:
            kinds = ", ".join(type(one).__name__ for one in inner)
            raise TypeError(
                f"{type(wrapper).__name__} steps several optimizers ({kinds}); give them to "
                f"regularize as a list"
            )
        wrapper = inner[0]
    if not isinstance(wrapper, optim.Optimizer) or not hasattr(
        wrapper, "_optimizer_step_pre_hooks"
    ):
        raise TypeError(
            f"optimizer must be a torch optimizer, received {type(optimizer).__name__}"
        )
    return wrapper


def inside(wrapper: Any) -> list[optim.Optimizer]:
    """The optimizers that an object holds, if they step all parameters that it has itself."""
    attributes = getattr(wrapper, "__dict__", {})
    found = {id(one): one for one in attributes.values() if isinstance(one, optim.Optimizer)}
    own = {id(p) for group in getattr(wrapper, "param_groups", ()) for p in group["params"]}
    theirs = {id(p) for one in found.values() for g in one.param_groups for p in g["params"]}
    return list(found.values()) if own <= theirs else []


@dataclass(frozen=True)
class Copies:
    """What an optimizer keeps of the weights beside the parameters.

    Attributes:
        key: where it keeps it.
        every_step: whether it moves in each step (the parameter is a point between two
            sequences), or now and then (the parameter is set back towards it).
    """

    key: str
    every_step: bool


def copies_in(optimizer: optim.Optimizer) -> Copies | None:
    """The copy of the weights that the optimizer moves beside the parameters, if it keeps one.

    Found by a few steps on weights of its own: a few numbers, far from those of gradients and
    moments. Optimizers of torch have none, and one that cannot be tried like that tells nothing.
    """
    if is_torchs(optimizer) or _is_distributed():
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return _try_out(optimizer)
    except Exception:  # it needs a closure, a device, attributes of its own parameters ...
        return None


def is_torchs(optimizer: optim.Optimizer) -> bool:
    """Whether the rule of this optimizer is one of torch's own."""
    return inspect.unwrap(type(optimizer).step).__module__.startswith("torch.")


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _try_out(optimizer: optim.Optimizer) -> Copies | None:
    twin, probes = _twin(optimizer)
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, int] = {}
    before: dict[str, Tensor] = {}
    for _ in range(_STEPS):
        for probe in probes:
            probe.grad = torch.randn(probe.shape, generator=generator).to(probe)
        twin.step()
        near = dict(_near(twin, probes[0]))
        for key, held in near.items():
            changed[key] = changed.get(key, 0) + (
                key in before and not torch.equal(held, before[key])
            )
        before = {key: held.clone() for key, held in near.items()}
    moving = {key: count for key, count in changed.items() if count and key in before}
    if not moving:
        return None
    key = max(moving, key=lambda name: moving[name])
    return Copies(key, every_step=moving[key] > _STEPS // 2)


def _twin(optimizer: optim.Optimizer) -> tuple[optim.Optimizer, list[nn.Parameter]]:
    """The same optimizer on small weights of its own, without hooks and without a past."""
    twin = object.__new__(type(optimizer))
    attributes = {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in vars(optimizer).items()
        if name != "step"
    }
    vars(twin).update(attributes)
    probes: list[nn.Parameter] = []
    groups = []
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        first = group["params"][0]
        generator = torch.Generator().manual_seed(len(probes))
        weights = torch.randn([4] * first.ndim, generator=generator, dtype=torch.float64)
        probe = nn.Parameter((_PROBE * weights).to(dtype=first.dtype))
        probes.append(probe)
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        if isinstance(settings.get("lr"), float):
            settings["lr"] = _RATE  # a warm-up may begin with 0
        groups.append({**copy.deepcopy(settings), "params": [probe]})
    twin.param_groups, twin.state = groups, defaultdict(dict)
    for name in vars(twin):
        if name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
    if callable(enter := getattr(twin, "train", None)):
        enter()  # of optimizers that hold other weights for evaluation
    return twin, probes


def _near(optimizer: optim.Optimizer, probe: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the state of a parameter that are close to its weights."""
    for key, held in optimizer.state[probe].items():
        if isinstance(held, Tensor) and held.shape == probe.shape:
            distance = (held.detach().to(probe.dtype) - probe.detach()).norm()
            if distance < 0.3 * probe.detach().norm():
                yield str(key), held.detach()


def copies_beside(
    optimizer: optim.Optimizer, routed: Sequence[tuple[Binding, Route]]
) -> Copies | None:
    """The copies of the weights that an optimizer keeps, if terms move the parameters.

    By orthants zeros are set in the copies too, and a penalty in the gradient is right for every
    optimizer. Raises TypeError for other terms where the parameters are not what is iterated, and
    warns where they are set back now and then.
    """
    moving = [(b, r) for b, r in routed if r != "gradient"]
    copies = copies_in(optimizer) if moving else None
    others = [(b, r) for b, r in moving if r != "orthant"]
    if copies is None or not others:
        return copies
    kind, (first, route) = type(optimizer).__name__, others[0]
    keeps = (
        f"{kind} keeps other weights beside the parameters (in its state, under {copies.key!r})"
    )
    if copies.every_step:
        decay = route in ("decay", "cautious")
        instead = f"the weight_decay of {kind}" if decay else "an optimizer such as AdamW"
        raise TypeError(
            f"{first.name} would move the parameters, but {keeps} and computes the parameters "
            f'from both; use how="objective" with L2, L1 or GroupLasso, or {instead}'
        )
    kept = [b for b, r in others if r not in ("decay", "cautious")]
    if kept:
        warn(
            f"{kept[0].name}: {keeps} and sets the parameters back towards them, so zeros and "
            f"bounds hold after a step of the penalty, not after that; for exact ones use an "
            f"optimizer such as AdamW"
        )
    return copies


def warn_of_synchronised_copies(wrapper: Any, bindings: Sequence[Binding]) -> None:
    """Warn of a wrapper around the optimizer that averages weights of its own, as Lookahead."""
    kept = [b for b in bindings if b.route in ("prox", "project")]
    params = [param for binding in kept for param in binding.target.params]
    inner = inside(wrapper)
    if not (inner and params and synchronised_copies(wrapper, params)):
        return
    warn(
        f"{kept[0].name} acts in the steps of {type(inner[0]).__name__}, and "
        f"{type(wrapper).__name__} around it averages the weights with a copy of its own: zeros "
        f"and bounds do not outlast that; for exact ones regularize a plain "
        f"{type(inner[0]).__name__}"
    )


def synchronised_copies(wrapper: Any, params: Sequence[nn.Parameter]) -> bool:
    """Whether a wrapper around an optimizer holds copies of the weights, as Lookahead does."""
    params = [param for param in params if not is_lazy(param)]
    known = {id(p) for p in params}
    shapes = {p.shape: p for p in params}
    for held in _tensors(getattr(wrapper, "__dict__", {}), depth=4):
        param = shapes.get(held.shape)
        if param is None or id(held) in known or held.dtype != param.dtype:
            continue
        if any(
            p.shape == held.shape and torch.equal(local(p), held.detach()) and bool(p.any())
            for p in params
        ):
            return True
    return False


def _tensors(values: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif depth and isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value, depth - 1)
    elif depth and isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value, depth - 1)
