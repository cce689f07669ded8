"""The data without any network: scales, relation of inputs and targets, validation, loader."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, WeightedRandomSampler

from tikhon.data.nested import Batch, split_batch, take_rows, tensors
from tikhon.diagnosis.reference import (
    MAX_CLASSES,
    binary,
    build_design,
    clip_outliers,
    interquartile_range,
    ridge,
)
from tikhon.diagnosis.samples import Samples, read_other_targets
from tikhon.diagnosis.wiring.program import Facts

MAX_ROWS = 1200  # maximum number of rows tested
RELATED_ROWS = 200  # minimum number of rows for a comparison with neighbouring rows
UNEXPLAINED = 0.05  # explained variance below which inputs are uninformative
TABLE_ROWS = 200  # rows from which a constant column is significant
FEW_COLUMNS = 64  # columns up to which one curve per column is fitted
FULL_TURNS = (2 * math.pi, 360.0)  # full turns of an angle
FEW_CLASSES = 20  # distinct integers that may be class indices
SQUEEZED = 0.01  # interquartile range / standard deviation: heavy tails leave 0.02 and more
MIN_MOVED = 10  # training rows that must differ from the mode of a column
MIN_BORDERS = 50  # minimum number of one-pixel borders
MIN_CATEGORIES, ROWS_EACH = 8, 5  # numbered categories of a column, and rows of each in a half
EVEN = 1e-3  # of a step between two numbers: rounding
MIN_PERIOD = 10  # minimum length of a period, and of distinct values in a column
MAX_BATCHES = 8  # batches read to see whether a loader shuffles


def dataset_facts(source: Samples, valid: Batch | None, *, whole: bool) -> Facts:
    """Return facts of inputs and targets; empty unless they are plain tensors.

    With a `whole` loss, `loss(model, batch)`, it is unknown which of several tensors is the
    target: the batch may hold rewards, masks and states.
    """
    inputs, target = sample(source)
    facts: Facts = _constant_columns(inputs)
    if isinstance(target, Tensor) and not (whole and isinstance(inputs, tuple)):
        facts |= _target_facts(target)
        for part in tensors(inputs):
            facts |= copied_columns(part, target)
        if isinstance(inputs, Tensor):
            facts |= _adjacent_lines(inputs)
            facts["target_is_input"] = _equals_inputs(inputs, target)
            facts |= relation(inputs, target)
            if source.indexed and isinstance(source.source[0], Tensor):
                facts |= _neighbouring_rows(source.source, facts)
                facts["period"] = _period(*source.source)
    if valid is not None:
        every = source.source[1] if source.indexed else target  # all rows: classes may be rare
        facts |= _compare_validation((inputs, every), valid)
    return facts


def sample(source: Samples) -> Batch:
    """Return at most `MAX_ROWS` random rows of a pair, or the rows read from a loader.

    Of named inputs, the only one that varies, so as to drop masks of ones.
    """
    if isinstance(source.probe[0], dict):
        varied = [t for t in tensors(source.probe[0]) if bool((t != t[:1]).any())]
        return (varied[0] if len(varied) == 1 else source.probe[0]), source.probe[1]
    if not source.indexed:
        return source.probe
    count = min(source.rows, MAX_ROWS)
    order = torch.randperm(source.rows, generator=torch.Generator().manual_seed(1))[:count]
    return take_rows(source.source, order)


def _constant_columns(inputs: Any) -> Facts:
    """Return the share of constant input columns, whether all are zero, and constant tensors."""
    parts = [t.detach().reshape(len(t), -1) for t in tensors(inputs) if t.ndim and len(t) > 1]
    columns = sum(p.shape[1] for p in parts)
    if not columns:
        return {}
    still = sum(int((p == p[:1]).all(0).sum()) for p in parts)
    zero = all(not bool(p.any()) for p in parts)
    facts: Facts = {"constant_columns": still / columns, "all_zero": zero}
    facts["columns"] = columns
    facts["still_parts"] = [k for k, p in enumerate(parts) if bool((p == p[:1]).all())]
    table = isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.is_floating_point()
    facts["table"] = table and len(inputs) >= TABLE_ROWS
    return facts | _outlier_columns(inputs)


def _outlier_columns(inputs: Any) -> Facts:
    """Return the share of a table's columns whose standard deviation stems from few outliers."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or not inputs.is_floating_point():
        return {}
    x = inputs.detach().double()
    inner, spread = interquartile_range(x), x.std(0)
    varied = inner > 0
    if len(x) < 60 or not bool(varied.any()) or not bool(torch.isfinite(spread).all()):
        return {}
    share = inner[varied] / spread[varied]
    distance = (x - x.median(0).values).abs()
    far = distance > 0.1 * distance.amax(0)
    rows = int(far[:, varied][:, share < SQUEEZED].any(1).sum())
    return {"squeezed": float((share < SQUEEZED).double().mean()), "far_rows": rows}


def _adjacent_lines(inputs: Tensor) -> Facts:
    """Return the mean difference of adjacent lines of images / their standard deviation.

    As given, and with the memory read as (height, width, channels).
    """
    if inputs.ndim != 4 or len(inputs) < 20 or not 2 <= inputs.shape[1] <= 4:
        return {}
    rows, channels, height, width = inputs.shape
    if min(height, width) < 6:
        return {}
    read = inputs.reshape(rows, height, width, channels).permute(0, 3, 1, 2)
    spread = float(inputs.double().std())
    lines = [float(x.double().diff(dim=2).abs().mean() / spread) for x in (inputs, read)]
    return {"lines": lines}


def _target_facts(target: Tensor) -> Facts:
    """Return range and kind of the targets, and the share of the majority class."""
    values = target.detach().reshape(len(target), -1).double()
    facts: Facts = {"target_low": float(values.min()), "target_high": float(values.max())}
    facts["amounts"] = target.is_floating_point() and not binary(values)
    facts["target_columns"] = values.shape[1]
    facts["constant_target"] = len(values) > 1 and bool((values == values[:1]).all())
    if values.shape[1] > 1 and (target.ndim > 2 or binary(values)):
        return facts | _majority_pixels(values) | _interpolated_borders(target.detach())
    if values.shape[1] != 1 or len(values) < 20:
        return facts
    distinct, counts = values.flatten().unique(return_counts=True)
    whole = bool((distinct == distinct.round()).all())
    facts["target_values"] = len(distinct)
    facts["target_whole"] = whole
    if whole and 2 <= len(distinct) <= MAX_CLASSES:
        facts["majority"] = float(counts.max()) / len(values)
        facts["majority_value"] = float(distinct[counts.argmax()])
    return facts


def _majority_pixels(values: Tensor) -> Facts:
    """Return the majority class of maps of class indices; empty for other maps."""
    if bool((values != values.round()).any()):
        return {}
    distinct, counts = values.unique(return_counts=True)
    if not 2 <= len(distinct) <= FEW_CLASSES:
        return {}
    share = float(counts.max()) / values.numel()
    return {"majority": share, "majority_value": float(distinct[counts.argmax()]), "dense": True}


def _interpolated_borders(target: Tensor) -> Facts:
    """Return the share of one-pixel borders among those of non-adjacent class indices, `rims`.

    Interpolated class indices leave an index in between around objects. Where indices are levels,
    such as heights, the zone in between is wider.
    """
    maps = target.squeeze(1) if target.ndim == 4 and target.shape[1] == 1 else target
    if maps.ndim != 3 or not 3 <= len(maps.unique()) <= FEW_CLASSES or min(maps.shape[1:]) < 5:
        return {}
    single = wide = direct = 0
    for lines in (maps.long(), maps.long().transpose(1, 2)):
        step = lines[:, :, 1:] - lines[:, :, :-1]
        direct += int((step.abs() > 1).sum())
        single += int((step[:, :, 1:] * step[:, :, :-1] > 0).sum())
        distance = (step[:, :, 1:-1] == 0) & (step[:, :, 2:] * step[:, :, :-2] > 0)
        wide += int(distance.sum())
    if single < MIN_BORDERS or single <= 2 * wide or 20 * direct < single:  # nested classes
        return {}
    return {"rims": single / (single + direct)}


def _equals_inputs(inputs: Tensor, target: Tensor) -> bool:
    """Whether the targets are the inputs, as for an autoencoder."""
    if inputs.shape[0] != target.shape[0] or inputs.numel() != target.numel():
        return False
    return torch.allclose(inputs.flatten().double(), target.flatten().double())


def copied_columns(inputs: Tensor, target: Tensor) -> Facts:
    """Return input columns that equal the target, or a linear function of it, if any."""
    if inputs.ndim not in (2, 3) or not inputs.is_floating_point():  # tokens repeat by chance
        return {}
    if len(inputs) != len(target):
        return {}
    if target.reshape(len(target), -1).shape[1] != 1 or len(inputs) < 20:
        return {}
    goal = target.detach().double().reshape(-1, 1)
    if bool((goal == goal[0]).all()) or inputs.shape[1] < 2:
        return {}
    x = inputs.detach().double().flatten(1)
    same = (x == goal).all(0) | _linear_in_target(x, goal)
    if not target.is_floating_point() and len(goal.unique()) > 2:
        for value in goal.unique()[:FEW_CLASSES]:  # one-hot columns
            same |= _linear_in_target(x, (goal == value).double())
    columns = same.nonzero().flatten()[:5].tolist()
    found: Facts = {"target_columns_in_inputs": columns} if columns else {}
    return found | ({"input_steps": inputs.shape[1]} if columns and inputs.ndim == 3 else {})


def _linear_in_target(x: Tensor, goal: Tensor) -> Tensor:
    """Return a mask of columns that are linear functions of the target up to rounding."""
    a, b = x - x.mean(0), goal - goal.mean(0)
    size = (a.square().sum(0) * b.square().sum(0)).sqrt()
    if x.shape[1] < 3:  # with few columns a linear relation is the task, not a leak
        return torch.zeros_like(size, dtype=torch.bool)
    return ((a * b).sum(0).abs() > (1 - 1e-9) * size) & (size > 0)


def relation(inputs: Tensor, target: Tensor) -> Facts:
    """Return the z-score of held-out predictions of shallow models under permuted targets.

    Ridges fitted to each half of the rows predict the other; the statistic is the sum of
    prediction times target. Given the fitted half, the null distribution is exact.
    """
    design, straight = build_design(inputs)
    y = _columns(target)
    if design is None or y is None or len(design) < 60:
        return {}
    hinges = _hinge_features(design[:, 1:straight])
    y = y - y.mean(0)
    spread = y.std(0)
    if not bool((spread > 0).any()):
        return {}
    y = y[:, spread > 0] / spread[spread > 0]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2))
    halves = order[: len(y) // 2], order[len(y) // 2 :]
    facts: Facts = {"related_rows": len(y)}
    best = -math.inf
    skills: dict[str, float] = {}
    designs = {"straight": design[:, :straight], "bent": design, "added": hinges}
    for name, x in designs.items():
        for strength in (1.0, 100.0) if x.shape[1] else ():
            scores = _held_out(x, y, halves, strength)
            best = max(best, _agreement_z(scores, y, halves))
            explained = 1 - float((y - scores).square().mean() / y.square().mean())
            skills[name] = max(skills.get(name, -math.inf), explained)
    facts["relation"] = best
    facts |= _angle_gain(design, target, halves)
    facts |= _class_gain(design, target, halves)
    if straight > 1 and not inputs.is_floating_point():
        facts["order_gain"] = skills["straight"] - _bag_skill(inputs, y, halves)
    facts["explained_straight"] = skills["straight"]
    facts["explained_bent"] = max(skills["bent"], skills.get("added", -math.inf))
    is_amount = target.is_floating_point() and not binary(target)
    return facts | (_best_category(inputs, y, halves) if is_amount else {})


def _best_category(inputs: Tensor, y: Tensor, halves: Sequence[Tensor]) -> Facts:
    """Return the column of numbered categories whose means explain most of held-out targets."""
    table = inputs.is_floating_point() and inputs.ndim == 2 and inputs.shape[1] <= FEW_COLUMNS
    best, place_of_best = 0.0, -1
    for place, column in enumerate(inputs.detach().double().cpu().T if table else ()):
        values, kind = column.unique(return_inverse=True)
        if not MIN_CATEGORIES <= len(values) <= len(y) / (2 * ROWS_EACH):
            continue
        steps = values.diff() / values.diff().min()
        if float((steps - steps.round()).abs().max()) > EVEN:
            continue  # measured values, not numbers of categories
        hot = torch.nn.functional.one_hot(kind, len(values)).double()
        error = (y - _held_out(hot, y, halves, 1.0)).square().mean()
        explained = 1 - float(error / y.square().mean())
        if explained > best:
            best, place_of_best = explained, place
    found = {"explained_by_category": best, "category_column": place_of_best}
    return found if best else {}


def _held_out(x: Tensor, y: Tensor, halves: Sequence[Tensor], strength: float) -> Tensor:
    """Return the predictions for each half by a ridge fitted to the other."""
    scores = torch.zeros_like(y)
    for fit, test in (halves, halves[::-1]):
        scores[test] = x[test] @ ridge(x[fit], y[fit], strength)
    return scores


def _neighbouring_rows(data: Batch, known: Facts) -> Facts:
    """Return the variance of targets that inputs of the previous or next row explain.

    Only if a row's own inputs explain none, and rows are not a time series, where neighbours
    correlate.
    """
    own = [v for k, v in known.items() if k.startswith("explained") and isinstance(v, float)]
    inputs, target = (t[:MAX_ROWS] for t in data)
    if not own or max(own) > UNEXPLAINED or len(inputs) < RELATED_ROWS or inputs.ndim != 2:
        return {}
    y = _columns(target)
    table = inputs.is_floating_point() and not _is_autocorrelated(inputs.double().cpu())
    if y is None or not table or _is_autocorrelated(y):
        return {}
    best: tuple[float, int] = (0.0, 0)
    for shift in (-1, 1):
        moved = target.roll(shift, 0)
        if copied_columns(inputs, moved):
            continue
        found = relation(inputs, moved)
        explained = [v for k, v in found.items() if k.startswith("explained_")]
        best = max(best, *((v, shift) for v in explained if isinstance(v, float)))
    return {"row_beside": best[0], "shift_of_rows": best[1]} if best[1] else {}


def _period(inputs: Tensor, target: Tensor) -> int:
    """Return the period after which all rows repeat in the same order; 0 if they do not.

    Columns of few distinct values may repeat legitimately and are excluded.
    """
    if not inputs.is_floating_point():
        return 0
    flat = inputs.flatten(1) if inputs.ndim > 1 else inputs[:, None]
    again = (flat == flat[:1]).all(1).nonzero().flatten()
    step = int(again[1]) if len(again) > 2 else 0
    if (
        step < MIN_PERIOD
        or len(flat) < 3 * step
        or max(len(c.unique()) for c in flat.T) < MIN_PERIOD
    ):
        return 0
    same = torch.equal(flat[step:], flat[:-step]) and torch.equal(target[step:], target[:-step])
    return step if same else 0


def _is_autocorrelated(t: Tensor) -> bool:
    """Whether a column has a significant autocorrelation at lag 1."""
    a = t - t.mean(0)
    size = a.square().sum(0)
    along = (a[1:] * a[:-1]).sum(0)[size > 0] / size[size > 0]
    return bool((along.abs() > 4 / math.sqrt(len(t))).any())


def _hinge_features(x: Tensor) -> Tensor:
    """Return hinge features at the quartiles: an additive model, if there are few columns."""
    if not 0 < x.shape[1] <= FEW_COLUMNS:
        return x[:, :0]
    knots = torch.quantile(x, torch.tensor([0.25, 0.5, 0.75], dtype=x.dtype), dim=0)
    bends = [torch.relu(x - knot) for knot in knots]
    return torch.cat([torch.ones_like(x[:, :1]), x, *bends], 1)


def _angle_gain(design: Tensor, target: Tensor, halves: tuple[Tensor, ...]) -> Facts:
    """Return the unexplained variance of an angle / that of its cosine and sine."""
    if not target.is_floating_point() or target.numel() != len(target):
        return {}
    angle = target.detach().double().reshape(-1, 1).cpu()
    width = float(angle.max() - angle.min())
    full_turn = next((t for t in FULL_TURNS if 0.98 * t < width <= t * (1 + 1e-6)), None)
    if full_turn is None:
        return {}
    angle = angle * (2 * math.pi / full_turn)
    y = torch.cat([angle, angle.cos(), angle.sin()], 1)
    y = (y - y.mean(0)) / y.std(0)
    scores = _held_out(design, y, halves, 10.0)
    number, *circle = (y - scores).square().mean(0).tolist()
    return {"turn": number / max(*circle, 1e-9)}


def _class_gain(design: Tensor, target: Tensor, halves: tuple[Tensor, ...]) -> Facts:
    """Return the gain in held-out accuracy of classifying integers over rounded regression."""
    values = target.detach().double().reshape(len(target), -1).cpu()
    if values.shape[1] != 1 or bool((values != values.round()).any()):
        return {}
    distinct = values.unique()
    if not 3 <= len(distinct) <= FEW_CLASSES:
        return {}
    classes = torch.searchsorted(distinct, values.flatten())
    hot = torch.nn.functional.one_hot(classes, len(distinct)).double()
    mean = values.mean()
    scores = _held_out(design, torch.cat([hot, values - mean], 1), halves, 10.0)
    rounded = (scores[:, -1:] + mean - distinct).abs().argmin(1)
    predicted = scores[:, :-1].argmax(1), rounded
    by_class, by_number = (float((p == classes).double().mean()) for p in predicted)
    return {"class_gain": by_class - by_number}


def _bag_skill(inputs: Tensor, y: Tensor, halves: tuple[Tensor, ...]) -> float:
    """Return the held-out variance explained by a bag of tokens, without their order."""
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in inputs.flatten(1)])
    design, straight = build_design(shuffled)
    assert design is not None
    errors = [y - _held_out(design[:, :straight], y, halves, s) for s in (1.0, 100.0)]
    return 1 - float(min(e.square().mean() for e in errors) / y.square().mean())


def _agreement_z(scores: Tensor, y: Tensor, halves: tuple[Tensor, ...]) -> float:
    """Return the z-score of the agreement of scores and targets under permuted targets.

    Over all permutations of n rows, `sum a_i b_i` has the mean `n <mean a, mean b>` and the
    variance `|a_c b_c'|^2 / (n - 1)` of the centred columns (Hoeffding, 1951): no sampling.
    """
    gap = variance = 0.0
    for half in halves:
        a, b = (t[half] - t[half].mean(0) for t in (scores, y))
        gap += float((a * b).sum())
        variance += float(((a.T @ a) * (b.T @ b)).sum()) / (len(half) - 1)
    return gap / max(math.sqrt(variance), 1e-12)


def _columns(target: Tensor) -> Tensor | None:
    """Return targets as columns, class indices as one-hot; None for other targets."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return clip_outliers(target.detach().double().reshape(len(target), -1)[:, :64].cpu())
    if target.ndim != 1 or not 0 <= int(target.min()) <= int(target.max()) < MAX_CLASSES:
        return None
    return torch.nn.functional.one_hot(target.detach().long()).double().cpu()


def _compare_validation(train: Batch, valid: Batch) -> Facts:
    """Compare validation with training data: scale, classes, common rows."""
    facts: Facts = {}
    x, other = train[0], valid[0]
    if isinstance(x, Tensor) and isinstance(other, Tensor) and x.shape[1:] == other.shape[1:]:
        if x.is_floating_point():
            facts |= _compare_scales(x, other)
        facts |= _shared_rows(x, other)
    if isinstance(train[1], Tensor) and isinstance(valid[1], Tensor):
        facts |= _compare_classes(train[1], valid[1])
    return facts


def _compare_classes(y: Tensor, goal: Tensor) -> Facts:
    """Return classes that occur in validation only, and the total variation of class shares."""
    if any(t.is_floating_point() or t.ndim != 1 for t in (y, goal)):
        return {}
    known, valid_classes = set(y.unique().tolist()), set(goal.unique().tolist())
    if len(goal) < 10 * len(known | valid_classes) or len(y) < 10 * len(known | valid_classes):
        return {}  # too few rows per class
    shares = {
        v: (float((y == v).double().mean()), float((goal == v).double().mean()))
        for v in known | valid_classes
    }
    return {
        "new_classes": sorted(v for v in valid_classes - known if shares[v][1] > 0.02)[:5],
        "class_shift": sum(abs(a - b) for a, b in shares.values()) / 2,
    }


def _compare_scales(x: Tensor, other: Tensor) -> Facts:
    a, b = (t.detach().double().flatten(1) for t in (x, other))
    deviation = a.std(0)
    # rare features, such as single words, may be absent by chance
    moving = (a != a.mode(0).values).sum(0) >= MIN_MOVED
    if not bool(moving.any()) or len(b) < 10:
        return {}
    shift = (b.mean(0) - a.mean(0)).abs()[moving] / deviation[moving]
    ratio = b.std(0)[moving] / deviation[moving]
    return {"valid_shift": float(shift.median()), "valid_scale": float(ratio.median())}


def _shared_rows(x: Tensor, other: Tensor) -> Facts:
    """Return the shares of validation rows that are training rows, and of repeated ones."""
    rows = [t.detach().flatten(1).cpu().contiguous().numpy() for t in (x, other)]
    train = [row.tobytes() for row in rows[0]]
    known = set(train)
    both = sum(row.tobytes() in known for row in rows[1]) / len(rows[1])
    return {"rows_in_both": both, "rows_repeated": 1 - len(known) / len(train)}


def _sampler_facts(loader: object) -> Facts:
    """Return whether a loader reads rows in order, or how many a weighted sampler can draw."""
    sampler, data = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    if not isinstance(sampler, WeightedRandomSampler) or not isinstance(data, Sized):
        return {"in_order": not isinstance(sampler, RandomSampler)}
    return {"drawable": int((sampler.weights > 0).sum()), "rows_there": len(data)}


def loader_facts(source: Samples) -> Facts:
    """Measure whether the batches of a loader vary less inside than shuffled ones would."""
    if source.indexed:
        return {}
    drawn, reading = _sampler_facts(source.source), iter(source.source)
    read = [split_batch(batch) for batch in itertools.islice(reading, MAX_BATCHES)]
    seen: list[Tensor] = []
    for _, target in [*read, *(read_other_targets(reading, read) if read else [])]:
        if not isinstance(target, Tensor) or target.reshape(len(target), -1).shape[1] != 1:
            break
        seen.append(target.reshape(-1))
    if len(seen) < 4 or min(len(t) for t in seen[:-1]) < 8:
        return drawn
    if seen[0].is_floating_point():
        return drawn | _batch_mean_variance([t.double() for t in seen])
    values, counts = torch.cat(seen).unique(return_counts=True)
    shares = counts.double() / counts.sum()
    # expected number of classes in a shuffled batch
    expected = sum(float((1 - (1 - shares) ** len(t)).sum()) for t in seen) / len(seen)
    within = sum(len(t.unique()) for t in seen) / len(seen)
    found = {"classes_in_batch": within, "classes_in_all": len(values)}
    return drawn | found | {"classes_expected": expected}


def _batch_mean_variance(seen: list[Tensor]) -> Facts:
    """Return the variance of batch means / that expected of shuffled batches."""
    whole = torch.cat(seen)
    size = sum(len(t) for t in seen) / len(seen)
    expected = float(whole.var()) / size
    between = float(torch.stack([t.mean() for t in seen]).var())
    return {"between": between / expected} if expected > 0 else {}
