"""Do strengths that adapt do harm? One run with them, one without decay, one with the default.

Each cell is a kind of network, an optimizer and a number of steps. It is trained three ways with
the same seeds: without decay, with the optimizer's default decay, and with decoupled
`L2(Hypergradient(...))`. Printed: test log-loss of the adapting run over the better of the other
two (means over the seeds), and the strengths it ended at. The law: never above 1.01.

    python benchmarks/no_harm.py --quick      # 6 short cells, one seed
    python benchmarks/no_harm.py --output no_harm.jsonl     # 24 cells, 3 seeds; resumes
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

OPTIMIZERS = {  # factory of (params, lr, decay), lr, default decay
    "adamw": (lambda p, lr, d: torch.optim.AdamW(p, lr, weight_decay=d), 3e-3, 0.01),
    "adam": (lambda p, lr, d: torch.optim.Adam(p, lr, weight_decay=d), 3e-3, 0.0),
    "sgd": (lambda p, lr, d: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=d), 0.05, 0.0),
    "muon": (lambda p, lr, d: torch.optim.Muon(p, lr, weight_decay=d), 0.02, 0.1),
}
CELLS = [  # a fractional design: every kind with every optimizer once, lengths spread
    ("mlp", "adamw", 60),
    ("mlp", "sgd", 300),
    ("mlp", "adam", 1200),
    ("mlp", "adamw", 5000),
    ("convnet", "adamw", 160),
    ("convnet", "sgd", 600),
    ("convnet", "adam", 60),
    ("convnet", "adamw", 2000),
    ("batchnorm", "adamw", 160),
    ("batchnorm", "sgd", 160),
    ("batchnorm", "adam", 600),
    ("batchnorm", "adamw", 60),
    ("batchnorm", "adamw", 2000),
    ("batchnorm", "sgd", 1200),
    ("lstm", "adamw", 300),
    ("lstm", "adam", 160),
    ("lstm", "sgd", 1200),
    ("transformer", "adamw", 160),
    ("transformer", "adam", 600),
    ("transformer", "adamw", 2000),
    ("finetune", "adamw", 60),
    ("finetune", "sgd", 160),
    ("finetune", "adam", 600),
    ("mlp", "muon", 600),
]


class Last(nn.Module):
    """The class scores from the last state of an LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])


class Patches(nn.Module):
    """A small transformer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x.view(-1, 8, 8)) + self.place).mean(1))


def network(kind: str) -> nn.Module:
    if kind == "lstm":
        return Last()
    if kind == "transformer":
        return Patches()
    if kind in ("convnet", "batchnorm"):
        layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
        for i, (a, b) in enumerate(((1, 16), (16, 32), (32, 64))):
            layers.append(nn.Conv2d(a, b, 3, padding=1))
            layers += [nn.BatchNorm2d(b)] if kind == "batchnorm" else []
            layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if i < 2 else [])]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    bias = kind != "muon"
    return nn.Sequential(
        nn.Linear(64, 64, bias=bias),
        nn.ReLU(),
        nn.Linear(64, 64, bias=bias),
        nn.ReLU(),
        nn.Linear(64, 10, bias=bias),
    )


def data(seed: int):
    """1000 training rows of noisy digits, 250 to validate, the rest to test."""
    x, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)
    x, y = torch.tensor(x, dtype=torch.float32)[rows] / 16, torch.tensor(y)[rows]
    x = x + 0.3 * torch.randn(x.shape, generator=generator)
    x = (x - x[:1000].mean()) / x[:1000].std()
    wrong = torch.rand(1000, generator=generator) < 0.05
    y[:1000][wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    return (x[:1000], y[:1000]), (x[1000:1250], y[1000:1250]), (x[1250:], y[1250:])


def pretrained(seed: int) -> nn.Module:
    """A perceptron that knows the even digits from the odd ones, with a new head."""
    (x, y), _, _ = data(seed + 100)
    model = network("mlp")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        i = torch.arange(32 * step, 32 * step + 32) % 1000
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i] % 2).backward()
        optimizer.step()
    model[-1] = nn.Linear(64, 10)
    return model


def train(kind: str, optimizer: str, steps: int, seed: int, way: str, **options) -> dict:
    train_rows, valid, test = data(seed)
    torch.manual_seed(seed)
    model = pretrained(seed) if kind == "finetune" else network(kind)
    make, lr, default = OPTIMIZERS[optimizer]
    lr = lr / 3 if kind == "finetune" else lr
    params = list(model.parameters())
    if optimizer == "muon":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.bias = None
        params = [p for p in model.parameters() if p.ndim == 2]
    chosen = make(params, lr, default if way == "default" else 0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
    handle = None
    said = []
    if way == "adapting":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            every = max(1, min(5, int(0.9 * steps) // 20))
            strength = tk.Hypergradient(
                valid, F.cross_entropy, steps=steps, every=every, **options
            )
            handle = tk.regularize(model, chosen, tk.L2(strength), how="decoupled")
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    rows = iter(())
    for _ in range(steps):
        i = next(rows, None)
        if i is None:
            rows = iter(torch.randperm(1000, generator=generator).split(32)[:-1])
            i = next(rows)
        chosen.zero_grad()
        F.cross_entropy(model(train_rows[0][i]), train_rows[1][i]).backward()
        chosen.step()
        schedule.step()
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        out = model(test[0])
    found = {} if handle is None else {k: round(v, 4) for k, v in handle.strengths().items()}
    return {
        "loss": float(F.cross_entropy(out, test[1])),
        "accuracy": float((out.argmax(1) == test[1]).float().mean()),
        "seconds": seconds,
        "strengths": found,
        "said": [str(w.message) for w in said],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="kinds to run, separated by commas")
    parser.add_argument("--per", default=None)
    parser.add_argument("--first-seed", type=int, default=10, help="0 to 2 chose the defaults")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [c for c in CELLS if c[2] <= 160][:6] if options.quick else CELLS
    cells = [c for c in cells if not options.only or c[0] in options.only.split(",")]
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    done = {}
    if options.output and options.output.exists():
        for line in options.output.read_text().splitlines():
            row = json.loads(line)
            done[tuple(row["key"])] = row
    more = {"per": options.per} if options.per else {}
    print(
        f"{'network':<12} {'optimizer':<7} {'steps':>5}  {'none':>7} {'default':>7} "
        f"{'adapting':>8}  {'ratio':>6}  accuracy"
    )
    ratios = []
    for cell in cells:
        means = {}
        for way, seed in itertools.product(("none", "default", "adapting"), seeds):
            if way == "default" and not OPTIMIZERS[cell[1]][2]:
                continue
            key = (*cell, seed, way)
            if key not in done:
                done[key] = {
                    "key": key,
                    **train(*cell, seed, way, **(more if way == "adapting" else {})),
                }
                if options.output:
                    with options.output.open("a") as file:
                        file.write(json.dumps(done[key]) + "\n")
            means.setdefault(way, []).append(done[key])
        loss = {w: sum(r["loss"] for r in rows) / len(rows) for w, rows in means.items()}
        accuracy = {w: sum(r["accuracy"] for r in rows) / len(rows) for w, rows in means.items()}
        best = min(loss["none"], loss.get("default", math.inf))
        ratios.append(loss["adapting"] / best)
        shown = f"{loss['default']:7.3f}" if "default" in loss else "      -"
        print(
            f"{cell[0]:<12} {cell[1]:<7} {cell[2]:>5}  {loss['none']:7.3f} {shown} "
            f"{loss['adapting']:8.3f}  {ratios[-1]:6.3f}  {accuracy['none']:.3f} -> "
            f"{accuracy['adapting']:.3f}  {means['adapting'][0]['strengths']}",
            flush=True,
        )
    above = sum(r > 1.01 for r in ratios)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(
        f"{len(ratios)} cells: {above} above 1.01, worst {max(ratios):.3f}, "
        f"geometric mean {mean:.3f}"
    )


if __name__ == "__main__":
    main()
