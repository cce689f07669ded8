"""The form of a program from a public report, of its repaired twin, and of a loop for `watch`.

A folder beside this file (`frozen/`, `developed/`, `fresh/`, `third/`, `fourth/`, `fifth/`,
`sixth/`, `seventh/`, `eighth/`) holds modules with two lists, PROGRAMS and LOOPS; either may be
absent.
`load("frozen")` reads them all. Every program is written as

    def right():
        x, y = ...                                     # torch is seeded, so draw from it freely
        model = nn.Sequential(...)
        return Parts(model, (x[:400], y[:400]), nn.MSELoss(), adam(model), score=r2(x[400:], ...))

    PROGRAMS = [
        Program("squares", "https://...", "broadcast_loss", wrong, right, low=0.1, high=0.8),
    ]

and `python benchmarks/programs/form.py FOLDER` trains them with `train`, a plain loop that knows
nothing of tikhon, with two seeds: the faulty one must score at most `low`, the twin at least
`high`. `score` is what the author of the report wanted, so higher is better: accuracy, or R2.
A loop gets `watch(model, optimizer)`, to be entered by `with` around the training, and gives back
its score at the end:

    def broken(watch):
        model = ...
        with watch(model, optimizer):
            for x, y in batches:
                ...
        return accuracy(x, y)(model)
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Score = Callable[[nn.Module], float]
Watch = Callable[[nn.Module, torch.optim.Optimizer], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Parts:
    """What `tikhon.diagnose` takes, and the score of a trained model, in evaluation mode."""

    model: nn.Module
    data: Any  # a pair (inputs, target) or a loader
    loss: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    score: Score
    valid: Any = None
    batch_size: int = 32
    steps: int = 200
    clip: float | None = None


@dataclass(frozen=True)
class Program:
    """A faulty program with its true cause, a code of `diagnose`, and the program repaired.

    `also` are codes that would send the author to the same line; `cause` always counts. Where no
    code of `diagnose` says the cause, `cause` is the word that would, and `also` the nearest.
    """

    name: str
    source: str
    cause: str
    wrong: Callable[[], Parts]
    right: Callable[[], Parts]
    low: float
    high: float
    also: tuple[str, ...] = ()

    @property
    def accepted(self) -> frozenset[str]:
        """Codes that count as right when they stand on top."""
        return frozenset((self.cause, *self.also))

    def build(self, seed: int, *, repaired: bool = False) -> Parts:
        """The parts of the faulty program or of its twin, drawn anew with a seed."""
        torch.manual_seed(seed)
        return (self.right if repaired else self.wrong)()


@dataclass(frozen=True)
class Loop:
    """A training loop with a broken law, and the same loop repaired; see `Program` for `also`."""

    name: str
    source: str
    cause: str
    broken: Callable[[Watch], float]
    healthy: Callable[[Watch], float]
    low: float
    high: float
    also: tuple[str, ...] = ()

    @property
    def accepted(self) -> frozenset[str]:
        """Alarms that count as right."""
        return frozenset((self.cause, *self.also))

    def run(self, watch: Watch, seed: int, *, repaired: bool = False) -> float:
        """Run the broken or the healthy loop under `watch`; the score of the model it trains."""
        torch.manual_seed(seed)
        return (self.healthy if repaired else self.broken)(watch)


def unwatched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What a loop is given where nobody watches."""
    return contextlib.nullcontext()


def batches(parts: Parts) -> Iterator[Any]:
    """Batches without end: of the loader, or of rows in a new order each epoch."""
    if not (isinstance(parts.data, tuple) and len(parts.data) == 2):
        while True:
            yield from parts.data
    inputs, target = parts.data
    while True:
        order = torch.randperm(rows_of(target))
        for rows in order.split(parts.batch_size):
            yield take(inputs, rows), take(target, rows)


def take(values: Any, rows: Tensor) -> Any:
    """Rows of a tensor, or of each tensor in a tuple or dictionary."""
    if isinstance(values, dict):
        return {name: take(v, rows) for name, v in values.items()}
    return tuple(take(v, rows) for v in values) if isinstance(values, tuple) else values[rows]


def rows_of(values: Any) -> int:
    """Rows of a tensor, or of the first tensor in a tuple or dictionary."""
    while isinstance(values, (dict, tuple)):
        values = next(iter(values.values() if isinstance(values, dict) else values))
    return len(values)


def train(parts: Parts) -> float:
    """Train with a plain loop for `steps` steps; the score at the end, 0 or less if it blew up."""
    whole = next(iter(inspect.signature(parts.loss).parameters)) == "model"
    parts.model.train()
    for _, batch in zip(range(parts.steps), batches(parts)):
        parts.optimizer.zero_grad()
        loss = (
            parts.loss(parts.model, batch)
            if whole
            else parts.loss(answer(parts.model, batch[0]), batch[1])
        )
        loss.backward()
        if parts.clip is not None:
            nn.utils.clip_grad_norm_(parts.model.parameters(), parts.clip)
        parts.optimizer.step()
    parts.model.eval()
    with torch.no_grad():
        return parts.score(parts.model)


def answer(model: nn.Module, inputs: Any) -> Any:
    """What the model says to a batch of inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def accuracy(x: Any, y: Tensor) -> Score:
    """Share of rows whose largest output (or whose sign, where there is one) is the target."""

    def score(model: nn.Module) -> float:
        output = answer(model, x)
        single = output.ndim == 1 or output.shape[1] == 1
        found = (output.flatten() > 0) if single else output.argmax(1)
        return float((found == y.view_as(found)).float().mean())

    return score


def r2(x: Any, y: Tensor) -> Score:
    """Share of the variance that is explained; -1 at the least."""

    def score(model: nn.Module) -> float:
        output = answer(model, x)
        error = (output.reshape(y.shape) - y).square().mean() / (y - y.mean(0)).square().mean()
        return max(-1.0, 1 - float(error.nan_to_num(2.0, 2.0)))

    return score


def adam(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    """Adam over all parameters."""
    return torch.optim.Adam(model.parameters(), lr=lr, **options)


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """SGD over all parameters."""
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def load(folder: str) -> tuple[list[Program], list[Loop]]:
    """The programs and loops of a folder beside this file, in the order of its modules."""
    programs: list[Program] = []
    loops: list[Loop] = []
    package = importlib.import_module(f"programs.{folder}")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        found = importlib.import_module(f"programs.{folder}.{module}")
        programs += getattr(found, "PROGRAMS", [])
        loops += getattr(found, "LOOPS", [])
    return programs, loops


def main() -> None:
    """Print the scores of every program and loop of a folder, and those out of their bounds."""
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    programs, loops = load(folder)
    outside = 0
    for item in (*programs, *loops):
        if names and not any(name in item.name for name in names):
            continue
        scores: dict[bool, list[float]] = {False: [], True: []}
        for repaired in scores:
            for seed in (0, 1):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if isinstance(item, Program):
                        value = train(item.build(seed, repaired=repaired))
                    else:
                        value = item.run(unwatched, seed, repaired=repaired)
                scores[repaired].append(value)
        good = max(scores[False]) <= item.low and min(scores[True]) >= item.high
        outside += not good
        shown = ["/".join(f"{v:.2f}" for v in pair) for pair in scores.values()]
        print(
            f"{'' if good else 'NOT '}{item.name}: faulty {shown[0]} (at most {item.low}), "
            f"repaired {shown[1]} (at least {item.high})",
            flush=True,
        )
    raise SystemExit(outside > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from programs import form  # the classes that the programs themselves import

    form.main()
