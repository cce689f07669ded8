"""The loss as a function of the outputs: is it bounded, and is the sign of its parts right?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tikhon.data.rows import each
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.replica import number_of, undisturbed
from tikhon.diagnosis.wiring.program import Subject, floats
from tikhon.diagnosis.wiring.torch_calls import DRAWS, Calls

FAR = (1e1, 1e2, 1e3)  # shifts added to an output
FASTER = 30.0  # decrease of a loss over ten times the distance; a linear loss has 10
MATCH = 1e-4  # relative difference of equal numbers
WIDTH = 32  # input columns up to which a determinant is computed quickly
ROWS = 5
SEEDS = 3


def answer_facts(subject: Subject) -> dict[str, object]:
    """Find unbounded parts of the loss, parts of the wrong sign, and zero gradients."""
    facts: dict[str, object] = {}
    for test in (_silent, _far, _entropy, _determinant):
        try:
            facts |= test(subject)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            # the user's loss may raise anything on modified outputs
            facts.setdefault("answers_unmeasured", f"{test.__name__}: {type(error).__name__}")
    return facts


@contextmanager
def replaced(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Context that changes the float tensors of every model output, and yields their list."""
    seen: list[Tensor] = []

    def leave(module: nn.Module, args: object, output: object) -> object:
        def one(t: Tensor) -> Tensor:
            if not t.is_floating_point() or not t.numel():
                return t
            seen.append(change(t))
            return seen[-1]

        return each(output, one)

    handle = model.register_forward_hook(leave)
    try:
        yield seen
    finally:
        handle.remove()


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def _silent(subject: Subject) -> dict[str, object]:
    """Whether the gradient of the loss is 0 at every output, for all seeds."""
    model = subject.model
    for seed in range(SEEDS):
        with torch.enable_grad(), undisturbed(model, training=True, seed=seed):
            with replaced(model, _leaf) as leaves:
                loss = subject.replica.value(subject.batch)
            if not leaves or not loss.requires_grad:
                return {}
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        if all(g is None for g in found) or any(g is not None and bool(g.any()) for g in found):
            return {}
    with torch.enable_grad(), undisturbed(model, training=True), _Zeros() as tape:
        subject.replica.value(subject.batch)
    return {"answers_silent": tape.place or "the loss"}


class _Zeros(Functions):
    """Context that records a factor without gradient whose entries are all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.place = ""

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Inspect the factors and return the function's result."""
        if function_name(func) in ("mul", "__mul__", "__rmul__", "multiply"):
            fixed = [t for t in args if isinstance(t, Tensor) and not t.requires_grad]
            zero = [t for t in fixed if t.numel() > 1 and not bool(t.detach().any())]
            learned = any(isinstance(t, Tensor) and t.requires_grad for t in args)
            if zero and learned and not self.place:
                self.place = user_line()
        return func(*args, **kwargs)


def _far(subject: Subject) -> dict[str, object]:
    """Whether the loss is unbounded below when one output is moved and the others are kept.

    Adversarial and reward losses are linear and unbounded on purpose, so the decrease must
    accelerate; linear counts for paired outputs of a sampling network, such as a code's variance.
    """
    whole = subject.replica.whole
    with torch.no_grad(), undisturbed(subject.model, training=True):
        with Calls(subject.model) as tape, replaced(subject.model, Tensor.detach) as given:
            start = float(subject.replica.value(subject.batch))
    draws = any(c.module != "the loss" for c in tape.named(*DRAWS))
    several = len(floats(subject.answer(subject.batch))) if given else 0
    if not given or not math.isfinite(start) or (several < 2 and not whole):
        return {}
    shapes = [tuple(t.shape) for t in given[:several]]
    for place in range(several):
        coded = (
            draws and several > 2 and shapes.count(shapes[place]) > 1 and len(shapes[place]) > 1
        )
        for sign in (-1.0, 1.0):
            values = [_moved(subject, place, several, sign * far) for far in FAR]
            if _endless(values, start, straight=coded):
                lowest = values[-1] if math.isfinite(values[-1]) else -1e30
                return {"answer_without_end": {"place": place, "of": several, "loss": lowest}}
    return {}


def _moved(subject: Subject, place: int, several: int, way: float) -> float:
    count = 0

    def change(t: Tensor) -> Tensor:
        nonlocal count
        own, count = count % several == place, count + 1
        return t + way if own else t

    with torch.no_grad(), undisturbed(subject.model, training=True):
        with replaced(subject.model, change):
            return float(subject.replica.value(subject.batch))


def _endless(values: list[float], start: float, *, straight: bool) -> bool:
    """Whether a loss decreases without bound, accelerating unless `straight`."""
    if any(math.isnan(v) for v in values) or values[-1] == math.inf:
        return False
    drops = [start - v for v in values]
    if drops[0] <= 0 or drops[1] <= 0 or drops[2] < 3 * (1 + abs(start)):
        return False
    if values[-1] == -math.inf:
        return True
    return drops[2] > (5.0 if straight else FASTER) * drops[1] and drops[1] > 5 * drops[0]


class _Entropies(Functions):
    """Context that records tensors equal to the entropy of the outputs, its mean or sum."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, float, str]] = []  # with its sign
        self.gains = False  # an output is multiplied by one number per row
        self._known: list[Tensor] = []
        self._handle = model.register_forward_hook(self._answer)

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _answer(self, module: nn.Module, args: object, output: object) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for t in floats(output):
                if t.ndim > 1 and t.shape[-1] > 1:
                    p = t.detach().softmax(-1)
                    self._known.append(-(p * p.clamp_min(1e-30).log()).sum(-1))

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Compare the function's result with the entropies and return it."""
        output = func(*args, **kwargs)
        name = function_name(func)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if name in ("mul", "__mul__", "__rmul__") and len(args) == 2:
                self.gains |= _gains(args[0], args[1]) or _gains(args[1], args[0])
            if isinstance(output, Tensor) and output.requires_grad and output.ndim < 3:
                for known in self._known:
                    sign = _same(output.detach(), known)
                    if sign:
                        self.found.append((output, sign, user_line()))
                        break
        return output


def _gains(learned: object, factor: object) -> bool:
    """Whether `learned` is multiplied by one number per row, such as an action's advantage."""
    if not isinstance(learned, Tensor) or not isinstance(factor, Tensor):
        return False
    if not learned.requires_grad or factor.requires_grad or factor.numel() < 3:
        return False
    if not learned.numel() == factor.numel() == len(factor):
        return False
    return len(factor.detach().unique()) > 2


def _same(t: Tensor, entropy: Tensor) -> float:
    """Return 1 if a tensor is the entropy (or its mean or sum), -1 if its negative, else 0."""
    candidates = [entropy]
    if t.numel() == 1:
        candidates = [entropy.mean().reshape(t.shape), entropy.sum().reshape(t.shape)]
    for known in candidates:
        if known.numel() != t.numel() or not float(known.abs().sum()):
            continue
        for sign in (1.0, -1.0):
            apart = (sign * t.flatten() - known.flatten()).abs().max()
            if float(apart) <= MATCH * float(known.abs().max()):
                return sign
    return 0.0


def _entropy(subject: Subject) -> dict[str, object]:
    """Return the gradient of an agent's loss with respect to the entropy of its policy.

    Only if rows have advantages: other losses may lower entropy on purpose.
    """
    if not subject.replica.whole:
        return {}
    with torch.enable_grad(), undisturbed(subject.model, training=True):
        tape = _Entropies(subject.model)
        try:
            with tape:
                loss = subject.replica.value(subject.batch)
        finally:
            tape.close()
        if not tape.found or not tape.gains or not loss.requires_grad:
            return {}
        slopes = torch.autograd.grad(loss, [t for t, _, _ in tape.found], allow_unused=True)
    for (_, sign, place), slope in zip(tape.found, slopes):
        if slope is not None and bool(slope.any()):
            return {"entropy_pulled": sign * float(slope.sum()), "entropy_place": place}
    return {}


def _determinant(subject: Subject) -> dict[str, object]:
    """Return the gradient of the loss with respect to an output that is a log-determinant.

    The determinant is that of the Jacobian of another output, row by row. The log-density of a
    flow grows with it, so the loss has to raise it.
    """
    inputs, model = subject.batch[0], subject.model
    if isinstance(inputs, tuple) and len(inputs) == 1:
        inputs = inputs[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim != 2:
        return {}
    if not 1 < inputs.shape[1] <= WIDTH or subject.rows < ROWS:
        return {}
    kept = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(8)
    try:
        with torch.no_grad():  # a flow may start as the identity, with determinant 1
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
        with torch.enable_grad(), undisturbed(model, training=False):
            leaf = inputs.detach().clone().requires_grad_()
            answers = floats(model(leaf))
            moved = [t for t in answers if t.shape == leaf.shape and t.requires_grad]
            single = [t for t in answers if t.numel() == len(leaf) and t.requires_grad]
            if len(moved) != 1 or len(single) != 1:
                return {}
            columns = [
                torch.autograd.grad(moved[0][:, k].sum(), leaf, retain_graph=True)[0]
                for k in range(leaf.shape[1])
            ]
            true = torch.linalg.slogdet(torch.stack(columns, 1).double()).logabsdet
            said = single[0].detach().flatten().double()
            pull = _pull(subject, single[0].numel())
    finally:
        with torch.no_grad():
            for p, before in zip(model.parameters(), kept):
                p.copy_(before)
    size = float(true.abs().max())
    if pull == 0 or size < 1e-3 or not math.isfinite(size):
        return {}
    for sign in (1.0, -1.0):
        if float((sign * said - true).abs().max()) <= 1e-2 * size:
            return {"determinant_pulled": sign * pull}
    return {}


def _pull(subject: Subject, numel: int) -> float:
    """Return the summed gradient of the loss at outputs with `numel` entries."""
    with torch.enable_grad(), undisturbed(subject.model, training=False):
        with replaced(subject.model, _leaf) as leaves:
            loss = number_of(subject.replica.value(subject.batch))
        own = [t for t in leaves if t.numel() == numel]
        if not own or not loss.requires_grad:
            return 0.0
        slopes = torch.autograd.grad(loss, own, allow_unused=True)
    return sum(float(g.sum()) for g in slopes if g is not None)
