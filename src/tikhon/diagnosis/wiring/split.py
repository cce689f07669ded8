"""The split: do training and validation share a relation but no rows?"""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.data.nested import Batch
from tikhon.diagnosis.reference import MAX_CLASSES, binary, build_design, ridge
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.wiring.program import Facts

MAX_FITTED = 1200  # maximum number of training rows for a shallow model
MIN_ROWS = 50  # minimum number of validation rows
NEIGHBOURS = 10
MAX_SEARCHED = 4000  # training rows searched for neighbours
MAX_VALID = 300  # validation rows whose neighbours are searched
MIN_COLUMNS = 8  # columns from which neighbours are distant
MIN_STEPS = 8  # minimum length of a window
RIDGES = (1.0, 30.0)


def split_facts(train: Batch, valid: Batch | None) -> Facts:
    """Compare training with validation rows; empty unless they are plain tensors."""
    if valid is None:
        return {}
    (x, y), (other, goal) = train, valid
    if not isinstance(x, Tensor) or not isinstance(other, Tensor):
        return {}
    if x.shape[1:] != other.shape[1:] or x.dtype != other.dtype or x.ndim < 2:
        return {}
    if len(x) < 2 * NEIGHBOURS or not len(other):
        return {}
    facts: Facts = {"windows_in_both": windows_in_both(x, other)}
    if x.is_floating_point() and x[0].numel() >= MIN_COLUMNS:
        facts |= _noisy_copies(x, other)
        if _noisy_copies(x[::2], x[1::2]).get("copies", 0) > SELF_COPIES:
            return facts  # a model of one half would know copies in the other
    if isinstance(y, Tensor) and isinstance(goal, Tensor) and y.shape[1:] == goal.shape[1:]:
        facts |= relation_moved((x, y), (other, goal))
    return facts


def windows_in_both(x: Tensor, other: Tensor) -> float:
    """Return the share of validation windows that are training windows shifted by 1 to 4 steps."""
    if x.shape[1] < MIN_STEPS or (x.ndim == 2 and not x.is_floating_point()):
        return 0.0
    best = 0.0
    for lag in range(1, 5):
        for ahead in (True, False):
            parts = (x[:, lag:], other[:, :-lag]) if ahead else (x[:, :-lag], other[:, lag:])
            rows = [p.detach().flatten(1).cpu().contiguous().numpy() for p in parts]
            known = {row.tobytes() for row in rows[0] if row.any()}
            best = max(best, sum(row.tobytes() in known for row in rows[1]) / len(rows[1]))
    return best


def _noisy_copies(x: Tensor, other: Tensor) -> dict[str, float]:
    """Return `copies`, the share of validation rows that are noisy copies of training rows.

    Copies lie near each other and far from all other rows, so the distance to the k-th nearest
    neighbour jumps after the last copy.
    """
    generator = torch.Generator().manual_seed(6)
    some = torch.randperm(len(other), generator=generator)[:MAX_VALID]
    rows = torch.randperm(len(x), generator=generator)[:MAX_SEARCHED]
    a, b = (t.detach().flatten(1).double().cpu() for t in (other[some], x[rows]))
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        return {}
    distances = torch.cdist(a, b)
    usual = float(distances.median())
    near = distances.topk(NEIGHBOURS, largest=False).values
    if usual <= 0:
        return {}
    jump, last = (near[:, 1:] / near[:, :-1].clamp_min(1e-9 * usual)).max(1)
    before = near.gather(1, last[:, None])[:, 0]
    found = (jump > MIN_JUMP) & (before < MAX_COPY_DISTANCE * usual) & (before > 0)
    return {"copies": float(found.double().mean())}


SELF_COPIES = 0.25  # share of training rows with copies, above which held-out rows are not new
MIN_JUMP = 3.0  # distance to a neighbour / to the previous one
MAX_COPY_DISTANCE = 0.25  # distance to a copy / median distance


def relation_moved(train: Batch, valid: Batch) -> Facts:
    """Return how well a shallow model of training rows predicts held-out and validation rows.

    `fits_train`, `fits_valid`: accuracy above the majority's share, or correlation. `fits_own`:
    the same for a model of validation rows on held-out ones.
    """
    (x, y), (other, goal) = train, valid
    if len(other) < MIN_ROWS or len(x) < 2 * MIN_ROWS or bool(torch.isinf(x).any()):
        return {}
    generator = torch.Generator().manual_seed(7)
    parts = [torch.randperm(len(t), generator=generator)[:MAX_FITTED] for t in (x, other)]
    design, straight = build_design(torch.cat([x[parts[0]], other[parts[1]]]))
    targets = _target_columns(torch.cat([y[parts[0]], goal[parts[1]]]))
    if design is None or targets is None:
        return {}
    columns, classes = targets
    x = design if classes else design[:, :straight]
    train_rows, valid_rows = torch.arange(len(design)).split([len(part) for part in parts])
    fit, held_out = train_rows.tensor_split([len(train_rows) // 2])
    first, second = valid_rows.tensor_split([len(valid_rows) // 2])
    best: tuple[float, ...] = (-1.0, -1.0)
    for strength in RIDGES:
        best = max(best, _skills(x, columns, classes, fit, (held_out, valid_rows), strength))
    own_skill = max(_skills(x, columns, classes, first, (second,), s)[0] for s in RIDGES)
    found: Facts = {"fits_train": best[0], "fits_valid": best[1], "fits_own": own_skill}
    return found | {"fits_rows": len(valid_rows)}


def _target_columns(y: Tensor) -> tuple[Tensor, bool] | None:
    """Return targets as columns, and whether they are classes; None for other targets."""
    if not y.is_floating_point() and y.ndim == 1 and y.dtype != torch.bool:
        if not 0 <= int(y.min()) <= int(y.max()) < MAX_CLASSES:
            return None
        return torch.nn.functional.one_hot(y.detach().long()).double().cpu(), True
    flat = y.detach().double().flatten(1) if y.ndim > 1 else y.detach().double()[:, None]
    if flat.shape[1] != 1 or not bool(torch.isfinite(flat).all()):
        return None
    flat = flat.cpu()
    if binary(flat):
        high = (flat > 0).double()
        return torch.cat([1 - high, high], 1), True
    return flat, False


def _skills(
    x: Tensor, y: Tensor, classes: bool, fit: Tensor, row_sets: tuple[Tensor, ...], strength: float
) -> tuple[float, ...]:
    """Fit a ridge to some rows and return its skill on others."""
    mean = y[fit].mean(0)
    weights = ridge(x[fit], y[fit] - mean, strength)
    found = []
    for rows in row_sets:
        prediction, true = x[rows] @ weights + mean, y[rows]
        if classes:
            right = float((prediction.argmax(1) == true.argmax(1)).double().mean())
            found.append(right - float(true.mean(0).max()))
        else:
            a, b = prediction[:, 0] - prediction.mean(), true[:, 0] - true.mean()
            size = float((a.square().sum() * b.square().sum()).sqrt())
            found.append(float((a * b).sum()) / size if size > 0 else 0.0)
    return tuple(found)


def renumbering_facts(replica: Replica, valid: Batch) -> Facts:
    """Return the accuracy of a trained network on validation rows as it is, and renumbered.

    `valid_mapped` is the accuracy with each class renumbered to its most frequent prediction, if
    that is a different one for every class.
    """
    goal = valid[1]
    if not isinstance(goal, Tensor) or goal.is_floating_point() or goal.ndim != 1:
        return {}
    with torch.no_grad(), undisturbed(replica.model, training=False):
        output, _ = replica.outcome(valid)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(goal):
        return {}
    classes = output.shape[1]
    known = 0 <= int(goal.min()) <= int(goal.max()) < classes
    if classes < 2 or not known or len(goal) < MIN_ROWS:
        return {}
    table = torch.zeros(classes, classes)
    table.index_put_((goal.cpu(), output.argmax(1).cpu()), torch.ones(len(goal)), accumulate=True)
    there = (table.sum(1) > 0).nonzero().flatten()
    given = table[there].argmax(1)
    if len(given.unique()) < len(given):
        return {}
    names = [[int(g), int(c)] for c, g in zip(there.tolist(), given.tolist()) if c != g]
    right, mapped = float(table.diagonal().sum()), float(table[there].max(1).values.sum())
    found: Facts = {"valid_right": right / len(goal), "valid_mapped": mapped / len(goal)}
    return found | {"valid_names": names}
