"""What a population saves, and how good the choice is.

  speed    microseconds per step of one configuration: population against a tight PyTorch loop
           (tensors in memory, fused AdamW) and the habitual one (DataLoader, .item()), interleaved
           A-B-C-C-B-A, one thread, CPU time. Equivalence is checked first: after 50 steps every
           member equals its separate run to 1e-5, otherwise nothing is printed.
  target   CPU time until the validation loss of an 8x8 grid (weight decay x dropout, 60 epochs of
           separate runs) is reached. The grid's runs are trained as verified population members
           and charged at the measured cost of the tight or habitual loop; Optuna's TPE walks the
           same table. `informed` is run for real: 16 trials on the grid's ranges, the tight loop,
           safe pruning. `ours` searches the grid's ranges, `ours_default_space` its own.
  quality  test log-loss within a time limit beside other tools at their defaults

One JSON a cell in --output; a run continues where it stopped.

    python benchmarks/tune.py --quick      # minutes
    python benchmarks/tune.py              # hours
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
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
from tikhon.tuning.searches import Grid, SpaceFilling
from tikhon.tuning.settings import Settings
from tikhon.tuning.trials import History

DATA = Path(os.environ.get("TIKHON_BENCHMARK_DATA", Path(__file__).parents[2] / "shared/data"))
SETS = ("german", "breast_cancer", "vehicle", "segment", "digits", "sonar", "phoneme", "splice",
        "satimage", "spambase")  # fmt: skip
WIDTHS = {"2k": 24, "7k": 64, "26k": 140, "79k": 260, "270k": 500, "1M": 970}
BATCH, EPOCHS = 32, 60
NEAR = 1.01  # a goal counts as reached within 1 %
GRID = tk.Space(weight_decay=tk.Log(1e-3, 10.0), dropout=tk.Uniform(0.0, 0.7), lr=3e-3)


def split(name: str, seed: int) -> tuple[torch.Tensor, ...]:
    """train, valid, test: 56, 14, 30 %; scaled by the training rows."""
    from sklearn.model_selection import train_test_split

    data = np.load(DATA / f"{name}.npz")
    x, y = data["X"].astype(np.float32), data["y"].astype(np.int64)
    xa, xt, ya, yt = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    xa, xv, ya, yv = train_test_split(xa, ya, test_size=0.2, stratify=ya, random_state=seed)
    mean, spread = xa.mean(0), xa.std(0)
    scale = np.where(spread > 1e-6, spread, 1)  # a pixel that is constant here may vary in test
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

    chosen = _model(job, best.trial.config, alone.states[best.trial.id], None)
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


def quality(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Test log-loss of every tool after at most `seconds` of CPU time, each in its own process."""
    rows = split(name, seed)
    tools: dict[str, Callable[..., dict[str, np.ndarray]]] = {
        "tikhon": _tikhon, "Optuna + PyTorch": _optuna, "scikit-learn MLP + grid": _grid,
        "LassoNetCV": _lassonet, "RealMLP-TD": _pytabkit("RealMLP_TD_Classifier"),
        "TabM": _pytabkit("TabM_D_Classifier"),
        "LightGBM": _gbm("lightgbm", "LGBMClassifier", verbose=-1, n_jobs=1),
        "XGBoost": _gbm("xgboost", "XGBClassifier", n_jobs=1),
        "CatBoost": _gbm("catboost", "CatBoostClassifier", verbose=0, thread_count=1,
                         allow_writing_files=False),
    }  # fmt: skip
    cell: dict[str, Any] = {}
    for label, tool in tools.items():
        cell |= _limited(label, tool, rows, seed, seconds)
    return cell


def _limited(
    label: str, tool: Callable[..., dict[str, np.ndarray]], rows: Any, seed: int, seconds: float
) -> dict[str, Any]:
    """Run in a forked process that the kernel ends at twice the limit: some overrun a little."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def work() -> None:
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + int(2 * seconds),) * 2)
        began = time.process_time()
        found = tool(*rows, seed, seconds)
        sending.send((found, time.process_time() - began))

    process = context.Process(target=work)
    process.start()
    sending.close()
    try:
        found, cpu = receiving.recv()
    except EOFError:
        return {label: {"log_loss": None, "cpu": 2 * seconds}}
    finally:
        process.join()
    truth = rows[5].numpy()
    return {
        key: {"log_loss": _log_loss(truth, p), "cpu": cpu, "late": cpu > 1.1 * seconds}
        for key, p in found.items()
    }


def _log_loss(truth: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    p = p.astype(float)
    return float(log_loss(truth, p / p.sum(1, keepdims=True), labels=np.arange(p.shape[1])))


def _tikhon(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
    x, y = torch.cat([xa, xv]), torch.cat([ya, yv])
    classes = int(y.max()) + 1
    found = tk.tune(lambda: MLP([x.shape[1], 64, 64, classes]), (x, y), budget=f"{seconds:g}s",
                    seed=seed)  # fmt: skip
    with torch.no_grad():
        return {
            "tikhon": found.model(xt).softmax(1).numpy(),
            "tikhon average": found.average(xt).softmax(1).numpy(),
        }


def _optuna(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
    """The habit: TPE over lr, weight decay and dropout, one tight training a trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began, steps = time.process_time(), EPOCHS * max(1, len(xa) // 64)
    best: dict[str, Any] = {"score": np.inf}

    def objective(trial: Any) -> float:
        config = {
            "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 10, log=True),
            "dropout": trial.suggest_float("dropout", 0, 0.8),
        }
        model = separate(xa, ya, (64, 64), config, steps, seed, 64)(steps).eval()
        with torch.no_grad():
            score = float(F.cross_entropy(model(xv), yv))
            if score < best["score"]:
                best.update(score=score, p=model(xt).softmax(1).numpy())
        return score if np.isfinite(score) else 1e6

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    while time.process_time() - began < seconds:
        study.optimize(objective, n_trials=1)
    return {"Optuna + PyTorch": best["p"]}


def separate(xa, ya, hidden: tuple[int, ...], config, steps: int, seed: int, batch: int):
    """A training of the tight loop as a function that continues it: (upto step) -> model.

    Shuffled batches from memory, fused AdamW, cosine over `steps`.
    """
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise((xa.shape[1], *hidden)):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Dropout(config["dropout"])]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(hidden[-1], int(ya.max()) + 1))
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
            F.cross_entropy(model(xa[rows]), ya[rows]).backward()
            optimizer.step()
            schedule.step()
        done = upto
        return model

    return advance


def _estimator(label: str, make: Callable[[int], Any]) -> Callable[..., dict[str, np.ndarray]]:
    def fit(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
        x, y = torch.cat([xa, xv]).numpy(), torch.cat([ya, yv]).numpy()
        return {label: np.asarray(make(seed).fit(x, y).predict_proba(xt.numpy()))}

    return fit


def _sklearn_grid(seed: int) -> Any:
    from sklearn.model_selection import GridSearchCV
    from sklearn.neural_network import MLPClassifier

    grid = {"alpha": [1e-4, 1e-2, 1.0, 10.0]}
    return GridSearchCV(MLPClassifier((64, 64), max_iter=100, random_state=seed), grid, cv=3,
                        scoring="neg_log_loss")  # fmt: skip


_grid = _estimator("scikit-learn MLP + grid", _sklearn_grid)


def _lassonet_cv(seed: int) -> Any:
    from lassonet import LassoNetClassifierCV

    return LassoNetClassifierCV(hidden_dims=(64,), cv=3, random_state=seed, verbose=0)


_lassonet = _estimator("LassoNetCV", _lassonet_cv)


def _pytabkit(name: str) -> Callable[..., dict[str, np.ndarray]]:
    def make(seed: int) -> Any:
        import pytabkit

        return getattr(pytabkit, name)(device="cpu", n_threads=1, random_state=seed)

    return _estimator({"RealMLP_TD_Classifier": "RealMLP-TD"}.get(name, "TabM"), make)


def _gbm(module: str, name: str, **options: Any) -> Callable[..., dict[str, np.ndarray]]:
    import importlib

    label = name.removesuffix("Classifier").replace("LGBM", "LightGBM").replace("XGB", "XGBoost")
    return _estimator(label, lambda seed: getattr(importlib.import_module(module), name)(
        random_state=seed, **options))  # fmt: skip


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
    runs = [c for k, c in cells.items() if k.startswith("quality")]
    if runs:
        ranks: dict[str, list[float]] = {}
        for cell in runs:
            scores = {k: v["log_loss"] for k, v in cell.items()}
            order = sorted(scores, key=lambda k: np.inf if scores[k] is None else scores[k])
            for rank, label in enumerate(order, 1):
                ranks.setdefault(label, []).append(rank)
        for label, values in sorted(ranks.items(), key=lambda item: np.mean(item[1])):
            finished = [c[label]["log_loss"] for c in runs if c[label]["log_loss"] is not None]
            cpu = np.mean([c[label]["cpu"] for c in runs])
            print(f"quality over {len(runs)}: {label}: mean rank {np.mean(values):.2f}, "
                  f"log-loss {np.mean(finished or [np.nan]):.4f}, {cpu:.0f} CPU-s, "
                  f"finished {len(finished)}")  # fmt: skip


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
