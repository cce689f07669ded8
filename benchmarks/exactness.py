"""Does training with a penalty end at the minimum of loss + penalty? Six data sets, exact solvers.

The lasso, the elastic net and the group lasso (a group is a feature, over all outputs) of a
linear model are trained by full-batch gradients and a decaying learning rate, in float64, through
`regularize` and through what else there is: torch's optimizers, those of the packages
pytorch-optimizer and schedulefree where they are installed, and two written by hand. Where no
metric is known `regularize` goes the way of orthants. The minimum is that of scikit-learn's
coordinate descent (Lasso, ElasticNet, MultiTaskLasso) to a tolerance of 1e-13; the strength is a
tenth of the one that zeroes everything. Reported are the relative gap of the objective,
(F - F*) / F*, and the F1 score of the support, each at its worst of the data sets.

    python benchmarks/exactness.py --data DIR         DIR holds NAME.npz with X and y
    python benchmarks/exactness.py --quick            two data sets of scikit-learn, fewer steps
    python benchmarks/exactness.py --batch-size 256   gradients of random rows instead of all
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_iris, load_wine
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso
from torch import Tensor, nn, optim

import tikhon as tk

SETS = ("wine", "vehicle", "segment", "digits", "satimage", "contraceptive")
PENALTIES = ("lasso", "elastic net", "group lasso")
RATIO = 0.5  # l1_ratio of the elastic net
GAP = 1e-6  # the largest relative gap that counts as exact
FRACTION = 0.1  # of the smallest strength that zeroes every weight


@dataclass(frozen=True)
class Problem:
    """1/(2m) |Y - X W'|^2 + penalty, as a quadratic in W (outputs, features)."""

    name: str
    kind: str
    strength: float
    gram: Tensor
    cross: Tensor
    constant: float
    solution: Tensor
    x: Tensor
    y: Tensor

    def gradient(self, w: Tensor) -> Tensor:
        """Of the loss."""
        return w @ self.gram - self.cross

    def estimate(self, w: Tensor, rows: Tensor) -> Tensor:
        """The gradient over some rows."""
        x = self.x[rows]
        return (x @ w.T - self.y[rows]).T @ x / len(rows)

    def penalty(self) -> tk.Term:
        """The penalty in tikhon's words."""
        if self.kind == "lasso":
            return tk.Term(tk.L1(self.strength))
        if self.kind == "elastic net":
            return tk.Term(tk.ElasticNet(self.strength, l1_ratio=RATIO))
        return tk.Term(tk.GroupLasso(self.strength), rows="in")

    def objective(self, w: Tensor) -> float:
        """Loss + penalty."""
        term = self.penalty()
        seen = w.T if term.rows == "in" else w
        loss = (w @ self.gram * w).sum() / 2 - (w * self.cross).sum() + self.constant
        return float(loss + term.penalty.value(seen))


def problem(name: str, kind: str, x: np.ndarray, y: np.ndarray) -> Problem:
    """Standardised features, centred one-hot targets, and the reference solution."""
    x = np.asarray(x, np.float64)
    x = x[:, x.std(0) > 1e-9]
    x = (x - x.mean(0)) / x.std(0)
    targets = (np.asarray(y)[:, None] == np.unique(y)).astype(np.float64)
    targets -= targets.mean(0)
    m = len(x)
    cross = targets.T @ x / m
    largest = np.linalg.norm(cross, axis=0).max() if kind == "group lasso" else abs(cross).max()
    strength = FRACTION * largest / (RATIO if kind == "elastic net" else 1)
    options = {"alpha": strength, "fit_intercept": False, "tol": 1e-13, "max_iter": 200_000}
    solver = {
        "lasso": lambda: Lasso(**options),
        "elastic net": lambda: ElasticNet(l1_ratio=RATIO, **options),
        "group lasso": lambda: MultiTaskLasso(**options),
    }[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last digit of the dual gap may stall
        solution = solver.fit(x, targets).coef_
    as_tensor = torch.from_numpy
    gram = as_tensor(x.T @ x / m)
    constant = float((targets**2).sum() / (2 * m))
    found = as_tensor(np.ascontiguousarray(solution))
    return Problem(
        name,
        kind,
        float(strength),
        gram,
        as_tensor(cross),
        constant,
        found,
        as_tensor(x),
        as_tensor(targets),
    )


class ByHand(optim.Optimizer):
    """The loop of an optimizer that somebody wrote: nothing is known of its metric."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every weight."""
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.direction(self.state[p], p.grad))

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """signSGD."""
        return gradient.sign()


class Lion(ByHand):
    """The rule of Chen et al. (2023), https://arxiv.org/abs/2302.06675."""

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """The sign of an average that looks ahead."""
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        ahead = (0.9 * mean + 0.1 * gradient).sign()
        mean.lerp_(gradient, 0.01)
        return ahead


def by_orthants(kind: type[optim.Optimizer]) -> type[optim.Optimizer]:
    """The same optimizer as one whose metric is not known: its `step` is overridden."""

    def step(self: Any, closure: Any = None) -> Any:
        return kind.step(self, closure)

    return type(f"{kind.__name__}ByOrthants", (kind,), {"step": step})


def optimizers(problem: Problem) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Optimizers with the step size that suits each: 1/L of the loss, or 0.01."""
    largest = float(torch.linalg.eigvalsh(problem.gram)[-1])
    momentum = {"momentum": 0.9, "lr": 0.3 / largest}
    plain = {"lr": 0.01, "weight_decay": 0.0}
    found = {
        "SGD": (optim.SGD, {"lr": 1 / largest}),
        "SGD momentum": (optim.SGD, momentum),
        "SGD nesterov": (optim.SGD, momentum | {"nesterov": True}),
        "ASGD": (optim.ASGD, {"lr": 1 / largest}),
        "RMSprop": (optim.RMSprop, {"lr": 0.01}),
        "Adam": (optim.Adam, {"lr": 0.01}),
        "AdamW": (optim.AdamW, plain),
        "NAdam": (optim.NAdam, {"lr": 0.01}),
        "RAdam": (optim.RAdam, {"lr": 0.01}),
        "Adamax": (optim.Adamax, {"lr": 0.01}),
        "Adagrad": (optim.Adagrad, {"lr": 0.1}),
        "Adadelta": (optim.Adadelta, {"lr": 1.0}),
        "Muon": (optim.Muon, plain),
        "Adafactor": (optim.Adafactor, {"lr": 0.02, "weight_decay": 0.0}),
        "Rprop": (optim.Rprop, {"lr": 0.01}),
        "signSGD by hand": (ByHand, {"lr": 0.01}),
        "Lion by hand": (Lion, {"lr": 0.01}),
        "SGD momentum, by orthants": (by_orthants(optim.SGD), momentum),
        "Adam, by orthants": (by_orthants(optim.Adam), {"lr": 0.01}),
    }
    return found | {name: found_there for name, found_there in third_party(largest)}


def third_party(largest: float) -> Iterator[tuple[str, tuple[Any, dict[str, Any]]]]:
    """Those of packages that are installed."""
    plain = {"lr": 0.01, "weight_decay": 0.0}
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer as theirs

        for name in ("Lion", "SOAP", "StableAdamW", "Adan", "AdaBelief"):
            yield name, (getattr(theirs, name), plain)
        # the default of its slow average remembers 10,000 steps
        yield "AdEMAMix", (theirs.AdEMAMix, plain | {"betas": (0.9, 0.999, 0.99)})
        yield "Prodigy", (theirs.Prodigy, plain | {"lr": 1.0})
    if importlib.util.find_spec("schedulefree"):
        import schedulefree as theirs

        yield "SGDScheduleFree", (theirs.SGDScheduleFree, {"lr": 5 / largest})
        yield "AdamWScheduleFree", (theirs.AdamWScheduleFree, {"lr": 0.003})


TORCHS = ("SGD", "SGD momentum", "SGD nesterov", "ASGD", "RMSprop", "Adam", "AdamW", "NAdam")
TORCHS += ("RAdam", "Adamax", "Adagrad", "Adadelta", "Muon", "Adafactor", "Rprop")
OTHERS = ("signSGD by hand", "Lion by hand", "Lion", "SOAP", "AdEMAMix", "Prodigy")
OTHERS += ("StableAdamW", "Adan", "AdaBelief", "SGDScheduleFree", "AdamWScheduleFree")
TWINS = ("SGD momentum, by orthants", "Adam, by orthants")


class Regularized:
    """tikhon: the user's optimizer, with `regularize` attached."""

    runs, kinds = TORCHS + OTHERS + TWINS, PENALTIES

    def __init__(self, problem: Problem, model: nn.Module, make: Any) -> None:
        self.optimizer = make(model.parameters())
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        tk.regularize(model, self.optimizer, {"weight": problem.penalty()})
        self.step = self.optimizer.step


class InLoss:
    """The penalty added to the loss, its gradient by autograd."""

    runs, kinds = ("SGD", "SGD momentum", "RMSprop", "Adam"), PENALTIES

    def __init__(self, problem: Problem, model: nn.Module, make: Any) -> None:
        self.optimizer = make(model.parameters())
        self.weight, self.term = model.weight, problem.penalty()

    def step(self) -> None:
        """Add autograd's gradient of the penalty, then step."""
        leaf = self.weight.detach().clone().requires_grad_()
        penalty = self.term.penalty
        seen = leaf.T if self.term.rows == "in" else leaf
        if isinstance(penalty, tk.GroupLasso):
            value = penalty.strength * torch.linalg.vector_norm(seen, dim=1).sum()
        else:
            ratio = penalty.l1_ratio if isinstance(penalty, tk.ElasticNet) else 1.0
            entries = ratio * seen.abs() + (1 - ratio) / 2 * seen.square()
            value = penalty.strength * entries.sum()
        value.backward()
        self.weight.grad += leaf.grad
        self.optimizer.step()


class NaiveProx:
    """A prox after each step with threshold lr * strength, whatever the optimizer."""

    runs, kinds = ("SGD", "SGD momentum", "RMSprop", "Adam"), PENALTIES

    def __init__(self, problem: Problem, model: nn.Module, make: Any) -> None:
        self.optimizer = make(model.parameters())
        self.weight, self.term = model.weight, problem.penalty()

    @torch.no_grad()
    def step(self) -> None:
        """Step, then the prox with the learning rate as its step."""
        self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        if self.term.rows == "in":
            self.weight.copy_(self.term.penalty.prox(self.weight.T.contiguous(), lr).T)
        else:
            self.weight.copy_(self.term.penalty.prox(self.weight, lr))


class PAT:
    """torchao.prototype.pat around the optimizer; it has no elastic net."""

    runs, kinds = ("SGD", "SGD momentum", "Adam"), ("lasso", "group lasso")
    needs = "torchao"

    def __init__(self, problem: Problem, model: nn.Module, make: Any) -> None:
        from torchao.prototype.pat.optim import PruneOptimizer

        strength, kinds = problem.strength, ("ProxLasso", "ElemGrouper")
        if problem.kind == "group lasso":  # its strength is per sqrt(size of the group)
            strength, kinds = (
                strength / len(model.weight) ** 0.5,
                ("ProxGroupLasso", "Dim1Grouper"),
            )
        group = {"params": [model.weight], "reg_lambda": strength}
        group |= {"prox_type": kinds[0], "group_type": kinds[1]}
        self.optimizer = make([group])
        self.step = PruneOptimizer(self.optimizer, reg_lambda=strength).step


class CPR:
    """AdamCPR with the L1 norm of the exact solution as its bound: it is told the answer."""

    runs, kinds = ("Adam",), ("lasso",)
    needs = "pytorch_cpr"

    def __init__(self, problem: Problem, model: nn.Module, make: Any) -> None:
        from pytorch_cpr import AdamCPR

        bound = float(problem.solution.abs().sum())
        self.optimizer = AdamCPR(
            [{"params": [model.weight], "regularize": True}],
            lr=0.01,
            kappa_init_method="uniform",
            kappa_init_param=bound,
            reg_function="l1",
            reg_by_lr=True,
            foreach=False,
        )
        self.step = self.optimizer.step


METHODS = {
    "tikhon": Regularized,
    "penalty in the loss": InLoss,
    "prox with plain lr": NaiveProx,
    "torchao PAT": PAT,
    "AdamCPR l1": CPR,
}


def train(
    problem: Problem, method: Any, run: str, steps: int, batch_size: int | None = None
) -> dict[str, Any]:
    """One training; the gap, the F1 of the support and the zeros it ends with."""
    kind, options = optimizers(problem)[run]
    torch.manual_seed(0)
    model = nn.Linear(problem.gram.shape[0], len(problem.cross), bias=False).double()
    fitted = method(problem, model, lambda params: kind(params, **options))
    averages = hasattr(fitted.optimizer, "eval")  # schedule-free
    constant = averages or (batch_size is None and issubclass(kind, optim.SGD | optim.ASGD))
    decay = 1.0 if constant else 1e-5 ** (2 / steps)  # Rprop keeps the steps that it has found
    for step in range(steps):
        w = model.weight.detach()
        if batch_size is None:
            model.weight.grad = problem.gradient(w)
        else:
            model.weight.grad = problem.estimate(w, torch.randint(len(problem.x), (batch_size,)))
        fitted.step()
        if step >= steps // 2:
            for group in fitted.optimizer.param_groups:
                group["lr"] *= decay
    if averages:
        fitted.optimizer.eval()
    w = model.weight.detach()
    best = problem.objective(problem.solution)
    truth, found = problem.solution != 0, w != 0
    both = int((truth & found).sum())
    return {
        "data": problem.name,
        "penalty": problem.kind,
        "run": run,
        "steps": steps,
        "gap": max(problem.objective(w) - best, 0.0) / best,
        "f1": 2 * both / max(1, int(truth.sum()) + int(found.sum())),
        "zeros": float(1 - found.double().mean()),
        "true_zeros": float(1 - truth.double().mean()),
    }


def train_until(
    problem: Problem, method: Any, run: str, steps: int, longest: int, batch_size: int | None
) -> dict[str, Any]:
    """The same with five times the steps, again and again, until both targets are met."""
    row = train(problem, method, run, steps, batch_size)
    while (row["gap"] > GAP or row["f1"] < 1) and 5 * row["steps"] <= longest:
        row = train(problem, method, run, 5 * row["steps"], batch_size)
    return row


def load(folder: Path | None, quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The data sets, by name."""
    if quick:
        return {"iris": load_iris(return_X_y=True), "wine": load_wine(return_X_y=True)}
    if folder is None or not folder.is_dir():
        raise SystemExit(f"--data must name the folder with {SETS[0]}.npz, received {folder}")
    found = {}
    for name in SETS:
        with np.load(folder / f"{name}.npz") as arrays:
            found[name] = arrays["X"], arrays["y"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a method and optimizer, the worst over the data sets."""
    lines = ["| | | " + " | ".join(f"{p}: gap | F1" for p in PENALTIES) + " |"]
    lines.append("|---|---|" + "---:|---:|" * len(PENALTIES))
    for method, run in dict.fromkeys((row["method"], row["run"]) for row in rows):
        cells = []
        for penalty in PENALTIES:
            own = [
                r for r in rows if (r["method"], r["run"], r["penalty"]) == (method, run, penalty)
            ]
            if own:
                gap, f1 = max(r["gap"] for r in own), min(r["f1"] for r in own)
                cells.append(f"{gap:.1e} | {f1:.3f}")
            else:
                cells.append("- | -")
        lines.append(f"| {method} | {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("TIKHON_BENCHMARK_DATA"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--until", type=int, default=0, help="repeat tikhon's misses with 5x the steps up to this"
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods alone")
    parser.add_argument("--batch-size", type=int, help="rows in a step; all of them if not given")
    parser.add_argument("--runs", nargs="+", help="these optimizers alone")
    parser.add_argument("--penalties", nargs="+", choices=PENALTIES, default=PENALTIES)
    parser.add_argument("--sets", nargs="+", choices=SETS, help="these data sets alone")
    parser.add_argument(
        "--output", type=Path, help="write all figures as JSON; sets that it holds are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    steps = options.steps or (2000 if options.quick else 4000)
    folder = Path(options.data) if options.data else None
    rows, started = [], time.process_time()
    if options.output and options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    done = {row["data"] for row in rows}
    for name, (x, y) in load(folder, options.quick).items():
        if name in done or name not in (options.sets or [name]):
            continue
        for kind in options.penalties:
            exact = problem(name, kind, x, y)
            known = optimizers(exact)
            for label, method in METHODS.items():
                needs = getattr(method, "needs", None)
                if kind not in method.kinds or (needs and not importlib.util.find_spec(needs)):
                    continue
                if options.only and label not in options.only:
                    continue
                longest = options.until if method is Regularized else 0
                for run in method.runs:
                    if run not in (options.runs or known):
                        continue
                    row = train_until(exact, method, run, steps, longest, options.batch_size)
                    rows.append({"method": label} | row)
                    if row["steps"] > steps:
                        print(f"  {kind}, {run}: {row['steps']} steps, gap {row['gap']:.1e}")
        print(f"{name}: done after {time.process_time() - started:.0f} CPU seconds", flush=True)
    rows.sort(key=lambda row: list(METHODS).index(row["method"]))
    print(f"\nWorst of {len({r['data'] for r in rows})} data sets, {steps} steps each.\n")
    print(table(rows))
    if options.output:
        document = {"schema_version": 1, "steps": steps, "torch": torch.__version__, "rows": rows}
        options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
