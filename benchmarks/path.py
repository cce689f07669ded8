"""Paths: exactness against celer, cost and accuracy against lassonet, planted supports.

Five parts, one JSON a cell in --output (a run continues where it stopped):
  linear   largest difference of coefficients to celer on the same strengths
  network  CPU time and test accuracy per number of kept features against the lassonet package,
           A-B in one process, one thread; hidden layer of 64
  weights  100 strengths over all weights of a network: CPU time in trainings at one strength, and
           the objective on the training rows at 10 strengths over that of a separate training of
           the same length from the same start
  debias   networks of such a path on rows that nothing else has seen: as they are, trained on with
           their zeros frozen (debias=True), and their supports trained apart from the start
  planted  n=200, p=1000, 10 true features: F1 of the support of a debiased L1 path with the
           one-standard-error rule, beside LassoCV and LassoNetCV

    python benchmarks/path.py --quick      # one seed; minutes
    python benchmarks/path.py              # 20 planted seeds, 5 splits
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
import torch

import tikhon as tk
from tikhon.models.mlp import MLP

DATA = Path(os.environ.get("TIKHON_BENCHMARK_DATA", Path(__file__).parents[2] / "shared/data"))
NOISE = (1.0, 3.0, 6.0)


def standardised(name: str) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(DATA / f"{name}.npz")
    x = data["X"].astype(float)
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1), data["y"]


def linear(name: str) -> dict[str, Any]:
    from celer import celer_path

    x, y = standardised(name)
    y = y.astype(float)
    began = time.process_time()
    result = tk.path(None, (x, y), tk.L1(), strengths=50, smallest=0.01)
    ours = time.process_time() - began
    began = time.process_time()
    _, other, _ = celer_path(
        x - x.mean(0), y - y.mean(), "lasso", alphas=np.array(result.strengths), tol=1e-14,
        max_iter=1_000,
    )  # fmt: skip
    theirs = time.process_time() - began
    gap = float(np.abs(result.coefficients[:, 0].numpy() - other.T).max())
    largest = float(np.abs(other).max())
    return {"difference": gap, "largest": largest, "cpu": ours, "cpu_celer": theirs}


def network(name: str, seed: int) -> dict[str, Any]:
    from lassonet import LassoNetClassifier
    from sklearn.model_selection import train_test_split

    x, y = standardised(name)
    parts = train_test_split(
        x.astype(np.float32), y.astype(int), test_size=0.3, stratify=y, random_state=seed
    )
    xa, xb, ya, yb = parts
    classes = int(y.max()) + 1

    def ours() -> dict[int, float]:
        result = tk.path(
            lambda: MLP([x.shape[1], 64, classes]), (xa, ya), tk.Hierarchical(), seed=seed
        )
        found = {}
        for index, count in enumerate(result.counts):
            with torch.no_grad():
                guess = result.model(index)(torch.tensor(xb)).argmax(1).numpy()
            found[count] = float((guess == yb).mean())
        return found

    def theirs() -> dict[int, float]:
        torch.manual_seed(seed)
        model = LassoNetClassifier(hidden_dims=(64,), M=10, verbose=0)
        found: dict[int, float] = {}
        for point in model.path(xa, ya, return_state_dicts=True):
            model.load(point.state_dict)
            count = int(point.selected.sum())
            found[count] = max(found.get(count, 0.0), float((model.predict(xb) == yb).mean()))
        return found

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # torch's optimizers load on first use
    times: dict[str, float] = {}
    scores: dict[str, dict[int, float]] = {}
    order: list[tuple[str, Callable[[], dict[int, float]]]] = [
        ("ours", ours), ("lassonet", theirs), ("again", ours)]  # fmt: skip
    for label, run in order:
        began = time.process_time()
        scores[label] = run()
        times[label] = time.process_time() - began
    return {"cpu": times, "accuracy": {k: scores[k] for k in ("ours", "lassonet")}}


WEIGHTS: dict[str, tuple[str, str, int, float, tk.penalties.Proximable]] = {
    "digits-mlp-l1": ("digits", "mlp:64", 40, 1e-3, tk.L1()),
    "digits-mlp-l1-fast": ("digits", "mlp:64,32", 40, 3e-3, tk.L1()),
    "digits-mlp-rows": ("digits", "mlp:64", 40, 1e-3, tk.GroupLasso()),
    "digits-mlp-log": ("digits", "mlp:64", 40, 1e-3, tk.LogSum()),
    "satimage-mlp-l1": ("satimage", "mlp:64", 20, 1e-3, tk.L1()),
    "concrete-mlp-l1": ("concrete", "mlp:64,32", 60, 1e-3, tk.L1()),
    "mnist-convnet-l1": ("mnist5k", "convnet", 10, 1e-3, tk.L1()),
}


def rows_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised columns and targets, or images; classes as integers from 0."""
    if name == "mnist5k":
        data = np.load(DATA / "mnist5k.npz")
        x = torch.tensor(data["X"].reshape(-1, 1, 28, 28), dtype=torch.float32)
        return x / x.max(), torch.tensor(data["y"].astype(int))
    x, y = standardised(name)
    if name == "concrete":
        y = (y - y.mean()) / y.std()
        return torch.tensor(x).float(), torch.tensor(y).float()[:, None]
    return torch.tensor(x).float(), torch.tensor(np.unique(y, return_inverse=True)[1])


def trained_apart(
    model: torch.nn.Module,
    train: Any,
    penalty: tk.penalties.Proximable,
    epochs: int,
    lr: float,
    seed: int,
    support: dict[str, torch.Tensor] | None = None,
) -> None:
    """A plain loop with `regularize` at a fixed strength, over the rows in the order of `fit`.

    Weights outside the support are kept at zero.
    """
    from tikhon.data.batches import order, slices

    x, y = train
    loss = torch.nn.functional.cross_entropy if y.dtype == torch.long else torch.nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    with tk.regularize(model, optimizer, penalty):
        for epoch in range(epochs):
            for batch in slices(order(len(x), seed=seed, epoch=epoch), 64):
                optimizer.zero_grad()
                loss(model(x[batch]), y[batch]).backward()
                optimizer.step()
                for name, kept in (support or {}).items():
                    model.get_parameter(name).data.mul_(kept)


def objective(
    model: torch.nn.Module, train: Any, penalty: tk.penalties.Proximable
) -> tuple[float, int]:
    """Loss on the training rows plus penalty, and the penalised weights that are not zero."""
    x, y = train
    loss = torch.nn.functional.cross_entropy if y.dtype == torch.long else torch.nn.MSELoss()
    weights = [p for p in model.parameters() if p.ndim > 1]
    with torch.no_grad():
        value = loss(model.eval()(x), y) + sum(penalty.value(w.flatten(1)) for w in weights)
    return float(value), sum(int((w != 0).sum()) for w in weights)


def weights(key: str, seed: int) -> dict[str, Any]:
    from tikhon.models import build

    name, model, epochs, lr, penalty = WEIGHTS[key]
    x, y = rows_of(name)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = len(x) // 5
    train, valid = ((x[o], y[o]) for o in (order[cut:], order[:cut]))
    outputs = int(y.max()) + 1 if y.dtype == torch.long else 1

    def start() -> torch.nn.Module:
        torch.manual_seed(seed)
        return build(model, tuple(x.shape[1:]), outputs)

    trained_apart(start(), (x[:64], y[:64]), penalty.with_strength(1e-3), 1, lr, 0)  # warm caches
    began = time.process_time()
    result = tk.path(start, train, penalty, of="weights", valid=valid, epochs=epochs, lr=lr,
                     seed=seed)  # fmt: skip
    cpu, singles, checks = time.process_time() - began, [], []
    last = next((i for i, c in enumerate(result.counts) if not c), len(result.counts) - 1)
    for index in sorted({round(i * last / 9) for i in range(10)}):
        at = penalty.with_strength(result.strengths[index])
        other = start()
        began = time.process_time()
        trained_apart(other, train, at, epochs, lr, seed)
        singles.append(time.process_time() - began)
        (ours, size), (theirs, other_size) = (
            objective(m, train, at) for m in (result.model(index), other)
        )
        checks.append({"strength": result.strengths[index], "ratio": ours / theirs,
                       "weights": size, "weights_apart": other_size})  # fmt: skip
    return {
        "cpu": cpu, "single": (single := float(np.median(singles))), "trainings": cpu / single,
        "checks": checks, "weights": result.supports.shape[1], "sizes": result.counts,
        "scores": result.accuracies or list(zip(result.scores, result.errors)),
        "chosen": result.chosen, "knee": result.knee,
    }  # fmt: skip


def planted(noise: float, seed: int, peer: str) -> dict[str, Any]:
    """F1 of the supports; `peer` is "linear" (ours and LassoCV) or "lassonet" (minutes)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 1000))
    w = np.zeros(1000)
    w[:10] = rng.choice([-1.0, 1.0], 10) * rng.uniform(1, 3, 10)
    y = x @ w + noise * rng.standard_normal(200)
    x = (x - x.mean(0)) / x.std(0)

    def one_se() -> np.ndarray:
        result = tk.path(None, (x, y), tk.L1(), strengths=60, smallest=0.03, folds=5, debias=True)
        return result.supports[result.chosen].numpy()

    def universal() -> np.ndarray:
        return tk.path(None, (x, y), tk.L1(), strengths="universal").supports[0].numpy()

    def lasso() -> np.ndarray:
        from sklearn.linear_model import LassoCV

        return LassoCV(cv=5, random_state=seed).fit(x, y).coef_ != 0

    def lassonet() -> np.ndarray:
        from lassonet import LassoNetRegressorCV

        torch.manual_seed(seed)
        model = LassoNetRegressorCV(hidden_dims=(32,), cv=3, verbose=0)
        scaled = ((y - y.mean()) / y.std()).astype(np.float32)
        model.fit(x.astype(np.float32), scaled)
        return model.best_selected_.numpy().astype(bool)

    cell: dict[str, Any] = {}
    methods = {"one_se": one_se, "universal": universal, "LassoCV": lasso}
    for label, run in (methods if peer == "linear" else {"LassoNetCV": lassonet}).items():
        began = time.process_time()
        support = run()
        right = int(support[:10].sum())
        f1 = 2 * right / max(support.sum() + 10, 1)
        cell[label] = {"f1": float(f1), "size": int(support.sum()),
                       "cpu": time.process_time() - began}  # fmt: skip
    return cell


def debias(key: str, seed: int) -> dict[str, Any]:
    from tikhon.models import build

    name, model, epochs, lr, penalty = WEIGHTS[key]
    x, y = rows_of(name)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = len(x) // 5
    train, valid, test = (
        (x[o], y[o]) for o in (order[2 * cut :], order[:cut], order[cut : 2 * cut])
    )
    outputs = int(y.max()) + 1 if y.dtype == torch.long else 1

    def start() -> torch.nn.Module:
        torch.manual_seed(seed)
        return build(model, tuple(x.shape[1:]), outputs)

    def score(network: torch.nn.Module) -> float:
        with torch.no_grad():
            out = network.eval()(test[0])
        if y.dtype == torch.long:
            return float((out.argmax(1) == test[1]).double().mean())
        return float((out - test[1]).square().mean())

    few = (x[:128], y[:128])
    tk.path(start, few, penalty, of="weights", epochs=3, debias=True)  # warm caches
    results, cpu = {}, {}
    for refitted in (False, True):
        began = time.process_time()
        results[refitted] = tk.path(start, train, penalty, of="weights", valid=valid,
                                    epochs=epochs, lr=lr, seed=seed, debias=refitted)  # fmt: skip
        cpu[refitted] = time.process_time() - began
    plain, total = results[False], results[False].supports.shape[1]
    rows = []
    for share in (0.25, 0.1, 0.05, 0.02):
        index = min(range(len(plain.counts)), key=lambda i: abs(plain.counts[i] - share * total))
        network, apart = plain.model(index), start()
        support = {n: (p != 0).float() for n, p in network.named_parameters() if p.ndim > 1}
        began = time.process_time()
        none = penalty.with_strength(0.0)
        trained_apart(apart, train, none, epochs, lr, seed, support=support)
        cpu["apart"] = time.process_time() - began
        rows.append({"share": share, "weights": plain.counts[index], "plain": score(network),
                     "debiased": score(results[True].model(index)),
                     "apart": score(apart)})  # fmt: skip
    return {"rows": rows, "weights": total, "dense": score(plain.model(0)),
            "trainings": (cpu[True] - cpu[False]) / cpu["apart"]}  # fmt: skip


def binned(accuracy: dict[str, float], edges: list[tuple[int, int]]) -> list[float | None]:
    found = []
    for low, high in edges:
        values = [v for k, v in accuracy.items() if low <= int(k) <= high]
        found.append(float(np.mean(values)) if values else None)
    return found


def show(cells: dict[str, Any], wanted: int) -> None:
    print(f"coverage: {len(cells)} of {wanted} cells")
    for key, cell in cells.items():
        if key.startswith("linear"):
            print(f"{key}: largest difference {cell['difference']:.1e} of coefficients up to "
                  f"{cell['largest']:.3g}")  # fmt: skip
    for name in ("breast_cancer", "digits"):
        runs = [c for k, c in cells.items() if k.startswith(f"network-{name}-")]
        if not runs:
            continue
        ratio = [2 * c["cpu"]["lassonet"] / (c["cpu"]["ours"] + c["cpu"]["again"]) for c in runs]
        features = max(int(k) for c in runs for k in c["accuracy"]["ours"])
        cuts = sorted({1, 2, 4, 7, 11, 16, 23, 31, 46, features + 1})
        cuts = [c for c in cuts if c <= features + 1]
        edges = [(a, b - 1) for a, b in itertools.pairwise(cuts)]
        rows = {
            label: [binned(c["accuracy"][label], edges) for c in runs]
            for label in ("ours", "lassonet")
        }
        print(f"{name}: lassonet / tikhon CPU time {np.median(ratio):.1f} "
              f"(min {min(ratio):.1f}, {len(runs)} splits)")  # fmt: skip
        for i, (low, high) in enumerate(edges):
            means = {
                label: np.mean([r[i] for r in table if r[i] is not None] or [np.nan])
                for label, table in rows.items()
            }
            print(f"  {low:>2}-{high:<2} features: tikhon {means['ours']:.3f}, "
                  f"lassonet {means['lassonet']:.3f}")  # fmt: skip
    for key in WEIGHTS:
        runs = [c for k, c in cells.items() if k.rpartition("-")[0] == f"weights-{key}"]
        for c in runs:
            ratios = [check["ratio"] for check in c["checks"]]
            print(f"{key}: {c['trainings']:.1f} trainings of {c['single']:.1f} s, objective over "
                  f"a separate training {min(ratios):.3f} to {max(ratios):.3f}, "
                  f"{sum(r <= 1.01 for r in ratios)} of {len(ratios)} within 1 %")  # fmt: skip
            for label, i in (("dense", 0), ("chosen", c["chosen"]), ("knee", c["knee"])):
                print(f"  {label}: {c['sizes'][i]:,} of {c['weights']:,} weights, score "
                      f"{c['scores'][i][0]:.3f} +- {c['scores'][i][1]:.3f}")  # fmt: skip
        for c in (c for k, c in cells.items() if k.rpartition("-")[0] == f"debias-{key}"):
            print(f"{key}: refits of all sizes {c['trainings']:.1f} trainings more, dense "
                  f"{c['dense']:.3f}")  # fmt: skip
            for row in c["rows"]:
                print(f"  {row['weights']:,} of {c['weights']:,}: as it is {row['plain']:.3f}, "
                      f"debiased {row['debiased']:.3f}, apart {row['apart']:.3f}")  # fmt: skip
    for noise in NOISE:
        for peer in ("linear", "lassonet"):
            keys = [k for k in cells if k.startswith(f"planted-{peer}-{noise}-")]
            pairs = [cells[k] | cells.get(k.replace(peer, "linear"), {}) for k in keys]
            if pairs:
                print(f"planted, noise {noise}, {len(pairs)} seeds: " + ", ".join(
                    f"{label} F1 {np.mean([c[label]['f1'] for c in pairs]):.3f} "
                    f"({np.mean([c[label]['size'] for c in pairs]):.0f} features, "
                    f"{np.mean([c[label]['cpu'] for c in pairs]):.1f} CPU-s)"
                    for label in pairs[0]
                ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed a cell")
    parser.add_argument("--only", default=None, metavar="PREFIX",
                        help="of the cells to run, such as linear or planted-linear")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/path"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    splits, seeds = (1, 1) if options.quick else (5, 20)
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in ("diabetes", "communities", "khan_srbct"):
        work[f"linear-{name}"] = lambda name=name: linear(name)
    for seed in range(splits):
        for name in ("breast_cancer", "digits"):
            work[f"network-{name}-{seed}"] = lambda name=name, seed=seed: network(name, seed)
    for seed, key in itertools.product(range(min(splits, 3)), WEIGHTS):
        work[f"weights-{key}-{seed}"] = lambda key=key, seed=seed: weights(key, seed)
        work[f"debias-{key}-{seed}"] = lambda key=key, seed=seed: debias(key, seed)
    for peer in ("linear", "lassonet"):
        for seed, noise in itertools.product(range(seeds), NOISE):
            work[f"planted-{peer}-{noise}-{seed}"] = lambda noise=noise, seed=seed, peer=peer: (
                planted(noise, seed, peer)
            )
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
