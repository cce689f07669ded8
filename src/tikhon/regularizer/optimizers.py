"""Classify optimizers: wrappers around others, and copies of the weights they keep.

Determined by what an optimizer holds and does, not by class names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn, optim

from tikhon.regularizer.audit import warn
from tikhon.regularizer.targets import is_distributed
from tikhon.regularizer.terms import Binding, Route

_PROBE_STEPS = 12  # of a probe: wrappers of torch's optimizers synchronise every 5 or 6 steps
_PROBE_LR = 0.01
_PROBE_SIZE = 100.0  # size of a probe's weights, far from that of its gradients and moments
_PERTURBED_STEP = 11  # step before which a probe is moved, not a multiple of a period
_PERTURBATION = 0.1  # of a probe's weights, and the share of it that must outlast a step
_LASTING_SHARE = 0.97
_HOLDING_STEPS = 45  # steps in which weights are held against a gradient
_DIVERGENCE_FACTOR = 20  # growth of the moves, from the first to the last third
_MIN_COSINE = 0.9999  # cosine of weights and the state they are computed from
_TINY_WEIGHT = 1e-9  # of the cubes of a probe's weights, and the tolerance of gradients there
_GRADIENT_TOLERANCE = 0.01
_MIN_TURN = 0.02  # least relative turn of the weights by an orthogonal gradient
_MAX_SHORTENING = 0.1  # of that, the least shortening by a parallel gradient
T = TypeVar("T")
Given = ParamSpec("Given")
Some = TypeVar("Some")  # an optimizer or a wrapper


def as_list(optimizer: object) -> list[object]:
    """Return the optimizers of a list or dict; a single one as a list."""
    if isinstance(optimizer, Mapping):
        return list(cast("Mapping[object, object]", optimizer).values())
    if isinstance(optimizer, Iterable) and not isinstance(
        optimizer, optim.Optimizer | str | Tensor
    ):
        return list(cast("Iterable[object]", optimizer))
    return [optimizer]


def inner_optimizer(optimizer: object) -> optim.Optimizer:
    """Return the optimizer whose `step` moves the weights, inside Accelerate, Lightning or SAM.

    Any object that holds a torch optimizer of the same parameters counts as a wrapper.
    """
    wrapper = optimizer
    while inner := wrapped_optimizers(wrapper):
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


def wrapped_optimizers(wrapper: object) -> list[optim.Optimizer]:
    """Return the optimizers held by an object, if they cover all of its own parameters."""
    attributes = getattr(wrapper, "__dict__", {})
    found = {id(one): one for one in attributes.values() if isinstance(one, optim.Optimizer)}
    own = {id(p) for group in getattr(wrapper, "param_groups", ()) for p in group["params"]}
    theirs = {id(p) for one in found.values() for g in one.param_groups for p in g["params"]}
    return list(found.values()) if own <= theirs else []


@dataclass(frozen=True)
class WeightCopies:
    """Copies of the weights kept by an optimizer beside the parameters.

    Attributes:
        keys: state keys of the copies.
        every_step: whether they move in each step (the parameter is between two sequences), or
            occasionally (the parameter is pulled back to them).
        averaged: whether they are an average of the parameters for evaluation, not used in
            training.
    """

    keys: tuple[str, ...]
    every_step: bool
    averaged: bool = False


def _experiment(otherwise: object) -> Callable[[Callable[Given, T]], Callable[Given, T]]:
    """Make a test on a copy of its first argument return `otherwise` if impossible or needless."""

    def wrap(test: Callable[Given, T]) -> Callable[Given, T]:
        @functools.wraps(test)
        def run(*args: Given.args, **kwargs: Given.kwargs) -> T:
            if is_torch_optimizer(args[0]) or _may_communicate(args[0]):
                return cast(T, otherwise)
            try:
                with torch.random.fork_rng(devices=[]), torch.enable_grad():
                    return test(*args, **kwargs)
            except Exception:  # it needs a device, or attributes of its own parameters
                return cast(T, otherwise)

        return run

    return wrap


@_experiment(otherwise=False)
def diverges_when_held(optimizer: optim.Optimizer) -> bool:
    """Return whether steps grow without bound while weights are held against gradients.

    As with D-Adaptation, which takes persistent gradients for a distant goal.
    """
    clone, probes = _probe_copy(optimizer)
    held = [group for group in optimizer.param_groups if group["params"]]
    for group, own in zip(clone.param_groups, held):
        if "lr" in own:
            group["lr"] = own["lr"]
    for probe in probes:
        probe.data.div_(_PROBE_SIZE)
    lengths: list[float] = []
    before = [probe.detach().clone() for probe in probes]
    for _ in range(_HOLDING_STEPS):
        for probe in probes:
            probe.grad = torch.ones_like(probe)
        _step(clone, probes)
        lengths.append(float((probes[0].detach() - before[0]).double().norm()))
        for probe, weights in zip(probes, before):
            probe.data.copy_(weights)
    return lengths[-1] > _DIVERGENCE_FACTOR * max(lengths[: _HOLDING_STEPS // 3])


@_experiment(otherwise=False)
def preserves_norms(optimizer: optim.Optimizer) -> bool:
    """Return whether gradients turn weights without shortening them, defeating penalties.

    So where weights keep their norm or largest singular value (optimizers on spheres). Detected by
    a few steps on test weights, with parallel and orthogonal gradients.
    """
    moves: list[Tensor] = []
    shorter: list[Tensor] = []
    for along in (True, False):
        clone, probes = _probe_copy(optimizer)
        probe = max(probes, key=lambda one: one.ndim)
        start = probe.detach().double()
        if any(clone.state.get(one) for one in probes):  # state that depends on weights
            return False
        for count in range(_HOLDING_STEPS):
            if count == 1:  # some set their step length in the first step
                start = probe.detach().double().clone()
            for one in probes:
                one.data.div_(1 if count else _PROBE_SIZE)
                one.grad = one.detach().sign() if along else _orthogonal_direction(one.detach())
            _step(clone, probes)
        end = probe.detach().double()
        moves.append((end - start).norm() / start.norm())
        ratios = [1 - end.norm() / start.norm()]
        if probe.ndim > 1:
            ratios.append(1 - _largest_singular_value(end) / _largest_singular_value(start))
        shorter.append(torch.stack(ratios).abs().min())
    return bool(moves[1] > _MIN_TURN) and bool(shorter[0] < _MAX_SHORTENING * moves[1])


@_experiment(otherwise=False)
def keeps_zeros(optimizer: optim.Optimizer) -> bool:
    """Return whether weights are multiplied, so that zeros stay whatever their gradient."""
    clone, probes = _probe_copy(optimizer)
    for probe in probes:
        probe.data[::2] = 0
    before = [probe.detach().clone() for probe in probes]
    list(_take_random_steps(clone, probes))
    return all((p != w).any() and not p.detach()[::2].any() for p, w in zip(probes, before))


def _orthogonal_direction(w: Tensor) -> Tensor:
    other = w.flip(0) if w.numel() > 1 else w
    return other - w * (other * w).sum() / w.square().sum()


def _largest_singular_value(w: Tensor) -> Tensor:
    return torch.linalg.svdvals(w.flatten(1))[0]


def _holds_other_objects(wrapper: object) -> bool:
    """Return whether it holds more than optimizers and numbers, which a clone would change."""
    simple = (bool, int, float, str, Tensor, dict, list, tuple, set, type(None), optim.Optimizer)
    return not all(
        isinstance(value, simple)
        or (isinstance(value, nn.Module) and next(value.parameters(), None) is None)
        for value in getattr(wrapper, "__dict__", {}).values()
    )


def refuse_gradient_wrappers(
    wrapper: object, optimizer: optim.Optimizer, bindings: Sequence[Binding]
) -> None:
    """Raise TypeError for objective-mode terms inside a wrapper that changes gradients."""
    found = [b for b in bindings if b.how == "objective" and not b.base.constraint]
    while wrapper is not optimizer:
        (inner,) = wrapped_optimizers(wrapper)
        kind, around = type(optimizer).__name__, type(wrapper).__name__
        if found and changes_gradients(wrapper, inner):
            raise TypeError(
                f"{found[0].name} would act in the steps of {kind}, and {around} around it "
                f"changes the gradients by the weights before these (as LARC does), so that it is "
                f'not loss + penalty that is minimised; use how="decoupled", give regularize an '
                f"optimizer that does all in one `step`, or a plain {kind}"
            )
        if found and reads_gradients(wrapper, inner):
            raise TypeError(
                f"{found[0].name} would act in the steps of {kind}, and {around} around it reads "
                f"the gradients before these, so that the penalty has no part in what {around} "
                f'makes of them; use how="decoupled", or a plain {kind}'
            )
        wrapper = inner


def is_torch_optimizer(optimizer: object) -> bool:
    """Return whether this optimizer's step is one of torch's own."""
    step: Callable[..., object] | None = getattr(type(optimizer), "step", None)
    return step is not None and inspect.unwrap(step).__module__.startswith("torch.")


def _may_communicate(optimizer: object) -> bool:
    """Return whether its step may wait for other processes, absent from the experiment."""
    if not is_distributed():
        return False
    modules = {inspect.getmodule(kind) for kind in type(optimizer).__mro__}
    try:
        own = [m for m in modules if m and not m.__name__.startswith(("torch.", "builtins"))]
        return any("distributed" in inspect.getsource(module) for module in own)
    except OSError:  # no source
        return True


@_experiment(otherwise=None)
def find_weight_copies(optimizer: optim.Optimizer) -> WeightCopies | None:
    """Return the copies of the weights that the optimizer moves itself, if any.

    Detected by a few steps on test weights of a size unlike gradients and moments. Torch's own
    optimizers have none; None also if the optimizer cannot be tested.
    """
    clone, probes = _probe_copy(optimizer)
    changed: dict[str, int] = {}
    before: dict[str, Tensor] = {}
    for _ in _take_random_steps(clone, probes):
        near = dict(_states_near_weights(clone, probes[0]))
        for key, held in near.items():
            changed[key] = changed.get(key, 0) + (
                key in before and not torch.equal(held, before[key])
            )
        before = {key: held.clone() for key, held in near.items()}
    moving = {key: count for key, count in changed.items() if count and key in before}
    if not moving:
        averages = _averages_for_evaluation(clone, probes[0])
        return (
            None if averages is None else WeightCopies(averages, every_step=False, averaged=True)
        )
    return WeightCopies(tuple(moving), every_step=max(moving.values()) > _PROBE_STEPS // 2)


@_experiment(otherwise=True)
def preserves_moves(optimizer: optim.Optimizer) -> bool:
    """Return whether changes of the parameters between steps outlast the next step.

    Not so where they are computed from the optimizer's state alone (dual averaging, as in FTRL) or
    partly (MADGRAD). Detected by a few steps on test weights.
    """
    ends: list[Tensor] = []
    for kept in (1.0, 1 - _PERTURBATION):
        torch.manual_seed(0)
        clone, (probe, *others) = _probe_copy(optimizer)
        for count in _take_random_steps(clone, [probe, *others]):
            if count == _PERTURBED_STEP - 1:
                probe.data.mul_(kept)
            elif count == _PERTURBED_STEP:
                break
        ends.append(probe.detach().float())
    plain, moved = ends
    return bool((plain - moved).norm() > _LASTING_SHARE * _PERTURBATION * plain.norm())


@_experiment(otherwise=False)
def changes_gradients(wrapper: object, optimizer: optim.Optimizer) -> bool:
    """Return whether a wrapper's `step` changes gradients depending on the weights.

    As LARC, which scales a layer's gradients by the norm of its weights, and OrthoGrad, which
    removes their component along the weights. Detected by steps of a clone with two gradients at
    large and at small weights: their difference is unaffected by clipping and weight decay.
    """
    if _holds_other_objects(wrapper):
        return False
    differences: list[Tensor] = []
    for power, size in ((1, 1.0), (3, _TINY_WEIGHT)):  # different sizes and directions
        seen: list[Tensor] = []
        for seed in (0, 1):
            around, clone, probes = _probe_copy_of_wrapper(wrapper, optimizer)
            generator = torch.Generator().manual_seed(seed)
            for probe in probes:
                probe.data.pow_(power).mul_(size)
                probe.grad = torch.randn(probe.shape, generator=generator).to(probe)
            arrived = [torch.zeros(())]

            def note(*_: object, probe: nn.Parameter = probes[0]) -> None:
                arrived[0] = cast(Tensor, probe.grad).clone()  # noqa: B023

            clone.register_step_pre_hook(note)
            around.step()
            seen.append(arrived[0])
        first, second = seen
        differences.append((first - second).float())
    at_large, at_small = differences
    return bool((at_large - at_small).norm() > _GRADIENT_TOLERANCE * at_large.norm())


@_experiment(otherwise=False)
def reads_gradients(wrapper: object, optimizer: optim.Optimizer) -> bool:
    """Return whether a wrapper reads gradients before the inner optimizer's step.

    As TRAC, which scales the optimizer's moves by their alignment with gradients. Detected by
    steps of a clone whose inner optimizer gets its own gradients: it then depends on the outer
    ones.
    """
    if _holds_other_objects(wrapper):
        return False
    ends: list[Tensor] = []
    for power in (0, 1):  # of the count, seen by the wrapper; the inner one always sees the same
        torch.manual_seed(0)
        around, clone, (probe, *others) = _probe_copy_of_wrapper(wrapper, optimizer)
        probe.data.mul_(_TINY_WEIGHT)  # so that even tiny first moves matter
        own: list[Tensor] = []

        def give(*_: object, probe: nn.Parameter = probe, own: list[Tensor] = own) -> None:
            own.append(cast(Tensor, probe.grad))
            generator = torch.Generator().manual_seed(len(own))
            probe.grad = torch.rand(probe.shape, generator=generator).to(probe)

        def restore(*_: object, probe: nn.Parameter = probe, own: list[Tensor] = own) -> None:
            probe.grad = own[-1]

        clone.register_step_pre_hook(give)
        clone.register_step_post_hook(restore)
        for count in _set_random_gradients(_PROBE_STEPS, [probe, *others]):
            probe.grad = count**power * cast(Tensor, probe.grad).abs()
            around.step()
        ends.append(probe.detach())
    alike, growing = ends
    return not torch.equal(alike, growing)


def _probe_copy_of_wrapper(
    wrapper: object, optimizer: optim.Optimizer
) -> tuple[optim.Optimizer, optim.Optimizer, list[nn.Parameter]]:
    """Return a copy of the wrapper around one of the optimizer, that and its weights."""
    clone, probes = _probe_copy(optimizer)
    around = _shallow_copy(wrapper)
    for name, value in vars(wrapper).items():
        if value is optimizer:
            vars(around)[name] = clone
    if "param_groups" in vars(wrapper):
        vars(around).update(param_groups=clone.param_groups, state=defaultdict(dict))
    return cast(optim.Optimizer, around), clone, probes


def _averages_for_evaluation(
    clone: optim.Optimizer, probe: nn.Parameter
) -> tuple[str, ...] | None:
    """Return the state keys from which evaluation weights come; None without such weights.

    Empty if such weights are in no state.
    """
    modes = [getattr(clone, name, None) for name in ("eval", "train")]
    if not all(callable(mode) for mode in modes):
        return None
    trained = probe.detach().clone()
    cast("Callable[[], object]", modes[0])()
    if torch.equal(trained, probe):
        return None
    held = ((str(key), value) for key, value in clone.state[probe].items())
    return tuple(
        key
        for key, value in held
        if isinstance(value, Tensor)
        and value.shape == probe.shape
        and torch.cosine_similarity(value.double().ravel(), probe.double().ravel(), 0)
        > _MIN_COSINE
        and not torch.equal(value.to(trained), trained)
    )


def _take_random_steps(clone: optim.Optimizer, probes: Sequence[nn.Parameter]) -> Iterator[int]:
    """Take steps with random gradients, yielding the count before each but the first."""
    for count in _set_random_gradients(_PROBE_STEPS, probes):
        _step(clone, probes)
        yield count


def _step(clone: optim.Optimizer, probes: Sequence[nn.Parameter]) -> None:
    """Take one step, with a closure if required."""
    gradients = [probe.grad for probe in probes]

    def closure() -> Tensor:
        for probe, gradient in zip(probes, gradients):
            probe.grad = gradient
        return torch.zeros(())

    try:
        clone.step()
    except Exception:
        clone.step(closure)  # type: ignore[arg-type]


def _set_random_gradients(steps: int, probes: Sequence[nn.Parameter]) -> Iterator[int]:
    """Set random gradients for `steps` steps, yielding the count from 1."""
    generator = torch.Generator().manual_seed(0)
    for count in range(1, steps + 1):
        for probe in probes:
            probe.grad = torch.randn(probe.shape, generator=generator).to(probe)
        yield count


def _probe_copy(optimizer: optim.Optimizer) -> tuple[optim.Optimizer, list[nn.Parameter]]:
    """Return a copy of the optimizer on small weights, without hooks or state."""
    clone, probes = _new_probe_copy(optimizer)
    try:
        for probe in probes:
            probe.grad = torch.ones_like(probe)
        _step(clone, probes)
    except Exception:  # its constructor initialises the state
        clone, probes = _new_probe_copy(optimizer)
        _copy_initial_state(clone, optimizer, probes)
        return clone, probes
    return _new_probe_copy(optimizer)


def _new_probe_copy(optimizer: optim.Optimizer) -> tuple[optim.Optimizer, list[nn.Parameter]]:
    clone = _shallow_copy(optimizer)
    probes: list[nn.Parameter] = []
    groups = []
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        first = group["params"][0]
        generator = torch.Generator().manual_seed(len(probes))
        weights = torch.randn([4] * first.ndim, generator=generator, dtype=torch.float64)
        probe = nn.Parameter((_PROBE_SIZE * weights).to(dtype=first.dtype))
        probes.append(probe)
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        if isinstance(settings.get("lr"), float):
            settings["lr"] = _PROBE_LR  # a warm-up may start from 0
        groups.append({**copy.deepcopy(settings), "params": [probe]})
    clone.param_groups, clone.state = groups, defaultdict(dict)
    if callable(enter := getattr(clone, "train", None)):
        enter()  # optimizers that swap weights for evaluation
    return clone, probes


def _copy_initial_state(
    clone: optim.Optimizer, optimizer: optim.Optimizer, probes: Sequence[nn.Parameter]
) -> None:
    """Give probes the state that a constructor creates, as MADGRAD's.

    Copies of the weights become copies of the probes, other tensors of their shape zeros.
    """
    groups = [group for group in optimizer.param_groups if group["params"]]
    for probe, group in zip(probes, groups):
        param = group["params"][0]
        for key, held in optimizer.state.get(param, {}).items():
            if isinstance(held, Tensor) and held.shape == param.shape:
                same = held.dtype == param.dtype and torch.equal(held, param)
                held = probe.detach().clone() if same else torch.zeros_like(probe)
            elif isinstance(held, Tensor) and held.numel() > 1:
                clone.state.pop(probe, None)  # of another shape, unlike the probe's
                break
            clone.state[probe][key] = copy.deepcopy(held)
    for key, held in optimizer.state.items():
        if not isinstance(key, Tensor):
            clone.state[key] = copy.deepcopy(held)


def _shallow_copy(optimizer: Some) -> Some:
    """Return a copy of an object whose changes do not affect the original."""
    clone = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name != "step":
            vars(clone)[name] = copy.copy(value) if isinstance(value, dict | list | set) else value
        if isinstance(value, nn.Module):
            vars(clone)[name] = copy.deepcopy(value)
        if name.endswith("_hooks"):
            vars(clone)[name] = OrderedDict()
    return clone


def _states_near_weights(
    optimizer: optim.Optimizer, probe: nn.Parameter
) -> Iterator[tuple[str, Tensor]]:
    """Yield state tensors close to the parameter's weights."""
    for key, held in optimizer.state[probe].items():
        if isinstance(held, Tensor) and held.shape == probe.shape:
            distance = (held.detach().to(probe.dtype) - probe.detach()).norm()
            if distance < 0.3 * probe.detach().norm():
                yield str(key), held.detach()


def check_weight_copies(
    optimizer: optim.Optimizer, routed: Sequence[tuple[Binding, Route]]
) -> WeightCopies | None:
    """Return the copies of the weights that an optimizer keeps, if terms move parameters.

    On the orthant route zeros are also set in the copies, an average for evaluation gets zeros and
    bounds when it is swapped in, and gradient penalties suit every optimizer. Raises TypeError for
    other terms if the parameters are not the iterates, and warns if they are occasionally reset.
    """
    kind = type(optimizer).__name__
    _check_norm_preservation(optimizer, routed)
    zeroing = [b for b, r in routed if r in ("prox", "orthant")]
    if zeroing and keeps_zeros(optimizer):
        warn(
            f"{kind} multiplies weights: none crosses zero, and one at zero stays there, so that "
            f"{zeroing[0].name} does not find the minimum; use an optimizer such as AdamW"
        )
    moving = [(b, r) for b, r in routed if r != "gradient"]
    holding = [b for b, r in moving if r in ("project", "orthant")]
    if holding and diverges_when_held(optimizer):
        warn(
            f"{holding[0].name} holds weights against their gradients, and {kind} takes longer "
            f"and longer steps while gradients last: its step size may grow without end; watch "
            f"the loss, or use an optimizer such as AdamW or Prodigy"
        )
    copies = find_weight_copies(optimizer) if moving else None
    others = [(b, r) for b, r in moving if r != "orthant"]
    if copies is None or copies.averaged:
        _refuse_undone_moves(optimizer, [b for b, r in others if r != "project"])
    if copies is not None and copies.averaged:
        return copies
    if copies is None or not others:
        return copies
    first, route = others[0]
    where = " and ".join(map(repr, copies.keys))
    keeps = f"{kind} keeps other weights beside the parameters (in its state, under {where})"
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


def _check_norm_preservation(
    optimizer: optim.Optimizer, routed: Sequence[tuple[Binding, Route]]
) -> None:
    """Raise TypeError for smooth penalties on weights of fixed norm; warn of zeros."""
    if not routed or not preserves_norms(optimizer):
        return
    kind = type(optimizer).__name__
    held = f"{kind} gives weights back their length (or largest singular value) in every step"
    for binding, route in routed:
        if route in ("gradient", "decay", "cautious"):
            raise TypeError(
                f"{binding.name} makes weights smaller, but {held}, so that it has no effect or "
                f"another one; leave it out, or use an optimizer such as AdamW"
            )
    warn(
        f"{routed[0][0].name}: {held}, so that zeros come without the shrinkage of a penalty and "
        f"bounds on lengths do not last; for exact ones use an optimizer such as AdamW"
    )


def _refuse_undone_moves(optimizer: optim.Optimizer, bindings: Sequence[Binding]) -> None:
    """Raise TypeError for decay that the optimizer's next step would undo."""
    if bindings and not preserves_moves(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(
            f"{bindings[0].name} would move the parameters, but {kind} computes these anew from "
            f'its own state, so that the move does not last; use how="objective", the '
            f"weight_decay of {kind}, or an optimizer such as AdamW"
        )
