"""Class weights of a loss beside class frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tikhon.data.nested import map_tensors
from tikhon.diagnosis.reference import MAX_CLASSES, binary
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.program import Facts, Program
from tikhon.diagnosis.wiring.targets import LossProbe

LOW_LOGIT = -3.0  # a logit at which focal losses differ from class weights
FOCAL = 1.5  # times the gradient of plain class weights there


def class_weight_facts(program: Program, source: Samples) -> Facts:
    """Return share and weight of each class, or of the positives in each binary column.

    The weight is the size of the loss gradient at logits of zero, where all classes are equally
    wrong. Empty for other targets.
    """
    target = program.batch[1]
    whole = source.source[1] if source.indexed else source.probe[1]
    if program.replica.whole or not isinstance(whole, Tensor) or not isinstance(target, Tensor):
        return {}
    with torch.no_grad(), undisturbed(program.model, training=False):
        output = program.forward(program.batch)
    if not isinstance(output, Tensor) or not output.ndim or not output.is_floating_point():
        return {}
    if whole.is_floating_point() and target.shape == output.shape and target.ndim <= 2:
        return _column_weights(program, whole, output, target)
    classes = output.shape[1] if output.ndim == 2 else 0
    if whole.is_floating_point() or target.ndim != 1 or not 2 <= classes <= program.rows:
        return {}
    counts = whole.flatten().clamp(0, MAX_CLASSES).bincount(minlength=classes)
    each = (torch.arange(program.rows) % classes).to(target)
    found = _gradient_at(program, output, each, 0.0)
    if found is None or len(counts) != classes:
        return {}
    sizes = found.flatten(1).abs().sum(1)
    weights = [float(sizes[each == k].mean()) for k in range(classes)]
    return {"class_shares": (counts / counts.sum()).tolist(), "class_weights": weights}


def _column_weights(program: Program, whole: Tensor, output: Tensor, target: Tensor) -> Facts:
    if not binary(whole):
        return {}
    tried = [(logit, value) for logit in (0.0, LOW_LOGIT) for value in (0.0, 1.0)]
    gradients = {
        (z, y): _gradient_at(program, output, torch.full_like(target, y), z) for z, y in tried
    }
    sizes = {k: g.abs().reshape(len(g), -1).mean(0) for k, g in gradients.items() if g is not None}
    if len(sizes) < 4 or any(not bool((s > 0).all()) for s in sizes.values()):
        return {}
    ratio = sizes[0.0, 1.0] / sizes[0.0, 0.0]
    plain = sizes[LOW_LOGIT, 1.0] / sizes[LOW_LOGIT, 0.0] / math.exp(-LOW_LOGIT)
    if bool((plain > FOCAL * ratio).any()):
        return {}  # a focal loss has weights of another meaning
    shares = (whole.double() > 0).double().reshape(len(whole), -1).mean(0)
    return {"positive_shares": shares.tolist(), "positive_weights": ratio.tolist()}


def _gradient_at(program: Program, output: Tensor, target: Tensor, logit: float) -> Tensor | None:
    """Return the gradient of the loss at logits that are all equal; None if there is none."""
    probe = LossProbe(program, map_tensors(output, torch.zeros_like))
    with torch.no_grad():
        probe.leaves[0].fill_(logit)
    found = probe.gradient_or_none(target)
    return found[0] if found is not None else None
