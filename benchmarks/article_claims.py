"""Does regularization lower the risk of vanishing gradients? The article's claim, measured.

Networks of 10 hidden layers of 64 units learn digits for 300 steps of 64 rows. The signal ratio is
the norm of the data loss's gradient at the first hidden layer's pre-activations over that at the
last hidden layer's: at initialisation and after 50 steps, with the noise of the treatment on.
Every treatment trains under Adam and under SGD with momentum 0.9, at the learning rate of a grid
that is best on validation rows (mean over 2 seeds). Printed: the ratio's geometric mean over seeds
and the accuracy on test rows, which nothing was chosen on, with its range.

    python benchmarks/article_claims.py                 # 3 activations, 5 seeds, about 10 minutes
    python benchmarks/article_claims.py --quick         # 1 seed
    python benchmarks/article_claims.py --optimizer SGD --output claims.json    # half of it
    python benchmarks/article_claims.py --picture docs/images/gradients.svg --output claims.json
    python benchmarks/article_claims.py --replay claims.json --picture docs/images/gradients.svg
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tikhon as tk

DEPTH, WIDTH, STEPS, EARLY, BATCH = 10, 64, 300, 50, 64
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}
RATES = {"Adam": (3e-4, 1e-3, 3e-3), "SGD": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
GAINS = {"sigmoid": 4.0, "tanh": 5 / 3, "ReLU": 2**0.5}  # xavier's, so that the signal keeps size


@dataclass(frozen=True)
class Treatment:
    name: str
    penalty: tk.Penalty | None = None
    rate: float = 0.0
    norm: Callable[[int], nn.Module] | None = None
    residual: bool = False
    good_init: bool = False
    clip: float | None = None


TREATMENTS = [
    Treatment("none"),
    Treatment("L1 1e-5", penalty=tk.L1(1e-5)),
    Treatment("L1 1e-3", penalty=tk.L1(1e-3)),
    Treatment("L2 1e-4", penalty=tk.L2(1e-4)),
    Treatment("L2 1e-2", penalty=tk.L2(1e-2)),
    Treatment("dropout 0.1", rate=0.1),
    Treatment("dropout 0.3", rate=0.3),
    Treatment("dropout 0.5", rate=0.5),
    Treatment("clipping 1.0", clip=1.0),
    Treatment("good init", good_init=True),
    Treatment("BatchNorm", norm=nn.BatchNorm1d),
    Treatment("LayerNorm", norm=nn.LayerNorm),
    Treatment("residual", residual=True),
]


class Block(nn.Module):
    """Linear, perhaps normalisation, activation, dropout; perhaps around a shortcut."""

    def __init__(self, inputs: int, activation: str, treatment: Treatment) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH)
        self.norm = treatment.norm(WIDTH) if treatment.norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]()
        self.noise = tk.layers.Dropout(treatment.rate)
        self.shortcut = treatment.residual and inputs == WIDTH
        if treatment.good_init:
            nn.init.xavier_normal_(self.linear.weight, GAINS[activation])
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.noise(self.activation(self.norm(self.linear(x))))
        return x + y if self.shortcut else y


def build(activation: str, treatment: Treatment, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [64] + [WIDTH] * (DEPTH - 1)
    return nn.Sequential(*(Block(n, activation, treatment) for n in sizes), nn.Linear(WIDTH, 10))


@functools.cache
def data(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of digits, standardised by the training rows; the test rows are those of every seed."""
    X, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1000))
    test, rest = order[:270], order[270:]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    rows = {"train": rest[:1257], "valid": rest[1257:], "test": test}
    X = X.float()
    X = (X - X[rows["train"]].mean(0)) / X[rows["train"]].std(0).clamp_min(1.0)
    return {name: (X[chosen], y[chosen]) for name, chosen in rows.items()}


def signal_ratio(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Gradient of the data loss at the first hidden layer over that at the last."""
    seen: list[Tensor] = []
    ends = (model[0].linear, model[DEPTH - 1].linear)
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in ends]
    state = {k: v.clone() for k, v in model.state_dict().items()}  # BatchNorm moves
    loss = F.cross_entropy(model(x), y)
    first, last = torch.autograd.grad(loss, seen)
    for handle in handles:
        handle.remove()
    model.load_state_dict(state)
    return (first.double().norm() / last.double().norm()).item()


def make_optimizer(name: str, parameters, rate: float) -> torch.optim.Optimizer:
    if name == "Adam":
        return torch.optim.Adam(parameters, lr=rate)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def train(
    activation: str, treatment: Treatment, optimizer: str, rate: float, seed: int
) -> dict[str, float]:
    """One network: its ratios and its accuracies."""
    rows = data(seed)
    X, y = rows["train"]
    model = build(activation, treatment, seed)
    step = make_optimizer(optimizer, model.parameters(), rate)
    if treatment.penalty:
        tk.regularize(model, step, treatment.penalty)
    found = {"init": signal_ratio(model, X[:256], y[:256])}
    for k in range(STEPS):
        batch = torch.randint(len(X), (BATCH,))
        step.zero_grad()
        F.cross_entropy(model(X[batch]), y[batch]).backward()
        if treatment.clip:
            nn.utils.clip_grad_norm_(model.parameters(), treatment.clip)
        step.step()
        if k + 1 == EARLY:
            found["early"] = signal_ratio(model, X[:256], y[:256])
    model.eval()
    with torch.no_grad():
        for name, (inputs, labels) in rows.items():
            found[name] = (model(inputs).argmax(1) == labels).float().mean().item()
    return found


def best_rate(activation: str, treatment: Treatment, optimizer: str, seeds: int) -> float:
    """The learning rate of the grid with the best validation accuracy (the smallest of equals)."""

    def accuracy(rate: float) -> float:
        runs = [train(activation, treatment, optimizer, rate, seed) for seed in range(seeds)]
        return sum(run["valid"] for run in runs)

    return max(RATES[optimizer], key=accuracy)


def geometric(values: list[float]) -> float:
    """Geometric mean; 0 if any value is 0 (or NaN: a network that diverged)."""
    alive = all(value > 0 for value in values)
    return math.exp(sum(map(math.log, values)) / len(values)) if alive else 0.0


def summary(runs: list[dict[str, float]], rate: float) -> dict[str, float]:
    test = [run["test"] for run in runs]
    return {
        "rate": rate,
        "init": geometric([run["init"] for run in runs]),
        "early": geometric([run["early"] for run in runs]),
        "train": sum(run["train"] for run in runs) / len(runs),
        "test": sum(test) / len(test),
        "lowest": min(test),
        "highest": max(test),
    }


def measure(seeds: int, optimizers: list[str], output: Path | None) -> dict:
    """Every cell; with `output`, saved after each row and continued from there."""
    results: dict = {}
    if output and output.exists():
        results = json.loads(output.read_text())["results"]
    for optimizer in optimizers:
        for activation in ACTIVATIONS:
            rows = results.setdefault(activation, {}).setdefault(optimizer, {})
            columns = f"{'lr':>8}{'at init':>10}{'step 50':>10}{'test':>8}"
            print(f"\n{activation}, {optimizer}\n{'':14}{columns}")
            for treatment in TREATMENTS:
                if treatment.name not in rows:
                    cell = (activation, treatment, optimizer)
                    rate = best_rate(*cell, seeds=min(2, seeds))
                    runs = [train(*cell, rate, seed) for seed in range(seeds)]
                    rows[treatment.name] = summary(runs, rate)
                row = rows[treatment.name]
                numbers = f"{row['rate']:8.0e}{row['init']:10.0e}{row['early']:10.0e}"
                numbers += f"{row['test']:8.2f}"
                span = f"  ({row['lowest']:.2f} to {row['highest']:.2f})"
                print(f"{treatment.name:14}{numbers}{span}", flush=True)
                if output:
                    saved = {"schema_version": 1, "seeds": seeds, "results": results}
                    output.write_text(json.dumps(saved, indent=1))
    return results


def table(results: dict, optimizer: str) -> str:
    """The Markdown table of the documentation."""
    heads = " | ".join(f"{a}: lr, init, step 50, accuracy" for a in results)
    lines = [f"| {optimizer} | {heads} |", "|---|" + "---|" * len(results)]
    for treatment in TREATMENTS:
        cells = [results[a][optimizer][treatment.name] for a in results]
        parts = [
            f"{c['rate']:.0e}, {c['init']:.0e}, {c['early']:.0e}, **{c['test']:.2f}**"
            for c in cells
        ]
        lines.append(f"| {treatment.name} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def draw(results: dict, seeds: int, path: Path) -> None:
    """Signal ratio and final accuracy of every treatment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "tikhon"})
    optimizers = list(next(iter(results.values())))
    figure, axes = plt.subplots(
        len(optimizers), len(results), figsize=(10, 0.6 + 3.8 * len(optimizers)), squeeze=False
    )
    for row, optimizer in zip(axes, optimizers, strict=True):
        for axis, activation in zip(row, results, strict=True):
            _panel(axis, results[activation][optimizer], labelled=axis is row[0])
            axis.set_title(f"{activation}, {optimizer}")
    for axis in axes[-1]:
        axis.set_xlabel("signal ratio, first / last")
    figure.suptitle(
        f"Ten hidden layers on digits, {seeds} seeds: ring at initialisation, dot after {EARLY} "
        f"steps;\nright: test accuracy after {STEPS} steps; shaded: vanished",
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _panel(axis, rows: dict[str, dict[str, float]], *, labelled: bool) -> None:
    names = [treatment.name for treatment in TREATMENTS]
    axis.axvspan(1e-13, 1e-3, color="#c44e52", alpha=0.08, lw=0)
    for k, name in enumerate(names):
        row = rows[name]
        start, end = (max(row[key], 1e-12) for key in ("init", "early"))
        axis.plot([start, end], [k, k], color="#b0b0b0", lw=1, zorder=1)
        axis.scatter(start, k, s=26, facecolor="white", edgecolor="#404040", zorder=2)
        axis.scatter(end, k, s=26, color="#404040", zorder=3, clip_on=False)
        reached = row["test"]
        color = "#2a7f3f" if reached > 0.9 else "#404040" if reached > 0.5 else "#c44e52"
        axis.text(2e2, k, f"{reached:.2f}", va="center", color=color)
    axis.set(xscale="log", xlim=(1e-12, 3e3))
    axis.set_xticks([1e-12, 1e-9, 1e-6, 1e-3, 1])
    axis.set_yticks(range(len(names)), names if labelled else [""] * len(names))
    axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--optimizer", choices=list(RATES), action="append")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--replay", type=Path, help="results of an earlier run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.replay:
        saved = json.loads(options.replay.read_text())
        results, seeds = saved["results"], saved["seeds"]
    else:
        seeds = 1 if options.quick else 5
        results = measure(seeds, options.optimizer or list(RATES), options.output)
    for optimizer in next(iter(results.values())):
        print("\n" + table(results, optimizer))
    if options.picture:
        draw(results, seeds, options.picture)


if __name__ == "__main__":
    main()
