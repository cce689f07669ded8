"""The tools that `tune.py --only quality` compares, each in a process with limited CPU time.

Of classes the loss is the log-loss, of numbers the RMSE in standard deviations of the training
rows. ANYTIME tools use the time they are given. The others run once at their defaults, under
LIMIT, and count as finished under a smaller limit if their CPU time is within a tenth of it.
Imports are not counted. The budget of `tikhon.tune`, which is wall time, is counted in CPU time
here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tuned_trees import TREES, predict, tuned

import tikhon as tk
from tikhon.models import build

Fit = Callable[..., dict[str, np.ndarray]]
EPOCHS = 60  # of one of Optuna's trainings
LIMIT = 60.0  # CPU seconds of a tool at its defaults
SLACK = 1.1


def run(label: str, rows: Any, seed: int, seconds: float) -> dict[str, Any]:
    """Test loss and CPU time by a forked process that the kernel ends when it is late."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    modules, fit = TOOLS[label]
    limit = int(2 * seconds if label in ANYTIME else SLACK * LIMIT) + 1

    def work() -> None:
        for module in modules:
            importlib.import_module(module)
        used = time.process_time()
        if (
            label != "tikhon"
        ):  # it keeps its time; under a limit the clock of a process ticks by 4 ms
            resource.setrlimit(resource.RLIMIT_CPU, (int(used) + limit,) * 2)
        try:
            found: Any = fit(*rows, seed, seconds)
        except Exception as error:
            found = error
        sending.send((found, time.process_time() - used))

    process = context.Process(target=work)
    process.start()
    sending.close()
    try:
        found, cpu = receiving.recv()
    except EOFError:
        return {label: {"loss": None, "cpu": float(limit)}}
    finally:
        process.join()
    if isinstance(found, Exception):
        raise SystemExit(f"{label} failed: {type(found).__name__}: {found}")
    truth = rows[5].numpy()
    return {key: {"loss": _loss(truth, p), "cpu": cpu} for key, p in found.items()}


def _loss(truth: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    p = p.astype(float)
    if truth.dtype.kind == "f":
        return float(np.sqrt(np.mean((truth - p.ravel()) ** 2)))
    return float(log_loss(truth, p / p.sum(1, keepdims=True), labels=np.arange(p.shape[1])))


def _tikhon(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
    time.perf_counter, time.perf_counter_ns = time.process_time, time.process_time_ns
    x, y = torch.cat([xa, xv]), torch.cat([ya, yv])
    outputs = 1 if y.is_floating_point() else int(y.max()) + 1
    names = ("mlp:64,64", "spline:mlp:64,64")  # what `tikhon tune` takes for a table
    space = tk.Space(model=tk.Choice(names), dropout=tk.Uniform(0, 0.8),
                     lr=tk.Log(1e-4, 1e-1), weight_decay="auto")  # fmt: skip

    def network(config: dict[str, Any]) -> torch.nn.Module:
        return build(config.get("model", names[0]), x.shape[1:], outputs, rows=x)

    found = tk.tune(network, (x, y), space=space, budget=f"{seconds:g}s", seed=seed)
    with torch.no_grad():
        return {
            "tikhon": _answer(found.model, xt),
            "tikhon average": _answer(found.average, xt),
        }


def _answer(model: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    out = model(x)
    return (out if out.shape[1] == 1 else out.softmax(1)).numpy()


def _optuna(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
    """The habit: TPE over lr, weight decay and dropout, one tight training a trial."""
    import optuna
    from tune import loss_of, separate

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
            score = float(loss_of(model(xv), yv))
            if score < best["score"]:
                best.update(score=score, p=_answer(model, xt))
        return score if np.isfinite(score) else 1e6

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    while time.process_time() - began < seconds:
        study.optimize(objective, n_trials=1)
    return {"Optuna + PyTorch": best["p"]}


def _estimator(label: str, make: Callable[[int, str], Any]) -> Fit:
    def fit(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
        x, y = torch.cat([xa, xv]).numpy(), torch.cat([ya, yv]).numpy()
        kind = "Regressor" if y.dtype.kind == "f" else "Classifier"
        return {label: predict(make(seed, kind).fit(x, y), xt.numpy())}

    return fit


def _sklearn_grid(seed: int, kind: str) -> Any:
    from sklearn.model_selection import GridSearchCV

    from sklearn import neural_network

    made = getattr(neural_network, f"MLP{kind}")
    mlp = made(hidden_layer_sizes=(64, 64), max_iter=100, random_state=seed)
    scoring = "neg_log_loss" if kind == "Classifier" else "neg_mean_squared_error"
    return GridSearchCV(mlp, {"alpha": [1e-4, 1e-2, 1.0, 10.0]}, cv=3, scoring=scoring)


def _lassonet(seed: int, kind: str) -> Any:
    import lassonet

    make = getattr(lassonet, f"LassoNet{kind}CV")
    return make(hidden_dims=(64,), cv=3, random_state=seed, verbose=0)


def _made(label: str, module: str, name: str, **options: Any) -> tuple[tuple[str, ...], Fit]:
    def make(seed: int, kind: str) -> Any:
        return getattr(importlib.import_module(module), name + kind)(random_state=seed, **options)

    return (module,), _estimator(label, make)


def _tuned(label: str) -> Fit:
    def fit(xa, ya, xv, yv, xt, yt, seed: int, seconds: float) -> dict[str, np.ndarray]:
        x, y = torch.cat([xa, xv]).numpy(), torch.cat([ya, yv]).numpy()
        return {label: tuned(label, x, y, xt.numpy(), seed, seconds)}

    return fit


_CPU = {"device": "cpu", "n_threads": 1}
ANYTIME = ("tikhon", "Optuna + PyTorch", *TREES)
TOOLS: dict[str, tuple[tuple[str, ...], Fit]] = {
    "tikhon": ((), _tikhon),
    "Optuna + PyTorch": (("optuna",), _optuna),
    "CatBoost + Optuna": (("catboost", "optuna"), _tuned("CatBoost + Optuna")),
    "LightGBM + Optuna": (("lightgbm", "optuna"), _tuned("LightGBM + Optuna")),
    "LightGBM": _made("LightGBM", "lightgbm", "LGBM", verbose=-1, n_jobs=1),
    "XGBoost": _made("XGBoost", "xgboost", "XGB", n_jobs=1),
    "CatBoost": _made("CatBoost", "catboost", "CatBoost", verbose=0, thread_count=1,
                      allow_writing_files=False),
    "scikit-learn MLP + grid": (
        ("sklearn.neural_network",), _estimator("scikit-learn MLP + grid", _sklearn_grid)),
    "RealMLP-TD": _made("RealMLP-TD", "pytabkit", "RealMLP_TD_", **_CPU),
    "TabM": _made("TabM", "pytabkit", "TabM_D_", **_CPU),
    "LassoNetCV": (("lassonet",), _estimator("LassoNetCV", _lassonet)),
}  # fmt: skip


def show(cells: dict[tuple[str, int], dict[str, Any]], seconds: float) -> None:
    """Mean ranks by loss of the tools that were run everywhere, tikhon by either model.

    A tool that did not finish in time shares the last ranks with the others that did not.
    """
    everywhere = [label for label in TOOLS if all(label in cell for cell in cells.values())]
    for own in ("tikhon", "tikhon average"):
        labels = [own, *(label for label in everywhere if label != "tikhon")]
        table = np.array(
            [[_in_time(cell[label], seconds) for label in labels] for cell in cells.values()]
        )
        ranks = np.array([[_rank(row, value) for value in row] for row in table])
        print(f"quality within {seconds:g} s over {len(table)} cells, {own} beside the others:")
        for k in ranks.mean(0).argsort():
            done = np.isfinite(table[:, k])
            with np.errstate(invalid="ignore"):
                ratio = np.log(table[done, k] / table[done, 0])
            cpu = np.mean([cell[labels[k]]["cpu"] for cell in cells.values()])
            print(f"  {labels[k]}: mean rank {ranks[:, k].mean():.2f}, best on "
                  f"{int((ranks[:, k] < 1.5).sum())}, loss x{np.exp(ratio.mean()):.3f} of "
                  f"{own}'s, {cpu:.0f} CPU-s, finished {done.sum()}")  # fmt: skip
    for (name, seed), cell in cells.items():
        scores = {k: v["loss"] for k, v in cell.items() if np.isfinite(_in_time(v, seconds))}
        order = sorted(scores, key=lambda k: scores[k])
        print(f"  {name} {seed}: " + ", ".join(f"{k} {scores[k]:.3f}" for k in order))


def _in_time(entry: dict[str, Any], seconds: float) -> float:
    late = entry["loss"] is None or entry["cpu"] > SLACK * seconds
    return np.inf if late else entry["loss"]


def _rank(row: np.ndarray, value: float) -> float:
    return 1 + float((row < value).sum()) + 0.5 * float((row == value).sum() - 1)
