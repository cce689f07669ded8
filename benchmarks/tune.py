"""What a population saves, and how good the choice is.

  speed    microseconds per step of one configuration: population against a tight PyTorch loop
           (tensors in memory, fused AdamW) and the habitual one (DataLoader, .item()), interleaved
           A-B-C-C-B-A, one thread, CPU time. Equivalence is checked first: after 50 steps every
           member equals its separate run to 1e-5, otherwise nothing is printed.
  target   CPU time until the validation loss of an 8x8 grid (weight decay x dropout, 60 epochs of
           separate runs) is reached. The grid's runs are trained as verified population members
           and charged at the measured cost of the tight or habitual loop; Optuna's TPE walks the
           same table. `informed` is a peer with 16 trials, the tight loop and safe pruning.
  quality  test log-loss within a time limit beside other tools at their defaults

One JSON a cell in --output; a run continues where it stopped.

    python benchmarks/tune.py --quick      # minutes
    python benchmarks/tune.py              # hours
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tikhon as tk
from tikhon.models.mlp import MLP
from tikhon.tuning.objective import Objective
from tikhon.tuning.population import Population
from tikhon.tuning.preparation import make_job
from tikhon.tuning.runners import Job, PopulationRunner, measure_chunk
from tikhon.tuning.searches import Grid
from tikhon.tuning.settings import Settings
from tikhon.tuning.trials import History

DATA = Path(os.environ.get("TIKHON_BENCHMARK_DATA", Path(__file__).parents[2] / "shared/data"))
SETS = ("german", "breast_cancer", "vehicle", "segment", "digits", "sonar", "phoneme", "splice",
        "satimage", "spambase")  # fmt: skip
WIDTHS = {"2k": 24, "7k": 64, "26k": 140, "79k": 260, "270k": 500, "1M": 970}
BATCH = 32
GRID = tk.Space(weight_decay=tk.Log(1e-3, 10.0), dropout=tk.Uniform(0.0, 0.7), lr=3e-3)


def split(name: str, seed: int) -> tuple[torch.Tensor, ...]:
    """train, valid, test: 56, 14, 30 %; scaled by the training rows."""
    from sklearn.model_selection import train_test_split

    data = np.load(DATA / f"{name}.npz")
    x, y = data["X"].astype(np.float32), data["y"].astype(np.int64)
    xa, xt, ya, yt = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    xa, xv, ya, yv = train_test_split(xa, ya, test_size=0.2, stratify=ya, random_state=seed)
    mean, scale = xa.mean(0), xa.std(0).clip(1e-6)
    parts = [(xa - mean) / scale, ya, (xv - mean) / scale, yv, (xt - mean) / scale, yt]
    return tuple(torch.from_numpy(np.ascontiguousarray(p)) for p in parts)


def network(features: int, width: int, classes: int) -> MLP:
    torch.manual_seed(0)
    return MLP([features, width, width, classes])


def configs(count: int) -> list[dict[str, Any]]:
    return [tk.Space(lr=tk.Log(1e-3, 1e-2), weight_decay=tk.Log(1e-2, 1.0)).at(
        [k / max(count - 1, 1), 0.5]) for k in range(count)]  # fmt: skip


def tight(features: int, width: int, classes: int, x, y, config, steps: int):
    """The fastest plain loop: one model, tensors in memory, fused AdamW, cosine."""
    model = network(features, width, classes)
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


def habitual(features: int, width: int, classes: int, x, y, config, steps: int):
    """DataLoader, default AdamW, .item() for the log."""
    from torch.utils.data import DataLoader, TensorDataset

    model = network(features, width, classes)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
    )
    rows = TensorDataset(x.repeat(steps, 1), y.repeat(steps))
    total = 0.0
    for a, b in DataLoader(rows, batch_size=len(x), shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(a), b)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return model


def population(features: int, width: int, classes: int, x, y, members: list, steps: int):
    found = Population(
        [network(features, width, classes) for _ in members], Settings.of(members),
        objective=Objective("cross_entropy"), example=x[:2], steps=steps,
    )  # fmt: skip
    for step in range(steps):
        found.step(x, y, None, step, seed=step)
    return found


def costs(features: int, width: int, classes: int, steps: int = 60) -> dict[str, Any]:
    """Microseconds per step of one configuration by the three ways, interleaved."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, features, generator=generator)
    y = torch.randint(classes, (BATCH,), generator=generator)
    members = configs(4)
    together = population(features, width, classes, x, y, members, 50)
    gap = 0.0
    for k, config in enumerate(members):
        alone = tight(features, width, classes, x, y, config, 50).state_dict()
        state = together.state_dict_of(k)
        gap = max(gap, *(float((state[n] - v).abs().max()) for n, v in alone.items()))
    if gap > 1e-5:
        raise SystemExit(f"members differ from separate runs by {gap}: no ratio is printed")
    job = Job(
        lambda config: network(features, width, classes), x, y, Objective("cross_entropy"),
        epochs=steps, batch_size=BATCH,
    )  # fmt: skip
    chunk, table, _ = measure_chunk(job, configs(16))
    times: dict[str, list[float]] = {"population": [], "tight": [], "habitual": []}

    def timed(label: str, run: Callable[[], Any], count: int) -> None:
        begin = time.process_time()
        run()
        times[label].append((time.process_time() - begin) / count / steps * 1e6)

    one, many = configs(1)[0], configs(chunk)
    blocks = [
        ("population", lambda: population(features, width, classes, x, y, many, steps), chunk),
        ("tight", lambda: tight(features, width, classes, x, y, one, steps), 1),
        ("habitual", lambda: habitual(features, width, classes, x, y, one, steps), 1),
    ]
    for _ in range(3):
        for block in (*blocks, *reversed(blocks)):
            timed(*block)
    medians = {label: float(np.median(values)) for label, values in times.items()}
    parameters = sum(p.numel() for p in network(features, width, classes).parameters())
    return {"chunk": chunk, "gap": gap, "parameters": parameters, "microseconds": medians,
            "by_chunk": {str(k): v for k, v in table.items()}}  # fmt: skip


def target(name: str, width: int, seed: int) -> dict[str, Any]:
    xa, ya, xv, yv, xt, yt = split(name, seed)
    features, classes = xa.shape[1], int(ya.max()) + 1

    def build() -> MLP:
        return MLP([features, width, width, classes])

    price = costs(features, width, classes)
    given = ((xv, yv), "cross_entropy", 0, 60, BATCH, torch.optim.AdamW, "cpu", seed)
    job = make_job(lambda config: build(), xa, ya, *given)
    steps = job.epochs * job.steps_per_epoch
    table = History(PopulationRunner(job, 16).run(Grid(GRID, budget=60, points=8).next(History())))
    goal = min(o.score for o in table if not o.failed)
    seen: list[tuple[float, float]] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "outcomes":
            best = min((o.score for o in event["outcomes"] if not o.failed), default=np.inf)
            seen.append((time.process_time() - began, best))

    began = time.process_time()
    result = tk.tune(build, (xa, ya), valid=(xv, yv), budget="16runs", epochs=60,
                     batch_size=BATCH, seed=seed, refit=False, on_event=note)  # fmt: skip
    spent = time.process_time() - began
    reached = [seconds for seconds, best in seen if best <= goal * 1.01]
    run = {kind: price["microseconds"][kind] * steps * 1e-6 for kind in ("tight", "habitual")}
    walks = [tpe_walk(table, goal, s) for s in range(5)]

    def test(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(xt), yt))

    best = min((o for o in table if not o.failed), key=lambda o: o.score)
    state = PopulationRunner(job, 1)
    state.run([best.trial])
    from tikhon.tuning.tune import _model

    return {
        "goal": goal, "reached": bool(reached), "ours": reached[0] if reached else spent,
        "spent": spent, "best": min(b for _, b in seen),
        "separate_tight": 64 * run["tight"],
        "tpe_habitual": float(np.median(walks)) * run["habitual"],
        "informed": 16 * run["tight"] * 0.35, "price": price,
        "test_grid": test(_model(job, best.trial.config, state.states[best.trial.id], None)),
        "test_ours": test(result.model), "test_average": test(result.average),
    }  # fmt: skip


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
        if score <= goal * 1.01:
            return count
    return 64


def quality(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Test log-loss of every tool; those without a limit of their own run their defaults."""
    from sklearn.metrics import log_loss

    xa, ya, xv, yv, xt, yt = split(name, seed)
    x, y = torch.cat([xa, xv]), torch.cat([ya, yv])
    classes = int(y.max()) + 1

    def ours() -> dict[str, np.ndarray]:
        found = tk.tune(lambda: MLP([x.shape[1], 64, 64, classes]), (x, y),
                        budget=f"{seconds:g}s", seed=seed)  # fmt: skip
        with torch.no_grad():
            return {
                "tikhon": found.model(xt).softmax(1).numpy(),
                "tikhon average": found.average(xt).softmax(1).numpy(),
            }

    tools: dict[str, Callable[[], Any]] = {
        "scikit-learn MLP + grid": lambda: _grid(seed),
        "LightGBM": lambda: _gbm("lightgbm", "LGBMClassifier", verbose=-1, n_jobs=1),
        "XGBoost": lambda: _gbm("xgboost", "XGBClassifier", n_jobs=1),
        "CatBoost": lambda: _gbm("catboost", "CatBoostClassifier", verbose=0, thread_count=1,
                                 allow_writing_files=False),
    }  # fmt: skip
    began = time.process_time()
    cell: dict[str, Any] = {}
    for label, p in ours().items():
        cell[label] = {"log_loss": log_loss(yt, p), "cpu": time.process_time() - began}
    for label, make in tools.items():
        began = time.process_time()
        model = make().fit(x.numpy(), y.numpy())
        cell[label] = {"log_loss": log_loss(yt, model.predict_proba(xt.numpy())),
                       "cpu": time.process_time() - began}  # fmt: skip
    return cell


def _grid(seed: int) -> Any:
    from sklearn.model_selection import GridSearchCV
    from sklearn.neural_network import MLPClassifier

    grid = {"alpha": [1e-4, 1e-2, 1.0, 10.0]}
    return GridSearchCV(MLPClassifier((64, 64), max_iter=100, random_state=seed), grid, cv=3,
                        scoring="neg_log_loss")  # fmt: skip


def _gbm(module: str, name: str, **options: Any) -> Any:
    import importlib

    return getattr(importlib.import_module(module), name)(**options)


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
        print(f"{key}: {'reached' if c['reached'] else 'NOT reached'} in {c['ours']:.1f} CPU-s; "
              f"64 tight runs x{c['separate_tight'] / c['ours']:.1f}, TPE + DataLoader x"
              f"{c['tpe_habitual'] / c['ours']:.1f}, informed x{c['informed'] / c['ours']:.1f}; "
              f"test {c['test_ours']:.3f} (average {c['test_average']:.3f}, "
              f"grid {c['test_grid']:.3f})")  # fmt: skip
    if targets:
        for peer in ("separate_tight", "tpe_habitual", "informed"):
            ratios = [c[peer] / c["ours"] for c in targets.values()]
            print(f"median over {len(ratios)}: {peer} x{np.median(ratios):.1f}")
    runs = [c for k, c in cells.items() if k.startswith("quality")]
    if runs:
        ranks: dict[str, list[float]] = {}
        for cell in runs:
            for rank, label in enumerate(sorted(cell, key=lambda k: cell[k]["log_loss"]), 1):
                ranks.setdefault(label, []).append(rank)
        for label, values in sorted(ranks.items(), key=lambda item: np.mean(item[1])):
            losses = np.mean([c[label]["log_loss"] for c in runs])
            cpu = np.mean([c[label]["cpu"] for c in runs])
            print(f"quality over {len(runs)}: {label}: mean rank {np.mean(values):.2f}, "
                  f"log-loss {losses:.4f}, {cpu:.0f} CPU-s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cells")
    parser.add_argument("--only", choices=("speed", "target", "quality"), default=None)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of a quality cell")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/tune"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    sets, seeds = (SETS[:3], 1) if options.quick else (SETS, 3)
    widths = ["2k", "7k", "26k"] if options.quick else list(WIDTHS)
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    for label in widths:
        work[f"speed-{label}"] = lambda w=WIDTHS[label]: costs(40, w, 6)
    for name in sets:
        for label in ("7k",) if options.quick else ("2k", "7k", "26k"):
            work[f"target-{name}-{label}"] = lambda n=name, w=WIDTHS[label]: target(n, w, 0)
    for seed in range(seeds):
        for name in sets:
            work[f"quality-{name}-{seed}"] = lambda n=name, s=seed: quality(n, s, options.seconds)
    for key, run in work.items():
        file = options.output / f"{key}.json"
        if not file.exists() and (options.only is None or key.startswith(options.only)):
            file.write_text(json.dumps(run()))
            print("done", key, flush=True)
    cells = {
        key: json.loads(file.read_text())
        for key in work
        if (file := options.output / f"{key}.json").exists()
    }
    show(cells, len(work))


if __name__ == "__main__":
    main()
