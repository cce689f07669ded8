"""More columns than rows: a sparse first layer against the lasso, LassoNet and a random forest.

Planted problems have 10 true columns among many and 1,000 test rows of their own; gene expression
has known classes and is split 70 to 30. For each method: test score (R², accuracy) over splits,
columns in use and, where they are planted, how many of the true ones are among them. Every method
chooses its strength by cross-validation or by validation rows of the training part. One JSON line
a cell in `--output`: a second run continues where the first stopped.

    python benchmarks/high_dimensional.py --quick
    python benchmarks/high_dimensional.py --genes DIR --output cells.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LassoCV, LogisticRegressionCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import tikhon
from tikhon.models.mlp import MLP
from tikhon.sklearn import RegularizedClassifierCV, RegularizedRegressorCV

TRUE, HIDDEN = 10, 32
ALPHAS = np.geomspace(0.3, 0.01, 6)
KINDS = ("linear", "saturated", "additive", "products")
GENES = ("golub", "khan_srbct", "tissue_gene_expression")
Answer = tuple[float, np.ndarray | None]


def planted(kind: str, rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    t = x[:, :TRUE]
    if kind == "linear":
        y = t.sum(1)
    elif kind == "saturated":
        y = np.tanh(2 * t).sum(1)
    elif kind == "additive":
        y = np.tanh(2 * t[:, :5]).sum(1) + (t[:, 5:] ** 2 - 1).sum(1)
    else:
        y = t[:, ::2] @ np.ones(5) * 0.5 + (t[:, ::2] * t[:, 1::2]).sum(1)
    return x, y + 0.3 * y.std() * rng.normal(size=rows)


def sparse_layer(x, y, test_x, test_y, classes) -> Answer:
    kind = RegularizedClassifierCV if classes else RegularizedRegressorCV
    model = kind(
        (HIDDEN,), alphas=ALPHAS, cv=3, penalty="group_lasso", max_iter=100, tol=0,
        n_iter_no_change=100, random_state=0,
    ).fit(x, y)  # fmt: skip
    return model.score(test_x, test_y), model.support_


def along_path(x, y, test_x, test_y, classes, penalty) -> Answer:
    x, valid_x, y, valid_y = train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y if classes else None
    )
    offset, scale = (0, 1) if classes else (y.mean(), y.std())
    kind, outputs = (np.int64, int(y.max()) + 1) if classes else (np.float32, 1)
    train, valid = (
        (a.astype(np.float32), ((b - offset) / scale).astype(kind))
        for a, b in ((x, y), (valid_x, valid_y))
    )
    found = tikhon.path(
        lambda: MLP([x.shape[1], HIDDEN, outputs]), train, penalty, valid=valid, select="best"
    )
    with torch.no_grad():
        output = found.model()(torch.tensor(test_x, dtype=torch.float32)).numpy()
    support = found.supports[found.chosen].numpy()
    if classes:
        return float((output.argmax(1) == test_y).mean()), support
    missed = ((output[:, 0] * scale + offset - test_y) ** 2).mean()
    return float(1 - missed / test_y.var()), support


def group_path(*data) -> Answer:
    return along_path(*data, penalty=tikhon.GroupLasso())


def hierarchical_path(*data) -> Answer:
    return along_path(*data, penalty=tikhon.Hierarchical())


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
    x, valid_x, y, valid_y = train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y if classes else None
    )
    offset, scale = (0, 1) if classes else (y.mean(), y.std())
    y, valid_y = (y - offset) / scale, (valid_y - offset) / scale
    if not classes:
        test_y = (test_y - offset) / scale
    parts = [a.astype(np.float32) for a in (x, valid_x, test_x)]
    model = kind(hidden_dims=(HIDDEN,), verbose=0, random_state=0, torch_seed=0,
                 path_multiplier=1.05)  # fmt: skip
    path = model.path(parts[0], y, X_val=parts[1], y_val=valid_y, return_state_dicts=True)
    best = min(path, key=lambda step: step.val_loss)
    model.load(best.state_dict)
    return model.score(parts[2], test_y), best.selected.numpy()


METHODS: dict[str, Callable[..., Answer]] = {
    "tikhon: sparse first layer": sparse_layer,
    "tikhon: path, GroupLasso": group_path,
    "tikhon: path, Hierarchical": hierarchical_path,
    "lasso": lasso,
    "LassoNet": lassonet,
    "random forest": forest,
}


def drawn(kind: str, rows: int, columns: int, seed: int) -> tuple[np.ndarray, ...]:
    """Training and test part of a planted problem."""
    x, y = planted(kind, rows + 1000, columns, seed)
    return x[:rows], x[rows:], y[:rows], y[rows:]


def genes(path: Path, seed: int) -> tuple[np.ndarray, ...]:
    with np.load(path) as file:
        x, y = file["X"].astype(float), file["y"].astype(int)
    return tuple(train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y))


def measure(method: str, parts: tuple[np.ndarray, ...], classes: bool) -> dict[str, Any]:
    x, test_x, y, test_y = parts
    scaler, began = StandardScaler().fit(x), time.process_time()
    score, support = METHODS[method](
        scaler.transform(x), y, scaler.transform(test_x), test_y, classes
    )
    hits = None if support is None or classes else int(support[:TRUE].sum())
    return {"score": float(score), "columns": None if support is None else int(support.sum()),
            "true_columns": hits, "cpu_seconds": time.process_time() - began}  # fmt: skip


def cells(quick: bool, splits: int, folder: Path | None) -> Iterator[tuple[str, int, Any, bool]]:
    rows, columns = (80, 100) if quick else (200, 1000)
    for seed in range(splits):
        for kind in KINDS:
            name = f"{kind} ({rows}x{columns})"
            yield name, seed, lambda kind=kind, seed=seed: drawn(kind, rows, columns, seed), False
        for name in GENES if folder else ():
            path = folder / f"{name}.npz"  # type: ignore[operator]
            yield name, seed, lambda path=path, seed=seed: genes(path, seed), True


def show(found: list[dict[str, Any]]) -> None:
    def mean(values: list[Any]) -> str:
        kept = [value for value in values if value is not None]
        return f"{fmean(kept):.1f}" if kept else "-"

    print("| data | method | splits | score (sd) | columns | true | CPU-s |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(cell["data"] for cell in found):
        for method in METHODS:
            some = [c for c in found if c["data"] == name and c["method"] == method]
            if some:
                scores = [cell["score"] for cell in some]
                spread = f" ({stdev(scores):.3f})" if len(scores) > 1 else ""
                columns, true, cpu = (
                    mean([cell[key] for cell in some])
                    for key in ("columns", "true_columns", "cpu_seconds")
                )
                print(f"| {name} | {method} | {len(some)} | {fmean(scores):.3f}{spread} | "
                      f"{columns} | {true} | {cpu} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--splits", type=int, default=None)
    parser.add_argument("--genes", type=Path, default=None, help="folder of golub.npz, ...")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began, found = time.monotonic(), []
    if options.output is not None and options.output.exists():
        found = [json.loads(line) for line in options.output.read_text().splitlines()]
    done = {(cell["data"], cell["method"], cell["seed"]) for cell in found}
    splits = options.splits or (1 if options.quick else 5)
    for name, seed, make, classes in cells(options.quick, splits, options.genes):
        for method in options.methods:
            if (name, method, seed) in done or time.monotonic() - began > options.seconds:
                continue
            try:
                figures = measure(method, make(), classes)
            except ImportError:
                print(f"{method}: not installed, left out")
                continue
            cell = {"schema_version": 1, "data": name, "method": method, "seed": seed, **figures}
            found.append(cell)
            if options.output is not None:
                with options.output.open("a") as file:
                    file.write(json.dumps(cell) + "\n")
    show(found)


if __name__ == "__main__":
    main()
