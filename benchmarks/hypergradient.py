"""One adapting run against a grid of separate runs: is the strength worth its name?

For each data set and split, a network is trained with AdamW at every strength of two 7-point grids
of decoupled weight decay, and once with `L2(Hypergradient(...))`. GRID is even in the logarithm
over the range in which the adapting strength may move; DENSE is placed by hand where good values
usually lie. A grid's choice is its run with the best validation loss. Printed: test log-loss (RMSE
for regression) relative to that choice, geometric mean over the splits; beside it one strength for
all layers, the plain one-step hypergradient, the schedule that was found replayed on train +
valid, the best fixed value of all, a generic default (0.01) and none.

The MLPs of the grids are trained side by side (`tikhon.population.population`: the same initial
weights and batches as separate runs); CPU time is relative to one plain run at the grid's middle,
measured right before and after the adapting one.

    python benchmarks/hypergradient.py --quick            # 3 sets, 2 splits, about 2 minutes
    python benchmarks/hypergradient.py --data FOLDER      # 70 cells; resumes from --output

The defaults of `Hypergradient` were chosen on SELECTION (other splits than these), which --sets
can name too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tikhon as tk
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses
from tikhon.population.population import Population

SELECTION = (
    "sonar german vehicle breast_cancer digits contraceptive "
    "segment diabetes concrete dhfr airfoil wine"
).split()
REPORT = (
    "phoneme satimage spambase splice ada_agnostic credit_data "
    "communities wa_churn ames tissue_gene_expression mdrr blood_brain"
).split()
CONVOLUTIONAL = ("digits", "mnist5k")
GRID = tuple(float(f"{1e-4 * 3e5 ** (k / 6):.2g}") for k in range(7))
DENSE = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
LR, BATCH, ROWS = 3e-3, 32, 3000


def load(folder: Path | None, name: str, split: int):
    """Standardised train, valid and test tensors (56/14/30 %), at most ROWS rows."""
    if folder is None:
        from sklearn import datasets

        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    else:
        with np.load(folder / f"{name}.npz") as file:
            X, y = file["X"], file["y"]
    regression = y.dtype.kind == "f" and len(np.unique(y)) > 30
    rows = np.random.default_rng(split).permutation(len(X))[:ROWS]
    test, rest = np.split(rows, [int(0.3 * len(rows))])
    valid, train = np.split(rest, [int(0.2 * len(rest))])
    X = X.astype(np.float32)
    center, scale = X[train].mean(0), X[train].std(0)
    X = np.clip((X - center) / np.where(scale < 1e-6, 1, scale), -10, 10)
    if regression:
        y = ((y - y[train].mean()) / y[train].std()).astype(np.float32)[:, None]
    else:
        y = np.unique(y, return_inverse=True)[1]
    parts = [(torch.from_numpy(X[i]), torch.from_numpy(y[i])) for i in (train, valid, test)]
    return regression, 1 if regression else int(y.max()) + 1, parts


def build(kind: str, inputs: int, outputs: int, seed: int) -> nn.Module:
    """The 2x64 MLP, or a small ConvNet on square images."""
    torch.manual_seed(seed)
    if kind == "mlp":
        sizes = (inputs, 64, 64, outputs)
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])
    side = math.isqrt(inputs)
    pool = nn.MaxPool2d(2) if side > 8 else nn.Identity()
    features = 16 * (side // 2 // (2 if side > 8 else 1)) ** 2
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), pool,
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(features, outputs),
    )  # fmt: skip


def train(kind: str, data, strength, *, epochs: int, seed: int, replay=None):
    """One run; validation and test loss, CPU seconds, strengths at the end, and the regularizer.

    `replay` is the regularizer of a run whose strengths are followed on train + valid.
    """
    regression, outputs, (fit, valid, test) = data
    if replay is not None:
        fit = tuple(torch.cat(parts) for parts in zip(fit, valid))
    net = build(kind, fit[0].shape[1], outputs, seed)
    loss = nn.functional.mse_loss if regression else nn.functional.cross_entropy
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    rows = len(fit[0])
    steps = epochs * (rows // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if callable(strength):
        strength = strength(valid, loss, steps)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    terms = tk.L2(strength) if replay is None else replay.replay(steps)
    reg = tk.regularize(net, optimizer, terms, how="decoupled")
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator)
        for i in range(rows // BATCH):
            batch = order[i * BATCH : (i + 1) * BATCH]
            optimizer.zero_grad()
            loss(net(fit[0][batch]), fit[1][batch]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - began
    net.eval()
    with torch.no_grad():
        scores = [float(loss(net(x), y)) for x, y in (valid, test)]
    scores = [math.sqrt(s) for s in scores] if regression else scores
    found = {"valid": scores[0], "test": scores[1], "cpu": seconds, "strengths": reg.strengths()}
    return found, reg


def side_by_side(data, strengths, *, epochs: int, seed: int) -> dict[str, dict]:
    """The runs of the MLP at fixed strengths, as the members of a population."""
    regression, outputs, (fit, valid, test) = data
    members = [build("mlp", fit[0].shape[1], outputs, seed) for _ in strengths]
    loss = nn.functional.mse_loss if regression else nn.functional.cross_entropy
    rows = len(fit[0])
    settings = Hyperparameters(
        lr=torch.full((len(strengths),), LR), weight_decay={"*": torch.tensor(strengths)}
    )
    population = Population(
        members, settings, objective=RowLosses(loss), example=fit[0][:BATCH],
        steps=epochs * (rows // BATCH),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator)
        for i in range(rows // BATCH):
            batch = order[i * BATCH : (i + 1) * BATCH]
            population.step(fit[0][batch], fit[1][batch], None, step, seed=step)
            step += 1
    scores = [population.row_losses(x, y).mean(1) for x, y in (valid, test)]
    scores = [part.sqrt() if regression else part for part in scores]
    pairs = zip(strengths, *(part.tolist() for part in scores))
    return {str(s): {"valid": on_valid, "test": on_test} for s, on_valid, on_test in pairs}


def adapting(**options):
    return lambda valid, loss, steps: tk.Hypergradient(valid, loss, steps=steps, **options)


def one_step(valid, loss, steps):
    """The plain T1-T2 rule: all memory of the sensitivity is damped away at every step."""
    return tk.Hypergradient(valid, loss, steps=steps, damping=math.inf, caution=1.0)


ARMS = {"adapting": adapting(), "one strength": adapting(per="term"), "one-step": one_step}


def cell(folder, name, kind, split, epochs) -> dict:
    """All runs of one data set and split; plain runs before and after the adapting one."""
    data = load(folder, name, split)
    setting = {"epochs": epochs, "seed": split}
    fixed = list(dict.fromkeys((*GRID, *DENSE, 0.0)))
    middle = GRID[len(GRID) // 2]
    plain = [train(kind, data, middle, **setting)[0]]
    runs: dict[str, dict] = {}
    for arm, strength in ARMS.items():
        runs[arm], reg = train(kind, data, strength, **setting)
        if arm == "adapting":
            plain.append(train(kind, data, middle, **setting)[0])
            runs["refit"], _ = train(kind, data, 0.0, **setting, replay=reg)
    if kind == "mlp":
        runs |= side_by_side(data, fixed, **setting)
    else:
        runs |= {str(s): train(kind, data, s, **setting)[0] for s in fixed if s != middle}
        runs[str(middle)] = plain[0]
    cpu = [run["cpu"] for run in plain]
    return {"data": name, "model": kind, "split": split, "epochs": epochs, "cpu": cpu,
            "separate": plain[0]["test"], "runs": runs}  # fmt: skip


def summary(cells: list[dict], grid: tuple[float, ...]) -> list[dict]:
    """One row a data set and model: geometric means of the test-loss ratios to the choice."""
    rows = []
    for key in dict.fromkeys((c["data"], c["model"]) for c in cells):
        mine = [c["runs"] for c in cells if (c["data"], c["model"]) == key]
        choice = [min((r[str(g)] for g in grid), key=lambda run: run["valid"]) for r in mine]
        one = [np.mean(c["cpu"]) for c in cells if (c["data"], c["model"]) == key]

        def ratio(arm, mine=mine, choice=choice):
            logs = [math.log(r[arm]["test"] / c["test"]) for r, c in zip(mine, choice)]
            return math.exp(sum(logs) / len(logs))

        rows.append(
            {"data": key[0], "model": key[1], "splits": len(mine),
             **{arm: ratio(arm) for arm in (*ARMS, "refit")}, "none": ratio("0.0"),
             "0.01": ratio("0.01"), **{f"fixed {g}": ratio(str(g)) for g in grid},
             "cost": float(np.median([r["adapting"]["cpu"] / t for r, t in zip(mine, one)]))}
        )  # fmt: skip
    return rows


def show(rows: list[dict], title: str) -> None:
    if not rows:
        return
    fixed = [arm for arm in rows[0] if arm.startswith("fixed")]
    mean = {a: math.exp(np.mean([math.log(r[a]) for r in rows])) for a in rows[0] if a in {
        *ARMS, "refit", "0.01", "none", *fixed}}  # fmt: skip
    best = min(fixed, key=mean.__getitem__)
    arms = [*ARMS, "refit", best, "0.01", "none"]
    print(f"\n### {title}\n")
    print("| data | model | splits | " + " | ".join(arms) + " | CPU of one run |")
    print("|---|---|---|" + "---|" * (len(arms) + 1))
    for r in rows:
        values = " | ".join(f"{r[a]:.2f}" for a in arms)
        print(f"| {r['data']} | {r['model']} | {r['splits']} | {values} | {r['cost']:.2f} |")
    worst = {a: max(r[a] for r in rows) for a in arms}
    cost = np.median([r["cost"] for r in rows])
    print("| **geometric mean** | | | " + " | ".join(f"{mean[a]:.3f}" for a in arms)
          + f" | {cost:.2f} |")  # fmt: skip
    print("| **worst** | | | " + " | ".join(f"{worst[a]:.2f}" for a in arms) + " | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the .npz data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/hypergradient.jsonl"))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--sets", help="comma-separated names, instead of all")
    parser.add_argument("--model", choices=("mlp", "convnet"), help="instead of both")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop, to be continued")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        plan = [(n, "mlp", s, 60) for n in ("breast_cancer", "wine", "diabetes") for s in (0, 1)]
        options.data, options.output = None, options.output.with_suffix(".quick.jsonl")
    else:
        if options.data is None:
            parser.error("--data FOLDER is needed for the full benchmark (or --quick)")
        splits = range(options.splits)
        names = options.sets.split(",") if options.sets else REPORT
        images = options.sets.split(",") if options.sets else CONVOLUTIONAL
        plan = [(n, "mlp", s, 60) for s in splits for n in names]
        plan += [(n, "convnet", s, 20) for s in splits for n in images if n in CONVOLUTIONAL]
        plan = [cell for cell in plan if options.model in (None, cell[1])]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    cells = [json.loads(line) for line in lines]
    done = {(c["data"], c["model"], c["split"]) for c in cells}
    began = time.monotonic()
    for name, kind, split, epochs in plan:
        if (name, kind, split) in done or time.monotonic() - began > options.seconds:
            continue
        cells.append(cell(options.data, name, kind, split, epochs))
        with options.output.open("a") as file:
            file.write(json.dumps(cells[-1]) + "\n")
    for label, grid in (("even grid over the same range", GRID), ("dense grid by hand", DENSE)):
        rows = summary(cells, grid)
        mlp, images = ([r for r in rows if r["model"] == kind] for kind in ("mlp", "convnet"))
        if options.quick:
            show(mlp, f"MLP, {label}")
            continue
        show([r for r in mlp if r["data"] in REPORT], f"MLP, {label}")
        show([r for r in mlp if r["data"] in SELECTION], f"MLP, sets chosen on, {label}")
        show(images, f"ConvNets, {label}")
    if missing := [cell for cell in plan if cell[:3] not in {
        (c["data"], c["model"], c["split"]) for c in cells}]:  # fmt: skip
        print(f"\n{len(plan) - len(missing)} of {len(plan)} cells measured")


if __name__ == "__main__":
    main()
