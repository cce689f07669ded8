"""What a penalty costs: proxes in copies of the weights, and whole training steps against peers.

All figures are ratios of CPU time within one run, the two sides interleaved (A-B-B-A), medians
over rounds. `kernels` compares one operation on one float32 tensor with `out.copy_(w)`; `steps`
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
from pathlib import Path

import torch
from torch import nn

import tikhon as tk
from tikhon.penalties import kernels

Run = Callable[[], object]
SMALLEST = 50_000  # entries from which the compiled kernel is tried in whole steps
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


def operations(w: torch.Tensor, compiled: bool) -> Iterator[tuple[str, Run]]:
    """(name, one pass over w), the in-place kernels first."""
    moment, gradient = torch.rand_like(w).mul_(1e-4), torch.zeros_like(w)
    tiny, lr = STRENGTH * 1e-3, 1e-3
    l1, net, group = tk.L1(tiny), tk.ElasticNet(tiny), tk.GroupLasso(tiny)
    yield "L1 prox", lambda: kernels.prox_(l1, w, lr)
    yield "ElasticNet prox", lambda: kernels.prox_(net, w, lr)
    yield "GroupLasso prox", lambda: kernels.prox_(group, w, lr)
    kernels.compile_from(math.inf)
    metric = {"moment": moment, "eps": 1e-8}
    yield "L1 prox, Adam's metric, eager", lambda: kernels.prox_(l1, w, lr, **metric)
    yield "ElasticNet prox, Adam's metric, eager", lambda: kernels.prox_(net, w, lr, **metric)
    if compiled:

        def by_compiler() -> None:
            before = kernels.compile_from(1)
            kernels.prox_(l1, w, lr, **metric)
            kernels.compile_from(before)

        yield "L1 prox, Adam's metric, compiled", by_compiler
    l2 = tk.L2(tiny)
    yield "L2 gradient", lambda: kernels.add_gradient_(l2, gradient, w)
    yield "ElasticNet gradient", lambda: kernels.add_gradient_(net, gradient, w)
    yield "L1 prox out of place", lambda: l1.prox(w, lr)
    yield "GroupLasso prox, Adam's metric", lambda: kernels.prox_(group, w, lr, **metric)
    leaf = w.requires_grad_()

    def by_autograd() -> None:
        leaf.grad = None
        (tiny * leaf.abs().sum()).backward()

    yield "L1 in the loss, autograd", by_autograd


TARGETS = {
    "L1 prox": 1.6,
    "L1 prox, Adam's metric, eager": 4.5,
    "L1 prox, Adam's metric, compiled": 1.6,
    "L2 gradient": 2.5,
    "ElasticNet gradient": 2.5,
    "GroupLasso prox": 3.0,
}


def kernel_table(sizes: list[int], rounds: int, compiled: bool) -> dict[str, dict]:
    table: dict[str, dict] = {}
    for name, run in operations(torch.randn(300, 300), compiled):  # load code before measuring
        with torch.set_grad_enabled("autograd" in name):
            run()
    for size in sizes:
        rows = max(1, round(size**0.5))
        w = torch.randn(rows, size // rows)
        out = torch.empty_like(w)
        for name, run in operations(w, compiled):
            with torch.set_grad_enabled("autograd" in name):
                extra = peak(run)
                found = ratio(run, lambda: out.copy_(w.detach()), rounds)  # noqa: B023
            # smaller tensors stay in the cache, where a copy is no measure of memory traffic
            target = TARGETS.get(name, math.inf) if size >= 4096**2 else math.inf
            table[f"{name} | {size:.0e}"] = {"copies": found, "extra_mb": extra}
            verdict = "" if target == math.inf else "ok" if found <= target else f"> {target}"
            print(f"{name:40}{size:9.0e}{found:9.2f}{extra:9.1f} MB  {verdict}", flush=True)
    return table


# -- whole steps ----------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), torch.randn(64, 784)


def transformer(width: int) -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(
        width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    return model, torch.randn(4, 32, width)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "MLP 784-128-10 (1e5)": mlp,
    "transformer 12 x 64 (6e5)": lambda: transformer(64),
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


def make(kind: str, params) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(params, lr=1e-4, momentum=0.9)
    return torch.optim.Adam(params, lr=1e-4)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim >= 2]


def ways(
    model: nn.Module, x: torch.Tensor, kind: str, compiled: bool = False
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
        optimizer = make(kind, own.parameters())
        own.penalties = tk.regularize(own, optimizer, {"*": term})  # keeps the handle alive
        yield name, trainer(own, x, optimizer, compiled=compiled)
    if compiled:
        return
    if kind == "adam":  # the kernel for large tensors, where it is worth a compilation
        before = kernels.compile_from(SMALLEST)
        own = copy.deepcopy(model)
        optimizer = make(kind, own.parameters())
        own.penalties = tk.regularize(own, optimizer, {"*": terms["tikhon L1"]})
        step = trainer(own, x, optimizer)
        step()
        yield "tikhon L1, compiled kernel", step
        kernels.compile_from(before)
        del own, optimizer, step
    own = copy.deepcopy(model)
    chosen = weights_of(own)
    yield (
        "L1 in the loss",
        trainer(
            own,
            x,
            make(kind, own.parameters()),
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
                print(f"{label:22}{kind:6}{name:24}{found:8.3f}", flush=True)
            if (
                label.startswith("MLP")
                and not (compiled or only)
                and (found := keras_ratio(rounds, kind))
            ):
                table[f"{label} | {kind} | Keras L1"] = found
                print(f"{label:22}{kind:6}{'Keras L1 (own base)':24}{found:8.3f}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one thread")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--only", choices=["kernels", "steps"])
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
    if not torch.cuda.is_available():
        print("no GPU here: its section (copies at the device's bandwidth) is skipped")
    for threads in options.threads or ((1,) if options.quick else (1, 2)):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found: dict = {}
        if options.only != "steps":
            print(f"\n{threads} thread(s): copies of the weights, and extra memory")
            found["kernels"] = kernel_table(sizes, options.rounds, not options.no_compile)
        if options.only != "kernels":
            print(f"\n{threads} thread(s): whole step over the step without a penalty")
            found["steps"] = step_table(
                models, options.rounds, options.compiled_step, options.ways
            )
        report["threads"][threads] = found
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
