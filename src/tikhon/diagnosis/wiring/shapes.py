"""Reshapes that mix axes: a view where a permutation was meant, a softmax over the rows."""

from __future__ import annotations

from typing import Any

import torch

from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.calls import LOSS, Call, Calls
from tikhon.diagnosis.wiring.subject import Subject

RESHAPES = ("view", "reshape", "view_as", "reshape_as", "unflatten")


def shape_facts(subject: Subject) -> dict[str, Any]:
    """Reshapes after which the same sizes stand in another order, and softmaxes over the rows."""
    with torch.no_grad(), undisturbed(subject.model, training=False), Calls(subject.model) as tape:
        subject.replica.value(subject.batch)
    mixed = [c for c in tape.named(*RESHAPES) if reorders(c)]
    facts: dict[str, Any] = {}
    if mixed:
        call = mixed[0]
        facts["reshape"] = {
            "from": list(call.shapes[0]),
            "to": list(call.output or ()),
            "place": call.place,
        }
    over_rows = [
        c
        for c in tape.calls
        if c.dim == 0 and len(c.shapes[0]) > 1 and c.shapes[0][0] == subject.rows
    ]
    if over_rows:
        facts["softmax_over_rows"] = over_rows[0].place
    single = [
        c
        for c in tape.named("softmax", "log_softmax")
        if c.module == LOSS and c.dim is not None and c.shapes[0] and c.shapes[0][c.dim] == 1
    ]
    entropies = [
        c
        for c in tape.named("cross_entropy")
        if c.shapes and len(c.shapes[0]) > 1 and c.shapes[0][1] == 1
    ]
    if single or entropies:
        facts["softmax_over_one"] = (single or entropies)[0].place
    return facts


def reorders(call: Call) -> bool:
    """Whether a reshape gives the same sizes, none of them 1, in another order of axes.

    Memory is read in the old order, so the values of the axes get mixed: a permutation was meant.
    """
    if not call.shapes or call.output is None:
        return False
    before = [s for s in call.shapes[0] if s != 1]
    after = [s for s in call.output if s != 1]
    moved = {s for s, t in zip(before, after) if s != t} if len(before) == len(after) else set()
    # a square and its shift by one is how relative positions are read, on purpose
    return bool(moved) and sorted(before) == sorted(after) and max(moved) - min(moved) > 1
