"""The loss as a function of the outputs: is it bounded, and is the sign of its parts right?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from tikhon.data.nested import map_tensors
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import LOSS, Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.replica import scalar_loss, undisturbed
from tikhon.diagnosis.wiring.program import Facts, Program, float_tensors, restored
from tikhon.diagnosis.wiring.torch_calls import RANDOM_FUNCTIONS, CallTrace

SHIFTS = (1e1, 1e2, 1e3)  # shifts added to an output
ACCELERATION = 30.0  # decrease of a loss over ten times the distance; a linear loss has 10
SAME = 1e-4  # relative difference of equal numbers
MAX_COLUMNS = 32  # input columns up to which a determinant is computed quickly
ROWS = 5
SEEDS = 3
STEP = 1e-2  # of outputs, in their standard deviations, to measure a slope
SMOOTH = 0.3  # relative difference of slopes over two distances, at most
CLAMPS = {"clamp", "clamp_min", "relu", "clip"}
SEEN = 0.05  # share of the slope that the gradient has: less, and the rest is cut off (convention)


def loss_sign_facts(program: Program) -> Facts:
    """Find unbounded parts of the loss, parts of the wrong sign, and zero gradients."""
    facts: Facts = {}
    tests = (_zero_gradients, _unseen_slope, _unbounded, _entropy_gradient, _determinant_gradient)
    for test in tests:
        try:
            facts |= test(program)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            # the user's loss may raise anything on modified outputs
            facts.setdefault("answers_unmeasured", f"{test.__name__}: {type(error).__name__}")
    return facts


@contextmanager
def replace_outputs(
    model: nn.Module, change: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Context that changes the float tensors of every model output, and yields their list."""
    seen: list[Tensor] = []

    def leave(module: nn.Module, args: object, output: object) -> object:
        def one(t: Tensor) -> Tensor:
            if not t.is_floating_point() or not t.numel():
                return t
            seen.append(change(t))
            return seen[-1]

        return map_tensors(output, one)

    with model.register_forward_hook(leave):
        yield seen


def _as_leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def _output_gradients(
    program: Program, *, training: bool = True, seed: int = 0
) -> tuple[list[Tensor], tuple[Tensor | None, ...], float]:
    """Return the outputs, the loss and its gradients there; no outputs if it has none."""
    with torch.enable_grad(), undisturbed(program.model, training=training, seed=seed):
        with replace_outputs(program.model, _as_leaf) as leaves:
            loss = scalar_loss(program.replica.value(program.batch))
        if not leaves or not loss.requires_grad:
            return [], (), float(loss.detach())
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [leaf.detach() for leaf in leaves], slopes, float(loss.detach())


def _zero_gradients(program: Program) -> Facts:
    """Whether the gradient of the loss is 0 at every output, for all seeds."""
    for seed in range(SEEDS):
        _, found, _ = _output_gradients(program, seed=seed)
        known = [g for g in found if g is not None]
        if not known or any(bool(g.any()) for g in known):
            return {}
    with torch.enable_grad(), undisturbed(program.model, training=True):
        with _ZeroFactorTrace() as trace:
            program.replica.value(program.batch)
    return {"answers_silent": trace.place or "the loss", "clamped_by": trace.clamp}


def _unseen_slope(program: Program) -> Facts:
    """Whether the loss changes with the outputs far more than its gradient says.

    Then its main part is computed from detached outputs. A part that is detached on purpose, such
    as the target of a bootstrapped value, leaves a share of the slope that is larger than `SEEN`.
    """
    with CallTrace(program.model) as trace:
        leaves, found, loss = _output_gradients(program)
    cuts = [c for c in trace.calls if (c.cut or c.silent) and c.module == LOSS]
    if not cuts or not leaves:
        return {}
    seen = slope = 0.0
    for seed in range(SEEDS):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        ways = [
            torch.randn(t.shape, generator=generator).to(t) * t.std(correction=0) for t in leaves
        ]
        far, near = (_slope_along(program, ways, step) for step in (STEP, STEP / 2))
        if not abs(far - near) <= SMOOTH * abs(far) > SAME * (1 + abs(loss)):
            return {}
        seen += abs(sum(float((g * way).sum()) for g, way in zip(found, ways) if g is not None))
        slope += abs(far)
        if not seen <= SEEN * slope:  # also where the gradient is not finite
            return {}
    name = "no_grad" if cuts[0].silent else cuts[0].name
    return {"unseen_slope": {"share": seen / slope, "name": name, "place": cuts[0].place}}


def _slope_along(program: Program, ways: list[Tensor], step: float) -> float:
    """Return the slope of the loss along a change of all outputs."""
    values = []
    for signed in (step, -step):
        shifts = iter(ways)
        with torch.no_grad(), undisturbed(program.model, training=True):
            with replace_outputs(
                program.model, lambda t, signed=signed, shifts=shifts: t + signed * next(shifts)
            ):
                values.append(float(program.replica.value(program.batch)))
    return (values[0] - values[1]) / (2 * step)


class _ZeroFactorTrace(Functions):
    """Context that records a factor without gradient, or a clamped result, that is all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.place = self.clamp = ""

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Inspect the factors and return the function's result."""
        output = func(*args, **kwargs)
        is_clamped = function_name(func) in CLAMPS and isinstance(output, Tensor)
        if is_clamped and output.requires_grad and not bool(output.detach().any()):
            self.place, self.clamp = user_line(), function_name(func)
        if function_name(func) in ("mul", "__mul__", "__rmul__", "multiply"):
            fixed = [t for t in args if isinstance(t, Tensor) and not t.requires_grad]
            zero = [t for t in fixed if t.numel() > 1 and not bool(t.detach().any())]
            learned = any(isinstance(t, Tensor) and t.requires_grad for t in args)
            if zero and learned and not self.place:
                self.place = user_line()
        return output


def _unbounded(program: Program) -> Facts:
    """Whether the loss is unbounded below when one output is moved and the others are kept.

    Adversarial and reward losses are linear and unbounded on purpose, so the decrease must
    accelerate; linear counts for paired outputs of a sampling network, such as a code's variance.
    """
    whole = program.replica.whole
    with torch.no_grad(), undisturbed(program.model, training=True):
        with replace_outputs(program.model, Tensor.detach) as given:
            with CallTrace(program.model) as trace:
                start = float(program.replica.value(program.batch))
    draws = any(c.module != "the loss" for c in trace.named(*RANDOM_FUNCTIONS))
    count = len(float_tensors(program.forward(program.batch))) if given else 0
    if not given or not math.isfinite(start) or (count < 2 and not whole):
        return {}
    shapes = [tuple(t.shape) for t in given[:count]]
    for index in range(count):
        paired = draws and count > 2 and len(shapes[index]) > 1 < shapes.count(shapes[index])
        for sign in (-1.0, 1.0):
            values = [_loss_of_shifted(program, index, count, sign * far) for far in SHIFTS]
            if _falls_without_bound(values, start, linear=paired):
                lowest = values[-1] if math.isfinite(values[-1]) else -1e30
                return {"answer_without_end": {"place": index, "of": count, "loss": lowest}}
    return {}


def _loss_of_shifted(program: Program, index: int, count: int, shift: float) -> float:
    seen = itertools.count()

    def change(t: Tensor) -> Tensor:
        return t + shift if next(seen) % count == index else t

    with torch.no_grad(), undisturbed(program.model, training=True):
        with replace_outputs(program.model, change):
            return float(program.replica.value(program.batch))


def _falls_without_bound(values: list[float], start: float, *, linear: bool) -> bool:
    """Whether a loss decreases without bound, accelerating unless `linear`."""
    if any(math.isnan(v) for v in values) or values[-1] == math.inf:
        return False
    drops = [start - v for v in values]
    if drops[0] <= 0 or drops[1] <= 0 or drops[2] < 3 * (1 + abs(start)):
        return False
    if values[-1] == -math.inf:
        return True
    return drops[2] > (5.0 if linear else ACCELERATION) * drops[1] and drops[1] > 5 * drops[0]


class _EntropyTrace(Functions):
    """Context that records tensors equal to the entropy of the outputs, its mean or sum."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, float, str]] = []  # with its sign
        self.has_advantages = False  # an output is multiplied by one number per row
        self._entropies: list[Tensor] = []
        self.model = model

    def __enter__(self) -> Self:
        self._handle = self.model.register_forward_hook(self._record_entropies)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._handle.remove()

    def _record_entropies(self, module: nn.Module, args: object, output: object) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for t in float_tensors(output):
                if t.ndim > 1 and t.shape[-1] > 1:
                    p = t.detach().softmax(-1)
                    self._entropies.append(-(p * p.clamp_min(1e-30).log()).sum(-1))

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Compare the function's result with the entropies and return it."""
        output = func(*args, **kwargs)
        name = function_name(func)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if name in ("mul", "__mul__", "__rmul__") and len(args) == 2:
                a, b = args
                self.has_advantages |= _is_advantage(a, b) or _is_advantage(b, a)
            if isinstance(output, Tensor) and output.requires_grad and output.ndim < 3:
                for known in self._entropies:
                    sign = _matching_sign(output.detach(), known)
                    if sign:
                        self.found.append((output, sign, user_line()))
                        break
        return output


def _is_advantage(learned: object, factor: object) -> bool:
    """Whether `learned` is multiplied by one number per row, such as an action's advantage."""
    if not isinstance(learned, Tensor) or not isinstance(factor, Tensor):
        return False
    if not learned.requires_grad or factor.requires_grad or factor.numel() < 3:
        return False
    if not learned.numel() == factor.numel() == len(factor):
        return False
    return len(factor.detach().unique()) > 2


def _matching_sign(t: Tensor, entropy: Tensor) -> float:
    """Return 1 if a tensor is the entropy (or its mean or sum), -1 if its negative, else 0."""
    candidates = [entropy]
    if t.numel() == 1:
        candidates = [entropy.mean().reshape(t.shape), entropy.sum().reshape(t.shape)]
    for known in candidates:
        if known.numel() != t.numel() or not float(known.abs().sum()):
            continue
        for sign in (1.0, -1.0):
            apart = (sign * t.flatten() - known.flatten()).abs().max()
            if float(apart) <= SAME * float(known.abs().max()):
                return sign
    return 0.0


def _entropy_gradient(program: Program) -> Facts:
    """Return the gradient of an agent's loss with respect to the entropy of its policy.

    Only if rows have advantages: other losses may lower entropy on purpose.
    """
    if not program.replica.whole:
        return {}
    with torch.enable_grad(), undisturbed(program.model, training=True):
        with _EntropyTrace(program.model) as trace:
            loss = program.replica.value(program.batch)
        if not trace.found or not trace.has_advantages or not loss.requires_grad:
            return {}
        slopes = torch.autograd.grad(loss, [t for t, _, _ in trace.found], allow_unused=True)
    for (_, sign, index), slope in zip(trace.found, slopes):
        if slope is not None and bool(slope.any()):
            return {"entropy_pulled": sign * float(slope.sum()), "entropy_place": index}
    return {}


def _determinant_gradient(program: Program) -> Facts:
    """Return the gradient of the loss with respect to an output that is a log-determinant.

    The determinant is that of the Jacobian of another output, row by row. The log-density of a
    flow grows with it, so the loss has to raise it.
    """
    inputs, model = program.batch[0], program.model
    if isinstance(inputs, tuple) and len(inputs) == 1:
        inputs = inputs[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim != 2:
        return {}
    if not 1 < inputs.shape[1] <= MAX_COLUMNS or program.rows < ROWS:
        return {}
    generator = torch.Generator().manual_seed(8)
    with restored(model.parameters()), torch.enable_grad(), undisturbed(model, training=False):
        for p in model.parameters():  # a flow may start as the identity, with determinant 1
            p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p)
        leaf = _as_leaf(inputs)
        outputs = float_tensors(model(leaf))
        moved = [t for t in outputs if t.shape == leaf.shape and t.requires_grad]
        single = [t for t in outputs if t.numel() == len(leaf) and t.requires_grad]
        if len(moved) != 1 or len(single) != 1:
            return {}
        entries = moved[0].sum(0)
        columns = [torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in entries]
        expected = torch.linalg.slogdet(torch.stack(columns, 1).double()).logabsdet
        log_determinant = single[0].detach().flatten().double()
        pull = _output_gradient(program, single[0].numel())
    size = float(expected.abs().max())
    if pull == 0 or size < 1e-3 or not math.isfinite(size):
        return {}
    for sign in (1.0, -1.0):
        if float((sign * log_determinant - expected).abs().max()) <= 1e-2 * size:
            return {"determinant_pulled": sign * pull}
    return {}


def _output_gradient(program: Program, numel: int) -> float:
    """Return the summed gradient of the loss at outputs with `numel` entries."""
    leaves, slopes, _ = _output_gradients(program, training=False)
    own = [g for t, g in zip(leaves, slopes) if t.numel() == numel]
    return sum(float(g.sum()) for g in own if g is not None)
