"""Claims of `diagnose`, `cure` and `watch`, on labelled programs: python benchmarks/diagnosis.py

The programs come from the folder given by --programs or $TIKHON_BENCHMARK_DATA: a file
`faulty_programs.json` there, and its runner `faulty_programs.py` there or in `../tools`. Each cell
(program x seed) is one JSON line in --journal; a second start goes on where the first one ended.
The part `price` compares `diagnose` with training.
The part `drawn` needs no file: `drawn_programs.py` draws programs of other kinds with --draw.
The part `programs` asks about programs and loops from public reports, with their repaired twins:
--half frozen, developed, fresh, third, fourth, fifth, sixth, seventh or eighth, a folder of
`benchmarks/programs`; --result keeps its figures as JSON. The part `repairs` cures the faulty
ones, runs each patch in full and compares it with the twin.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import drawn_programs
from programs import exam, form
from rival_rules import RIVALS

from tikhon.cures import cure
from tikhon.diagnosis import LABELS, diagnose
from tikhon.monitoring import watch


def programs(folder: str | Path | None) -> tuple[Any, list[dict[str, Any]]] | None:
    """(runner module, cases), or None where the programs are absent."""
    if folder is None:
        return None
    base = Path(folder)
    cases = base / "faulty_programs.json"
    places = (base / "faulty_programs.py", base.parent / "tools" / "faulty_programs.py")
    runner = next((p for p in places if p.exists()), None)
    if not cases.exists() or runner is None:
        return None
    spec = importlib.util.spec_from_file_location("faulty_programs", runner)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faulty_programs"] = module
    spec.loader.exec_module(module)
    found = json.loads(cases.read_text(encoding="utf-8"))
    return module, found["cases"] if isinstance(found, dict) else found


def arguments(program: Any) -> dict[str, Any]:
    """The keyword arguments that `diagnose` and `cure` share."""
    return {
        "optimizer": program.optimizer,
        "valid": program.valid,
        "batch_size": program.batch_size,
        "penalty": program.penalty,
        "clip": program.clip,
    }


def diagnose_cell(runner: Any, case: dict[str, Any], seed: int, steps: int | None) -> dict:
    """Labels of tikhon and of the rivals for one program and seed."""
    program = runner.load(case, seed)
    began = time.process_time()
    found = diagnose(
        program.model, program.train, program.loss, seed=seed,
        steps=program.steps if steps is None else steps, **arguments(program),
    )  # fmt: skip
    seconds = time.process_time() - began
    expected = set(case["expected"])
    where = [w for f in found.findings if f.code in expected for w in f.where]
    labels = {"tikhon": sorted(found.labels & set(LABELS))}
    labels |= {name: sorted(rule(found.record)) for name, rule in RIVALS.items()}
    return {"labels": labels, "where": where, "seconds": seconds}


def cure_cell(runner: Any, case: dict[str, Any], seed: int, budget: float) -> dict:
    """Whether a cure was confirmed, and how much of the gap to the given cure it closes."""
    program = runner.load(case, seed)
    began = time.process_time()
    found = cure(
        program.model, program.train, program.loss, seed=seed, budget=f"{budget:g}s",
        steps=min(program.steps, 300), **arguments(program),
    )  # fmt: skip
    seconds = time.process_time() - began
    model, _ = found.train(program.steps, seed=seed)
    treated = judge(program, model)
    plain = runner.run(runner.load(case, seed), seed=seed)
    given = runner.run(runner.load(runner.with_cure(case), seed), seed=seed)
    closed = closure(plain, given, treated, "overfitting" in case["expected"], program.task)
    name = found.treatment.name if found.treatment else None
    return {"confirmed": found.confirmed, "treatment": name, "closed": closed, "seconds": seconds}


def judge(program: Any, model: nn.Module) -> tuple[float, ...]:
    """(train loss, train metric, valid loss, valid metric), as the runner reports them."""
    model.eval()
    rows = []
    with torch.no_grad():
        for x, y in (program.train, program.valid):
            output = model(x)
            rows += [float(program.loss(output, y)), program.metric(output, y)]
    return tuple(rows)


def closure(
    plain: tuple[float, ...], given: tuple[float, ...], treated: tuple[float, ...], over: bool,
    task: str,
) -> float:  # fmt: skip
    """Share of the gap between the faulty run and the given cure that is closed.

    Validation loss against overfitting; else the training metric, or the validation metric where
    the training metric has no gap. A run that blew up counts as the worst metric.
    """
    if over:
        start, goal, reached = plain[2], given[2], treated[2]
    else:
        place = 1 if abs(_known(given[1]) - _known(plain[1])) >= 0.05 else 3
        floor = 0.0 if task == "cls" else -1.0
        start, goal, reached = (max(floor, _known(r[place])) for r in (plain, given, treated))
    return (reached - start) / (goal - start) if goal != start else 1.0


def _known(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def named_layers(where: list[str]) -> set[int]:
    """Positions in a Sequential."""
    heads = (w.split(".")[0] for w in where)
    return {int(h) for h in heads if h.isdigit()}


def accuracy(rows: list[dict[str, Any]], who: str) -> dict[str, float]:
    """Found, false alarms, precision and places over (case, cell) rows."""
    found = faulty = alarms = healthy = good = given = placed = places = 0
    for row in rows:
        case, labels = row["case"], set(row["labels"][who])
        expected = set(case["expected"])
        if expected == {"healthy"}:
            healthy += 1
            alarms += bool(labels)
            continue
        faulty += 1
        found += bool(labels & expected)
        given += len(labels)
        good += len(labels & (expected | set(case["also"])))
        if case.get("where") is not None:
            places += 1
            named = named_layers(row["where"])
            # naming everything is naming nothing: two positions more than the culprits at most
            near = len(named) <= len(case["where"]) + 2
            placed += bool(named & set(case["where"])) and near
    return {
        "found": found / max(faulty, 1),
        "false alarms": alarms / max(healthy, 1),
        "precision": good / max(given, 1),
        "culprit": placed / places if places else math.nan,
    }


def watch_ratios(rounds: int, steps: int) -> dict[str, float]:
    """CPU time of a watched over a plain loop: interleaved A-B-B-A, median of rounds."""
    image = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 256, 10),
    )  # fmt: skip
    block = nn.Sequential(
        nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True), nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )  # fmt: skip
    mlp = nn.Sequential(
        *[m for _ in range(6) for m in (nn.Linear(512, 512), nn.ReLU())], nn.Linear(512, 10)
    )
    models = {
        "MLP 6x512, batch 128": (mlp, torch.randn(128, 512)),
        "ConvNet 2x32, batch 32": (image, torch.randn(32, 3, 16, 16)),
        "transformer block, batch 32": (block, torch.randn(32, 32, 64)),
    }
    return {name: _ratio(*pair, rounds, steps) for name, pair in models.items()}


def _ratio(model: nn.Module, x: torch.Tensor, rounds: int, steps: int) -> float:
    y = torch.randint(10, (len(x),))
    engine = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loop() -> float:
        began = time.process_time()
        for _ in range(steps):
            engine.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            engine.step()
        return time.process_time() - began

    def watched() -> float:
        with watch(model, engine, every=50):
            return loop()

    loop()
    ratios = []
    for _ in range(rounds):
        a, b, c, d = loop(), watched(), watched(), loop()
        ratios.append((b + c) / (a + d))
    return statistics.median(ratios)


def price(noise: float, steps: int = 120) -> tuple[float, list[str]]:
    """CPU time of `diagnose` over that of training as many steps, of a ConvNet; control runs.

    Pictures of ten classes that lie in noise: with much of it control runs are asked for.
    """
    torch.manual_seed(0)
    y = torch.randint(10, (2000,))
    x = torch.randn(10, 3, 32, 32)[y] + noise * torch.randn(2000, 3, 32, 32)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    start = {k: v.clone() for k, v in model.state_dict().items()}
    engine = torch.optim.Adam(model.parameters(), lr=1e-3)
    began = time.process_time()
    for _ in range(steps):
        rows = torch.randint(1500, (64,))
        engine.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        engine.step()
    trained = time.process_time() - began
    model.load_state_dict(start)
    began = time.process_time()
    found = diagnose(
        model, (x[:1500], y[:1500]), nn.CrossEntropyLoss(), valid=(x[1500:], y[1500:]),
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), steps=steps,
    )  # fmt: skip
    names = [k.removesuffix("_loss") for k in found.record.reference if k.endswith("_loss")]
    return (time.process_time() - began) / trained, names


def cells(
    journal: Path, part: str, todo: list[tuple[dict[str, Any], int]], make: Callable[..., dict]
) -> list[dict[str, Any]]:
    """The rows of a part: from the journal where they are, computed and appended otherwise."""
    known = {}
    if journal.exists():
        for line in journal.read_text().splitlines():
            row = json.loads(line)
            known[row["part"], row["id"], row["seed"]] = row
    rows = []
    for case, seed in todo:
        key = (part, case["id"], seed)
        if key not in known:
            known[key] = {"part": part, "id": case["id"], "seed": seed, **make(case, seed)}
            with journal.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(f"  {part} {case['id']} seed {seed}", file=sys.stderr, flush=True)
        rows.append({**known[key], "case": case})
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", default=os.environ.get("TIKHON_BENCHMARK_DATA"))
    parser.add_argument("--journal", type=Path, default=Path("diagnosis.jsonl"))
    parser.add_argument("--parts", default="diagnose,cure,watch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the dry run; the program's own if not given")
    parser.add_argument("--cure-seeds", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--only", default="", help="programs whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draw", type=int, default=1, help="seed of the drawn programs")
    parser.add_argument("--half", default="frozen", help="folder of benchmarks/programs")
    parser.add_argument("--each", type=int, default=1, help="every so many programs, for repairs")
    parser.add_argument("--first", type=int, default=0, help="place of the first, for repairs")
    parser.add_argument("--result", type=Path, help="file for the figures of the part programs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = options.parts.split(",")
    if "watch" in parts:
        print("watch, CPU time of a watched over a plain loop (target 1.01)")
        for name, ratio in watch_ratios(options.rounds, 100).items():
            print(f"  {name:30} {ratio:.3f}", flush=True)
    if "price" in parts:
        print("diagnose, CPU time over that of training as many steps (target 4)")
        for noise in (1.0, 6.0):
            ratio, names = price(noise)
            told = ", ".join(names) or "none"
            print(f"  ConvNet, control runs: {told:20} {ratio:.2f}", flush=True)
    if "drawn" in parts:
        print_drawn(options)
    if "programs" in parts:
        print_exam(options)
    if "repairs" in parts:
        print_repairs(options)
    if not {"diagnose", "cure"} & set(parts):
        return
    found = programs(options.programs)
    if found is None:
        print("no programs: give --programs FOLDER or set TIKHON_BENCHMARK_DATA")
        return
    runner, cases = found
    cases = [c for c in cases if options.only in c["id"]]
    if "diagnose" in parts:
        print_diagnosis(runner, cases, options)
    if "cure" in parts:
        print_cures(runner, cases, options)


def print_diagnosis(runner: Any, cases: list[dict[str, Any]], options: Any) -> None:
    """Accuracy of tikhon beside its rivals."""
    todo = [(case, seed) for seed in range(options.seeds) for case in cases]
    part = "diagnose" if options.steps is None else f"diagnose-{options.steps}"
    rows = cells(options.journal, part, todo,
                 lambda c, s: diagnose_cell(runner, c, s, options.steps))  # fmt: skip
    print_accuracy(rows, f"diagnose, {len(cases)} programs x {options.seeds} seeds")


class Drawn:
    """The runner of drawn programs."""

    @staticmethod
    def load(case: dict[str, Any], seed: int) -> drawn_programs.Program:
        return drawn_programs.load(case["program"], seed)


def print_drawn(options: Any) -> None:
    """Accuracy on the drawn programs that behave as their labels say."""
    drawn = [
        {"id": c.id, "expected": c.expected, "also": c.also, "program": c}
        for c in drawn_programs.draw(options.draw)
    ]
    truth = cells(options.journal, "truth", [(case, 0) for case in drawn],
                  lambda c, s: {"holds": drawn_programs.holds(c["program"])})  # fmt: skip
    kept = [row["case"] for row in truth if row["holds"]]
    sick = sum(case["expected"] != ("healthy",) for case in kept)
    rows = cells(options.journal, "drawn",
                 [(case, seed) for seed in range(options.seeds) for case in kept],
                 lambda c, s: diagnose_cell(Drawn, c, s, options.steps))  # fmt: skip
    print_accuracy(rows, f"drawn, {sick} faulty and {len(kept) - sick} healthy programs of "
                         f"{len(drawn)} x {options.seeds} seeds")  # fmt: skip


def print_exam(options: Any) -> None:
    """What tikhon says of programs and loops from public reports."""
    items = [i for group in form.load(options.half) for i in group if options.only in i.name]
    todo = [(case, seed) for case in exam.cases(items) for seed in range(options.seeds)]
    part = f"programs-{options.half}" + ("" if options.steps is None else f"-{options.steps}")
    rows = cells(options.journal, part, todo, lambda c, s: exam.ask(c, s, options.steps))
    print(exam.table(rows, options.half), *exam.misses(rows), sep="\n")
    if options.result is not None:
        said = {"half": options.half, "seeds": options.seeds, "figures": exam.figures(rows)}
        said |= {"by_cause": exam.by_cause(rows), "misses": exam.misses(rows)}
        options.result.write_text(json.dumps(said, indent=1) + "\n")


def print_repairs(options: Any) -> None:
    """Share of the programs from public reports that the printed patch repairs."""
    items = [p for p in form.load(options.half)[0] if options.only in p.name]
    items = items[options.first :: options.each]
    todo = [(case, s) for case in exam.cases(items) if not case["repaired"]
            for s in range(options.cure_seeds)]  # fmt: skip
    rows = cells(options.journal, f"repairs-{options.half}", todo,
                 lambda c, s: exam.repaired(c, s, options.budget))  # fmt: skip
    good = [row for row in rows if row["gain"] >= 0.8]
    patched = [row for row in rows if row["treatment"]]
    ran = sum(not row["error"] for row in patched)
    print(f"{options.half}: {len(good)} of {len(rows)} runs gain 80% of their twin (target 85%)")
    print(f"{ran} of {len(patched)} patches run where nothing but the program is known")
    for row in rows:
        told = row["error"] or row["treatment"] or "no cure"
        print(f"  {row['id']} seed {row['seed']}: {told}, gain {row['gain']:.2f}")


def print_accuracy(rows: list[dict[str, Any]], title: str) -> None:
    """A line for tikhon and for each rival, then what tikhon missed."""
    price = statistics.median(r["seconds"] for r in rows)
    print(f"{title}, {price:.1f} CPU seconds each")
    columns = ("found", "false alarms", "precision", "culprit")
    print(f"  {'':20}" + "".join(f"{c:>14}" for c in columns))
    goals = (">= 97%", "<= 2%", ">= 93%", ">= 90%")
    print(f"  {'target':20}" + "".join(f"{goal:>14}" for goal in goals))
    for who in ("tikhon", *RIVALS):
        values = accuracy(rows, who)
        values["culprit"] = values["culprit"] if who == "tikhon" else math.nan
        shown = ["-" if math.isnan(values[c]) else f"{values[c]:.1%}" for c in columns]
        print(f"  {who:20}" + "".join(f"{text:>14}" for text in shown))
    for row in rows:
        expected, labels = set(row["case"]["expected"]), set(row["labels"]["tikhon"])
        if bool(labels) if expected == {"healthy"} else not labels & expected:
            said, wanted = ", ".join(sorted(labels)) or "nothing", ", ".join(sorted(expected))
            print(f"  {row['id']} seed {row['seed']}: {said}, expected {wanted}")


def print_cures(runner: Any, cases: list[dict[str, Any]], options: Any) -> None:
    """Share of confirmed cures that close half of the gap, and their price."""
    sick = [c for c in cases if c["expected"] != ["healthy"]]
    todo = [(case, seed) for case in sick for seed in range(options.cure_seeds)]
    rows = cells(options.journal, "cure", todo,
                 lambda c, s: cure_cell(runner, c, s, options.budget))  # fmt: skip
    good = [r for r in rows if r["confirmed"] and r["closed"] >= 0.5]
    seconds = [r["seconds"] for r in rows]
    print(
        f"cure, {len(rows)} faulty programs: {len(good) / max(len(rows), 1):.1%} confirmed and at "
        f"least half of the gap to the given cure closed (target 90%); CPU seconds: median "
        f"{statistics.median(seconds):.0f}, largest {max(seconds):.0f}"
    )
    for row in rows:
        if row not in good:
            print(
                f"  {row['id']} seed {row['seed']}: {row['treatment']}, closed {row['closed']:.2f}"
            )


if __name__ == "__main__":
    main()
