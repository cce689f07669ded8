"""References from the data alone: the best constant, the lowest loss of the head, shallow models.

They replace absolute thresholds on accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from tikhon.data.forward import LossFunction
from tikhon.data.nested import Batch, map_tensors, stored_values, tensors
from tikhon.diagnosis.replica import scalar_loss

Tail = Callable[[Tensor], Tensor]
MAX_CLASSES = 1000  # limit of a ridge on one-hot targets; more are numbers or a vocabulary
CLIP_RANGES = 10.0  # interquartile ranges
EXTREME_INPUT = 50.0  # inputs of both signs give the lowest and highest output of an activation
MAX_NEIGHBOUR_COLUMNS = 3  # input columns up to which nearest neighbours are tried
NEIGHBOURS = 3  # neighbours averaged
UNBOUNDED_MARGIN = 10.0  # margin below the loss of correct outputs, times (1 + that loss)
CONSTANT_TOLERANCE = 0.02  # excess of a constant's mean squared error over the variance [share]
MAX_OUTPUTS = 256  # outputs per row up to which a shallow model is fitted to the user's loss
MAX_COLUMNS = 4096  # columns up to which the normal equations are solved quickly


def behind(tail: Tail | None, loss: LossFunction) -> LossFunction:
    """Return the loss as a function of the input of `tail`, the activations of the last layer."""
    return loss if tail is None else lambda z, target: loss(tail(z), target)


def best_constant(output: Tensor, target: object, loss: LossFunction) -> tuple[float, Tensor]:
    """Return the lowest loss of a constant output, the trivial predictor, and that constant."""
    return _minimise(output.detach().mean(0, keepdim=True), len(output), target, loss)


def lowest_loss(
    output: Tensor, target: object, loss: LossFunction, tail: Tail | None = None
) -> float:
    """Return the lowest loss with a free output per row: the floor of loss and head.

    If the head can produce the targets, their loss is an upper bound, as the search may miss the
    minimum of a non-convex loss such as box overlap.
    """
    found, _ = _minimise(output.detach(), None, target, behind(tail, loss))
    if tail is None or not isinstance(target, Tensor) or not target.is_floating_point():
        return found
    with suppress(Exception), torch.no_grad():  # the user's loss, on what it was not written for
        low, high = (tail(torch.full_like(output, end)) for end in (-EXTREME_INPUT, EXTREME_INPUT))
        if low.shape == target.shape and bool(((low <= target) & (target <= high)).all()):
            return min(found, float(scalar_loss(loss(target.to(low.dtype), target))))
    return found


def _minimise(
    start: Tensor, rows: int | None, target: object, loss: LossFunction
) -> tuple[float, Tensor]:
    def reach(free: Tensor) -> float:
        solver = torch.optim.LBFGS([free], max_iter=25, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            output = free if rows is None else free.expand(rows, *free.shape[1:])
            value = scalar_loss(loss(output, target))
            if value.requires_grad:
                value.backward()
            return value

        try:
            with torch.enable_grad():
                solver.step(closure)
                return float(closure().detach())
        except Exception:  # the user's loss, on outputs that it was not written for
            return math.nan

    # start at zero and above, since a rectified head is flat at zero
    starts = [s.requires_grad_() for s in (torch.zeros_like(start), start.clone() + 1.0)]
    results = [(reach(s), s.detach()) for s in starts]
    finite = [pair for pair in results if math.isfinite(pair[0])]
    return min(finite, key=lambda pair: pair[0], default=(math.nan, starts[0].detach()))


def pca_explained(inputs: Tensor, width: int) -> float:
    """Return the share of variance explained by the first `width` principal components."""
    rows = inputs.detach().flatten(1).double()
    rows = rows - rows.mean(0)
    square = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    eigenvalues = torch.linalg.eigvalsh(square).clamp_min(0.0)
    return float(eigenvalues[-width:].sum() / eigenvalues.sum().clamp_min(1e-300))


def has_real_targets(target: object) -> bool:
    """Whether targets are quantities: neither class indices nor binary."""
    return isinstance(target, Tensor) and target.is_floating_point() and not binary(target)


def is_constant_off_mean(constant: Tensor, target: Tensor, rows: int) -> bool:
    """Whether R2 does not apply to a loss: the best `constant` is not near the mean.

    True for quantiles, and for outputs of another shape than the targets.
    """
    if constant.numel() * rows != target.numel():
        return True
    targets = target.detach().double().reshape(rows, -1)
    spread = float((targets - targets.mean(0)).square().mean())
    error = float((targets - constant.double().reshape(1, -1)).square().mean())
    return spread > 0 and error > (1 + CONSTANT_TOLERANCE) * spread


def unbounded_loss(output: Tensor, target: Tensor, loss: LossFunction) -> float:
    """Return the loss far from all targets if it is unbounded below there, else 0.

    All outputs are moved up or down by 100, 10,000 and a million standard deviations.
    """
    targets = target.detach().double()
    unit = float(targets.std()) if targets.numel() > 1 else 0.0
    lowest = 0.0
    for sign in (-1.0, 1.0):
        values = []
        for far in (1e2, 1e4, 1e6):
            z = torch.full_like(output, sign * far * unit) + float(targets.mean())
            with suppress(Exception), torch.no_grad():  # the user's loss, far from its targets
                values.append(float(scalar_loss(loss(z, target))))
        falls = len(values) == 3 and values[2] < 10 * values[1] < 100 * values[0] < 0
        lowest = min(lowest, values[2]) if falls and math.isfinite(values[2]) else lowest
    return lowest


def has_binary_targets(output: Tensor, target: object) -> bool:
    """Whether every output has a target of 0 or 1."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return False
    return target.shape == output.shape and binary(target) and float(target.min()) == 0


def unbounded_shares(
    output: Tensor, target: Tensor, loss: LossFunction, lowest: float
) -> dict[str, object]:
    """Detect a loss that correct outputs minimise on 0 to 1 only, as Dice overlap does.

    Returns `unbounded_shares` if free outputs cost far less than the targets themselves, and
    outputs of a sigmoid do not.
    """
    with suppress(Exception), torch.no_grad():  # the user's loss, on what it was not written for
        right = float(scalar_loss(loss(target.to(output.dtype), target)))
        if not lowest < right - UNBOUNDED_MARGIN * (1 + abs(right)):
            return {}
        bounded, _ = _minimise(output.detach(), None, target, behind(torch.sigmoid, loss))
        if bounded >= right - 1e-3 * (1 + abs(right)):
            return {"unbounded_shares": {"lowest": lowest, "right": right}}
    return {}


def shallow_loss(batch: Batch, constant: Tensor, loss: LossFunction) -> dict[str, float]:
    """Return the user's loss of a shallow model and of the best constant on held-out rows.

    A linear map of inputs and random features to the input of the head is fitted to half of the
    rows by that loss, starting from the best `constant`. Empty if permuted targets cost
    the same.
    """
    inputs, target = batch
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor) or len(inputs) < 48:
        return {}
    design, _ = build_design(inputs)
    if design is None or constant.numel() > MAX_OUTPUTS:
        return {}
    x = design.to(constant.dtype) / math.sqrt(design.shape[1])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    halves = order[: len(x) // 2], order[len(x) // 2 :]
    unit = float(target.detach().double().std())

    def value(weights: Tensor, rows: Tensor, of: Tensor | None = None) -> Tensor:
        z = constant + unit * (x[rows] @ weights).reshape(len(rows), *constant.shape[1:])
        return scalar_loss(loss(z, target[rows if of is None else of]))

    zeros = torch.zeros(x.shape[1], constant.numel(), dtype=x.dtype)
    try:
        with torch.no_grad():
            loss_of_constant = float(value(zeros, halves[1]))
            drawn = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(4)).to(zeros)
            own, shifted = (float(value(drawn, halves[1], of)) for of in (None, halves[1].roll(1)))
        if math.isclose(own, shifted, rel_tol=1e-4):  # compares the batch as a whole
            return {}
        fitted = [_fit(value, zeros, halves, ridge) for ridge in (3e-3, 3e-2, 0.3)]
    except Exception:  # the user's loss, on outputs that it was not written for
        return {}
    found = {"constant_loss": loss_of_constant, "shallow_loss": min(fitted)}
    return found if all(map(math.isfinite, found.values())) else {}


def _fit(
    value: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    halves: tuple[Tensor, Tensor],
    ridge: float,
) -> float:
    """Fit weights to the first half of the rows; return the loss on the second."""
    weights = start.clone().requires_grad_()
    with torch.no_grad():
        scale = abs(float(value(start, halves[0])))
    solver = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        total = value(weights, halves[0]) + ridge * scale * weights.square().sum() / len(weights)
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(closure)
    with torch.no_grad():
        final_loss = float(value(weights, halves[1]))
    return final_loss if math.isfinite(final_loss) else math.inf


def shallow_skill(batch: Batch) -> dict[str, float]:
    """Return held-out accuracy (classes) or R2 (numbers) of a ridge on inputs and random features.

    Half of the rows are fitted, half held out; `constant` is the skill of the best constant.
    Empty unless inputs are one tensor of numbers or tokens, and targets classes or numbers.
    """
    inputs, target = batch
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return {}
    if target.ndim > 2 or len(inputs) < 24 or inputs.dtype == torch.bool:
        return {}
    if target.ndim == 2 and target.shape[1] > 1 and not target.is_floating_point():
        return {}  # one class per position
    generator = torch.Generator(device="cpu").manual_seed(0)
    design, _ = build_design(inputs, width=256, generator=generator)
    if design is None:
        return {}
    classes = not target.is_floating_point() and target.ndim == 1
    if classes and not 0 <= int(target.min()) <= int(target.max()) < MAX_CLASSES:
        return {}
    y = torch.nn.functional.one_hot(target.long()).double() if classes else target.double()
    y = y.reshape(len(y), -1)
    is_binary = not classes and binary(y)
    order = torch.randperm(len(design), generator=generator)
    fit, held_out = order[: len(design) // 2], order[len(design) // 2 :]
    y = y.cpu()
    best = -math.inf
    for strength in (0.3, 10.0, 300.0):
        scores = design[held_out] @ ridge(design[fit], y[fit], strength)
        best = max(best, _score(scores, y[held_out], classes, is_binary))
    if inputs.is_floating_point() and inputs[0].numel() <= MAX_NEIGHBOUR_COLUMNS:
        predictions = _neighbours(
            inputs.detach().reshape(len(inputs), -1).double().cpu(), y, fit, held_out
        )
        best = max(best, _score(predictions, y[held_out], classes, is_binary))
    constant = float(y.mean(0).max()) if classes else 0.0
    if is_binary:
        share = (y > 0).double().mean(0)
        constant = float(torch.maximum(share, 1 - share).mean())
    return {"shallow": best, "constant": constant}


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Return ridge weights with penalty `strength`, by the smaller system of equations.

    (x'x + s)^-1 x'y = x'(xx' + s)^-1 y: with fewer rows than columns the second is cheaper.
    """
    wide = len(x) < x.shape[1]
    gram = x @ x.T if wide else x.T @ x
    gram.diagonal().add_(strength)
    return x.T @ torch.linalg.solve(gram, y) if wide else torch.linalg.solve(gram, x.T @ y)


def _neighbours(x: Tensor, y: Tensor, fit: Tensor, held_out: Tensor) -> Tensor:
    """Predict by nearest neighbours, which fit oscillations that the ridge cannot."""
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-9)
    nearest = torch.cdist(x[held_out], x[fit]).topk(NEIGHBOURS, largest=False).indices
    return y[fit][nearest].mean(1)


def build_design(
    inputs: Tensor, *, width: int = 256, generator: torch.Generator | None = None
) -> tuple[Tensor | None, int]:
    """Return columns (1, inputs, random ReLU features), and how many of them are linear.

    Integer inputs are tokens: counts and, where few enough, positions. None for too many columns
    or non-finite numbers.
    """
    x = inputs.detach().flatten(1).cpu() if inputs.ndim > 1 else inputs.detach().cpu()[:, None]
    x = x.double() if x.is_floating_point() else _token_counts(x.long())
    if x.shape[1] > MAX_COLUMNS or not x.shape[1] or not bool(torch.isfinite(x).all()):
        return None, 0
    x = clip_outliers(x)
    x = x - x.mean(0)
    x = x / x.std(0, correction=int(len(x) > 1)).clamp_min(1e-9 + 1e-6 * float(x.abs().max()))
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    projection = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64)
    shift = torch.randn(width, generator=generator, dtype=torch.float64)
    hidden = torch.relu(x @ projection / math.sqrt(x.shape[1]) + shift)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    return torch.cat([ones, x, hidden], 1), 1 + x.shape[1]


def clip_outliers(x: Tensor) -> Tensor:
    """Clip each column to within FAR interquartile ranges of its median."""
    middle, reach = x.T.contiguous().median(1).values, CLIP_RANGES * interquartile_range(x)
    reach = torch.where(reach > 0, reach, math.inf)
    return x.clamp(middle - reach, middle + reach)


def interquartile_range(x: Tensor) -> Tensor:
    """Return the interquartile range of each column."""
    columns = x.T.contiguous()
    low, high = (columns.kthvalue(max(1, k * len(x) // 4), 1).values for k in (1, 3))
    return high - low


def _token_counts(tokens: Tensor) -> Tensor:
    """Return counts per token, and one-hot tokens per position where these are few columns."""
    if int(tokens.min()) < 0 or int(tokens.max()) >= MAX_CLASSES:
        return torch.zeros(len(tokens), 0, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(tokens).double()
    counts = one_hot.sum(1)
    if one_hot[0].numel() > MAX_CLASSES:
        return counts
    return torch.cat([counts, one_hot.flatten(1)], 1)


def binary(values: Tensor) -> bool:
    """Whether all values are 0 and 1, or -1 and 1."""
    low = float(values.min()) if values.numel() else 1.0
    return low <= 0 and bool(((values == 1) | (values == (0.0 if low == 0 else -1.0))).all())


def _score(output: Tensor, y: Tensor, classes: bool, is_binary: bool) -> float:
    if is_binary:
        cut = 0.5 if float(y.min()) == 0 else 0.0
        return float(((output > cut) == (y > 0)).double().mean())
    if classes:
        return float((output.argmax(1) == y.argmax(1)).double().mean())
    spread = float((y - y.mean(0)).square().mean())
    return 1 - float((output - y).square().mean()) / spread if spread > 0 else 0.0


def applies_softmax(output: Tensor, target: object, loss: LossFunction) -> bool:
    """Whether the loss is invariant to a constant added to all outputs: it applies a softmax."""
    try:
        with torch.no_grad():
            before, after = float(loss(output, target)), float(loss(output + 0.7, target))
    except Exception:  # as above
        return False
    return math.isfinite(before) and abs(after - before) <= 1e-4 * (abs(before) + 1e-6)


def sum_share(output: object, target: object, loss: LossFunction) -> float:
    """Return the share of a loss that is a sum over rows while the rest is a mean; else 0.

    Rows repeated once, twice and four times cost m + s, m + 2 s, m + 4 s for sum s and mean m.
    """
    rows = [t for t in tensors(output) if t.ndim]
    if not rows or not isinstance(target, Tensor) or len({len(t) for t in rows}) > 1:
        return 0.0
    try:
        with torch.no_grad():
            once, twice, four_times = (
                float(
                    loss(
                        map_tensors(output, lambda t, k=k: torch.cat([t] * k)),
                        torch.cat([target] * k),
                    )
                )
                for k in (1, 2, 4)
            )
    except Exception:  # as above
        return 0.0
    sum_part, rest = twice - once, 2 * once - twice
    is_linear = abs(four_times - twice - 2 * sum_part) <= 0.01 * abs(sum_part)
    is_present = abs(sum_part) > 1e-3 * (abs(once) + abs(rest))
    known = math.isfinite(four_times) and is_linear and is_present
    return abs(sum_part) / (abs(sum_part) + abs(rest)) if known else 0.0


def scale(value: object) -> dict[str, float]:
    """Return rms, mean, standard deviation and absolute maximum of float tensors."""
    parts = [stored_values(t.detach()).double() for t in tensors(value) if t.is_floating_point()]
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
