"""LeNet-300-100 on MNIST: a group penalty on the columns of every layer, cut, trained on.

Aim: at most 1.6 % test error with fewer units in all than the published 270-100-15 (385), and a
smaller, faster, equal model (docs/compaction.md says what was reached). Three stages:
a dense network on shifted and turned digits; from it, slowly, down to the asked sizes
(`GroupMCP`, which leaves the columns that stay unshrunk, under `TargetSparsity`, SGD); then the
small network goes on. Both learn what the dense one answers on shifted digits. All was chosen on
5,000 validation rows; the test rows are read only with `--test`. Prints ratios measured in this
run and writes JSON. `--folder` keeps the weights of each stage, and a second run starts from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tikhon
from tikhon.compaction import speedup
from tikhon.data import load, split
from tikhon.models import build

BATCH = 256
WARMTH = 2.0  # of the answers that the small network learns


def moved(x: Tensor, generator: torch.Generator, amount: float) -> Tensor:
    """Images shifted by up to 2 pixels (of 28), turned, scaled and sheared, times `amount`."""
    side = x.shape[-1] if x.ndim > 2 else int(x.shape[-1] ** 0.5)
    images = x.reshape(len(x), 1, side, side)
    angle, size, shear, right, down = (
        amount
        * (2 * torch.rand(5, len(x), generator=generator) - 1)
        * torch.tensor([0.15, 0.1, 0.15, 1 / 7, 1 / 7])[:, None]
    )
    cos, sin = torch.cos(angle) * (1 + size), torch.sin(angle) * (1 + size)
    rows = torch.stack([cos, shear - sin, right, sin, cos, down], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).view(x.shape)


def error(model: nn.Module, part) -> float:
    with torch.no_grad():
        return float((model.eval()(part.x).argmax(1) != part.y).double().mean())


def train(model, part, optimizer, *, epochs, teacher=None, amount=0.0, floor=0.0, seed=0) -> None:
    """A plain loop with a cosine schedule; against the teacher's answers where there is one."""
    generator = torch.Generator().manual_seed(seed)
    batches = len(part.x) // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: floor + (1 - floor) * (1 + math.cos(math.pi * t / (epochs * batches))) / 2,
    )
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(part.x), generator=generator)[: batches * BATCH]
        for rows in order.view(batches, BATCH):
            x = moved(part.x[rows], generator, amount) if amount else part.x[rows]
            output = model(x)
            loss = F.cross_entropy(output, part.y[rows])
            if teacher is not None:
                with torch.no_grad():
                    answers = (teacher(x) / WARMTH).softmax(1)
                loss = 0.3 * loss + WARMTH**2 * F.cross_entropy(output / WARMTH, answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def shrunk(model: nn.Module, part, sizes: list[int], *, epochs: int, seed: int) -> nn.Module:
    """The network with so many inputs and hidden units, from the dense one downward."""
    sparse = copy.deepcopy(model)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    steps = int(0.8 * epochs * (len(part.x) // BATCH))
    terms = {}
    for name, weight in sparse.named_parameters():
        if weight.ndim == 2 and len(terms) < len(sizes):
            share = 1 - sizes[len(terms)] / weight.shape[1]
            strength = tikhon.TargetSparsity(share, steps=steps)
            terms[name] = tikhon.Term(tikhon.GroupMCP(), rows="in", strength=strength)
    with tikhon.regularize(sparse, optimizer, terms):
        train(
            sparse, part, optimizer,
            epochs=epochs, teacher=model, amount=0.4, floor=0.05, seed=seed,
        )  # fmt: skip
    return tikhon.compact(sparse, part.x[:256])


def stage(folder: Path | None, name: str, model: nn.Module, work) -> nn.Module:
    """The model of an earlier run, or the work's."""
    if folder is not None and (folder / f"{name}.pt").exists():
        return torch.load(folder / f"{name}.pt", weights_only=False)
    model = work(model)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        torch.save(model, folder / f"{name}.pt")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="digits, a minute at most")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--sizes", default=None, help="inputs-hidden-hidden")
    parser.add_argument("--epochs", default=None, help="dense,sparse,small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="read the test rows, at the end")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = [
        int(n)
        for n in (options.sizes or ("40-50-30" if options.quick else "250-98-30")).split("-")
    ]
    epochs = [
        int(n)
        for n in (options.epochs or ("60,60,60" if options.quick else "30,40,60")).split(",")
    ]
    name, seed = "digits" if options.quick else "mnist", options.seed
    parts = split(load(name, data_dir=options.data_dir), seed=0)
    started = time.process_time()
    torch.manual_seed(seed)
    first = build("lenet-300-100", parts.train.shape, parts.train.outputs)

    def dense(model):
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        train(model, parts.train, adam, epochs=epochs[0], amount=1.0, seed=seed)
        return model

    def small(model):
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        train(
            model, parts.train, adam, epochs=epochs[2], teacher=teacher, amount=0.4, seed=seed + 2
        )
        return model

    teacher = stage(options.folder, "dense", first, dense).eval()
    print(f"dense: validation error {error(teacher, parts.valid):.2%}", flush=True)
    cut = stage(
        options.folder, "cut", teacher,
        lambda m: shrunk(m, parts.train, sizes, epochs=epochs[1], seed=seed + 1),
    )  # fmt: skip
    print(f"cut: validation error {error(cut, parts.valid):.2%}", flush=True)
    model = stage(options.folder, "small", cut, small)
    units = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    parameters = [sum(p.numel() for p in m.parameters()) for m in (teacher, model)]
    result = {
        "schema_version": 1,
        "benchmark": "compaction",
        "data": name,
        "sizes": sizes,
        "epochs": epochs,
        "seed": seed,
        "units": units,
        "units_in_all": sum(units),
        "parameters": parameters,
        "valid_error_dense": error(teacher, parts.valid),
        "valid_error": error(model, parts.valid),
        "test_error_dense": error(teacher, parts.test) if options.test else None,
        "test_error": error(model, parts.test) if options.test else None,
        "speedup_batch_256": speedup(teacher, model, parts.valid.x[:256].contiguous()),
        "speedup_batch_1": speedup(teacher, model, parts.valid.x[:1].contiguous()),
        "cpu_seconds": time.process_time() - started,
    }
    print(json.dumps(result, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
