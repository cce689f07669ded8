"""The result of a path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tikhon import notebook, plotting
from tikhon.errors import InputError

Select = Literal["one_se", "best"]
Of = Literal["features", "weights"]


@dataclass(frozen=True, eq=False)
class PathResult:
    """Result of a path, with one entry for each strength, largest first for linear models.

    `supports` (strengths, features) are bool, `importances` the sizes of the weights,
    `coefficients` (strengths, outputs, features) exist for linear models. `scores` are mean
    validation losses (of debiased models, if requested) with standard `errors`; `best` has the
    lowest score and `one_se` is the sparsest within one standard error of it. `classes` are the
    labels of a classifier's outputs; a single output is the logit of the last of two. `residuals`
    are distances to optimality relative to the largest gradient.

    A path with `of="weights"` begins with the dense network, at strength 0. Its `supports` have a
    column for each penalised weight, its `importances` are the shares of the weights left in each
    layer, whose names are `feature_names`, and `accuracies` are those on the validation rows with
    their standard errors (for classes).
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
    of: Of = "features"
    accuracies: tuple[tuple[float, float], ...] = ()

    def __repr__(self) -> str:
        counts = self.counts
        span = f"{len(self.strengths)} strengths, {min(counts)} to {max(counts)} {self.of}"
        chosen = f", {counts[self.chosen]} chosen" if self._chooses else ""
        return f"PathResult({self.penalty}, {span}{chosen})"

    def _repr_html_(self) -> str:
        rows, last = [], None
        for i, count in enumerate(self.counts):
            if count != last:
                rows.append((count, self.strengths[i], self.scores[i]))
            last = count
        series: dict[str, notebook.Line] = {"": (self.strengths, self.scores)}
        chart = notebook.svg_lines(series, "strength", "validation loss", log=True)
        said = []
        if self.of == "weights":
            rows = rows[:: 1 + len(rows) // 20]
        elif self._chooses:
            said = [f"chosen: {', '.join(self.features()) or 'no feature'}"]
        head = (self.of, "from strength", "validation loss")
        return notebook.html_card(repr(self), said, head, rows, chart)

    def plot(self, *, ax: plotting.Axes | None = None, top: int = 12) -> plotting.Display:
        """Plot coefficients (or importances) against the strength, with the scores below.

        With `of="weights"`: the accuracy (or validation loss) with one standard error against the
        number of weights, the dense model, the choices and the knee marked; below, what is left of
        each layer.

        Args:
            ax: two matplotlib axes to draw on; a new figure if None.
            top: number of features named.

        Raises:
            InputError: if matplotlib is not installed.

        >>> import matplotlib; matplotlib.use("agg")
        >>> x = torch.randn(50, 4); y = x[:, 0] - 2 * x[:, 1]
        >>> display = tk.path(None, (x, y), tk.L1(), strengths=10, folds=3).plot()
        >>> len(display.axes_)
        2
        """
        display = plotting.canvas(ax, 1, 0.6)
        if self.of == "weights" and self._scored:
            self._plot_sizes(display.axes_[0])
            self._plot_curves(display.axes_[1], top)
            return display
        self._plot_curves(display.axes_[0], top)
        self._plot_scores(display.axes_[1])
        return display

    def _places(self) -> list[float]:
        """log10 of the strengths; the dense model (strength 0) is placed left of the smallest."""
        positive = [s for s in self.strengths if s > 0]
        left = math.log10(min(positive)) - 0.1 if positive else 0.0
        return [math.log10(s) if s > 0 else left for s in self.strengths]

    def _plot_curves(self, axes: Any, top: int) -> None:
        single = self.coefficients is not None and self.coefficients.shape[1] == 1
        curves = self.coefficients[:, 0] if single else self.importances  # type: ignore[index]
        named = set(curves.abs().amax(0).argsort(descending=True)[:top].tolist())
        names = self.feature_names or tuple(map(str, range(curves.shape[1])))
        places = self._places()
        for j in range(curves.shape[1]):
            style = {"label": names[j]} if j in named else {"color": "0.8", "zorder": 0}
            axes.plot(places, curves[:, j].tolist(), **style)
        size = "weights left, share" if self.of == "weights" else "norm of the feature's weights"
        axes.set_ylabel("coefficient" if single else size)
        axes.set_title(f"{self.penalty} path")
        axes.legend(fontsize="small", ncols=2)

    def _plot_sizes(self, axes: Any) -> None:
        values, errors = zip(*self.accuracies) if self.accuracies else (self.scores, self.errors)
        sizes = [max(count, 1) for count in self.counts]
        below, above = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
        axes.fill_between(sizes, below, above, color="0.85", label="one standard error")
        axes.plot(sizes, values, ".-")
        axes.axhline(values[0], linestyle=":", color="0.6", label="dense")
        marks = {"best": self.best, "one SE": self.one_se, "knee": self.knee}
        for (label, index), marker in zip(marks.items(), "os^"):
            place = sizes[index], values[index]
            axes.plot(*place, marker, fillstyle="none", markersize=9, color="0.2", label=label)
        axes.set(xscale="log", xlabel=f"weights that are not zero, of {self.supports.shape[1]:,}")
        axes.set_ylabel("validation accuracy" if self.accuracies else "validation loss")
        axes.legend(fontsize="small")

    def _plot_scores(self, axes: Any) -> None:
        places = self._places()
        axes.set_xlabel("log10(strength)")
        if not self._scored:
            axes.plot(places, self.counts)
            axes.set_ylabel(f"{self.of} in use")
            return
        axes.set_ylabel("validation loss")
        axes.errorbar(places, self.scores, yerr=self.errors, fmt=".-", ecolor="0.7")
        for index, style, label in ((self.best, ":", "best"), (self.one_se, "--", "one SE")):
            axes.axvline(places[index], linestyle=style, color="0.3", label=label)
        axes.legend(fontsize="small")

    @property
    def _scored(self) -> bool:
        return any(map(math.isfinite, self.scores))

    @property
    def _chooses(self) -> bool:
        return self._scored or len(self.strengths) == 1

    @property
    def counts(self) -> list[int]:
        """Number of features (or weights) kept at each strength."""
        return self.supports.sum(1).tolist()

    @property
    def best(self) -> int:
        """Index of the lowest score, the sparser model on ties."""
        if not self._scored:
            raise InputError("the path was not scored: give valid or folds")
        finite = [i for i, score in enumerate(self.scores) if math.isfinite(score)]
        return min(finite, key=lambda i: (self.scores[i], self.counts[i]))

    @property
    def one_se(self) -> int:
        """Index of the sparsest model within one standard error of the best score.

        Reference: Breiman et al. (1984), Classification and regression trees.
        """
        best = self.best
        error = self.errors[best]  # NaN if only one row was scored
        limit = self.scores[best] + (error if math.isfinite(error) else 0.0)
        near = [i for i, score in enumerate(self.scores) if score <= limit]
        return min(near, key=lambda i: (self.counts[i], -self.strengths[i]))

    @property
    def knee(self) -> int:
        """Index of the model from which on size buys little.

        Of the lowest score among models of at most a given size, against the logarithm of one plus
        the size, both scaled to [0, 1]: the point farthest below the straight line from its first
        to its last point.

        Reference: Satopaa et al. (2011), https://doi.org/10.1109/ICDCSW.2011.20 (Kneedle).
        """
        lowest = self.scores[self.best]
        finite = [i for i, score in enumerate(self.scores) if math.isfinite(score)]
        order = sorted(finite, key=lambda i: (self.counts[i], self.scores[i]))
        counts = [self.counts[i] for i in order]
        small, large = math.log1p(counts[0]), math.log1p(counts[-1])
        highest, score = self.scores[order[0]], math.inf
        found, depth = order[0], -math.inf
        for i, count in zip(order, counts):
            if self.scores[i] >= score:
                continue
            score = self.scores[i]
            size = (math.log1p(count) - small) / ((large - small) or 1.0)
            below = 1.0 - size - (score - lowest) / ((highest - lowest) or 1.0)
            if below > depth:
                found, depth = i, below
        return found

    @property
    def chosen(self) -> int:
        """Index selected by `select`; the only strength if unscored."""
        if len(self.strengths) == 1:
            return 0
        return self.best if self.select == "best" else self.one_se

    def features(self, index: int | None = None) -> list[str]:
        """Return names (or indices) of the selected features, most important first.

        Raises `InputError` for a path of weights.
        """
        if self.of == "weights":
            raise InputError("this is a path of weights: see counts, or model() for the network")
        index = self.chosen if index is None else index
        order = self.importances[index].argsort(descending=True).tolist()
        names = self.feature_names or tuple(map(str, range(len(order))))
        return [names[j] for j in order if self.supports[index, j]]

    def model(self, index: int | None = None) -> nn.Module:
        """Return the model at a strength, by default the selected one."""
        model = self.build()
        model.load_state_dict(self.states[self.chosen if index is None else index])
        return model.eval()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict without the models."""
        return {
            "schema_version": 1,
            "kind": "path",
            "penalty": self.penalty,
            "strengths": list(self.strengths),
            "how": "objective",
            "counts": self.counts,
            "scores": [s if math.isfinite(s) else None for s in self.scores],
            "errors": [e if math.isfinite(e) else None for e in self.errors],
            "importances": [[float(f"{v:.6g}") for v in row] for row in self.importances.tolist()],
            "feature_names": list(self.feature_names),
            "classes": list(self.classes),
            "chosen": self.chosen if self._chooses else None,
            "selected": self.features() if self._chooses and self.of == "features" else [],
            "seconds": self.seconds,
            **(self._weights_to_dict() if self.of == "weights" else {}),
        }

    def _weights_to_dict(self) -> dict[str, Any]:
        return {
            "of": self.of,
            "weights": self.supports.shape[1],
            "knee": self.knee if self._scored else None,
            "accuracies": [list(pair) for pair in self.accuracies],
        }


def mean_and_error(rows: Tensor) -> tuple[list[float], list[float]]:
    """Mean loss over rows of (strengths, rows) and its standard error, NaN for one row."""
    count = rows.shape[1]
    spread = rows.std(1) if count > 1 else torch.full((len(rows),), math.nan)
    return rows.mean(1).tolist(), (spread / math.sqrt(count)).tolist()
