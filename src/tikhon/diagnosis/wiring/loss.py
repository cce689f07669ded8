"""Facts about the computation from outputs to loss, followed tensor by tensor."""

from __future__ import annotations

import torch

from tikhon.data.rows import tensors
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.followed import pulled_above
from tikhon.diagnosis.wiring.recorder import Recorder
from tikhon.diagnosis.wiring.subject import Subject


def loss_facts(subject: Subject) -> dict[str, object]:
    """Find broadcast rows, misused masks, samples without gradient, arguments out of domain."""
    parts = tensors(subject.batch)
    with torch.enable_grad(), undisturbed(subject.model, training=True):
        with Recorder(subject.model, parts, subject.rows) as tape:
            loss = subject.replica.value(subject.batch)
        note = tape.note(loss)
    facts = dict(tape.facts)
    slipped = [g for g in note.grown if g.slipped]
    if slipped:
        first = slipped[0]
        facts["broadcast"] = {
            "function": first.function,
            "shapes": [list(s) for s in first.shapes],
            "place": first.place,
        }
    if pulled_above(tape.answers, loss):
        facts["draws_above"] = True
    for summand in note.summands:
        if not summand.meant:
            facts.setdefault(summand.kind, {"name": summand.function, "place": summand.place})
    return facts
