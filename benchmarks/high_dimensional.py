"""More columns than rows: a sparse first layer against the lasso, LassoNet and a random forest.

Planted problems have 10 true columns among many; gene expression has known classes. For each
method: test score over splits, columns in use and (planted) how many of the true ones are among
them. Every method chooses its strength by cross-validation or validation rows of the training
part. LassoNet is left out, and said so, when it is not installed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LassoCV, LogisticRegressionCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from tikhon.sklearn import RegularizedClassifierCV, RegularizedRegressorCV

TRUE = 10
ALPHAS = np.geomspace(0.3, 0.01, 6)
Answer = tuple[float, np.ndarray | None]


def planted(kind: str, rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    t = x[:, :TRUE]
    if kind == "linear":
        y = t.sum(1)
    elif kind == "additive":
        y = np.tanh(2 * t[:, :5]).sum(1) + (t[:, 5:] ** 2 - 1).sum(1)
    else:
        y = t[:, ::2] @ np.ones(5) * 0.5 + (t[:, ::2] * t[:, 1::2]).sum(1)
    return x, y + 0.3 * y.std() * rng.normal(size=rows)


def sparse_layer(x, y, test_x, test_y, classes) -> Answer:
    kind = RegularizedClassifierCV if classes else RegularizedRegressorCV
    model = kind(
        (32,), alphas=ALPHAS, cv=3, penalty="group_lasso", max_iter=100, tol=0,
        n_iter_no_change=100, random_state=0,
    ).fit(x, y)  # fmt: skip
    return model.score(test_x, test_y), model.support_


def lasso(x, y, test_x, test_y, classes) -> Answer:
    if not classes:
        model = LassoCV(cv=3, random_state=0).fit(x, y)
        return model.score(test_x, test_y), model.coef_ != 0
    model = LogisticRegressionCV(
        Cs=6, cv=3, l1_ratios=(1,), solver="saga", max_iter=300, use_legacy_attributes=False
    ).fit(x, y)
    return model.score(test_x, test_y), (model.coef_ != 0).any(0)


def forest(x, y, test_x, test_y, classes) -> Answer:
    kind = RandomForestClassifier if classes else RandomForestRegressor
    return kind(200, random_state=0).fit(x, y).score(test_x, test_y), None


def lassonet(x, y, test_x, test_y, classes) -> Answer:
    import lassonet as package

    kind = package.LassoNetClassifier if classes else package.LassoNetRegressor
    x, valid_x, y, valid_y = train_test_split(x, y, test_size=0.25, random_state=0)
    offset, scale = (0, 1) if classes else (y.mean(), y.std())
    y, valid_y = (y - offset) / scale, (valid_y - offset) / scale
    if not classes:
        test_y = (test_y - offset) / scale
    parts = [a.astype(np.float32) for a in (x, valid_x, test_x)]
    model = kind(hidden_dims=(32,), verbose=0, random_state=0, torch_seed=0, n_iters=(100, 20),
                 path_multiplier=1.25)  # fmt: skip
    path = model.path(parts[0], y, X_val=parts[1], y_val=valid_y, return_state_dicts=True)
    best = min(path, key=lambda step: step.val_loss)
    model.load(best.state_dict)
    return model.score(parts[2], test_y), best.selected.numpy()


METHODS: dict[str, Callable[..., Answer]] = {
    "sparse first layer": sparse_layer,
    "lasso": lasso,
    "LassoNet": lassonet,
    "random forest": forest,
}


def measure(name: str, make: Callable[[int], Any], splits: int) -> list[dict[str, Any]]:
    rows = []
    for method, run in METHODS.items():
        scores, counts, hits, started = [], [], [], time.process_time()
        try:
            for seed in range(splits):
                x, y, classes, truth = make(seed)
                train, test = train_test_split(
                    np.arange(len(x)), test_size=0.3, random_state=seed,
                    stratify=y if classes else None,
                )  # fmt: skip
                scaler = StandardScaler().fit(x[train])
                score, support = run(
                    scaler.transform(x[train]),
                    y[train],
                    scaler.transform(x[test]),
                    y[test],
                    classes,
                )
                scores.append(float(score))
                if support is not None:
                    counts.append(int(support.sum()))
                    hits += [int(support[:truth].sum())] if truth else []
        except ImportError:
            print(f"{name:22} {method:20} not installed: left out")
            continue
        row = {
            "data": name,
            "method": method,
            "score": fmean(scores),
            "scores": scores,
            "columns": fmean(counts) if counts else None,
            "true_columns": fmean(hits) if hits else None,
            "cpu_seconds": time.process_time() - started,
        }
        rows.append(row)
        used = "-" if row["columns"] is None else f"{row['columns']:.1f}"
        found = "" if row["true_columns"] is None else f", {row['true_columns']:.1f} of 10 true"
        print(f"{name:22} {method:20} score {row['score']:.3f}  columns {used}{found}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--splits", type=int, default=None)
    parser.add_argument("--genes", type=Path, default=None, help="folder of golub.npz, ...")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    splits = options.splits or (1 if options.quick else 3)
    rows, columns = (80, 100) if options.quick else (150, 300)
    warnings.simplefilter("ignore")
    found = []
    for kind in ("linear", "additive", "products"):

        def make(seed: int, kind: str = kind) -> Any:
            return (*planted(kind, rows, columns, seed), False, TRUE)

        found += measure(f"{kind} ({rows}x{columns})", make, splits)
    for path in sorted(options.genes.glob("golub.npz")) if options.genes else []:
        with np.load(path) as file:
            x, y = file["X"].astype(float), file["y"]
        found += measure(f"{path.stem} {x.shape}", lambda seed, x=x, y=y: (x, y, True, 0), splits)
    result = {"schema_version": 1, "benchmark": "high_dimensional", "rows": found}
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
