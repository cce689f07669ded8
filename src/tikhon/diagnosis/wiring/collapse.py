"""Embeddings that are compared with each other: are all rows given the same one?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.loss_signs import replace_outputs
from tikhon.diagnosis.wiring.program import Facts, Program


def spread_facts(program: Program) -> Facts:
    """Return `embedding_spread` over rows: absolute, / the size, and of the directions."""
    outputs = [t.double() for t in program.by_row(program.outputs(program.batch)) if t.ndim == 2]
    if not outputs or program.rows < 3:
        return {}
    relative = [t / t.square().mean().sqrt().clamp_min(1e-30) for t in outputs]
    forms = outputs, relative, [functional.normalize(t, dim=1) for t in outputs]
    return {"embedding_spread": [max(float((t - t.mean(0)).norm()) for t in f) for f in forms]}


def collapse_facts(program: Program, before: list[float]) -> Facts:
    """Compare a trained network with one embedding for all rows.

    `embeddings_left`: the spread of the outputs / that before training, in the smallest of its
    three forms. `embedding_losses`: the loss, and that of the mean output for all rows.
    """
    after = spread_facts(program).get("embedding_spread")
    if not isinstance(after, list) or not all(before):
        return {}
    with torch.no_grad(), undisturbed(program.model, training=False):
        own = float(program.replica.value(program.batch))
        with replace_outputs(program.model, _mean_row):
            constant = float(program.replica.value(program.batch))
    left = min(now / then for now, then in zip(after, before))
    return {"embeddings_left": left, "embedding_losses": [own, constant]}


def _mean_row(t: Tensor) -> Tensor:
    return t.mean(0, keepdim=True).expand_as(t).contiguous() if t.ndim == 2 else t
