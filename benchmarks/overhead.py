"""What a penalty costs: proxes in copies of the weights, and whole training steps against peers.

All figures are ratios of CPU time within one run, the two sides interleaved (A-B-B-A), medians
over rounds. `kernels` compares one operation on one float32 tensor with `out.copy_(w)`; `moves`
what a penalty adds to `optimizer.step()` on one 4096 x 4096 tensor with that copy; `steps`
compares forward, backward and optimizer step with the same step without a penalty.

    python benchmarks/overhead.py --quick           # about 2 minutes
    python benchmarks/overhead.py                   # up to 1e8 parameters, needs 4 GB

Peers, each left out if it is not installed: torchao (its prox after the step, with plain lr),
pytorch-cpr (AdamCPR, foreach=True), keras (KERAS_BACKEND=torch, kernel_regularizer in the loss).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import tikhon as tk
from tikhon.penalties import kernels

Run = Callable[[], object]
GPU_TARGET = 1.3  # copies
STRENGTH = 1e-6  # weights stay away from zero: no denormals, no work saved


def cpu(run: Run, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - start


def ratio(ours: Run, base: Run, rounds: int) -> float:
    """Median of ours / base, each repeated for about 20 ms."""
    counts = {}
    for run in (ours, base):
        run()
        counts[run] = max(1, round(0.02 / max(cpu(run, 1), 1e-6)))
    found = []
    for _ in range(rounds):
        a, b, b2, a2 = (cpu(run, counts[run]) / counts[run] for run in (ours, base, base, ours))
        found.append((a + a2) / (b + b2))
    return statistics.median(found)


def peak(run: Run) -> float:
    """Megabytes by which one call raises the resident size at its peak (Linux; else nan)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
    except OSError:
        return math.nan
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# -- one operation on one tensor ------------------------------------------------------------------


@contextmanager
def compiled_from(entries: float, device: str) -> Iterator[None]:
    before = kernels.compile_from(entries, device)
    yield
    kernels.compile_from(before, device)


def operations(w: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """(name, one pass over w): in place by blocks and by compiled kernels, then the others."""
    moment = torch.rand_like(w).mul_(1e-4)
    tiny, lr = STRENGTH * 1e-3, 1e-3
    l1, net, group = tk.L1(tiny), tk.ElasticNet(tiny), tk.GroupLasso(tiny)

    def prox(penalty: tk.Penalty, entries: float, **metric) -> Run:
        def run() -> None:
            with compiled_from(entries, w.device.type):
                kernels.prox_(penalty, w, lr, **metric)

        return run

    metric = {"moment": moment, "eps": 1e-8}
    for penalty in (l1, net, group):
        kind = type(penalty).__name__
        for how, entries in (("eager", math.inf), ("compiled", 0)):
            yield f"{kind} prox, {how}", prox(penalty, entries)
            yield f"{kind} prox, Adam's metric, {how}", prox(penalty, entries, **metric)
    yield "L1 prox out of place", lambda: l1.prox(w, lr)
    leaf = w.requires_grad_()

    def by_autograd() -> None:
        leaf.grad = None
        (tiny * leaf.abs().sum()).backward()

    yield "L1 in the loss, autograd", by_autograd


TARGETS = {
    "L1 prox, eager": 1.6,
    "L1 prox, compiled": 1.6,
    "L1 prox, Adam's metric, eager": 4.5,
    "L1 prox, Adam's metric, compiled": 1.6,
    "GroupLasso prox, eager": 3.0,
    "GroupLasso prox, compiled": 3.0,
}


def kernel_table(sizes: list[int], rounds: int) -> dict[str, dict]:
    table: dict[str, dict] = {}
    for name, run in operations(torch.randn(300, 300)):  # load code before measuring
        with torch.set_grad_enabled("autograd" in name):
            run()
    for size in sizes:
        rows = max(1, round(size**0.5))
        w = torch.randn(rows, size // rows)
        out = torch.empty_like(w)
        for name, run in operations(w):
            with torch.set_grad_enabled("autograd" in name):
                extra = peak(run)
                found = ratio(run, lambda: out.copy_(w.detach()), rounds)  # noqa: B023
            # smaller tensors stay in the cache, where a copy is no measure of memory traffic
            target = TARGETS.get(name, math.inf) if size >= 4096**2 else math.inf
            table[f"{name} | {size:.0e}"] = {"copies": found, "extra_mb": extra}
            verdict = "" if target == math.inf else "ok" if found <= target else f"> {target}"
            print(f"{name:40}{size:9.0e}{found:9.2f}{extra:9.1f} MB  {verdict}", flush=True)
    return table


# -- what a penalty adds to the step of an optimizer ----------------------------------------------

TERMS: dict[str, tk.Penalty] = {
    "L1": tk.L1(STRENGTH),
    "L2": tk.L2(STRENGTH),
    "ElasticNet": tk.ElasticNet(STRENGTH),
    "MCP": tk.MCP(STRENGTH),
    "SCAD": tk.SCAD(STRENGTH),
    "LogSum": tk.LogSum(STRENGTH),
    "Huber": tk.Huber(STRENGTH),
    "Box": tk.Box(-10.0, 10.0),
    "GroupLasso": tk.GroupLasso(STRENGTH),
}
MOVE_TARGETS = {"sgd": 1.6, "adam": 2.5}  # extra copies, elementwise terms


def move_table(rounds: int) -> dict[str, float]:
    """Copies of the weights that a term adds to `optimizer.step()`, by the user's own call."""
    table: dict[str, float] = {}
    start = torch.randn(4096, 4096)
    out = torch.empty_like(start)
    for kind in ("sgd", "adam", "sgd, fused", "adam, fused"):
        plain = _mover(start, kind, None)
        alone = ratio(plain, lambda: out.copy_(start), rounds)
        for name, penalty in {**TERMS, "weight_decay of torch": None}.items():
            run = _mover(start, kind, penalty, decay=0.0 if penalty else STRENGTH)
            found = (ratio(run, plain, rounds) - 1) * alone
            table[f"{kind} | {name}"] = found
            target = math.inf if name == "GroupLasso" else MOVE_TARGETS[kind.split(",")[0]]
            verdict = "ok" if found <= target else f"> {target}"
            print(f"{kind:12}{name:24}{found:8.2f}  {verdict}", flush=True)
    return table


def _mover(start: torch.Tensor, kind: str, penalty: tk.Penalty | None, decay: float = 0.0) -> Run:
    model = nn.Module()
    model.weight = nn.Parameter(start.clone())
    model.weight.grad = torch.randn_like(start).mul_(1e-4)
    name, *fused = kind.split(",")
    optimizer = make(name, [model.weight], fused=bool(fused) or None, decay=decay)
    model.held = penalty and tk.regularize(model, optimizer, {"weight": penalty})
    model.step = optimizer.step  # keeps both alive
    return lambda: model.step()


# -- whole steps ----------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), torch.randn(64, 784)


def transformer(width: int, depth: int = 12) -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(
        width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return model, torch.randn(4, 32, width)


def convolutions(depth: int = 100, width: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """Convolutions with BatchNorm, each added to what comes in: three tensors a layer."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.convolution(x)).relu()

    return nn.Sequential(*[Residual() for _ in range(depth)]), torch.randn(8, width, 8, 8)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "MLP 784-128-10 (1e5)": mlp,
    "transformer 12 x 64 (6e5)": lambda: transformer(64),
    "residual net, 300 tensors (9e5)": convolutions,
    "transformer, 300 tensors (1e6)": lambda: transformer(64, depth=25),
    "transformer 12 x 88 (1e6)": lambda: transformer(88),
    "transformer 12 x 344 (1.7e7)": lambda: transformer(344),
    "transformer 12 x 832 (1e8)": lambda: transformer(832),
}


def trainer(
    model: nn.Module,
    x: torch.Tensor,
    optimizer,
    extra: Run | None = None,
    compiled: bool = False,
) -> Run:
    update = torch.compile(optimizer.step) if compiled else optimizer.step

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if extra is not None:
            loss = loss + extra()
        loss.backward()
        update()

    return step


def make(
    kind: str, params, *, fused: bool | None = None, decay: float = 0.0
) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(params, lr=1e-4, momentum=0.9, fused=fused, weight_decay=decay)
    return torch.optim.Adam(params, lr=1e-4, fused=fused, weight_decay=decay)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim >= 2]


def ways(
    model: nn.Module,
    x: torch.Tensor,
    kind: str,
    compiled: bool = False,
    fused: bool | None = None,
) -> Iterator[tuple[str, Run]]:
    """(name, step) for every way to penalise, each on a copy of the model."""
    terms = {
        "tikhon L1": tk.L1(STRENGTH),
        "tikhon L1 decoupled": tk.Term(tk.L1(STRENGTH), how="decoupled"),
        "tikhon L2": tk.L2(STRENGTH),
        "tikhon L2 decoupled": tk.Term(tk.L2(STRENGTH), how="decoupled"),
        "tikhon ElasticNet": tk.ElasticNet(STRENGTH),
        "tikhon GroupLasso": tk.GroupLasso(STRENGTH),
    }
    for name, term in terms.items():
        own = copy.deepcopy(model)
        optimizer = make(kind, own.parameters(), fused=fused)
        own.penalties = tk.regularize(own, optimizer, {"*": term})  # keeps the handle alive
        yield name, trainer(own, x, optimizer, compiled=compiled)
    if compiled:
        return
    own = copy.deepcopy(model)
    chosen = weights_of(own)
    yield (
        "L1 in the loss",
        trainer(
            own,
            x,
            make(kind, own.parameters(), fused=fused),
            lambda: STRENGTH * sum(p.abs().sum() for p in chosen),
        ),
    )
    if importlib.util.find_spec("torchao"):
        yield "torchao PAT L1", pat(copy.deepcopy(model), x, kind)
    if kind == "adam" and importlib.util.find_spec("pytorch_cpr"):
        from pytorch_cpr import AdamCPR

        own = copy.deepcopy(model)
        yield "AdamCPR", trainer(own, x, AdamCPR(own.parameters(), lr=1e-4, foreach=True))


def pat(model: nn.Module, x: torch.Tensor, kind: str) -> Run:
    from torchao.prototype.pat import PruneOptimizer

    chosen = weights_of(model)
    others = [p for p in model.parameters() if p.ndim < 2]
    group = {"params": chosen, "group_type": "ElemGrouper", "prox_type": "ProxLasso"}
    base = make(kind, [{**group, "reg_lambda": STRENGTH}, {"params": others}])
    return trainer(model, x, PruneOptimizer(base))


def keras_ratio(rounds: int, kind: str) -> float | None:
    """A Keras model's step with kernel_regularizer over the same model's step without."""
    if not importlib.util.find_spec("keras"):
        return None
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    x = torch.randn(64, 784)
    runs = []
    for regularizer in (keras.regularizers.L1(STRENGTH), None):
        dense = {"kernel_regularizer": regularizer}
        model = keras.Sequential(
            [
                keras.Input((784,)),
                keras.layers.Dense(128, activation="relu", **dense),
                keras.layers.Dense(10, **dense),
            ]
        )
        optimizer = make(kind, model.parameters())
        extra = (lambda own=model: sum(own.losses)) if regularizer else None
        runs.append(trainer(model, x, optimizer, extra))
    return ratio(*runs, rounds)


def step_table(
    models: list[str], rounds: int, compiled: bool, only: list[str] | None
) -> dict[str, float]:
    table: dict[str, float] = {}
    for label in models:
        for kind in ("sgd", "adam"):
            model, x = MODELS[label]()
            own = copy.deepcopy(model)
            plain = trainer(own, x, make(kind, own.parameters()), compiled=compiled)
            for name, step in ways(model, x, kind, compiled):
                if only and name not in only:
                    continue
                table[f"{label} | {kind} | {name}"] = found = ratio(step, plain, rounds)
                print(f"{label:32}{kind:6}{name:24}{found:8.3f}", flush=True)
            if (
                label.startswith("MLP")
                and not (compiled or only)
                and (found := keras_ratio(rounds, kind))
            ):
                table[f"{label} | {kind} | Keras L1"] = found
                print(f"{label:32}{kind:6}{'Keras L1 (own base)':24}{found:8.3f}", flush=True)
    return table


# -- on a GPU -------------------------------------------------------------------------------------


def gpu_ratio(ours: Run, base: Run, rounds: int) -> float:
    """Median of ours / base by CUDA events, both sides queued in turn (A-B-B-A)."""

    def elapsed(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    for run in (ours, base) * 3:  # compile, and fill the allocator's cache
        elapsed(run)
    found = []
    for _ in range(rounds):
        a, b, b2, a2 = (elapsed(run) for run in (ours, base, base, ours))
        found.append((a + a2) / (b + b2))
    return statistics.median(found)


def gpu_peak(run: Run) -> float:
    """Megabytes that one call holds at its peak beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1024**2


def synchronises(run: Run) -> bool:
    """Whether a step makes the host wait for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def gpu_table(rounds: int) -> dict[str, dict]:
    """Operations in copies at the device's bandwidth, and whole steps; {} without a device."""
    if not torch.cuda.is_available():
        print("no GPU here: the section of copies at a device's bandwidth is skipped")
        return {}
    device = torch.device("cuda")
    print(f"\n{torch.cuda.get_device_name(device)}: copies of the weights, and extra memory")
    table: dict[str, dict] = {}
    for size in (4096**2, 10**8):  # smaller ones stay in the cache of the device
        rows = round(size**0.5)
        w = torch.randn(rows, size // rows, device=device)
        out = torch.empty_like(w)
        for name, run in operations(w):
            with torch.set_grad_enabled("autograd" in name):
                found = gpu_ratio(run, lambda: out.copy_(w.detach()), rounds)  # noqa: B023
                extra = gpu_peak(run)
            verdict = "" if "autograd" in name else "ok" if found <= GPU_TARGET else "> 1.3"
            table[f"{name} | {size:.0e}"] = {"copies": found, "extra_mb": extra}
            print(f"{name:40}{size:9.0e}{found:9.2f}{extra:9.1f} MB  {verdict}", flush=True)
    print("\nwhole step over the step without a penalty, fused optimizers")
    for label, build in MODELS.items():
        for kind in ("sgd", "adam"):
            model, x = build()
            model, x = model.to(device), x.to(device)
            own = copy.deepcopy(model)
            plain = trainer(own, x, make(kind, own.parameters(), fused=True))
            for name, step in ways(model, x, kind, fused=True):
                found = gpu_ratio(step, plain, rounds)
                waits = synchronises(step)
                table[f"{label} | {kind} | {name}"] = {"ratio": found, "synchronises": waits}
                print(f"{label:30}{kind:6}{name:24}{found:8.3f}{'  waits' * waits}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one thread")
    parser.add_argument("--only", choices=["kernels", "moves", "steps", "gpu"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[])
    parser.add_argument("--sizes", type=float, nargs="+", help="entries of the tensor of kernels")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--ways", nargs="+", help="measure these of the ways of whole steps only")
    parser.add_argument("--compiled-step", action="store_true", help="compile optimizer.step")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes = [4096**2] if options.quick else [10**5, 10**6, 4096**2, 10**8]
    sizes = [int(size) for size in options.sizes or sizes]
    models = options.models or list(MODELS)[: 2 if options.quick else None]
    report: dict = {
        "schema_version": 1,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": {},
    }
    if options.only in (None, "gpu"):
        report["gpu"] = gpu_table(options.rounds)
    counts = options.threads or ((1,) if options.quick else (1, 2))
    for threads in () if options.only == "gpu" else counts:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found: dict = {}
        if options.only in (None, "kernels"):
            print(f"\n{threads} thread(s): copies of the weights, and extra memory")
            found["kernels"] = kernel_table(sizes, options.rounds)
        if options.only in (None, "moves"):
            print(f"\n{threads} thread(s): copies that a term adds to a step of 4096 x 4096")
            found["moves"] = move_table(options.rounds)
        if options.only in (None, "steps"):
            print(f"\n{threads} thread(s): whole step over the step without a penalty")
            found["steps"] = step_table(
                models, options.rounds, options.compiled_step, options.ways
            )
        report["threads"][threads] = found
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
