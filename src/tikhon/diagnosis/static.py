"""Facts about model and data that need no training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tikhon.data.forward import LossFunction, call_model
from tikhon.data.nested import Batch, take_rows, tensors
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Functions, Options, user_line
from tikhon.diagnosis.nonfinite import has_nonfinite
from tikhon.diagnosis.observe import ELEMENTWISE, SOFTMAXES
from tikhon.diagnosis.reference import (
    MAX_NEIGHBOUR_COLUMNS,
    applies_softmax,
    behind,
    best_constant,
    has_binary_targets,
    has_real_targets,
    is_constant_off_mean,
    lowest_loss,
    scale,
    shallow_loss,
    shallow_skill,
    sum_share,
    unbounded_loss,
    unbounded_shares,
)
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.torch_calls import DROPOUTS
from tikhon.regularizer.rounding import HALF_TYPES
from tikhon.regularizer.targets import NORMS

Steps = Sequence[Callable[[Tensor], Tensor]]  # applied in order
DROPOUT = nn.modules.dropout._DropoutNd
ALL_SUMMED = 0.98  # share of a loss that grows with the rows, for it to be a sum
UNBOUNDED_MARGIN = 1000.0  # margin below the trivial loss, times (1 + that loss): unbounded below
NONNEGATIVE = {"square", "abs", "exp", "norm", "vector_norm", "linalg_vector_norm", "cdist"}
NONNEGATIVE |= {"pairwise_distance", "relu", "softplus"}  # results are always >= 0
PRESERVING = {"sum", "mean", "sqrt", "squeeze", "flatten", "reshape", "view"}  # preserve >= 0
ADDITIONS = {"add", "__add__", "__radd__"}  # preserve >= 0 if both summands have it
HEAD_FUNCTIONS = ELEMENTWISE | SOFTMAXES | {"clamp", "clip", "clamp_min", "clamp_max"}


def model_facts(replica: Replica, batch_size: int) -> dict[str, object]:
    """Return frozen and unoptimized parameters, shared layers, dropout, batch norm on one row."""
    model = replica.model
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    facts: dict[str, object] = {
        "frozen": frozen,
        "trainable": len(frozen) < len(list(model.parameters())),
    }
    if replica.optimizer is not None:
        optimized = {id(p) for group in replica.optimizer.param_groups for p in group["params"]}
        facts["unoptimized"] = [
            n for n, p in model.named_parameters() if p.requires_grad and id(p) not in optimized
        ]
        facts["eps_lost"] = [
            name
            for group in replica.optimizer.param_groups
            if (group.get("eps") or 0) > 0
            for name, p in model.named_parameters()
            if p.dtype in HALF_TYPES and any(p is part for part in group["params"])
            if not bool(torch.tensor(group["eps"]).to(p.dtype))
        ]
        facts["maximize"] = any(g.get("maximize") for g in replica.optimizer.param_groups)
    facts["hooked"] = [n for n, p in model.named_parameters() if p._backward_hooks]
    modules = list(model.named_modules())
    facts["shared"] = _shared(model)
    rates = {n: float(getattr(m, "p", 0.0)) for n, m in modules if isinstance(m, DROPOUT)}
    facts["dropout"] = rates
    if batch_size == 1:
        norm = nn.modules.batchnorm._BatchNorm
        facts["batch_of_one"] = [n for n, m in modules if isinstance(m, norm)]
    facts["dropout_before_norm"] = _dropout_before_norm(model)
    return facts


def _shared(model: nn.Module) -> list[str]:
    """Return the names of layers with weights that occur repeatedly in one container."""
    found: list[str] = []
    for prefix, parent in model.named_modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            children = [(n, c) for n, c in parent._modules.items() if c is not None]
            counts = Counter(id(c) for _, c in children)
            found += [
                f"{prefix}.{n}".lstrip(".")
                for n, c in children
                if counts[id(c)] > 1 and any(True for _ in c.parameters())
            ]
    return found


def _dropout_before_norm(model: nn.Module) -> list[str]:
    found = []
    for prefix, parent in model.named_modules():
        if not isinstance(parent, nn.Sequential):
            continue
        previous = None
        for name, child in parent.named_children():
            follows = isinstance(previous, DROPOUT) and getattr(previous, "p", 0.0) > 0
            if follows and isinstance(child, nn.modules.batchnorm._BatchNorm):
                found.append(f"{prefix}.{name}".lstrip("."))
            previous = child
    return found


def data_facts(samples: Samples, model: nn.Module) -> dict[str, Any]:
    """Return scale and finiteness of inputs and targets."""
    inputs, target = samples.probe if not samples.indexed else samples.source
    bad = [
        f"{'inputs' if whole is inputs else 'target'}"
        for whole in (inputs, target)
        for part in tensors(whole)
        if has_nonfinite(part)
    ]
    facts: dict[str, object] = {"rows": samples.rows, "nonfinite": bad}
    facts["inputs"] = scale(inputs) if "inputs" not in bad else {}
    facts["target"] = scale(target) if "target" not in bad else {}
    first = next((m for m in model.modules() if not any(m.children())), None)
    facts["normalised_inside"] = isinstance(first, NORMS)
    return facts


def forward_facts(replica: Replica, samples: Samples) -> dict[str, Any]:
    """Return facts of the loss: trivial predictor, floor of the head, growth with the batch."""
    model, (inputs, target) = replica.model, samples.probe
    if replica.whole:
        return {}
    before = {n: (p._version, p.shape) for n, p in model.named_parameters()}
    with torch.no_grad(), undisturbed(model, training=True), _Tape() as tape:
        output = call_model(model, inputs)
    after = {n: (p._version, p.shape) for n, p in model.named_parameters()}
    facts: dict[str, Any] = {"changes_in_forward": before != after}
    facts["dropout_at_end"] = [line for result, line in tape.dropped if result is output]
    facts["grows_in_part"] = sum_share(output, target, replica.loss)
    plain = isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0
    if not plain or not output.numel() or not bool(torch.isfinite(output).all()):
        return facts | _partial_head_facts(tape, output, target, replica.loss)
    facts["grows_with_batch"] = facts["grows_in_part"] > ALL_SUMMED
    facts["output_units"] = int(output.shape[1]) if output.ndim > 1 else 1
    tail, names = _head_activations(tape, output)
    facts["head"] = names
    facts["probabilities"] = _sums_to_one(output)
    facts["own_softmax"] = applies_softmax(output, target, replica.loss)
    z = tail[0] if tail else output
    steps = _compose(tail[1]) if tail else None
    loss_behind = behind(steps, replica.loss)
    facts["trivial"], answer = best_constant(z, target, loss_behind)
    facts["lowest"] = lowest_loss(output, target, replica.loss)
    if not names and has_binary_targets(output, target):
        lowest = facts["lowest"]
        if tape.is_nonnegative(output):  # exclude negative outputs, which it never gives
            lowest = lowest_loss(output, target, replica.loss, nn.functional.softplus)
        facts |= unbounded_shares(output, target, replica.loss, lowest)
    if has_real_targets(target):
        shown = steps(answer) if steps is not None else answer
        if output.numel() == target.numel():
            facts["without_end"] = unbounded_loss(z, target, loss_behind)
        if is_constant_off_mean(shown, target, len(output)) and not facts.get("without_end"):
            # a shallow model is no reference for a loss that is unbounded below
            trivial, lowest = float(facts["trivial"]), float(facts["lowest"])
            falls = lowest < trivial - UNBOUNDED_MARGIN * (1 + abs(trivial))
            rows = rows_for_shallow_model(samples)
            facts["own_loss"] = {} if falls else shallow_loss(rows, answer, loss_behind)
    if names:
        reached = steps
        if steps is not None and tape.is_nonnegative(z):  # such as a norm, squashed afterwards
            reached = _compose([nn.functional.softplus, steps])
        facts["floor"] = lowest_loss(z, target, replica.loss, reached)
        if not facts["probabilities"] or facts["own_softmax"]:
            facts["free_floor"] = facts["lowest"]
            facts["free_trivial"] = best_constant(output, target, replica.loss)[0]
    return facts


def _partial_head_facts(
    tape: _Tape, output: object, target: object, loss: LossFunction
) -> dict[str, Any]:
    """Return head and floor of the one of several outputs that has the target's shape."""
    if type(output) not in (tuple, list) or not isinstance(target, Tensor):
        return {}
    if not has_real_targets(target):
        return {}
    parts = list(cast(list[object], output))
    for place, part in enumerate(parts):
        if not isinstance(part, Tensor) or part.shape != target.shape:
            continue
        tail, names = _head_activations(tape, part)
        if tail is None:
            continue

        def of_part(free: Tensor, target: object, place: int = place) -> Tensor:
            return loss((*parts[:place], free, *parts[place + 1 :]), target)

        return {
            "head": names,
            "floor": lowest_loss(tail[0], target, of_part, _compose(tail[1])),
            "free_floor": lowest_loss(part, target, of_part),
            "free_trivial": best_constant(part, target, of_part)[0],
        }
    return {}


def _sums_to_one(output: Tensor) -> bool:
    """Whether the outputs are class probabilities or their logarithms."""
    if output.ndim < 2:
        return False
    total = torch.logsumexp(output, 1).abs() if bool((output < 0).any()) else output.sum(1) - 1
    return bool(total.abs().max() < 1e-4)


def _compose(functions: Steps) -> Callable[[Tensor], Tensor]:
    def tail(z: Tensor) -> Tensor:
        for function in functions:
            z = function(z)
        return z

    return tail


def _head_activations(
    tape: _Tape, output: Tensor
) -> tuple[tuple[Tensor, Steps] | None, list[str]]:
    """Return the input of the activations after the last layer, those activations and names."""
    chain: list[Callable[[Tensor], Tensor]] = []
    names: list[str] = []
    wanted = output
    for func, args, kwargs, result in reversed(tape.calls):
        if result is not wanted:
            break
        chain.insert(0, lambda z, f=func, a=args[1:], k=kwargs: f(z, *a, **k))
        names.insert(0, func.__name__)
        wanted = cast(Tensor, args[0])
    if not chain:
        return None, []
    try:
        with torch.no_grad():
            same = torch.allclose(_compose(chain)(wanted), output, atol=1e-5)
    except (TypeError, RuntimeError):
        return None, []
    return ((wanted, chain), names) if same else (None, [])


class _Tape(Functions):
    """Records calls of activations and dropout with their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Function, Args, Options, object]] = []
        self.dropped: list[tuple[object, str]] = []
        self._nonnegative: list[object] = []  # results that are >= 0

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Record the call and return its result."""
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in HEAD_FUNCTIONS and args and isinstance(args[0], Tensor):
            self.calls.append((func, args, kwargs, result))
        even = name in ("pow", "__pow__") and len(args) > 1 and args[1] in (2, 4)
        if (
            name in NONNEGATIVE
            or even
            or (name in PRESERVING and args and self.is_nonnegative(args[0]))
        ):
            self._nonnegative.append(result)
        terms = [t >= 0 if isinstance(t, int | float) else self.is_nonnegative(t) for t in args]
        if name in ADDITIONS and len(args) == 2 and all(terms):
            self._nonnegative.append(result)
        if name in DROPOUTS and result is not (args[0] if args else kwargs.get("input")):
            self.dropped.append((result, user_line()))
        return result

    def is_nonnegative(self, value: object) -> bool:
        """Whether a result is >= 0 by construction: a square, a norm, a sum of them."""
        return any(value is known for known in self._nonnegative)


def clamped_score_facts(replica: Replica, batch: Batch) -> dict[str, float]:
    """Return the share of rows whose true class has a logit of 0 after a final ReLU.

    Only if nothing but a softmax, of the model or of the loss, follows the ReLU.
    """
    target = batch[1]
    if replica.whole or not isinstance(target, Tensor) or target.is_floating_point():
        return {}
    with torch.no_grad(), undisturbed(replica.model, training=False), _Tape() as tape:
        output = call_model(replica.model, batch[0])
    if not isinstance(output, Tensor):
        return {}
    wanted, inside = output, False
    for func, args, _, result in reversed(tape.calls):
        if result is not wanted:
            break
        wanted, scores = cast(Tensor, args[0]), cast(Tensor, result)
        if func.__name__ in ("log_softmax", "softmax"):
            inside = True
        elif not _rectifies(wanted, scores):
            break
        elif inside or applies_softmax(output, target, replica.loss):
            if scores.ndim != 2 or target.shape != scores.shape[:1]:
                break
            own = scores.gather(1, target[:, None].clamp(0, scores.shape[1] - 1))
            return {"own_score_zero": float((own == 0).double().mean())}
    return {}


def _rectifies(before: Tensor, after: Tensor) -> bool:
    """Whether negative values became 0."""
    low = before < 0
    return bool((after >= 0).all()) and bool((low & (after == 0)).any())


def reference(samples: Samples) -> dict[str, float]:
    """Return the skill of a shallow model on the same rows (see `shallow_skill`)."""
    return shallow_skill(rows_for_shallow_model(samples))


def rows_for_shallow_model(samples: Samples) -> Batch:
    """Return rows for a shallow model: at most 1200, 4000 of few columns, or a loader's probe."""
    if not samples.indexed:
        return samples.probe
    inputs = samples.source[0]
    place = isinstance(inputs, Tensor) and inputs.is_floating_point()
    few = place and inputs[:1].numel() <= MAX_NEIGHBOUR_COLUMNS  # nearest neighbours are tried
    count = min(samples.rows, 4000 if few else 1200)
    order = torch.randperm(samples.rows, generator=torch.Generator().manual_seed(1))[:count]
    return take_rows(samples.source, order)
