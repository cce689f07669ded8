"""Effect of targets on the gradient: broadcast shapes, wrong rows, rows without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from tikhon.data.forward import LossFunction
from tikhon.data.nested import map_tensors
from tikhon.diagnosis.modes import LOSS
from tikhon.diagnosis.reference import binary
from tikhon.diagnosis.replica import scalar_loss, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.program import Facts, Program, relative_change, restored
from tikhon.diagnosis.wiring.torch_calls import CallTrace
from tikhon.training.losses import IGNORED

SAME = 1e-5  # relative change of a gradient due to rounding
MAX_INSIDE = 0.2  # share of an ignored class inside of rows, from which it is not padding
MIN_SIZE_RATIO = 10.0  # rms of a target column / of another, and at least this
MAX_COLUMNS = 64  # maximum number of target columns compared
TESTED_COLUMNS = 4  # target columns that are tested one by one

Gradient = list[Tensor] | None  # of the loss at the float outputs


def target_facts(program: Program) -> Facts:
    """Measure how the loss uses outputs and targets; empty if it calls the model itself."""
    target = program.batch[1]
    if program.replica.whole or not isinstance(target, Tensor) or not target.ndim:
        return {}
    with undisturbed(program.model, training=False), torch.no_grad():
        output = map_tensors(program.forward(program.batch), lambda t: t.detach().clone())
    probe = LossProbe(program, output)
    base = probe.gradient(target)
    facts = _effects(program, probe, base, target)
    facts |= _dependence(program, probe, base, target)
    facts |= _ignored_columns(probe, base, target)
    facts |= _cost_facts(program.replica.loss, output, target)
    facts |= _dominant_column(probe, base, target)
    facts |= _loss_calls(program, probe, target)
    facts |= _target_kinds(output, target)
    return facts


class LossProbe:
    """The loss of fixed outputs as a function of the targets, and its gradient at the outputs."""

    def __init__(self, program: Program, output: object) -> None:
        self.loss = program.replica.loss
        self.leaves: list[Tensor] = []

        def leaf(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            # noise, since a zero-initialised head would hide which outputs a target affects
            generator = torch.Generator(device="cpu").manual_seed(len(self.leaves))
            noise = torch.rand(t.shape, generator=generator, dtype=torch.float32).to(t)
            # scaled, since huge logits saturate a softmax and leave no gradient
            large = max(1.0, float(t.abs().max()) / 3)
            self.leaves.append((t / large * (0.95 + 0.05 * noise)).requires_grad_())
            return self.leaves[-1]

        self.output = map_tensors(output, leaf)

    def gradient(self, target: Tensor) -> Gradient:
        """Return the gradients of the loss at the float outputs; None if there are none."""
        with torch.enable_grad():
            loss = scalar_loss(self.loss(self.output, target))
        if not loss.requires_grad or not bool(torch.isfinite(loss)):
            return None
        found = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.leaves)]

    def gradient_or_none(self, target: Tensor) -> Gradient:
        """Return `gradient` at artificial targets; None also if the loss rejects them.

        A column may be an index, for which not every number is valid.
        """
        try:
            return self.gradient(target)
        except (RuntimeError, IndexError, ValueError):
            return None

    def gradients_at(self, output: Tensor, targets: Iterable[Tensor]) -> list[Gradient]:
        """Return `gradient_or_none` of targets with another value of the only output."""
        with restored(self.leaves):
            self.leaves[0].data.copy_(output)
            return [self.gradient_or_none(target) for target in targets]


def _effects(program: Program, probe: LossProbe, base: Gradient, target: Tensor) -> Facts:
    """Change single targets and measure at which outputs the gradient changes."""
    rows = program.rows
    if base is None or rows < 3:
        return {"loss_connected": base is not None}
    facts: Facts = {"loss_connected": True} | _misplaced_outputs(probe, target, rows)
    if not any(t.ndim and len(t) == rows for t in probe.leaves):
        return facts
    several = target.ndim == 2 and target.is_floating_point()
    columns = min(target.shape[1], TESTED_COLUMNS) if several else 1
    found = [_column_effects(probe, target, column) for column in range(columns)]
    others = [share for shares, _ in found for share in shares]
    if others:
        # minimum over rows, maximum over columns
        facts["pull_on_others"] = max(min(shares) for shares, _ in found if shares)
    signs = [sign for _, column in found for sign in column]
    if len(signs) >= 3:
        facts["pulls_away"] = sum(sign > 0 for sign in signs) / len(signs)
    gradients = (base, *_gradients_at_ends(probe, target))
    size = sum((_sizes_by_row(g, rows) for g in gradients), torch.zeros(rows))
    counts = target.flatten(1) != IGNORED if target.ndim > 1 else (target != IGNORED)[:, None]
    labelled = counts.any(1).cpu()
    if bool(labelled.any()) and bool((size > 0).any()):
        facts["unheard"] = float((size[labelled] == 0).double().mean())
    return facts | _classes_without_gradient(base, target, rows)


def _ignored_columns(probe: LossProbe, base: Gradient, target: Tensor) -> Facts:
    """Return the output columns with a target that the loss never reads."""
    if base is None or len(base) != 1 or base[0].shape != target.shape or target.ndim != 2:
        return {}
    if target.shape[1] < 2 or not target.is_floating_point():
        return {}
    has_gradient = sum(g[0].abs().sum(0) for g in (base, *_gradients_at_ends(probe, target)))
    assert isinstance(has_gradient, Tensor)
    ignored = (has_gradient == 0).nonzero().flatten().tolist()
    return {"deaf_columns": ignored} if 0 < len(ignored) < target.shape[1] else {}


def _sizes_by_row(gradient: list[Tensor], rows: int) -> Tensor:
    return _change_by_row(gradient, [torch.zeros_like(g) for g in gradient], rows)


def _gradients_at_ends(probe: LossProbe, target: Tensor) -> list[list[Tensor]]:
    """Return gradients with all targets low, and high, since correct rows have none."""
    if not target.is_floating_point():
        return []
    ends = extremes(target, far=False)
    found = [probe.gradient_or_none(torch.full_like(target, end)) for end in ends]
    return [g for g in found if g is not None]


def _dependence(program: Program, probe: LossProbe, base: Gradient, target: Tensor) -> Facts:
    """Whether the gradient is the same with permuted targets, and with different ones."""
    others = 3 * target.flip(0) + 1 if target.is_floating_point() else target[:1].expand_as(target)
    if target.is_floating_point() and not _varies(target):  # all equal
        found = [probe.gradient_or_none(others.contiguous())]
        unheard = base is not None and found[0] is not None
        same = unheard and relative_change(base or [], found[0] or []) <= SAME
        return {"targets_used": False} if same and any(bool(g.any()) for g in base or []) else {}
    rolled = [target.roll(k, 0) for k in (1, 3)]
    moved = all(bool((t != target).any()) for t in rolled)
    if program.rows < 5 or not moved or not any(_varies(t) for t in probe.leaves):
        return {}
    found = [probe.gradient_or_none(t) for t in (*rolled, others.contiguous())]
    if base is None or not any(bool(g.any()) for g in base) or any(g is None for g in found):
        return {}
    apart = [relative_change(base, g) for g in found if g is not None]
    if max(apart[:-1]) > SAME or _depends_near_targets(probe, target, rolled):
        return {}
    scored = any(g.numel() == program.rows and bool(g.any()) for g in base)
    return {"indifferent": True, "targets_used": apart[-1] > SAME, "scored": scored}


def _depends_near_targets(probe: LossProbe, target: Tensor, rolled: list[Tensor]) -> bool:
    """Whether targets matter at outputs in their range: far away, absolute errors are linear."""
    leaf = probe.leaves[0]
    if len(probe.leaves) != 1 or leaf.numel() != target.numel() or not target.is_floating_point():
        return False
    # wider than the targets, since the gradient is 0 where both are equal
    outputs = (1.3 * target.flip(0) - 0.3 * target.mean(0)).reshape(leaf.shape)
    found = [g for g in probe.gradients_at(outputs, (target, *rolled)) if g is not None]
    complete = len(found) == 1 + len(rolled)
    return complete and any(relative_change(found[0], g) > SAME for g in found[1:])


def _varies(t: Tensor) -> bool:
    return t.ndim > 0 and len(t) > 1 and bool((t != t[:1]).any())


def _column_effects(
    probe: LossProbe, target: Tensor, column: int
) -> tuple[list[float], list[float]]:
    """Return effects of three targets on the gradient: other rows / own row, and own signs.

    The sign at the own output is negative if the loss pulls it towards the target.
    """
    rows = len(target)
    others, signs = [], []
    for row in (0, rows // 2, rows - 1):
        rest = [column, *[0] * (target.ndim - 2)] if target.ndim > 1 else []
        index = (row, *rest)
        pair, values = _two_gradients(probe, target, index)
        if pair is None:
            continue
        size = _change_by_row(pair[0], pair[1], rows)
        if float(size.max()) > 0:
            away = torch.cat([size[:row], size[row + 1 :]])
            others.append(float(away.median() / size.max()))
            signs += _effect_signs(probe, pair, target, index, values)
    return others, signs


def _misplaced_outputs(probe: LossProbe, target: Tensor, rows: int) -> Facts:
    """Return the share of single targets that affect the output of one other row only.

    The axis of the rows is identified by its size, a unique prime.
    """
    leaf = max(range(len(probe.leaves)), key=lambda k: probe.leaves[k].numel(), default=None)
    shape = probe.leaves[leaf].shape if leaf is not None else ()
    axes = [k for k, size in enumerate(shape) if size == rows]
    if len(axes) != 1 or leaf is None:
        return {}
    wrong = []
    for row in (1, rows // 2, rows - 1):
        for place in {0, *(target.shape[1:2] or (1,))}:
            index = (row, *([min(place, target.shape[1] - 1)] if target.ndim > 1 else []))
            index = (*index, *[0] * (target.ndim - len(index)))
            pair, _ = _two_gradients(probe, target, index)
            if pair is None:
                continue
            change = (pair[0][leaf] - pair[1][leaf]).abs().double().movedim(axes[0], 0)
            size = change.flatten(1).sum(1) if change.ndim > 1 else change
            if float(size.sum()) > 0:
                top = int(size.argmax())
                wrong.append(top != row and float(size[top]) > 0.9 * float(size.sum()))
    return {"answers_elsewhere": sum(wrong) / len(wrong)} if wrong else {}


def _two_gradients(
    probe: LossProbe, target: Tensor, index: tuple[int, ...]
) -> tuple[tuple[list[Tensor], list[Tensor]] | None, tuple[float, float]]:
    """Return gradients with a low and a high target, beyond the data's range if possible."""
    for far in (True, False):
        ends = extremes(target, far=far, column=index[1] if len(index) == 2 else None)
        if len(ends) < 2:
            continue
        low, high = (probe.gradient_or_none(with_entry(target, index, value)) for value in ends)
        if low is not None and high is not None:
            return (low, high), (ends[0], ends[1])
    return None, (0.0, 0.0)


def _effect_signs(
    probe: LossProbe,
    pair: tuple[list[Tensor], list[Tensor]],
    target: Tensor,
    index: tuple[int, ...],
    ends: tuple[float, float],
) -> list[float]:
    """Return the sign of the gradient's change, from low to high target, at its own output."""
    if len(probe.leaves) != 1 or _are_corners(target):
        return []
    change = pair[1][0] - pair[0][0]
    if change.shape in (target.shape, (*target.shape, 1)):
        own, largest = change.view(target.shape)[index], change[index[0]].abs().max()
        return [float(own.sign())] if float(own.abs()) > 0.9 * float(largest) else []
    scores = change.ndim == 2 and target.ndim == 1 and not target.is_floating_point()
    if scores and 0 <= ends[0] < ends[1] < change.shape[1]:
        low, high = int(ends[0]), int(ends[1])
        others = change[index[0]].abs().clone()
        own = float(others[[low, high]].max())
        others[[low, high]] = 0.0
        if float(others.max()) > 0.5 * own:  # embedding columns, not classes
            return []
        return [float(change[index[0], high].sign()), -float(change[index[0], low].sign())]
    return []


def _are_corners(target: Tensor) -> bool:
    """Whether targets are boxes by two corners, of which one alone cannot be moved far."""
    is_box = target.ndim == 2 and target.shape[1] == 4 and target.is_floating_point()
    return is_box and bool((target[:, :2] < target[:, 2:]).all())


def extremes(target: Tensor, *, far: bool = True, column: int | None = None) -> list[float]:
    """Return a low and a high value of a target; fewer if all are the same."""
    if target.dtype == torch.bool:
        return [False, True]
    seen = target if column is None else target[:, column]
    values = [v for v in seen.detach().unique().tolist() if v != IGNORED]
    if len(values) < 2 or not target.is_floating_point() or (values[0] >= 0 and values[-1] <= 1):
        return [values[0], values[-1]] if len(values) > 1 else []
    if not far:
        return [values[0], values[-1]]
    # beyond all outputs of an untrained network, so that signs change as well
    reach = 10 * max(abs(values[0]), abs(values[-1]))
    return [-reach, reach]


def with_entry(target: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    """Return the targets with one entry changed."""
    changed = target.clone()
    changed[index] = value
    return changed


def _change_by_row(before: list[Tensor], after: list[Tensor], rows: int) -> Tensor:
    total = torch.zeros(rows, dtype=torch.float64)
    for a, b in zip(before, after):
        if a.ndim and len(a) == rows:
            total += (a - b).double().abs().reshape(rows, -1).sum(1).cpu()
    return total


Cost = Callable[[Tensor, Tensor], float]


def _cost_facts(loss: LossFunction, output: object, target: Tensor) -> Facts:
    """Return what the loss of chosen outputs and targets says about the targets it expects."""
    facts: Facts = {}

    def cost(prediction: Tensor, goal: Tensor) -> float:
        return float(scalar_loss(loss(prediction, goal)))

    for test in (_below_zero, _ignores_zeros, _cost_of_correct_boxes, _cost_of_correct_shares):
        # the loss may take no such outputs or targets, or the whole batch only
        with suppress(RuntimeError, ValueError, IndexError), torch.no_grad():
            facts |= test(cost, output, target) if isinstance(output, Tensor) else {}
    return facts


def _below_zero(cost: Cost, output: Tensor, target: Tensor) -> Facts:
    """Whether the loss expects binary targets, and falls below zero on the given ones.

    Binary losses are symmetric: equal for (z, y) and (-z, 1 - y), or (p, y) and (1 - p, 1 - y). So
    is a squared error, but that is never negative.
    """
    if output.numel() != target.numel():
        return {}
    y = target.to(output.dtype).reshape(output.shape)
    generator = torch.Generator().manual_seed(0)
    p = (0.1 + 0.8 * torch.rand(output.shape, generator=generator)).to(output)

    def value(z: Tensor, goal: Tensor) -> float:
        return cost(z, goal.reshape(target.shape).to(target.dtype))

    mirrored = (p, 1 - p), (4 * p - 2, 2 - 4 * p)
    costs = [(value(a, y), value(b, 1 - y)) for a, b in mirrored]
    same = any(abs(one - other) <= 1e-4 * (1 + abs(one)) for one, other in costs)
    sure = torch.where(y > 0.5, 0.99, 0.01).to(p)
    lowest = min(value(sure, y), value(20 * sure - 10, y))
    inside = y.clamp(0, 1)  # a binary loss is >= 0 here
    same &= min(value(sure, inside), value(20 * sure - 10, inside)) >= 0
    return {"below_zero": lowest} if same and lowest < 0 else {}


def _ignores_zeros(cost: Cost, output: Tensor, target: Tensor) -> Facts:
    """Whether a loss that expects targets -1 and 1 is given 0 and 1, and ignores those of 0.

    Such a loss is equal for (z, 1) and (-z, -1), and the same for (z, 0) at every z.
    """
    if output.numel() != target.numel():
        return {}
    if not binary(target) or float(target.min()) < 0 or len(target.unique()) < 2:
        return {}
    generator = torch.Generator().manual_seed(0)
    z = (torch.rand(output.shape, generator=generator) - 0.5).to(output)
    one = torch.ones_like(target).to(z.dtype)
    low = [cost(k * z, 0 * one) for k in (-1.0, 0.5, 1.0)]
    mirrored = abs(cost(z, one) - cost(-z, -one))
    pulled = abs(cost(z, one) - cost(-z, one))
    size = 1e-5 * (1 + abs(low[0]))
    ignores = max(low) - min(low) <= size and mirrored <= size < pulled
    return {"zeros_unheard": True} if ignores else {}


def _cost_of_correct_boxes(cost: Cost, output: Tensor, target: Tensor) -> Facts:
    """Return the share of target boxes that cost more, as output, than another row's box."""
    if output.shape != target.shape or target.ndim != 2:
        return {}
    if not target.is_floating_point() or target.shape[1] != 4 or binary(target):
        return {}
    boxes, beaten = target.split(1), 0
    if abs(cost(boxes[0], boxes[-1]) - cost(boxes[-1], boxes[0])) > SAME:
        return {}  # outputs are read in a format of their own
    for row, goal in enumerate(boxes):
        best = min(cost(box, goal) for k, box in enumerate(boxes) if k != row)
        beaten += cost(goal, goal) > best + SAME
    return {"box_beaten": beaten / len(boxes)}


def _cost_of_correct_shares(cost: Cost, output: Tensor, target: Tensor) -> Facts:
    """Return the cost of correct outputs for a loss that normalises rows with several labels.

    It is invariant to a factor per row, `loss(c p, y) = loss(p, y)`. With normalised targets,
    correct outputs would cost nothing.
    """
    if output.shape != target.shape or target.ndim != 2:
        return {}
    several = target.is_floating_point() and binary(target) and float(target.min()) == 0
    if not several or float(target.sum(1).max()) < 2:
        return {}
    generator = torch.Generator().manual_seed(0)
    p = (0.05 + 0.4 * torch.rand(output.shape, generator=generator)).to(output)
    times = (1 + torch.rand((len(p), 1), generator=generator)).to(output)
    plain, scaled, other = (cost(z, target) for z in (p, times * p, p.roll(1, 0)))
    same = abs(plain - scaled) <= 1e-4 * abs(plain) < abs(plain - other)
    correct = target.clamp(1e-4, 1 - 1e-4).to(p)
    return {"right_shares_cost": cost(correct, target)} if same else {}


def _dominant_column(probe: LossProbe, base: Gradient, target: Tensor) -> Facts:
    """Return the target columns of largest and smallest gradient, and their ratio.

    The smaller of two ratios: at the network's outputs, and at the targets of another row.
    """
    if base is None or len(base) != 1 or base[0].shape != target.shape or target.ndim != 2:
        return {}
    if not target.is_floating_point() or not 2 <= target.shape[1] <= MAX_COLUMNS:
        return {}
    (found,) = probe.gradients_at(target.roll(1, 0), (target,))
    if found is None:
        return {}
    here, beside = (g[0].double().square().mean(0).sqrt() for g in (base, found))
    has_gradient = (here > 0) & (beside > 0)
    if int(has_gradient.sum()) < 2:
        return {}
    largest = int(torch.where(has_gradient, beside, -torch.inf).argmax())
    smallest = int(torch.where(has_gradient, beside, torch.inf).argmin())
    size = target.detach().double().square().mean(0).sqrt()
    if float(size[largest]) < MIN_SIZE_RATIO * max(1.0, float(size[smallest])):
        return {}
    times = min(float(t[largest] / t[smallest]) for t in (here, beside))
    return {"drowned": {"loud": largest, "quiet": smallest, "times": times}}


def _classes_without_gradient(base: list[Tensor], target: Tensor, rows: int) -> Facts:
    """Return classes whose rows have no gradient: ignored, or of weight zero."""
    if target.is_floating_point() or not target.ndim or target.dtype == torch.bool:
        return {}
    if target.ndim > 1:
        return _classes_without_gradient_inside(base, target)
    size = _sizes_by_row(base, rows)
    known = torch.isin(target.cpu(), target.cpu()[size > 0])
    if bool(known.any()) and float((size[known] > 0).double().mean()) < 0.5:
        return {}  # rows are left out, whatever their class
    has_gradient = [int(v) for v in target.unique() if bool((size[target.cpu() == v] > 0).any())]
    silent = [int(v) for v in target.unique() if int(v) not in has_gradient and int(v) != IGNORED]
    return {"silent_classes": silent} if has_gradient and silent else {}


def _classes_without_gradient_inside(base: list[Tensor], target: Tensor) -> Facts:
    """Return classes without gradient inside of rows; at the ends they are padding."""
    leaf = max(base, key=Tensor.numel)
    others = {k: leaf.shape[:k] + leaf.shape[k + 1 :] for k in (1, leaf.ndim - 1)}
    axis = next((k for k, shape in others.items() if shape == target.shape), None)
    if leaf.ndim != target.ndim + 1 or axis is None or target.shape[1] < 3:
        return {}
    has_gradient = leaf.abs().sum(axis) > 0
    silent = []
    for value in target.unique().tolist():
        here = target == value
        if value == IGNORED or bool((has_gradient & here).any()):
            continue
        steps = here.flatten(2).all(2) if target.ndim > 2 else here
        ends = steps.cumprod(1).bool() | steps.flip(1).cumprod(1).flip(1).bool()
        inside = float((steps & ~ends).sum())
        if inside > MAX_INSIDE * float(steps.sum()) and float(here.double().mean()) < 0.5:
            silent.append(int(value))
    return {"silent_classes": silent} if silent and bool(has_gradient.any()) else {}


def background_facts(program: Program, source: Samples) -> Facts:
    """Return the share of pixels with a target that is no class, if class 0 never occurs."""
    target, every = program.batch[1], source.probe[1]
    if program.replica.whole or not isinstance(every, Tensor) or every.ndim < 3:
        return {}
    if every.is_floating_point() or every.dtype == torch.bool:
        return {}
    found = program.outputs(program.batch)
    if len(found) != 1 or found[0].shape[:1] + found[0].shape[2:] != target.shape:
        return {}
    classes = found[0].shape[1]
    values, counts = every.unique(return_counts=True)
    outside = (values < 0) | (values >= classes)
    if int(outside.sum()) != 1 or values[~outside].tolist() != list(range(1, classes)):
        return {}
    share = float(counts[outside]) / every.numel()
    return {"background": {"share": share, "value": int(values[outside]), "classes": classes}}


def _loss_calls(program: Program, probe: LossProbe, target: Tensor) -> Facts:
    """Return the functions that the loss calls, and facts about their arguments."""
    with CallTrace(program.model) as trace, torch.enable_grad():
        program.replica.loss(probe.output, target)
    used = [c for c in trace.calls if c.module == LOSS]
    facts: Facts = {"loss_functions": sorted({c.name for c in used} & LOSSES)}
    goals = [c.target_range for c in used if c.target_range is not None]
    if goals:
        facts["binary_range"] = [min(low for low, _ in goals), max(high for _, high in goals)]
    turned = [c.name for c in used if c.swapped]
    straight = {c.name for c in used if not c.swapped}
    facts["swapped"] = next((name for name in turned if name not in straight), "")
    batch_softmax = [c for c in used if c.dim == 0 and c.shapes[0][:1] == (program.rows,)]
    if batch_softmax and len(batch_softmax[0].shapes[0]) > 1:
        facts["softmax_over_rows"] = batch_softmax[0].place
    return facts


LOSSES = set(
    "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div "
    "binary_cross_entropy binary_cross_entropy_with_logits poisson_nll_loss log "
    "gaussian_nll_loss log_softmax logsigmoid cosine_similarity triplet_margin_loss "
    "cosine_embedding_loss ctc_loss multi_margin_loss multilabel_margin_loss "
    "hinge_embedding_loss margin_ranking_loss soft_margin_loss softmax sigmoid".split()
)


def _target_kinds(output: object, target: Tensor) -> Facts:
    """Return shapes and values that a loss may not be made for."""
    facts: Facts = {"target_shape": list(target.shape[1:])}
    if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
        # distances, which should be small for similar pairs (label 1)
        two = output.numel() == target.numel() and len(target.unique()) <= 2
        facts["distances"] = two and bool((output >= 0).all())
    if isinstance(output, Tensor):
        facts["output_shape"] = list(output.shape[1:])
    if target.ndim == 2 and target.shape[1] > 1 and target.is_floating_point():
        sums = target.detach().double().sum(1)
        inside = bool(((target >= 0) & (target <= 1)).all())
        if inside:
            facts["target_sums"] = [float(sums.min()), float(sums.max())]
    return facts
