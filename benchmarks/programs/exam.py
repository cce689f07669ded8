"""What tikhon says of programs from public reports: the cells of the exam, and its figures."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch

from programs.form import Loop, Parts, Program, batches, train
from tikhon.cures import cure
from tikhon.data.nested import split_batch
from tikhon.diagnosis import diagnose
from tikhon.monitoring import NonFiniteError, watch

EVERY = 5  # steps between two readings of `watch`: the loops are short
TARGETS = {
    "detected": ">= 98%",
    "top finding accepted": ">= 90%",
    "true cause on top": ">= 90%",
    "repaired programs without an alarm": ">= 97%",
    "loops named": ">= 90%",
    "healthy loops silent": "100%",
}
Row = dict[str, Any]


def ask(case: Row, seed: int, steps: int | None = None) -> Row:
    """Codes of the warnings about a program or a loop, the most important one first."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(case["item"], Loop):
            said = _watched(case["item"], seed, case["repaired"])
        else:
            said = _diagnosed(case["item"], seed, case["repaired"], steps)
    return {**said, "seconds": time.process_time() - began}


def _diagnosed(program: Program, seed: int, repaired: bool, steps: int | None) -> Row:
    parts = program.build(seed, repaired=repaired)
    try:
        found = diagnose(
            parts.model,
            parts.data,
            parts.loss,
            optimizer=parts.optimizer,
            valid=parts.valid,
            steps=200 if steps is None else steps,
            batch_size=parts.batch_size,
            seed=seed,
            clip=parts.clip,
        )
    except Exception as error:  # a crash is an answer too: a wrong one
        return {"codes": [], "error": f"{type(error).__name__}: {error}"}
    return {"codes": [f.code for f in found.findings if f.severity != "info"], "error": ""}


def _watched(loop: Loop, seed: int, repaired: bool) -> Row:
    watches = []

    def watcher(model: Any, optimizer: Any) -> Any:
        watches.append(watch(model, optimizer, every=EVERY))
        return watches[-1]

    error = ""
    try:
        loop.run(watcher, seed, repaired=repaired)
    except NonFiniteError:
        pass  # the watch stops such a loop on purpose; what it named still counts
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    codes = [a.code for health in watches for a in health.findings if a.severity != "info"]
    return {"codes": codes, "error": error}


def repaired(case: Row, seed: int, budget: float) -> Row:
    """How much of what the twin gains the program gains when its patch is run in full.

    The budget is one of CPU time: on a busy machine a cure gets as far as on an idle one.
    """
    program = case["item"]
    began = time.process_time()
    with warnings.catch_warnings(), mock.patch.object(time, "perf_counter", time.process_time):
        warnings.simplefilter("ignore")
        plain, goal = (train(program.build(seed, repaired=r)) for r in (False, True))
        parts = program.build(seed)
        try:
            found = cure(
                parts.model,
                parts.data,
                parts.loss,
                optimizer=parts.optimizer,
                valid=parts.valid,
                budget=f"{budget:g}s",
                steps=min(parts.steps, 300),
                batch_size=parts.batch_size,
                seed=seed,
                clip=parts.clip,
            )
            model = found.train(parts.steps, seed=seed)[0].eval()
            with torch.no_grad():
                reached = parts.score(model)
        except Exception as error:  # what is refused is not repaired
            return {"treatment": "", "gain": 0.0, "error": f"{type(error).__name__}: {error}"}
    gain = (reached - plain) / (goal - plain) if goal > plain else 1.0
    name = found.treatment.name if found.treatment else ""
    error = pasted(found.patch, program.build(seed)) if name else ""
    said = {"treatment": name, "patch": found.patch, "error": error}
    scores = {"plain": plain, "goal": goal, "reached": reached, "gain": gain}
    return {**said, **scores, "seconds": time.process_time() - began}


def pasted(patch: str, parts: Parts) -> str:
    """The error of a patch that is run where there is the user's program and nothing else."""
    x, y = split_batch(next(batches(parts)))
    names = {"model": parts.model, "optimizer": parts.optimizer, "loss": parts.loss}
    names |= {"loader": parts.data}
    valid = parts.valid if isinstance(parts.valid, tuple) else (None, None)
    names |= {
        "x": x,
        "y": y,
        "x_train": x,
        "y_train": y,
        "x_valid": valid[0],
        "y_valid": valid[1],
        "penalty": None,
    }
    try:
        exec(compile(patch, "<patch>", "exec"), names)
    except Exception as error:
        return f"the patch fails, {type(error).__name__}: {error}"
    return ""


def cases(items: Iterable[Program | Loop]) -> list[Row]:
    """A case for each program or loop as it is, and one for it repaired."""
    return [
        {"id": item.name + (", repaired" if repaired else ""), "item": item, "repaired": repaired}
        for item in items
        for repaired in (False, True)
    ]


def figures(rows: list[Row]) -> dict[str, float]:
    """The shares that TARGETS names, over the rows of programs and loops."""
    sick = [r for r in rows if not r["case"]["repaired"]]
    well = [r for r in rows if r["case"]["repaired"]]
    programs, loops = _kind(sick, Program), _kind(sick, Loop)
    return {
        "detected": _share(programs, lambda r: bool(r["codes"])),
        "top finding accepted": _share(programs, accepted),
        "true cause on top": _share(programs, lambda r: r["codes"][:1] == [_item(r).cause]),
        "repaired programs without an alarm": _share(_kind(well, Program), silent),
        "loops named": _share(loops, accepted),
        "healthy loops silent": _share(_kind(well, Loop), silent),
    }


def accepted(row: Row) -> bool:
    """The first alarm of a program, or one of a loop's, sends the author to the right line."""
    codes = row["codes"] if isinstance(_item(row), Loop) else row["codes"][:1]
    return bool(_item(row).accepted & set(codes))


def silent(row: Row) -> bool:
    """No alarm and no crash."""
    return not row["codes"] and not row["error"]


def by_cause(rows: list[Row]) -> dict[str, tuple[int, int, int]]:
    """For each true cause: rows, those whose answer is accepted, and alarms once repaired."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        count = counts[_item(row).cause]
        if row["case"]["repaired"]:
            count[2] += not silent(row)
        else:
            count[0] += 1
            count[1] += accepted(row)
    return {cause: (a, b, c) for cause, (a, b, c) in sorted(counts.items())}


def table(rows: list[Row], half: str) -> str:
    """Two tables in Markdown: the figures with their targets, and the answers by cause."""
    lines = [f"| {half} programs | measured | target |", "|---|---|---|"]
    for name, value in figures(rows).items():
        lines.append(f"| {name} | {value:.1%} | {TARGETS[name]} |")
    lines += ["", "| true cause | named | alarms once repaired |", "|---|---|---|"]
    for cause, (count, named, alarms) in by_cause(rows).items():
        lines.append(f"| `{cause}` | {named} of {count} | {alarms} |")
    return "\n".join(lines)


def misses(rows: list[Row]) -> list[str]:
    """A line for each wrong answer: what was said, and what is true."""
    lines = []
    for row in rows:
        repaired = row["case"]["repaired"]
        if silent(row) if repaired else accepted(row):
            continue
        said = row["error"] or ", ".join(row["codes"]) or "nothing"
        wanted = "nothing" if repaired else " or ".join(sorted(_item(row).accepted))
        lines.append(f"{row['id']}, seed {row['seed']}: {said}; expected {wanted}")
    return lines


def _item(row: Row) -> Program | Loop:
    return row["case"]["item"]


def _kind(rows: list[Row], kind: type) -> list[Row]:
    return [r for r in rows if isinstance(_item(r), kind)]


def _share(rows: list[Row], holds: Callable[[Row], bool]) -> float:
    return sum(map(holds, rows)) / len(rows) if rows else float("nan")
