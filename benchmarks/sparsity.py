"""One run of `sparsify` against pruning as it is done today, at equal total steps.

Weights: against global magnitude pruning in one shot at half of the run, then fine-tuning, and
against gradual global magnitude pruning (the same cubic schedule, masks that only grow). Channels:
against filters of the smallest norm removed in one shot at half of the run, and against a small
network trained from scratch for the whole run. Accuracy on test rows, mean over the seeds.

    python benchmarks/sparsity.py --quick                    # one network, one seed
    python benchmarks/sparsity.py --output sparsity.jsonl    # resumes
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from no_harm import data
from torch import nn

import tikhon as tk

STEPS, LR = 900, 3e-3
WEIGHTS, CHANNELS = (0.9, 0.95, 0.98), (0.5, 0.75)


def network(kind: str, width: float = 1.0) -> nn.Module:
    """About 24,000 weights at width 1."""
    a, b, c = (max(1, round(width * n)) for n in (16, 32, 64))
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(64, 2 * c),
            nn.ReLU(),
            nn.Linear(2 * c, 2 * c),
            nn.ReLU(),
            nn.Linear(2 * c, 10),
        )
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10),
    )  # fmt: skip


def run(model: nn.Module, seed: int, act: Callable[[int], None]) -> float:
    """Test accuracy after STEPS steps; `act` is called after each."""
    rows, _, test = data(seed)
    optimizer = model.optimizer
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    left = iter(())
    for step in range(STEPS):
        i = next(left, None)
        if i is None:
            left = iter(torch.randperm(1000, generator=generator).split(32)[:-1])
            i = next(left)
        optimizer.zero_grad()
        F.cross_entropy(model(rows[0][i]), rows[1][i]).backward()
        optimizer.step()
        schedule.step()
        act(step + 1)
    model.eval()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim > 1]


@torch.no_grad()
def magnitude(model: nn.Module, share: float) -> list[torch.Tensor]:
    """Masks of the largest weights over the whole model."""
    flat = torch.cat([p.abs().flatten() for p in matrices(model)])
    edge = flat.kthvalue(max(1, round(share * len(flat)))).values
    return [(p.abs() > edge).to(p.dtype) for p in matrices(model)]


@torch.no_grad()
def filters(model: nn.Module, share: float) -> list[torch.Tensor]:
    """Masks of the hidden layers' output rows of the largest norm, with what follows each row."""
    masks, modules = [], list(model)
    weighted = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in weighted[:-1]:
        size = layer.weight.flatten(1).norm(dim=1)
        keep = torch.zeros_like(size)
        keep[size.topk(len(size) - round(share * len(size))).indices] = 1
        masks.append(keep)
    return masks


@torch.no_grad()
def apply_filters(model: nn.Module, masks: list[torch.Tensor]) -> None:
    modules = list(model)
    weighted = [i for i, m in enumerate(modules) if isinstance(m, nn.Linear | nn.Conv2d)]
    for i, keep in zip(weighted, masks):
        modules[i].weight.mul_(keep.view(-1, *[1] * (modules[i].weight.ndim - 1)))
        modules[i].bias.mul_(keep)
        if isinstance(modules[i + 1], nn.BatchNorm2d):
            modules[i + 1].weight.mul_(keep)
            modules[i + 1].bias.mul_(keep)


def train(kind: str, of: str, share: float, way: str, seed: int) -> float:
    torch.manual_seed(seed)
    model = network(kind, 1 - share if way == "from scratch" else 1.0)
    model.optimizer = torch.optim.Adam(model.parameters(), LR)
    masks: list[torch.Tensor] = []
    if way == "sparsify":
        tk.sparsify(
            model, model.optimizer, share, of=of, steps=STEPS, example=data(seed)[0][0][:2]
        )
        return run(model, seed, lambda step: None)

    def act(step: int) -> None:
        if way == "one shot" and step == STEPS // 2:
            masks[:] = (magnitude if of == "weights" else filters)(model, share)
        if way == "gradual" and step <= 0.65 * STEPS and step % 10 == 0:
            progress = max(0.0, (step / STEPS - 0.1) / 0.55)
            masks[:] = magnitude(model, max(1e-6, share * (1 - (1 - progress) ** 3)))
        if masks and of == "weights":
            with torch.no_grad():
                for p, mask in zip(matrices(model), masks):
                    p.mul_(mask)
        elif masks:
            apply_filters(model, masks)

    return run(model, seed, act)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds, seeds = (
        (("convnet",), range(20, 21)) if options.quick else (("convnet", "mlp"), range(20, 25))
    )
    done = {}
    if options.output and options.output.exists():
        for line in options.output.read_text().splitlines():
            row = json.loads(line)
            done[tuple(row["key"])] = row["accuracy"]
    ways = {"weights": ("one shot", "gradual", "sparsify"),
            "channels": ("one shot", "from scratch", "sparsify")}  # fmt: skip

    def mean(*cell) -> str:
        found = []
        for seed in seeds:
            key = (*cell, seed)
            if key not in done:
                done[key] = train(*cell, seed)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(json.dumps({"key": key, "accuracy": done[key]}) + "\n")
            found.append(done[key])
        spread = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        return f"{statistics.mean(found):.3f} ± {spread:.3f}"

    print("| network | what | share | dense | one shot | gradual / from scratch | sparsify |")
    print("|---|---|---|---|---|---|---|")
    for kind, (of, shares) in itertools.product(
        kinds, (("weights", WEIGHTS), ("channels", CHANNELS))
    ):
        for share in shares:
            cells = [mean(kind, of, share, way) for way in ways[of]]
            dense = mean(kind, "weights", 0.0, "dense")
            print(f"| {kind} | {of} | {share:.0%} | {dense} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
