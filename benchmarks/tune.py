"""What a population saves, and how good the choice is.

  speed    microseconds per step of one configuration, of perceptrons and of ConvNets by the side
           of their images: population against a tight PyTorch loop
           (tensors in memory, fused AdamW) and the habitual one (DataLoader, .item()), interleaved
           A-B-C-C-B-A, one thread, CPU time. Equivalence is checked first: after 50 steps every
           member equals its separate run to 1e-5, otherwise nothing is printed (in double
           precision: Adam turns the rounding of a gradient near zero into a whole step).
  target   CPU time until the validation loss of an 8x8 grid (weight decay x dropout, 60 epochs of
           separate runs) is reached. The grid's runs are trained as verified population members
           and charged at the measured cost of the tight or habitual loop; Optuna's TPE walks the
           same table. `informed` is run for real: 16 trials on the grid's ranges, the tight loop,
           safe pruning. `ours` searches the grid's ranges, `ours_default_space` its own.
  quality  test log-loss, or RMSE, within --seconds of CPU time beside other tools (`rivals.py`),
           which run at their defaults or are tuned within the same time (`tuned_trees.py`);
           `--tools` and `--sets` take parts of it, and `--sets` adds numbers to predict and the
           sets of `package_sets.py`

One JSON a cell in --output; a run continues where it stopped. The data sets (`NAME.npz` with X, y)
lie in --data.

    python benchmarks/tune.py --quick      # minutes
    python benchmarks/tune.py              # hours
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import torch
import torch.nn.functional as F

import tikhon as tk
from tikhon.models.convnet import ConvNet
from tikhon.models.mlp import MLP
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses
from tikhon.population.population import Population
from tikhon.tuning.preparation import make_job
from tikhon.tuning.runners import SIZES, PopulationRunner, SearchJob, microseconds, populate
from tikhon.tuning.searches import Grid, SpaceFilling
from tikhon.tuning.trials import History

DATA = Path(os.environ.get("TIKHON_BENCHMARK_DATA", Path(__file__).parents[2] / "shared/data"))
SETS = ("german", "breast_cancer", "vehicle", "segment", "digits", "sonar", "phoneme", "splice",
        "satimage", "spambase")  # fmt: skip
MORE = ("contraceptive", "wa_churn")  # beside SETS in the quality part
WIDTHS = {"2k": 24, "7k": 64, "26k": 140, "79k": 260, "270k": 500, "1M": 970}
SIDES = {"conv8x8": 8, "conv16x16": 16, "conv28x28": 28}  # images of one channel, 10 classes
BATCH, EPOCHS = 32, 60
Make = Callable[[torch.dtype], torch.nn.Module]
NEAR = 1.01  # a goal counts as reached within 1 %
GRID = tk.Space(weight_decay=tk.Log(1e-3, 10.0), dropout=tk.Uniform(0.0, 0.7), lr=3e-3)


def split(name: str, seed: int) -> tuple[torch.Tensor, ...]:
    """train, valid, test: 56, 14, 30 %; scaled by the training rows, as numbers to predict are."""
    from sklearn.model_selection import train_test_split

    data = np.load(DATA / f"{name}.npz")
    classes = "classes" in data
    x, y = data["X"].astype(np.float32), data["y"].astype(np.int64 if classes else np.float32)
    rows = np.arange(len(y))
    like = y if classes else None
    rows, test = train_test_split(rows, test_size=0.3, stratify=like, random_state=seed)
    like = y[rows] if classes else None
    rows, valid = train_test_split(rows, test_size=0.2, stratify=like, random_state=seed)
    (xa, xv, xt), (ya, yv, yt) = ([part[k] for k in (rows, valid, test)] for part in (x, y))
    if not classes:
        center, unit = ya.mean(), ya.std()
        ya, yv, yt = ((part - center) / unit for part in (ya, yv, yt))
    mean, spread = xa.mean(0), xa.std(0)
    scale = np.where(spread > 1e-6, spread, 1)  # a pixel that is constant here may vary in test
    parts = [(xa - mean) / scale, ya, (xv - mean) / scale, yv, (xt - mean) / scale, yt]
    return tuple(torch.from_numpy(np.ascontiguousarray(p)) for p in parts)


def perceptron(features: int, width: int, classes: int) -> Make:
    return _seeded(lambda: MLP([features, width, width, classes]))


def _seeded(build: Callable[[], torch.nn.Module]) -> Make:
    def make(dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        return build().to(dtype)

    return make


def configs(count: int) -> list[dict[str, Any]]:
    return [tk.Space(lr=tk.Log(1e-3, 1e-2), weight_decay=tk.Log(1e-2, 1.0)).at(
        [k / max(count - 1, 1), 0.5]) for k in range(count)]  # fmt: skip


def tight(make: Make, x, y, config, steps: int):
    """The fastest plain loop: one model, tensors in memory, fused AdamW, cosine."""
    model = make(x.dtype)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config["weight_decay"]},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=config["lr"], fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def habitual(make: Make, x, y, config, steps: int):
    """DataLoader, default AdamW, .item() for the log."""
    from torch.utils.data import DataLoader, TensorDataset

    model = make(x.dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
    )
    rows = TensorDataset(x.repeat(steps, *[1] * (x.ndim - 1)), y.repeat(steps))
    total = 0.0
    for a, b in DataLoader(rows, batch_size=len(x), shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(a), b)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return model


def population(make: Make, x, y, members: list, steps: int):
    found = Population(
        [make(x.dtype) for _ in members], Hyperparameters.of(members),
        objective=RowLosses("cross_entropy"), example=x[:2], steps=steps,
    )  # fmt: skip
    for step in range(steps):
        found.step(x, y, None, step, seed=step)
    return found


def by_chunk(job: SearchJob, members: list[dict[str, Any]]) -> tuple[int, dict[int, float]]:
    """The chunk with the fewest microseconds per step of a member (what `choose_chunk` is held
    to), and the table; sizes rise until one is worse than half of it.
    """
    table: dict[int, float] = {}
    microseconds(job, populate(job, members[:1]), repeats=1)  # torch loads its parts on first use
    for size in (s for s in SIZES if s <= len(members)):
        table[size] = microseconds(job, populate(job, members[:size])) / size
        if size > 2 * min(table, key=table.__getitem__):
            break
    return min(table, key=table.__getitem__), table


def costs(make: Make, shape: tuple[int, ...], classes: int, steps: int = 240) -> dict[str, Any]:
    """Microseconds per step of one configuration by the three ways, interleaved."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *shape, generator=generator)
    y = torch.randint(classes, (BATCH,), generator=generator)
    members = configs(4)
    together = population(make, x.double(), y, members, 50)
    gap = 0.0
    for k, config in enumerate(members):
        alone = tight(make, x.double(), y, config, 50).state_dict()
        state = together.state_dict_of(k)
        gap = max(gap, *(float((state[n] - v).abs().max()) for n, v in alone.items()))
    if gap > 1e-5:
        raise SystemExit(f"members differ from separate runs by {gap}: no ratio is printed")
    job = SearchJob(
        lambda config: make(torch.float32), x, y, RowLosses("cross_entropy"),
        epochs=steps, batch_size=BATCH,
    )  # fmt: skip
    chunk, table = by_chunk(job, configs(16))
    times: dict[str, list[float]] = {"population": [], "tight": [], "habitual": []}

    def timed(label: str, run: Callable[[], Any], count: int) -> None:
        begin = time.process_time()
        run()
        times[label].append((time.process_time() - begin) / count / steps * 1e6)

    one, many = configs(1)[0], configs(chunk)
    blocks = [
        ("population", lambda: population(make, x, y, many, steps), chunk),
        ("tight", lambda: tight(make, x, y, one, steps), 1),
        ("habitual", lambda: habitual(make, x, y, one, steps), 1),
    ]
    for _ in range(3):
        for block in (*blocks, *reversed(blocks)):
            timed(*block)
    medians = {label: float(np.median(values)) for label, values in times.items()}
    parameters = sum(p.numel() for p in make(x.dtype).parameters())
    return {"chunk": chunk, "gap": gap, "parameters": parameters, "microseconds": medians,
            "by_chunk": {str(k): v for k, v in table.items()}}  # fmt: skip


def target(name: str, width: int, seed: int) -> dict[str, Any]:
    xa, ya, xv, yv, xt, yt = split(name, seed)
    features, classes = xa.shape[1], int(ya.max()) + 1

    def build() -> MLP:
        return MLP([features, width, width, classes])

    price = costs(perceptron(features, width, classes), (features,), classes)
    given = ((xv, yv), "cross_entropy", 0, EPOCHS, BATCH, torch.optim.AdamW, "cpu", seed)
    job = make_job(lambda config: build(), xa, ya, *given)
    steps = job.epochs * job.steps_per_epoch
    grid = Grid(GRID, budget=EPOCHS, points=8)
    table = History(PopulationRunner(job, 16).run(grid.next(History())))
    goal = min(o.score for o in table if not o.failed)

    def test(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(xt), yt))

    def ours(space: tk.Space | None) -> dict[str, Any]:
        seen: list[tuple[float, float]] = []

        def note(event: dict[str, Any]) -> None:
            if event["event"] == "outcomes":
                best = min((o.score for o in event["outcomes"] if not o.failed), default=np.inf)
                seen.append((time.process_time() - began, best))

        began = time.process_time()
        result = tk.tune(build, (xa, ya), valid=(xv, yv), budget="16runs", epochs=EPOCHS,
                         batch_size=BATCH, seed=seed, space=space, refit=False,
                         on_event=note)  # fmt: skip
        spent = time.process_time() - began
        reached = [seconds for seconds, best in seen if best <= goal * NEAR]
        return {"reached": bool(reached), "cpu": reached[0] if reached else spent, "spent": spent,
                "best": min(b for _, b in seen), "test": test(result.model),
                "test_average": test(result.average)}  # fmt: skip

    alike = tk.Space(dropout=GRID["dropout"], lr=GRID["lr"], weight_decay="auto")
    run = {kind: price["microseconds"][kind] * steps * 1e-6 for kind in ("tight", "habitual")}
    walks = [tpe_walk(table, goal, s) for s in range(5)]
    best = min((o for o in table if not o.failed), key=lambda o: o.score)
    alone = PopulationRunner(job, 1)
    alone.run([best.trial])
    from tikhon.tuning.tune import _model

    chosen = _model(job, best.trial.config, alone.states[best.trial.id], 0, None)
    peers = [informed(xa, ya, xv, yv, width, goal, s) for s in (seed, seed + 100)]
    return {
        "goal": goal, "ours": ours(alike), "ours_default_space": ours(None),
        "separate_tight": 64 * run["tight"],
        "tpe_habitual": float(np.median(walks)) * run["habitual"],
        "informed": peers, "price": price, "test_grid": test(chosen),
    }  # fmt: skip


def informed(xa, ya, xv, yv, width: int, goal: float, seed: int) -> dict[str, Any]:
    """16 space-filling trials on the grid's ranges, one after another in the tight loop.

    All train a quarter of the length, the best four to the end: pruning that is safe here.
    """
    began = time.process_time()
    configs = SpaceFilling(GRID, count=16, seed=seed).configs()
    steps = EPOCHS * max(1, len(xa) // BATCH)
    runs = [separate(xa, ya, (width, width), config, steps, seed, BATCH) for config in configs]
    found = [np.inf] * len(runs)
    for upto, count in ((steps // 4, len(runs)), (steps, 4)):
        for k in np.argsort(found)[:count]:
            model = runs[k](upto).eval()
            with torch.no_grad():
                found[k] = float(F.cross_entropy(model(xv), yv))
            model.train()
            if upto == steps and found[k] <= goal * NEAR:
                return {"reached": True, "cpu": time.process_time() - began}
    return {"reached": False, "cpu": time.process_time() - began}


def tpe_walk(table: History, goal: float, seed: int) -> int:
    """Trials that TPE needs on the grid's table until it meets the goal (at most 64)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    decays = sorted({o.trial.config["weight_decay"] for o in table})
    rates = sorted({o.trial.config["dropout"] for o in table})
    scores = {(o.trial.config["weight_decay"], o.trial.config["dropout"]): o.score for o in table}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for count in range(1, 65):
        trial = study.ask()
        decay = decays[trial.suggest_int("decay", 0, len(decays) - 1)]
        rate = rates[trial.suggest_int("rate", 0, len(rates) - 1)]
        score = scores[decay, rate]
        study.tell(trial, score if np.isfinite(score) else 1e6)
        if score <= goal * NEAR:
            return count
    return 64


def loss_of(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Log-loss of classes, mean squared error of numbers."""
    return F.mse_loss(out[:, 0], y) if y.is_floating_point() else F.cross_entropy(out, y)


def separate(xa, ya, hidden: tuple[int, ...], config, steps: int, seed: int, batch: int):
    """A training of the tight loop as a function that continues it: (upto step) -> model.

    Shuffled batches from memory, fused AdamW, cosine over `steps`.
    """
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise((xa.shape[1], *hidden)):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Dropout(config["dropout"])]
    outputs = 1 if ya.is_floating_point() else int(ya.max()) + 1
    model = torch.nn.Sequential(*layers, torch.nn.Linear(hidden[-1], outputs))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"], fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    per_epoch, done, order = max(1, len(xa) // batch), 0, torch.randperm(len(xa))

    def advance(upto: int) -> torch.nn.Module:
        nonlocal done, order
        for step in range(done, upto):
            if step % per_epoch == 0:
                order = torch.randperm(len(xa))
            rows = order[step % per_epoch * batch :][:batch]
            optimizer.zero_grad()
            loss_of(model(xa[rows]), ya[rows]).backward()
            optimizer.step()
            schedule.step()
        done = upto
        return model

    return advance


def peers_of(cell: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of each peer; an informed one that missed the goal counts what it spent."""
    informed = float(np.mean([peer["cpu"] for peer in cell["informed"]]))
    return {"separate_tight": cell["separate_tight"], "tpe_habitual": cell["tpe_habitual"],
            "informed": informed}  # fmt: skip


def show(cells: dict[str, Any], wanted: int) -> None:
    print(f"coverage: {len(cells)} of {wanted} cells")
    for key, cell in cells.items():
        if key.startswith("speed"):
            micro = cell["microseconds"]
            print(f"{key}: {cell['parameters']:,} parameters, chunk {cell['chunk']}, "
                  f"{micro['population']:.0f} us a config-step; tight x"
                  f"{micro['tight'] / micro['population']:.2f}, habitual x"
                  f"{micro['habitual'] / micro['population']:.2f}; "
                  f"largest difference {cell['gap']:.1e}")  # fmt: skip
    targets = {k: c for k, c in cells.items() if k.startswith("target")}
    for key, c in targets.items():
        for label in ("ours", "ours_default_space"):
            own = c[label]
            ratios = [f"{peer} x{cpu / own['cpu']:.1f}" for peer, cpu in peers_of(c).items()]
            print(f"{key} {label}: {'reached' if own['reached'] else 'NOT reached'} in "
                  f"{own['cpu']:.1f} CPU-s (all {own['spent']:.1f}); {', '.join(ratios)}; "
                  f"test {own['test']:.3f}, average {own['test_average']:.3f}, "
                  f"grid {c['test_grid']:.3f}")  # fmt: skip
    if targets:
        for label in ("ours", "ours_default_space"):
            for peer in ("separate_tight", "tpe_habitual", "informed"):
                ratios = [peers_of(c)[peer] / c[label]["cpu"] for c in targets.values()]
                print(f"{label}, median over {len(ratios)}: {peer} x{np.median(ratios):.1f} "
                      f"(worst x{min(ratios):.1f})")  # fmt: skip
            found = [c[label]["reached"] for c in targets.values()]
            print(f"{label}: reached {sum(found)} of {len(found)} goals")
        met = [peer["reached"] for c in targets.values() for peer in c["informed"]]
        print(f"informed: reached {sum(met)} of {len(met)} goals")


def work_of(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every cell that was asked for, by the name of its file."""
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    for label in options.widths or (("2k", "7k", "26k") if options.quick else WIDTHS):
        if label in WIDTHS:
            work[f"speed-{label}"] = lambda w=WIDTHS[label]: costs(perceptron(40, w, 6), (40,), 6)
    for label in options.widths or (() if options.quick else SIDES):
        if label in SIDES:
            conv = _seeded(lambda: ConvNet(1, 10))
            work[f"speed-{label}"] = lambda s=SIDES[label], m=conv: costs(m, (1, s, s), 10, 60)
    for label in options.widths or (("7k",) if options.quick else ("2k", "7k", "26k")):
        if label not in WIDTHS:
            continue
        for name in options.sets or (SETS[:3] if options.quick else SETS):
            work[f"target-{name}-{label}"] = lambda n=name, w=WIDTHS[label]: target(n, w, 0)
    for seed in range(*options.splits):
        for name in options.sets or (SETS[:3] if options.quick else (*SETS, *MORE)):
            for tool in options.tools or rivals.TOOLS:
                limit = f"-{options.seconds:g}s" if tool in rivals.ANYTIME else ""
                work[f"quality-{name}-{seed}-{tool}{limit}"] = lambda t=tool, n=name, s=seed: (
                    rivals.run(t, split(n, s), s, options.seconds)
                )
    return {k: run for k, run in work.items() if not options.only or k.startswith(options.only)}


def main() -> None:
    global DATA
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cells")
    parser.add_argument("--only", choices=("speed", "target", "quality"), default=None)
    parser.add_argument("--seconds", type=float, help="limit of a quality cell (60; quick: 15)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data sets")
    parser.add_argument("--sets", type=lambda t: t.split(","), help="instead of all")
    parser.add_argument("--tools", type=lambda t: t.split(","), help="of quality, instead of all")
    parser.add_argument("--widths", type=lambda t: t.split(","), help="instead of all")
    parser.add_argument("--splits", type=int, nargs=2, help="first, last + 1 (0 3; quick: 0 1)")
    parser.add_argument("--until", type=float, default=np.inf, help="start no cell after so long")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/tune"))
    options = parser.parse_args()
    options.seconds = options.seconds or (15.0 if options.quick else 60.0)
    options.splits = options.splits or ((0, 1) if options.quick else (0, 3))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    DATA, work, began = options.data, work_of(options), time.monotonic()
    for key, run in work.items():
        file = options.output / f"{key}.json"
        if not file.exists() and time.monotonic() - began < options.until:
            file.write_text(json.dumps(run()))
            print("done", key, flush=True)
    cells = {
        key: json.loads(file.read_text())
        for key in work
        if (file := options.output / f"{key}.json").exists()
    }
    show(cells, len(work))
    compared: dict[tuple[str, int], dict[str, Any]] = {}
    for key in (key for key in cells if key.startswith("quality")):
        _, name, seed, _ = key.split("-", 3)
        compared.setdefault((name, int(seed)), {}).update(cells[key])
    compared = {key: cell for key, cell in compared.items() if "tikhon" in cell}
    if compared:
        rivals.show(compared, options.seconds)


if __name__ == "__main__":
    main()
