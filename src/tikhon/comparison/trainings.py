"""The trainings of a comparison, each done once even if the process is killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tikhon.compaction import Compaction, compact
from tikhon.data import Split
from tikhon.models import build
from tikhon.runs.files import to_plain
from tikhon.runs.interrupt import Stopped, never_stop
from tikhon.runs.journal import Journal
from tikhon.training import measures
from tikhon.training.fit import Run, fit
from tikhon.training.recipe import Recipe


@dataclass(frozen=True)
class Fitted:
    """One training: settings, scores, and the size of the model after compaction."""

    recipe: Recipe
    lr: float
    metrics: dict[str, float]
    seconds: float
    zeros: float  # share of the weights
    parameters: tuple[int, int]  # before and after compaction

    def score(self, part: str) -> float:
        """Return a score to maximise: accuracy, or minus the rmse."""
        if f"{part}/accuracy" in self.metrics:
            return self.metrics[f"{part}/accuracy"]
        return -self.metrics[f"{part}/rmse"]

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        return to_plain({**self.__dict__, "recipe": self.recipe.to_dict()})

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Fitted:
        """Invert `to_dict`."""
        before, after = row["parameters"]
        return cls(
            Recipe.from_dict(row["recipe"]),
            float(row["lr"]),
            {k: math.nan if v is None else float(v) for k, v in row["metrics"].items()},
            float(row["seconds"]),
            float(row["zeros"]),
            (int(before), int(after)),
        )


class Records:
    """Results of a comparison so far, by name, and the seconds taken.

    With a journal every result is on disk before it is used, and results of an earlier process are
    returned instead of recomputed. Raises `Stopped` once `stop` returns true.
    """

    def __init__(
        self, journal: Journal | None = None, *, stop: Callable[[], bool] = never_stop
    ) -> None:
        self._journal, self.stop = journal, stop
        self._known: dict[str, Any] = {}
        previous_seconds = 0.0
        for event in journal.events if journal is not None else ():
            try:
                self._known[event["name"]] = event["found"]
                previous_seconds = float(event["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise cast(Journal, journal).malformed(error) from error
        self._started = time.perf_counter() - previous_seconds

    def __len__(self) -> int:
        return sum(isinstance(found, dict) for found in self._known.values())

    @property
    def seconds(self) -> float:
        """Seconds since the comparison began, excluding time between processes."""
        return time.perf_counter() - self._started

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """Return the result of this name as read back from JSON; compute it if unknown."""
        if name in self._known:
            return self._known[name]
        if self.stop():
            raise Stopped
        found = to_plain(find())
        if self._journal is not None:
            self._journal.append({"name": name, "found": found, "seconds": self.seconds})
        self._known[name] = found
        return found

    def fitted(self, name: str, find: Callable[[], Fitted]) -> Fitted:
        """Return the training of this name."""
        row = self.once(name, lambda: find().to_dict())
        try:
            return Fitted.from_dict(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise cast(Journal, self._journal).malformed(error) from error


@dataclass(frozen=True)
class Trainer:
    """Train recipes on splits."""

    model: str
    epochs: int
    batch_size: int
    stop: Callable[[], bool]

    def cost(self, parts: Split) -> float:
        """Return the seconds of one training, from a third of one, after a warm-up."""
        short = replace(self, epochs=-(-self.epochs // 3))
        replace(self, epochs=1).fit(parts, Recipe(), 1e-3, seed=0)
        started = time.perf_counter()
        short.fit(parts, Recipe(), 1e-3, seed=0)
        return (time.perf_counter() - started) * self.epochs / short.epochs

    def fit(self, parts: Split, recipe: Recipe, lr: float, *, seed: int) -> Fitted:
        """Train once. Raises `Stopped`."""
        rate = recipe.dropout if isinstance(recipe.dropout, float) else 0.0
        train = parts.train
        run = train_seeded(
            lambda: build(self.model, train.shape, train.outputs, rate=rate, rows=train.x),
            [(part.x, part.y) for part in (train, parts.valid, parts.test)],
            recipe,
            seed=seed,
            stop=self.stop,
            lr=lr,
            schedule="cosine",
            batch_size=self.batch_size,
            epochs=self.epochs,
            unit=train.unit,
        )
        small = cast("Compaction", compact(run.model, parts.valid.x[:8]).compaction)
        share = measures.zero_share(run.model)
        return Fitted(recipe, lr, dict(run.metrics or {}), run.seconds, share, small.parameters)


def train_seeded(
    make: Callable[[], nn.Module],
    parts: Sequence[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    seed: int,
    stop: Callable[[], bool],
    **settings: Any,
) -> Run:
    """Build a model from a seed and train it on (train, valid, test). Raises `Stopped`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    train, valid, test = parts
    options = {"seed": seed, "device": "cpu", "linear": False, "stop": stop}
    run = fit(model, train, recipe, valid=valid, test=test, **options, **settings)
    if run.ended == "stopped":
        raise Stopped
    return run
