"""Noise layers against the layers of torch and timm that do the same: CPU time, in one run.

Forward and backward in training mode, our layer and its twin interleaved (A-B-B-A), one median of
the ratios over rounds. The aim is at most 1.05. timm's files are loaded without its package, which
needs torchvision (`pip install --no-deps timm`); without timm its rows are left out. On the CPU
the layers that torch has run on torch's own kernels; the others build their own mask.

    python benchmarks/layers.py                     # about 2 minutes
    python benchmarks/layers.py --compiled          # under torch.compile (needs a C++ compiler)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from tikhon import layers


def timm_file(path: str):
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"timm_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pairs():
    """(name, ours, twin, shape of the input)."""
    image, tokens = (32, 64, 28, 28), (32, 197, 192)
    yield "Dropout small", layers.Dropout(0.3), nn.Dropout(0.3), (64, 128)
    yield "Dropout", layers.Dropout(0.3), nn.Dropout(0.3), (256, 4096)
    yield "AlphaDropout", layers.AlphaDropout(0.3), nn.AlphaDropout(0.3), (256, 4096)
    yield "Dropout1d", layers.Dropout1d(0.3), nn.Dropout1d(0.3), (32, 64, 784)
    yield "Dropout2d", layers.Dropout2d(0.3), nn.Dropout2d(0.3), image
    yield "Dropout3d", layers.Dropout3d(0.3), nn.Dropout3d(0.3), (8, 32, 16, 28, 28)
    yield (
        "FeatureAlphaDropout",
        layers.FeatureAlphaDropout(0.3),
        nn.FeatureAlphaDropout(0.3),
        image,
    )
    drop, patch = timm_file("layers/drop.py"), timm_file("layers/patch_dropout.py")
    if drop and patch:
        yield "DropPath (timm)", layers.DropPath(0.3), drop.DropPath(0.3), tokens
        block = drop.DropBlock2d(0.1, 7, couple_channels=False)
        yield "DropBlock2d (timm)", layers.DropBlock2d(0.1, 7), block, image
        block = drop.DropBlock2d(0.1, 7)
        yield "DropBlock2d shared (timm)", layers.DropBlock2d(0.1, 7, shared=True), block, image
        yield "PatchDropout (timm)", layers.PatchDropout(0.5), patch.PatchDropout(0.5), tokens


def seconds(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
    """CPU time of `repeats` forward and backward passes."""
    start = time.process_time()
    for _ in range(repeats):
        layer(x).sum().backward()
    return time.process_time() - start


def ratio(ours: nn.Module, twin: nn.Module, x: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Median of ours / twin over rounds, and microseconds of one pass of the twin."""
    for layer in (ours, twin):
        seconds(layer, x, 2)
    repeats = max(1, round(0.02 / max(seconds(twin, x, 3) / 3, 1e-6)))
    found, times = [], []
    for _ in range(rounds):
        a, b, b2, a2 = (seconds(layer, x, repeats) for layer in (ours, twin, twin, ours))
        found.append((a + a2) / (b + b2))
        times.append((b + b2) / 2 / repeats)
    return statistics.median(found), statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    print(f"{'layer':28}{'ours / twin':>12}{'twin, us':>12}")
    for name, ours, twin, shape in pairs():
        x = torch.randn(shape, requires_grad=True)
        if options.compiled:
            ours, twin = torch.compile(ours), torch.compile(twin)
        results[name], micro = ratio(ours, twin, x, options.rounds)
        print(f"{name:28}{results[name]:12.3f}{micro:12.0f}", flush=True)
    worst = max(results, key=lambda name: results[name])
    print(f"worst: {worst} {results[worst]:.3f}")
    if options.output:
        options.output.write_text(json.dumps({"schema_version": 1, "ratios": results}, indent=1))


if __name__ == "__main__":
    main()
