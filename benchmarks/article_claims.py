"""Does regularization lower the risk of vanishing gradients? The article's claim, measured.

Networks of 10 hidden layers of 64 units learn digits for 300 steps of 64 rows. The signal ratio is
the norm of the data loss's gradient at the first hidden layer's pre-activations over that at the
last hidden layer's: at initialisation and after 50 steps, with the noise of the treatment on.
Printed: its geometric mean over seeds, and the final validation accuracy with its range.

    python benchmarks/article_claims.py                 # 3 activations, 5 seeds, about 10 minutes
    python benchmarks/article_claims.py --quick         # 1 seed
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
def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation rows of digits, standardised by the training rows."""
    X, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    train, valid = order[:1257], order[1257:]
    X = X.float()
    X = (X - X[train].mean(0)) / X[train].std(0).clamp_min(1.0)
    return X[train], y[train], X[valid], y[valid]


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


def train(activation: str, treatment: Treatment, optimizer: str, seed: int) -> dict[str, float]:
    """One network: its ratios and its accuracy."""
    X, y, X_valid, y_valid = data(seed)
    model = build(activation, treatment, seed)
    make = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[optimizer]
    step = make(model.parameters(), lr={"Adam": 1e-3, "SGD": 0.1}[optimizer])
    if treatment.penalty:
        tk.regularize(model, step, treatment.penalty)
    found = {"init": signal_ratio(model, X[:256], y[:256])}
    for k in range(STEPS):
        rows = torch.randint(len(X), (BATCH,))
        step.zero_grad()
        F.cross_entropy(model(X[rows]), y[rows]).backward()
        if treatment.clip:
            nn.utils.clip_grad_norm_(model.parameters(), treatment.clip)
        step.step()
        if k + 1 == EARLY:
            found["early"] = signal_ratio(model, X[:256], y[:256])
    model.eval()
    with torch.no_grad():
        found["train"] = (model(X).argmax(1) == y).float().mean().item()
        found["valid"] = (model(X_valid).argmax(1) == y_valid).float().mean().item()
    return found


def geometric(values: list[float]) -> float:
    """Geometric mean; 0 if any value is 0."""
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    valid = [run["valid"] for run in runs]
    return {
        "init": geometric([run["init"] for run in runs]),
        "early": geometric([run["early"] for run in runs]),
        "train": sum(run["train"] for run in runs) / len(runs),
        "valid": sum(valid) / len(valid),
        "lowest": min(valid),
        "highest": max(valid),
    }


def measure(seeds: int, output: Path | None) -> dict:
    """Every cell; with `output`, saved after each row and continued from there."""
    results: dict = {}
    if output and output.exists():
        results = json.loads(output.read_text())["results"]
    for optimizer in ("Adam", "SGD"):
        for activation in ACTIVATIONS:
            rows = results.setdefault(activation, {}).setdefault(optimizer, {})
            print(
                f"\n{activation}, {optimizer}\n{'':14}{'at init':>10}{'step 50':>10}{'valid':>8}"
            )
            for treatment in TREATMENTS:
                if treatment.name not in rows:
                    runs = [train(activation, treatment, optimizer, s) for s in range(seeds)]
                    rows[treatment.name] = summary(runs)
                row = rows[treatment.name]
                numbers = f"{row['init']:10.0e}{row['early']:10.0e}{row['valid']:8.2f}"
                span = f"  ({row['lowest']:.2f} to {row['highest']:.2f})"
                print(f"{treatment.name:14}{numbers}{span}", flush=True)
                if output:
                    saved = {"schema_version": 1, "seeds": seeds, "results": results}
                    output.write_text(json.dumps(saved, indent=1))
    return results


def table(results: dict) -> str:
    """The Markdown table of the documentation."""
    lines = [
        "| treatment | " + " | ".join(f"{a}: init, step 50, accuracy" for a in results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for treatment in TREATMENTS:
        cells = [results[a]["Adam"][treatment.name] for a in results]
        parts = [f"{c['init']:.0e}, {c['early']:.0e}, **{c['valid']:.2f}**" for c in cells]
        lines.append(f"| {treatment.name} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def draw(results: dict, seeds: int, path: Path) -> None:
    """Signal ratio and final accuracy of every treatment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "tikhon"})
    names = [treatment.name for treatment in TREATMENTS]
    figure, axes = plt.subplots(1, len(results), figsize=(10, 4.2), sharey=True)
    for axis, (activation, by_optimizer) in zip(axes, results.items(), strict=True):
        rows = by_optimizer["Adam"]
        axis.axvspan(1e-13, 1e-3, color="#c44e52", alpha=0.08, lw=0)
        for k, name in enumerate(names):
            row = rows[name]
            start, end = (max(row[key], 1e-12) for key in ("init", "early"))
            axis.plot([start, end], [k, k], color="#b0b0b0", lw=1, zorder=1)
            axis.scatter(start, k, s=26, facecolor="white", edgecolor="#404040", zorder=2)
            axis.scatter(end, k, s=26, color="#404040", zorder=3, clip_on=False)
            color = (
                "#2a7f3f" if row["valid"] > 0.9 else "#404040" if row["valid"] > 0.5 else "#c44e52"
            )
            axis.text(2e2, k, f"{row['valid']:.2f}", va="center", color=color)
        axis.set(
            xscale="log", xlim=(1e-12, 3e3), title=activation, xlabel="signal ratio, first / last"
        )
        axis.set_xticks([1e-12, 1e-9, 1e-6, 1e-3, 1])
        axis.set_yticks(range(len(names)), names)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"Ten hidden layers on digits, Adam, {seeds} seeds: ring at initialisation, dot after "
        f"{EARLY} steps;\nright: validation accuracy after {STEPS} steps; shaded: vanished",
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
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
        results = measure(seeds, options.output)
    print("\n" + table(results))
    if options.picture:
        draw(results, seeds, options.picture)


if __name__ == "__main__":
    main()
