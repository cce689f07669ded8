"""Propagation of origins through one operation: indices, norms over rows, bounds.

Functions of one call, used by the tracer for each operation of the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tikhon.diagnosis.functions import ADDING, COMPARED, JUDGES, PRODUCTS, SHARES, TIMES
from tikhon.diagnosis.wiring.origins import TracedCall

SHAPES = set(
    "T mT t transpose permute view reshape flatten squeeze unsqueeze expand contiguous clone "
    "detach __getitem__ unbind chunk split".split()
)
KEEPING = {*SHAPES, "neg", "__neg__"}
CASTS = set("float double half to type type_as long int bfloat16 cpu".split())
WITH_INDICES = {"max", "min", "topk", "sort", "kthvalue"}  # return values and indices
NORMS = {"norm", "linalg_norm", "linalg_vector_norm", "vector_norm", "linalg_matrix_norm"}
SOFTMAX_LOSSES = {"cross_entropy", "log_softmax", "logsumexp"}
SUMMING = {*ADDING, "stack", "cat"}
SAME_NORM = 1e-3  # relative difference of norms due to rounding
MIN_FLOOR = 0.7  # share of the trivial loss that bounded logits cannot get below


def is_index(step: TracedCall, result: Tensor) -> bool:
    """Whether a result is an index of entries, possibly reshaped or cast."""
    if step.name in ("argmax", "argmin"):
        return True
    if step.name in WITH_INDICES and not result.is_floating_point():
        return bool(step.inputs) and step.inputs[0].is_floating_point()
    return step.name in SHAPES | CASTS and bool(step.origins) and step.origins[0].is_index


def check_index_as_number(step: TracedCall, outputs: set[int]) -> None:
    """Detect an argmax of an output used as a value: discounted, added to data or compared."""
    if step.name not in ADDING | TIMES | COMPARED or not step.results:
        return
    if not step.results[0].is_floating_point():
        return
    for place, (tensor, origin) in enumerate(zip(step.inputs, step.origins)):
        if not origin.is_index or origin.roots.isdisjoint(outputs) or not tensor.ndim:
            continue
        others = [n for k, n in enumerate(step.origins) if k != place]
        of_data = any(n.roots and n.roots.isdisjoint(outputs) for n in others)
        numbers = [a for a in step.args if isinstance(a, float) and 0 < a < 1]
        compared = step.name in COMPARED and any(not n.roots.isdisjoint(outputs) for n in others)
        if (step.name in TIMES and numbers) or (step.name in ADDING and of_data) or compared:
            step.facts.setdefault("index_as_number", step.place)


def check_gather_over_rows(step: TracedCall, rows: int, outputs: set[int]) -> None:
    """Detect class indices that gather along the rows, and so pick outputs of other rows."""
    if step.name != "gather" or len(step.inputs) < 2:
        return
    axis = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim")
    source, index = step.inputs[0], step.inputs[-1]
    if axis not in (0, -2) or source.ndim != 2 or len(source) != rows or source.shape[1] >= rows:
        return
    if not index.numel() or step.origins[0].roots.isdisjoint(outputs):
        return
    if 1 < int(index.max()) + 1 <= source.shape[1]:
        step.facts.setdefault("gathered_over_rows", step.place)


def check_cosine_over_rows(step: TracedCall, rows: int) -> None:
    """Detect a cosine similarity over the rows, which compares columns."""
    if step.name != "cosine_similarity" or len(step.inputs) < 2:
        return
    axis = step.kwargs.get("dim", step.args[2] if len(step.args) > 2 else 1)
    a, b = step.inputs[:2]
    table = a.shape == b.shape and a.ndim == 2 and len(a) == rows
    if axis in (0, -2) and table and a.shape[1] > 1:
        step.facts.setdefault("compared_over_rows", step.place)


def check_mixed_derivatives(step: TracedCall) -> None:
    """Detect second derivatives of a sum of first ones, which include all mixed derivatives."""
    if step.name != "grad" or not any(n.derivative for n in step.origins[:1]) or not step.results:
        return
    given = step.inputs[0]
    columns = given.shape[1] if given.ndim == 2 else 1
    if columns < 2 or step.results[0].shape != given.shape:
        return
    weights = step.kwargs.get("grad_outputs", step.args[2] if len(step.args) > 2 else None)
    weights = weights[0] if isinstance(weights, tuple | list) and weights else weights
    if isinstance(weights, Tensor) and bool((weights == 1).all()):
        step.facts.setdefault("mixed_derivatives", step.place)


def follow_detached_loss(step: TracedCall) -> str:
    """Return the line of a loss without gradient; detect it when added to one with gradient."""
    known = next((n.detached_line for n in step.origins if n.detached_line), "")
    if step.attached:
        if known and step.name in SUMMING:
            step.facts.setdefault("unlearned_part", known)
        return ""
    given = step.name in JUDGES and any(n.roots for n in step.origins)
    if given:
        return step.place
    return known if step.name in SUMMING | TIMES | SHARES | SHAPES | {"mean", "sum"} else ""


def follow_log_targets(step: TracedCall) -> bool:
    """Whether a result is the log-softmax of data.

    Detects its product with logits: a hand-written cross-entropy with swapped arguments.
    """
    if step.name in TIMES and step.attached and len(step.inputs) == 2:
        for logs, scores in ((0, 1), (1, 0)):
            values = step.inputs[scores].detach()
            low, high = float(values.min()), float(values.max())
            shares = high <= 1 and (low >= 0 or high <= 0)
            if step.origins[logs].log_targets and not shares:
                found = {"name": "log_softmax", "place": step.place}
                step.facts.setdefault("logs_of_targets", found)
    made = step.name == "log_softmax" and not step.attached
    return made or (step.name in SHAPES and bool(step.origins) and step.origins[0].log_targets)


def follow_log_chance(step: TracedCall, outputs: set[int]) -> bool:
    """Whether a result is the log-probability of what was chosen.

    Detects its product with an advantage through which the other outputs get a gradient.
    """
    if step.name in TIMES and step.attached and len(step.inputs) == 2:
        for chance, gain in ((0, 1), (1, 0)):
            chosen, worth = step.origins[chance], step.origins[gain]
            others = (worth.roots & outputs) - chosen.roots
            if chosen.log_chance and others and step.inputs[gain].requires_grad:
                step.facts.setdefault("pulled_value", step.place)
    made = step.name == "gather" and step.attached and float(step.results[0].max()) <= 0
    return made or (
        step.name in KEEPING and bool(step.origins) and any(n.log_chance for n in step.origins)
    )


def follow_lost_slope(step: TracedCall) -> str:
    """Return the line that took a derivative without a graph; detect that the loss adds it.

    Derivatives by parameters, and those that weight a part of the loss, have no graph on purpose.
    """
    if step.name == "grad":
        of_outputs = step.inputs[:1] and step.inputs[0].requires_grad
        weights = any(isinstance(t, nn.Parameter) for t in step.inputs[1:])
        return step.place if of_outputs and not step.attached and not weights else ""
    line = next((n.lost_slope for n in step.origins if n.lost_slope), "")
    if not line or not step.attached:
        return line
    if step.name in ADDING:
        step.facts.setdefault("slope_without_graph", line)
    return ""


def is_norm_over_rows(step: TracedCall, rows: int) -> bool:
    """Whether a result is a norm over the rows: of the batch, or of each column."""
    given = step.inputs[0] if step.inputs else None
    if given is None or given.ndim != 2 or len(given) != rows or not given.requires_grad:
        return False
    return step.name in NORMS and step.results[0].shape[:1] != (rows,)


def follow_norm_over_rows(step: TracedCall, rows: int) -> str:
    """Return the line in which outputs were divided by a norm over the rows.

    Detects a matrix of similarities between rows made of such outputs.
    """
    known = next((n.normed_line for n in step.origins if n.normed_line), "")
    if step.name in PRODUCTS and known and tuple(step.results[0].shape) == (rows, rows):
        step.facts.setdefault("normed_over_rows", known)
    if step.name in SHAPES | TIMES or (step.name in SHARES and known):
        return known
    given = step.inputs[0] if step.inputs else None
    if given is None or given.ndim != 2 or len(given) != rows or given.shape[1] < 2:
        return ""
    if step.name == "normalize" and given.requires_grad:
        axis = step.kwargs.get("dim", step.args[2] if len(step.args) > 2 else 1)
        return step.place if axis in (0, -2) else ""
    divided = step.name in SHARES and len(step.origins) == 2 and step.origins[1].row_norm
    return step.place if divided and step.origins[0].roots & step.origins[1].roots else ""


def follow_bound(step: TracedCall) -> float | None:
    """Return the bound on products of vectors of fixed norm.

    Detects logits bounded too tightly for a softmax.
    """
    known = next((n.bound for n in step.origins if n.bound is not None), None)
    if step.name in PRODUCTS and len(step.inputs) == 2 and step.results[0].ndim == 2:
        a, b = (t.detach() for t in step.inputs)
        lengths = [a.norm(dim=1), b.norm(dim=0)] if a.ndim == b.ndim == 2 else []
        fixed = [bool((n - n.mean()).abs().max() <= SAME_NORM * n.mean()) for n in lengths]
        fixed_norms = bool(fixed) and all(fixed) and step.attached and min(map(len, lengths)) > 2
        return float(lengths[0].mean() * lengths[1].mean()) if fixed_norms else None
    if known is None:
        return None
    if step.name in SOFTMAX_LOSSES and step.inputs[0].ndim == 2:
        classes = step.inputs[0].shape[1]
        floor = math.log1p((classes - 1) * math.exp(-2 * known)) / math.log(max(2, classes))
        if floor >= MIN_FLOOR and classes > 2:
            step.facts.setdefault("bounded_scores", {"place": step.place, "floor": floor})
        return None
    if step.name in SHAPES:
        return known
    return _scale_bound(step, known)


def _scale_bound(step: TracedCall, known: float) -> float | None:
    """Return the bound after a product or quotient with a constant number."""
    if step.name not in TIMES | SHARES or len(step.args) != 2:
        return None
    first, other = step.args
    if not isinstance(first, Tensor) or first.numel() == 1:
        first, other = other, first
    if isinstance(other, Tensor) and (other.numel() != 1 or other.requires_grad):
        return None
    if not isinstance(first, Tensor) or not isinstance(other, float | int | Tensor):
        return None
    size = abs(float(other))
    if step.name in SHARES:
        return known / size if size and first is step.args[0] else None
    return known * size


def raises_random_samples(outputs: list[tuple[Tensor, bool]], loss: Tensor) -> bool:
    """Whether a loss raises the scores of random samples and lowers those of the data.

    Outputs of a single sign are distances, which should be small, and are excluded.
    """
    scores = [(t, drawn) for t, drawn in outputs if t.requires_grad and t.numel() > 2]
    if {drawn for _, drawn in scores} != {True, False} or not loss.requires_grad:
        return False
    values = torch.cat([t.detach().flatten() for t, _ in scores])
    if bool((values >= 0).all()) or bool((values <= 0).all()):
        return False
    wanted = [t for t, _ in scores]
    slopes = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    for (_, drawn), slope in zip(scores, slopes):
        if slope is None or not bool(slope.any()):
            return False
        wrong = slope <= 0 if drawn else slope >= 0
        if not bool(wrong.all()):
            return False
    return True
