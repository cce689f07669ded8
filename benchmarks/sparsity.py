"""One run of `sparsify` against pruning as it is published, at equal steps.

Small networks: a convolutional one with BatchNorm on noisy digits and on MNIST (10,000 rows, 14 x
14), a perceptron on the table satimage, a GPT over characters of Python's own help texts. Ways:
`pruners.py`. A way has a few settings (learning rates, strengths, intervals); the one with the
best loss on validation rows, at one share and a seed of its own, is run on the others. The test
rows are read once for each cell, at its end.

    python benchmarks/sparsity.py --quick                           # one network, one seed
    python benchmarks/sparsity.py --folder cells --data-dir DIR     # resumes: one JSON a cell
    python benchmarks/sparsity.py --folder cells --table            # what is there

Without --data-dir (MNIST's IDX files, satimage.npz) the digits and the GPT run alone; without
torchao or torch-pruning (pip) their ways are left out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from no_harm import data as digits
from pruners import PRUNERS, matrices
from torch import Tensor, nn

import tikhon as tk
from tikhon.compaction import speedup
from tikhon.data import load, split

Pair = tuple[Tensor, Tensor]
WEIGHTS, CHANNELS = (0.9, 0.95, 0.98), (0.5, 0.75)
CHOICE = {"weights": 0.95, "channels": 0.5}  # the share at which settings are chosen
CHOICE_SEED, SEEDS = 100, (20, 21, 22)
RATES = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)]
RESTART = {"lr": 3e-3, "restart": True}  # the learning rate begins again after the cut
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "one shot": [*RATES, RESTART],
    "filter norm": [*RATES, RESTART],
    "slimming": [
        {"lr": 3e-3, "strength": 1e-4},
        {"lr": 3e-3, "strength": 1e-3},
        {"lr": 3e-3, "strength": 1e-2},
        {"lr": 1e-2, "strength": 1e-3},
    ],
    "RigL": [{"lr": lr, "every": every} for lr in (3e-3, 1e-2) for every in (20, 60)],
    "DepGraph": [*RATES, RESTART],
    "SET": [{"lr": lr, "every": every} for lr in (3e-3, 1e-2) for every in (20, 60)],
}
NEEDS = {"PAT": "torchao", "DepGraph": "torch_pruning"}  # left out where they are not installed
WAYS = {
    "weights": ("one shot", "gradual", "torch prune", "RigL", "SET", "PAT", "sparsify"),
    "channels": ("filter norm", "DepGraph", "slimming", "small from scratch", "sparsify"),
}


@dataclass(frozen=True)
class Work:
    """A network with its data: a chance to be pruned."""

    build: Callable[[float], nn.Module]  # of a width
    rows: Callable[[int], tuple[Pair, Pair, Pair]]  # of a seed: train, valid, test
    steps: int
    batch: int
    kinds: tuple[str, ...] = ("weights", "channels")


def convnet(side: int, width: float = 1.0) -> nn.Module:
    a, b, c = (max(1, round(width * n)) for n in (16, 32, 64))
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10),
    )  # fmt: skip


def perceptron(width: float = 1.0) -> nn.Module:
    n = max(1, round(128 * width))
    return nn.Sequential(
        nn.Linear(36, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 6)
    )  # fmt: skip


class Block(nn.Module):
    """Causal attention and a perceptron, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.qkv(self.first(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    """Two blocks over characters."""

    def __init__(self, letters: int, width: int = 48, context: int = 48) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        places = self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.letter(x) + places))).transpose(1, 2)


@functools.cache
def letters() -> tuple[Tensor, int]:
    """Python's help texts as numbers: the 60 most frequent characters, the rest is one."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    common = sorted(set(text), key=lambda c: (-text.count(c), c))[:60]
    numbers = {c: i for i, c in enumerate(common)}
    return torch.tensor([numbers.get(c, 60) for c in text]), 61


def passages(seed: int) -> tuple[Pair, Pair, Pair]:
    """4,000 passages of 48 characters from 80 % of the text, 500 from each other 10 %."""
    text, _ = letters()
    generator = torch.Generator().manual_seed(seed)
    edges = [0, int(0.8 * len(text)), int(0.9 * len(text)), len(text)]

    def some(count: int, first: int, last: int) -> Pair:
        starts = torch.randint(first, last - 49, (count, 1), generator=generator)
        return text[starts + torch.arange(48)], text[starts + torch.arange(1, 49)]

    counts = (4000, 500, 500)
    return tuple(some(n, a, b) for n, a, b in zip(counts, edges, edges[1:]))  # type: ignore


def drawn(x: Tensor, y: Tensor, seed: int, *counts: int) -> tuple[Pair, ...]:
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return tuple((x[i], y[i]) for i in rows[: sum(counts)].split(list(counts)))


@functools.cache
def satimage(data_dir: str) -> tuple[Tensor, Tensor]:
    table = load("satimage", data_dir=data_dir)
    return (table.x - table.x.mean(0)) / table.x.std(0), table.y


@functools.cache
def mnist(data_dir: str) -> tuple[Pair, Pair]:
    parts = split(load("mnist", data_dir=data_dir), seed=0)

    def smaller(x: Tensor) -> Tensor:
        small = F.avg_pool2d(x.reshape(-1, 1, 28, 28), 2).flatten(1)
        return (small - 0.13) / 0.27

    return (smaller(parts.train.x), parts.train.y), (smaller(parts.test.x), parts.test.y)


def works(data_dir: str | None) -> dict[str, Work]:
    def some_of_mnist(seed: int) -> tuple[Pair, Pair, Pair]:
        train, test = mnist(data_dir)
        return (*drawn(*train, seed, 10_000, 5_000), test)  # type: ignore

    def table(seed: int) -> tuple[Pair, Pair, Pair]:
        return drawn(*satimage(data_dir), seed, 3_000, 1_000, 2_000)  # type: ignore

    found = {"digits": Work(functools.partial(convnet, 8), digits, 900, 32)}
    if data_dir:
        found["satimage"] = Work(perceptron, table, 900, 64)
    found["gpt"] = Work(lambda width: GPT(letters()[1]), passages, 400, 16, ("weights",))
    if data_dir:
        found["mnist"] = Work(functools.partial(convnet, 14), some_of_mnist, 624, 64)
    return found


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: count // size]


def judged(model: nn.Module, rows: Pair) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        out = model(rows[0])
    wrong = float((out.argmax(1) != rows[1]).float().mean())
    return {"loss": float(F.cross_entropy(out, rows[1])), "wrong": wrong}


def train(
    work: Work, of: str, share: float, way: str, setting: dict, seed: int, part: int
) -> dict:
    """One run; `part` 1 reads the validation rows at its end, 2 the test rows."""
    rows = work.rows(seed)
    torch.manual_seed(seed)
    model = work.build(1 - share if way == "small from scratch" else 1.0)
    options = {k: v for k, v in setting.items() if k not in ("lr", "restart")}
    if way in ("sparsify", "DepGraph"):
        options["example"] = rows[0][0][:2]
    if way == "sparsify":
        options["of"] = of
    optimizer = torch.optim.Adam(model.parameters(), setting["lr"])
    began = time.process_time()
    pruner = PRUNERS[way](model, optimizer, share, work.steps, **options)
    cycle = work.steps // 2 if setting.get("restart") else work.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * (t % cycle) / cycle)) / 2
    )
    order = batches(len(rows[0][0]), work.batch, seed)
    for step in range(1, work.steps + 1):
        i = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(rows[0][0][i]), rows[0][1][i]).backward()
        pruner.gradients(step)
        pruner.step()
        schedule.step()
        pruner.after(step)
    zeros = sum(int((p == 0).sum()) for p in matrices(model))
    weights = sum(p.numel() for p in matrices(model))
    found = judged(model, rows[part]) | {"zeros": zeros / weights}
    if of == "channels" and way != "dense":
        small = tk.compact(model, rows[0][0][:4])
        found |= {
            "parameters": small.compaction.parameters[1],
            "flops": small.compaction.flops[1],
        }
    return found | {"seconds": time.process_time() - began}


@dataclass(frozen=True)
class Bench:
    """The cells of a folder: each is run once."""

    works: dict[str, Work]
    folder: Path | None
    only_read: bool = False
    ways: tuple[str, ...] = tuple(PRUNERS)

    def cell(self, *key: Any) -> dict | None:
        """Of a work, a kind, a share, a way, a setting, a seed and the part that judges."""
        name, of, share, way, setting, seed, part = key
        told = "_".join(f"{k}{v:g}" for k, v in setting.items()).replace("restartTrue", "restart")
        text = f"{name} {of} {share:g} {way} {told} {seed} {('', 'valid', 'test')[part]}"
        path = self.folder / (text.replace(" ", "-") + ".json") if self.folder else None
        if path and path.exists():
            return json.loads(path.read_text())
        if self.only_read:
            return None
        found = train(self.works[name], of, share, way, setting, seed, part)
        print(text, json.dumps(found), flush=True)
        if path:
            path.write_text(json.dumps({"schema_version": 1, "cell": text, **found}) + "\n")
        return found

    def setting(self, name: str, of: str, way: str) -> dict | None:
        """The one with the best loss on the validation rows."""
        share = CHOICE[of] if way != "dense" else 0.0
        options = SETTINGS.get(way, RATES)
        scores = [self.cell(name, of, share, way, s, CHOICE_SEED, 1) for s in options]
        pairs = [(s["loss"], i) for i, s in enumerate(scores) if s is not None]
        return options[min(pairs)[1]] if len(pairs) == len(options) else None

    def results(self, name: str, of: str, share: float, way: str, seeds) -> list[dict]:
        setting = self.setting(name, of, way) if way in self.ways else None
        if setting is None:
            return []
        found = [self.cell(name, of, share, way, setting, seed, 2) for seed in seeds]
        return [one for one in found if one is not None]


def cells(works: dict[str, Work]) -> Iterator[tuple[str, str, float, str]]:
    for name, work in works.items():
        yield name, "weights", 0.0, "dense"
        for of in work.kinds:
            for share in WEIGHTS if of == "weights" else CHANNELS:
                for way in WAYS[of]:
                    if way != "slimming" or name != "satimage":  # it needs norms
                        yield name, of, share, way


def told(results: list[dict], name: str) -> str:
    """Mean and standard error of a cell: the loss of the GPT, wrong answers in % elsewhere."""
    if not results:
        return ""
    values = [r["loss"] if name == "gpt" else 100 * r["wrong"] for r in results]
    if len(values) == 1:
        return f"{values[0]:.2f} (one seed)"
    error = statistics.stdev(values) / len(values) ** 0.5
    few = "" if len(values) == len(SEEDS) else f" ({len(values)} seeds)"
    return f"{statistics.mean(values):.2f} ± {error:.2f}{few}"


def table(bench: Bench, seeds) -> None:
    for of in ("weights", "channels"):
        print(f"\n| {of} | share | dense | {' | '.join(WAYS[of])} |")
        print("|---" * (3 + len(WAYS[of])) + "|")
        for name, work in bench.works.items():
            if of not in work.kinds:
                continue
            dense = told(bench.results(name, "weights", 0.0, "dense", seeds), name)
            for share in WEIGHTS if of == "weights" else CHANNELS:
                ways = [w for w in WAYS[of] if w != "slimming" or name != "satimage"]
                row = {w: told(bench.results(name, of, share, w, seeds), name) for w in ways}
                texts = [row.get(w, "") for w in WAYS[of]]
                print(f"| {name} | {share:.0%} | {dense} | {' | '.join(texts)} |", flush=True)


def overhead(blocks: int = 20, steps: int = 50) -> None:
    """CPU time of a step with the handle over that without, in interleaved blocks."""

    def one(build: Callable[[], nn.Module], x: Tensor, y: Tensor, of: str | None):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        if of:
            tk.sparsify(model, optimizer, 0.9, of=of, steps=blocks * steps, example=x[:2])

        def block() -> float:
            began = time.process_time()
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            return (time.process_time() - began) / steps

        return block

    x, y = torch.randn(64, 784), torch.randint(0, 10, (64,))
    lenet: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    chances = {
        "LeNet-300-100, batch 64": (lenet, x),
        "conv-BatchNorm net, batch 64": (lambda: convnet(14), x[:, :196].contiguous()),
    }
    for name, (build, rows) in chances.items():
        for of in ("weights", "channels"):
            plain, sparse = one(build, rows, y, None), one(build, rows, y, of)
            times = [(plain(), sparse()) for _ in range(blocks)]
            ratio = sum(b for _, b in times) / sum(a for a, _ in times)
            print(f"| {name} | {of} | {ratio:.3f} |", flush=True)


def latency(side: int = 28) -> None:
    """Measured ratios of compacted networks: eager, compiled, ONNX Runtime; batch 1 and 64."""
    for kept in ((8, 16, 32), (11, 19, 32), (4, 8, 16)):
        torch.manual_seed(0)
        model = convnet(side).eval()
        counts = iter(kept)
        with torch.no_grad():
            for module in model:
                if isinstance(module, nn.Conv2d):
                    count = next(counts)
                    module.weight[count:] = module.bias[count:] = 0
                elif isinstance(module, nn.BatchNorm2d):
                    module.weight[count:] = module.bias[count:] = 0
        small = tk.compact(model, torch.randn(2, side * side))
        found = small.compaction
        cells = [f"{a / b:.2f}" for a, b in (found.parameters, found.flops)]
        for way, batch in itertools.product(("eager", "compile", "onnx"), (1, 64)):
            x = torch.randn(batch, side * side)
            cells.append(f"{speedup(model, small, x, way=way, rounds=5, seconds=0.1):.2f}")
        print(f"| {'-'.join(map(str, kept))} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--data-dir")
    parser.add_argument("--only", help="networks to run, separated by commas")
    parser.add_argument("--ways", help="ways to run, separated by commas")
    parser.add_argument("--table", action="store_true", help="of the cells that are there")
    parser.add_argument("--latency", action="store_true", help="of compacted networks")
    parser.add_argument("--overhead", action="store_true", help="of the handle in a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.overhead:
        return overhead()
    if options.latency:
        return latency()
    chosen = works(options.data_dir)
    if options.quick or options.only:
        wanted = ["digits"] if options.quick else options.only.split(",")
        chosen = {name: chosen[name] for name in wanted}
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[:1] if options.quick else SEEDS
    there = [w for w in PRUNERS if options.table or w not in NEEDS or find_spec(NEEDS[w])]
    ways = tuple(options.ways.split(",")) if options.ways else tuple(there)
    bench = Bench(chosen, options.folder, options.table, ways)
    if not options.table:
        for seed in seeds:  # a whole table of one seed first
            for name, of, share, way in cells(chosen):
                bench.results(name, of, share, way, [seed])
    table(bench, seeds)


if __name__ == "__main__":
    main()
