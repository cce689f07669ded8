"""Monte-Carlo dropout against one deterministic pass on digits: calibration and rejection.

A network of two hidden layers of 128 units with dropout learns 300 rows of digits and predicts the
other 1497 rows, as they are and with normal noise added (a shift that it was not trained on), once
in evaluation mode and by the mean of 50 noisy passes. Printed are means over seeds with their
standard error: accuracy, log-loss, calibration error (15 bins) and the accuracy on the 80 % of
rows that each is surest of.

    python benchmarks/montecarlo.py                     # 5 seeds, about a minute
    python benchmarks/montecarlo.py --picture docs/images/montecarlo.svg
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tikhon import layers

SHIFTS = {"as trained": 0.0, "noise 2": 2.0, "noise 4": 4.0}  # in sixteenths of the pixel range
SEEDS, ROWS, SAMPLES, STEPS = 5, 300, 50, 600


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    return X[order[:ROWS]].float(), y[order[:ROWS]], X[order[ROWS:]].float(), y[order[ROWS:]]


def train(X: Tensor, y: Tensor, seed: int, rate: float) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        layers.Dropout(rate),
        nn.Linear(128, 128),
        nn.ReLU(),
        layers.Dropout(rate),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(X), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(X[rows] / 16), y[rows]).backward()
        optimizer.step()
    return model.eval()


def judge(probabilities: Tensor, uncertainty: Tensor, y: Tensor) -> dict:
    correct = probabilities.argmax(1) == y
    rejected, curve = layers.accuracy_rejection(uncertainty, correct, torch.arange(0, 0.6, 0.05))
    chosen = probabilities[torch.arange(len(y)), y].clamp_min(1e-12)
    return {
        "accuracy": correct.float().mean().item(),
        "log-loss": -chosen.log().mean().item(),
        "ECE": layers.expected_calibration_error(probabilities, y),
        "at 80 %": curve[(rejected - 0.2).abs().argmin()].item(),
        "curve": curve.tolist(),
        "rejected": rejected.tolist(),
    }


def run(seed: int, rate: float) -> dict[str, dict[str, dict]]:
    X, y, X_test, y_test = data(seed)
    model, found = train(X, y, seed, rate), {}
    for name, size in SHIFTS.items():
        torch.manual_seed(seed)
        shifted = (X_test + size * torch.randn_like(X_test)) / 16
        with torch.no_grad():
            once = model(shifted).softmax(1)
        spread = layers.predict_distribution(model, shifted, samples=SAMPLES)
        found[name] = {
            "one pass": judge(once, torch.special.entr(once).sum(1), y_test),
            "MC, entropy": judge(spread.mean, spread.entropy, y_test),
            "MC, mutual information": judge(spread.mean, spread.mutual_information, y_test),
        }
    return found


def draw(runs: list[dict], path: Path) -> None:
    """Accuracy against the rejected share, for every shift."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "tikhon"})
    figure, axes = plt.subplots(1, len(SHIFTS), figsize=(10, 3.2))
    colors = {"one pass": "#8c8c8c", "MC, entropy": "#1d4ed8", "MC, mutual information": "#c2410c"}
    for axis, name in zip(axes, SHIFTS, strict=True):
        for way, color in colors.items():
            curves = torch.tensor([one[name][way]["curve"] for one in runs])
            share = torch.tensor(runs[0][name][way]["rejected"]) * 100
            axis.plot(share, curves.mean(0), color=color, label=way)
            error = curves.std(0) / len(runs) ** 0.5
            low, high = curves.mean(0) - error, curves.mean(0) + error
            axis.fill_between(share, low, high, color=color, alpha=0.15, lw=0)
        axis.set(title=name, xlabel="rejected, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on the rest")
    axes[-1].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed, options.rate) for seed in range(options.seeds)]
    columns = ("accuracy", "log-loss", "ECE", "at 80 %")
    print("| test rows | prediction | " + " | ".join(columns) + " |\n|---|---|" + "---|" * 4)
    for name in SHIFTS:
        for way in runs[0][name]:
            cells = []
            for column in columns:
                values = [one[name][way][column] for one in runs]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}")
            print(f"| {name} | {way} | " + " | ".join(cells) + " |")
    if options.picture:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
