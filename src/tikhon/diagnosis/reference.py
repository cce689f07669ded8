"""Yardsticks from the data alone: what a constant reaches, what the head can reach, and what a

plain shallow model reaches on the same rows. They replace absolute thresholds on accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from tikhon.data.rows import Batch, LossFunction, each, entries, tensors
from tikhon.diagnosis.replica import number_of

Tail = Callable[[Tensor], Tensor]
MANY_CLASSES = 1000  # of a ridge on one-hot targets; more are numbers or a vocabulary
FAR = 10.0  # distances of the quartiles
ENDS = 50.0  # what enters an activation where it says the least and the most
IGNORED = -100  # torch's own mark of a target that does not count
FEW_COORDINATES = 3  # of a place, to ask its nearest neighbours
NEAREST = 3
MUCH_LOWER = 10.0  # than right answers cost, times that and 1
OFF_CENTRE = 0.02  # mean square of a constant above the variance, as a share of it
MANY_OUTPUTS = 256  # numbers in an answer for which a shallow model is fitted by the user's loss
MANY_COLUMNS = 4096  # of a design whose normal equations are still solved in a moment


def constant_loss(
    output: Tensor, target: object, loss: LossFunction, tail: Tail | None = None
) -> float:
    """The smallest loss of a constant output: the trivial predictor, for any loss.

    With `tail` (the activations behind the last layer) the constant is what enters it.
    """
    return best_constant(output, target, loss, tail)[0]


def best_constant(
    output: Tensor, target: object, loss: LossFunction, tail: Tail | None = None
) -> tuple[float, Tensor]:
    """The smallest loss of a constant output, and that constant."""
    return _minimise(output.detach().mean(0, keepdim=True), len(output), target, loss, tail)


def free_loss(
    output: Tensor, target: object, loss: LossFunction, tail: Tail | None = None
) -> float:
    """The smallest loss when each row has an output of its own: the floor of loss and head.

    Where the targets are outputs that the head can give, theirs is reached: a search may stay away
    from it where the loss is no bowl, as that of an overlap of boxes.
    """
    found, _ = _minimise(output.detach(), None, target, loss, tail)
    if tail is None or not isinstance(target, Tensor) or not target.is_floating_point():
        return found
    with suppress(Exception), torch.no_grad():  # the user's loss, on what it was not written for
        low, high = (tail(torch.full_like(output, end)) for end in (-ENDS, ENDS))
        if low.shape == target.shape and bool(((low <= target) & (target <= high)).all()):
            return min(found, float(number_of(loss(target.to(low.dtype), target))))
    return found


def _minimise(
    start: Tensor,
    rows: int | None,
    target: object,
    loss: LossFunction,
    tail: Tail | None,
) -> tuple[float, Tensor]:
    def reach(free: Tensor) -> float:
        solver = torch.optim.LBFGS([free], max_iter=25, line_search_fn="strong_wolfe")

        def closure() -> Tensor:  # of a line search: no step of training
            solver.zero_grad()
            output = free if rows is None else free.expand(rows, *free.shape[1:])
            value = number_of(loss(tail(output) if tail is not None else output, target))
            if value.requires_grad:
                value.backward()
            return value

        try:
            with torch.enable_grad():
                solver.step(closure)
                return float(closure().detach())
        except Exception:  # the user's loss, on outputs that it was not written for
            return math.nan

    # from zero, and from above: a rectified head is flat at zero
    starts = [s.requires_grad_() for s in (torch.zeros_like(start), start.clone() + 1.0)]
    reached = [(reach(s), s.detach()) for s in starts]
    known = [pair for pair in reached if math.isfinite(pair[0])]
    return min(known, key=lambda pair: pair[0]) if known else (math.nan, starts[0].detach())


def compressed(inputs: Tensor, width: int) -> float:
    """The share of the variance of rows that their first `width` principal components keep."""
    rows = inputs.detach().flatten(1).double()
    rows = rows - rows.mean(0)
    square = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    kept = torch.linalg.eigvalsh(square).clamp_min(0.0)
    return float(kept[-width:].sum() / kept.sum().clamp_min(1e-300))


def amounts(target: object) -> bool:
    """Whether targets are numbers, and no names of classes nor yes and no."""
    return isinstance(target, Tensor) and target.is_floating_point() and not binary(target)


def misread(answer: Tensor, target: Tensor, rows: int) -> bool:
    """Whether squared errors do not judge a loss: its best constant is not near the mean.

    A quantile is such an answer, and any whose shape is not that of the targets.
    """
    if answer.numel() * rows != target.numel():
        return True
    goal = target.detach().double().reshape(rows, -1)
    spread = float((goal - goal.mean(0)).square().mean())
    off = float((goal - answer.double().reshape(1, -1)).square().mean())
    return spread > 0 and off > (1 + OFF_CENTRE) * spread


def without_end(output: Tensor, target: Tensor, loss: LossFunction, tail: Tail | None) -> float:
    """How low a loss falls far from all targets; 0 where it does not fall on and on.

    All answers move up together, or down, to 100, 10,000 and a million deviations.
    """
    goal = target.detach().double()
    unit = float(goal.std()) if goal.numel() > 1 else 0.0
    lowest = 0.0
    for sign in (-1.0, 1.0):
        values = []
        for far in (1e2, 1e4, 1e6):
            z = torch.full_like(output, sign * far * unit) + float(goal.mean())
            with suppress(Exception), torch.no_grad():  # the user's loss, far from its targets
                values.append(float(number_of(loss(tail(z) if tail is not None else z, target))))
        falls = len(values) == 3 and values[2] < 10 * values[1] < 100 * values[0] < 0
        lowest = min(lowest, values[2]) if falls and math.isfinite(values[2]) else lowest
    return lowest


def yes_or_no(output: Tensor, target: object) -> bool:
    """Whether each answer is one of targets 0 and 1."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return False
    return target.shape == output.shape and binary(target) and float(target.min()) == 0


def unbounded_shares(
    output: Tensor, target: Tensor, loss: LossFunction, lowest: float
) -> dict[str, object]:
    """Whether free answers get below what the targets themselves cost, and shares do not.

    An overlap of shares is such a loss: of answers below 0 it may have any value.
    """
    with suppress(Exception), torch.no_grad():  # the user's loss, on what it was not written for
        right = float(number_of(loss(target.to(output.dtype), target)))
        if not lowest < right - MUCH_LOWER * (1 + abs(right)):
            return {}
        bounded, _ = _minimise(output.detach(), None, target, loss, torch.sigmoid)
        if bounded >= right - 1e-3 * (1 + abs(right)):
            return {"unbounded_shares": {"lowest": lowest, "right": right}}
    return {}


def shallow_loss(
    batch: Batch, answer: Tensor, loss: LossFunction, tail: Tail | None = None
) -> dict[str, float]:
    """The user's own loss of a shallow model and of the best constant, on rows they never saw.

    A linear map of the inputs and random features to what enters the head is fitted to half of the
    rows by that loss; `answer` is the best constant, which it starts from. Empty where targets
    that change rows cost the same.
    """
    inputs, target = batch
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor) or len(inputs) < 48:
        return {}
    design, _ = design_of(inputs)
    if design is None or answer.numel() > MANY_OUTPUTS:
        return {}
    x = design.to(answer.dtype) / math.sqrt(design.shape[1])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    halves = order[: len(x) // 2], order[len(x) // 2 :]
    unit = float(target.detach().double().std())

    def value(weights: Tensor, rows: Tensor, of: Tensor | None = None) -> Tensor:
        z = answer + unit * (x[rows] @ weights).reshape(len(rows), *answer.shape[1:])
        return number_of(
            loss(tail(z) if tail is not None else z, target[rows if of is None else of])
        )

    still = torch.zeros(x.shape[1], answer.numel(), dtype=x.dtype)
    try:
        with torch.no_grad():
            constant = float(value(still, halves[1]))
            drawn = torch.randn(still.shape, generator=torch.Generator().manual_seed(4)).to(still)
            own, others = (float(value(drawn, halves[1], of)) for of in (None, halves[1].roll(1)))
        if math.isclose(own, others, rel_tol=1e-4):  # rows are compared as a whole, none by itself
            return {}
        fitted = [_fit(value, still, halves, ridge) for ridge in (3e-3, 3e-2, 0.3)]
    except Exception:  # the user's loss, on outputs that it was not written for
        return {}
    found = {"constant_loss": constant, "shallow_loss": min(fitted)}
    return found if all(map(math.isfinite, found.values())) else {}


def _fit(
    value: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    halves: tuple[Tensor, Tensor],
    ridge: float,
) -> float:
    """The loss on the second half of weights that are fitted to the first."""
    weights = start.clone().requires_grad_()
    with torch.no_grad():
        scale = abs(float(value(start, halves[0])))
    solver = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:  # of a line search: no step of training
        solver.zero_grad()
        total = value(weights, halves[0]) + ridge * scale * weights.square().sum() / len(weights)
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(closure)
    with torch.no_grad():
        reached = float(value(weights, halves[1]))
    return reached if math.isfinite(reached) else math.inf


def shallow_skill(batch: Batch) -> dict[str, float]:
    """Held-out accuracy (classes) or R2 (numbers) of a ridge on the inputs and random features.

    Half of the rows are fitted, half judge; `constant` is the skill of the best constant.
    Empty where inputs are not one tensor of numbers or tokens, or the targets neither classes nor
    numbers.
    """
    inputs, target = batch
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return {}
    if target.ndim > 2 or len(inputs) < 24 or inputs.dtype == torch.bool:
        return {}
    if target.ndim == 2 and target.shape[1] > 1 and not target.is_floating_point():
        return {}  # classes of positions
    generator = torch.Generator(device="cpu").manual_seed(0)
    design, _ = design_of(inputs, width=256, generator=generator)
    if design is None:
        return {}
    classes = not target.is_floating_point() and target.ndim == 1
    if classes and not 0 <= int(target.min()) <= int(target.max()) < MANY_CLASSES:
        return {}
    y = torch.nn.functional.one_hot(target.long()).double() if classes else target.double()
    y = y.reshape(len(y), -1)
    signs = not classes and binary(y)
    order = torch.randperm(len(design), generator=generator)
    fit, judge = order[: len(design) // 2], order[len(design) // 2 :]
    y = y.cpu()
    best = -math.inf
    for strength in (0.3, 10.0, 300.0):
        scores = design[judge] @ ridge(design[fit], y[fit], strength)
        best = max(best, _held_out(scores, y[judge], classes, signs))
    if inputs.is_floating_point() and inputs[0].numel() <= FEW_COORDINATES:
        near = _neighbours(inputs.detach().reshape(len(inputs), -1).double().cpu(), y, fit, judge)
        best = max(best, _held_out(near, y[judge], classes, signs))
    constant = float(y.mean(0).max()) if classes else 0.0
    if signs:
        share = (y > 0).double().mean(0)
        constant = float(torch.maximum(share, 1 - share).mean())
    return {"shallow": best, "constant": constant}


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Weights of least squares with `strength` times their squares, by the smaller equations.

    (x'x + s)^-1 x'y = x'(xx' + s)^-1 y: with fewer rows than columns the second is cheaper.
    """
    wide = len(x) < x.shape[1]
    gram = x @ x.T if wide else x.T @ x
    gram.diagonal().add_(strength)
    return x.T @ torch.linalg.solve(gram, y) if wide else torch.linalg.solve(gram, x.T @ y)


def _neighbours(x: Tensor, y: Tensor, fit: Tensor, judge: Tensor) -> Tensor:
    """The mean of the nearest rows: it follows waves that ridges of few bends cannot."""
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-9)
    near = torch.cdist(x[judge], x[fit]).topk(NEAREST, largest=False).indices
    return y[fit][near].mean(1)


def design_of(
    inputs: Tensor, *, width: int = 256, generator: torch.Generator | None = None
) -> tuple[Tensor | None, int]:
    """Columns of a shallow model, and how many of them are straight: 1, inputs, random features.

    Integer inputs are tokens: how often each occurs, and where, as far as that fits. None where
    there are too many columns or numbers that are not finite.
    """
    x = inputs.detach().flatten(1).cpu() if inputs.ndim > 1 else inputs.detach().cpu()[:, None]
    x = x.double() if x.is_floating_point() else _occurrences(x.long())
    if x.shape[1] > MANY_COLUMNS or not x.shape[1] or not bool(torch.isfinite(x).all()):
        return None, 0
    x = within(x)
    x = x - x.mean(0)
    x = x / x.std(0).clamp_min(1e-9 + 1e-6 * float(x.abs().max()))
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    projection = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64)
    shift = torch.randn(width, generator=generator, dtype=torch.float64)
    hidden = torch.relu(x @ projection / math.sqrt(x.shape[1]) + shift)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    return torch.cat([ones, x, hidden], 1), 1 + x.shape[1]


def within(x: Tensor) -> Tensor:
    """Columns with what lies far outside of their middle half drawn in: one row is no scale."""
    middle, reach = x.T.contiguous().median(1).values, FAR * middle_half(x)
    reach = torch.where(reach > 0, reach, math.inf)
    return x.clamp(middle - reach, middle + reach)


def middle_half(x: Tensor) -> Tensor:
    """Distance of the quartiles of each column."""
    columns = x.T.contiguous()
    low, high = (columns.kthvalue(max(1, k * len(x) // 4), 1).values for k in (1, 3))
    return high - low


def _occurrences(tokens: Tensor) -> Tensor:
    """Counts of every token; and of every token at every position where these are few columns."""
    if int(tokens.min()) < 0 or int(tokens.max()) >= MANY_CLASSES:
        return torch.zeros(len(tokens), 0, dtype=torch.float64)
    where = torch.nn.functional.one_hot(tokens).double()
    counts = where.sum(1)
    if where[0].numel() > MANY_CLASSES:
        return counts
    return torch.cat([counts, where.flatten(1)], 1)


def binary(values: Tensor) -> bool:
    """Whether numbers are the two ends of a yes or no: 0 and 1, or -1 and 1."""
    low = float(values.min()) if values.numel() else 1.0
    return low <= 0 and bool(((values == 1) | (values == (0.0 if low == 0 else -1.0))).all())


def _held_out(output: Tensor, y: Tensor, classes: bool, signs: bool) -> float:
    if signs:
        cut = 0.5 if float(y.min()) == 0 else 0.0
        return float(((output > cut) == (y > 0)).double().mean())
    if classes:
        return float((output.argmax(1) == y.argmax(1)).double().mean())
    spread = float((y - y.mean(0)).square().mean())
    return 1 - float((output - y).square().mean()) / spread if spread > 0 else 0.0


def shifts_out(output: Tensor, target: object, loss: LossFunction) -> bool:
    """Whether adding a constant to every output leaves the loss alone: it has its own softmax."""
    try:
        with torch.no_grad():
            before, after = float(loss(output, target)), float(loss(output + 0.7, target))
    except Exception:  # as above
        return False
    return math.isfinite(before) and abs(after - before) <= 1e-4 * (abs(before) + 1e-6)


def grows_with_batch(output: object, target: object, loss: LossFunction) -> bool:
    """Whether the same rows twice give twice the loss: a sum where a mean is expected."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return False
    try:
        with torch.no_grad():
            once = float(loss(output, target))
            twice = float(loss(torch.cat([output] * 2), torch.cat([target] * 2)))
    except Exception:  # as above
        return False
    return once > 0 and math.isfinite(once) and abs(twice / once - 2) < 0.02


def grows_in_part(output: object, target: object, loss: LossFunction) -> float:
    """The share of a loss that is a sum over rows, beside what is a mean; 0 where none is known.

    Of rows that come once, twice and four times a sum s and a mean m cost m + s, m + 2 s, m + 4 s.
    """
    rows = [t for t in tensors(output) if t.ndim]
    if not rows or not isinstance(target, Tensor) or len({len(t) for t in rows}) > 1:
        return 0.0
    try:
        with torch.no_grad():
            once, twice, often = (
                float(
                    loss(each(output, lambda t, k=k: torch.cat([t] * k)), torch.cat([target] * k))
                )
                for k in (1, 2, 4)
            )
    except Exception:  # as above
        return 0.0
    part, rest = twice - once, 2 * once - twice
    straight = abs(often - twice - 2 * part) <= 0.01 * abs(part)
    known = math.isfinite(often) and straight and abs(part) > 1e-3 * (abs(once) + abs(rest))
    return abs(part) / (abs(part) + abs(rest)) if known else 0.0


def scale(value: object) -> dict[str, float]:
    """Size of float tensors: rms, mean, deviation and absolute maximum."""
    parts = [entries(t.detach()).double() for t in tensors(value) if t.is_floating_point()]
    if not parts:
        return {}
    flat = parts[0]
    finite = bool(all(bool(torch.isfinite(p).all()) for p in parts))
    if not finite:
        return {"finite": 0.0}
    return {
        "finite": 1.0,
        "rms": float(flat.square().mean().sqrt()),
        "mean": float(flat.mean()),
        "std": float(flat.std()) if flat.numel() > 1 else 0.0,
        "largest": float(flat.abs().max()),
    }
