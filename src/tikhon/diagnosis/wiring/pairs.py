"""Networks that compare two rows: is the output a distance, and which label means similar?"""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.diagnosis.reference import binary
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.program import Facts, Program

NEAR = 0.1  # output for a row and itself / usual output, of a distance
MIN_Z = 3.0  # z-score of the difference between the labels' distances


def pair_facts(program: Program, source: Samples) -> Facts:
    """Return `alike`: the label of similar pairs, for a network whose output is a distance.

    A distance is nearly 0 between a row and itself; similar pairs have the closer inputs.
    """
    target = source.probe[1]
    if program.replica.whole or not isinstance(target, Tensor):
        return {}
    if target.numel() != len(target) or not binary(target) or len(target.unique()) != 2:
        return {}
    found = _split_pairs(program.batch[0])
    known = _split_pairs(source.probe[0])
    if found is None or known is None:
        return {}
    twice = (found[0], found[0])  # each row with itself, in the form of the inputs
    same = twice if isinstance(program.batch[0], tuple) else torch.stack(twice, 1)
    usual, itself = (program.outputs((x, program.batch[1])) for x in (program.batch[0], same))
    if len(usual) != 1 or bool((usual[0] < 0).any()):
        return {}
    if float(itself[0].abs().mean()) > NEAR * float(usual[0].abs().mean()):
        return {}
    distance = (known[0] - known[1]).double().flatten(1).square().sum(1).sqrt()
    label = target.flatten().to(distance.device) > 0
    if min(int(label.sum()), int((~label).sum())) < 10:
        return {}
    ones, others = distance[label], distance[~label]
    noise = (ones.var() / len(ones) + others.var() / len(others)).sqrt().clamp_min(1e-12)
    z_score = float((ones.mean() - others.mean()) / noise)
    return {"alike_label": float(z_score < 0)} if abs(z_score) >= MIN_Z else {}


def _split_pairs(inputs: object) -> tuple[Tensor, Tensor] | None:
    """Return the two rows of each pair: from a tuple, or from the second axis."""
    if isinstance(inputs, Tensor) and inputs.ndim > 2 and inputs.shape[1] == 2:
        first, second = inputs[:, 0], inputs[:, 1]
    elif isinstance(inputs, tuple) and len(inputs) == 2:
        first, second = inputs
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return None
    else:
        return None
    alike = first.shape == second.shape and first.is_floating_point() and first.ndim > 1
    return (first, second) if alike else None
