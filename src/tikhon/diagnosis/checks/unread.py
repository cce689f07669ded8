"""Findings about what is left out: parts of the inputs, a lost eps.

Pure functions of the evidence; standard library only. What is measured: `tikhon.diagnosis.wiring`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.findings import Finding
from tikhon.languages import said


def _unread(ev: Evidence) -> Iterable[Finding]:
    """Parts of the inputs that no answer depends on, though the targets do."""
    found = ev.wiring.get("unread")
    if not found or any((ev.fact(k) or 0.0) >= e.APART for k in ("rows_apart", "order_of_rows")):
        return
    every, read = (ev.fact(f"explained_{k}") for k in ("all", "read"))
    gain = every - max(read, 0.0) if every is not None and read is not None else 0.0
    related = "place" in found or gain > e.BENDS
    if "place" in found:
        place, count = found["place"], found["inputs"]
        why = said("why_unread_input", place=place, count=count)
        where, numbers = (f"input {place}",), {"inputs": float(count)}
        fix = "use each argument of forward: look for one name written twice, or a 0 as a factor"
    else:
        share, entries = float(found["share"]), int(found["entries"])
        first = ", ".join(map(str, found["first"]))
        why = said("why_unread_entries", share=share, first=first)
        if related:
            why = said("why_unread_worth", why=why, gain=gain)
        where, numbers = ("inputs",), {"unread": share, "columns": float(entries)}
        fix = "look for x[:, :k], x[:, 0] or a reshape that leaves some of the inputs out"
    yield Finding(
        "inputs_ignored",
        "critical" if ev.harmed and related else "info",
        where,
        numbers,
        why,
        fix=fix,
    )


def _lost_eps(ev: Evidence) -> Iterable[Finding]:
    lost = tuple(ev.static.get("eps_lost") or ())
    if not lost or (ev.record.failure is None and not ev.harmed):
        return
    eps = float(ev.record.optimizer.get("eps") or 0.0)
    why = said("why_eps_lost", eps=eps)
    fix = "model.float() and torch.autocast around the forward pass; or eps=1e-4"
    numbers = {"parameters": float(len(lost))}
    yield Finding("undefined_operation", "critical", lost, numbers, why, fix=fix)


CHECKS = (_unread, _lost_eps)
