"""What a path found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tikhon import notebook
from tikhon.errors import InputError

Select = Literal["one_se", "best"]


@dataclass(frozen=True, eq=False)
class PathResult:
    """What a path found, one entry a strength, strongest first for linear models.

    `supports` (strengths, features) tells the features in use, `importances` how large their
    weights are, `coefficients` (strengths, outputs, features) exist for linear models. `scores`
    are mean validation losses (of the debiased models, if these were asked for) with standard
    `errors`; `best` has the lowest score and `one_se` is the sparsest within one error of it.
    `classes` are the labels behind the outputs of a classifier: the last one of two, if there is
    one output. `residuals` are distances to optimality, as shares of the largest gradient.
    """

    strengths: tuple[float, ...]
    supports: Tensor
    importances: Tensor
    scores: tuple[float, ...]
    errors: tuple[float, ...]
    states: tuple[dict[str, Tensor], ...]
    build: Callable[[], nn.Module]
    penalty: str
    select: Select = "one_se"
    coefficients: Tensor | None = None
    intercepts: Tensor | None = None
    residuals: tuple[float, ...] = ()
    classes: tuple[int, ...] = ()
    feature_names: tuple[str, ...] = ()
    seconds: float = 0.0

    def __repr__(self) -> str:
        counts = self.counts
        span = f"{len(self.strengths)} strengths, {min(counts)} to {max(counts)} features"
        scored = len(self.strengths) == 1 or any(map(math.isfinite, self.scores))
        chosen = f", {counts[self.chosen]} chosen" if scored else ""
        return f"PathResult({self.penalty}, {span}{chosen})"

    def _repr_html_(self) -> str:
        rows, last = [], None
        for i, count in enumerate(self.counts):
            if count != last:
                rows.append((count, self.strengths[i], self.scores[i]))
            last = count
        series: dict[str, notebook.Line] = {"": (self.strengths, self.scores)}
        chart = notebook.lines(series, "strength", "validation loss", log=True)
        scored = len(self.strengths) == 1 or any(map(math.isfinite, self.scores))
        said = [f"chosen: {', '.join(self.features()) or 'no feature'}"] if scored else []
        head = ("features", "from strength", "validation loss")
        return notebook.card(repr(self), said, head, rows, chart)

    @property
    def counts(self) -> list[int]:
        """How many features each strength keeps."""
        return self.supports.sum(1).tolist()

    @property
    def best(self) -> int:
        """Index of the lowest score; of two equal ones the sparser."""
        if not any(map(math.isfinite, self.scores)):
            raise InputError("the path was not scored: give valid or folds")
        finite = [i for i, score in enumerate(self.scores) if math.isfinite(score)]
        return min(finite, key=lambda i: (self.scores[i], self.counts[i]))

    @property
    def one_se(self) -> int:
        """Index of the sparsest model within one standard error of the best score.

        Reference: Breiman et al. (1984), Classification and regression trees.
        """
        best = self.best
        limit = self.scores[best] + self.errors[best]
        near = [i for i, score in enumerate(self.scores) if score <= limit]
        return min(near, key=lambda i: (self.counts[i], -self.strengths[i]))

    @property
    def chosen(self) -> int:
        """The index that `select` names; without scores the only strength."""
        if len(self.strengths) == 1:
            return 0
        return self.best if self.select == "best" else self.one_se

    def features(self, index: int | None = None) -> list[str]:
        """Names (or numbers) of the features in use, the most important first."""
        index = self.chosen if index is None else index
        order = self.importances[index].argsort(descending=True).tolist()
        names = self.feature_names or tuple(map(str, range(len(order))))
        return [names[j] for j in order if self.supports[index, j]]

    def model(self, index: int | None = None) -> nn.Module:
        """The model at a strength, by default at the chosen one."""
        model = self.build()
        model.load_state_dict(self.states[self.chosen if index is None else index])
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: figures without the models."""
        scored = any(map(math.isfinite, self.scores)) or len(self.strengths) == 1
        return {
            "schema_version": 1,
            "kind": "path",
            "penalty": self.penalty,
            "strengths": list(self.strengths),
            "counts": self.counts,
            "scores": [s if math.isfinite(s) else None for s in self.scores],
            "errors": [e if math.isfinite(e) else None for e in self.errors],
            "importances": [[float(f"{v:.6g}") for v in row] for row in self.importances.tolist()],
            "feature_names": list(self.feature_names),
            "classes": list(self.classes),
            "chosen": self.chosen if scored else None,
            "selected": self.features() if scored else [],
            "seconds": self.seconds,
        }
