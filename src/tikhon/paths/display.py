"""The picture of a path: coefficients (or importances) over the strength, and the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tikhon.paths.result import PathResult


@dataclass(eq=False)
class PathDisplay:
    """Draws `result`, a `PathResult`, with matplotlib, in the manner of scikit-learn's displays.

    >>> import matplotlib; matplotlib.use("agg")
    >>> import torch
    >>> from tikhon import L1, path
    >>> x = torch.randn(50, 4); y = x[:, 0] - 2 * x[:, 1]
    >>> display = PathDisplay.from_result(path(None, (x, y), L1(), strengths=10, folds=3))
    >>> len(display.axes_)
    2
    """

    result: PathResult
    axes_: Any = None
    figure_: Any = None

    @classmethod
    def from_result(cls, result: PathResult, *, axes: Any = None, top: int = 12) -> PathDisplay:
        """Draw at once; `axes` are two matplotlib axes, or None for a new figure."""
        return cls(result).plot(axes=axes, top=top)

    def plot(self, *, axes: Any = None, top: int = 12) -> PathDisplay:
        """Curves above, scores with error bars below; the `top` features are named."""
        if axes is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError(
                    "PathDisplay needs matplotlib: pip install tikhon[plot]"
                ) from error
            self.figure_, axes = plt.subplots(
                2, 1, sharex=True, figsize=(7, 7), height_ratios=(2, 1)
            )
        self.axes_ = axes
        self.figure_ = self.figure_ or axes[0].figure
        strengths = self._places()
        self._curves(axes[0], strengths, top)
        self._scores(axes[1], strengths)
        return self

    def _places(self) -> list[float]:
        """log10 of the strengths; the dense model (strength 0) stands left of the smallest."""
        positive = [s for s in self.result.strengths if s > 0]
        left = math.log10(min(positive)) - 0.1 if positive else 0.0
        return [math.log10(s) if s > 0 else left for s in self.result.strengths]

    def _curves(self, axis: Any, strengths: list[float], top: int) -> None:
        result = self.result
        single = result.coefficients is not None and result.coefficients.shape[1] == 1
        curves = result.coefficients[:, 0] if single else result.importances  # type: ignore[index]
        last = curves.abs().amax(0)
        named = set(last.argsort(descending=True)[:top].tolist())
        names = result.feature_names or tuple(map(str, range(curves.shape[1])))
        for j in range(curves.shape[1]):
            style = {"label": names[j]} if j in named else {"color": "0.8", "zorder": 0}
            axis.plot(strengths, curves[:, j].tolist(), **style)
        axis.set_ylabel("coefficient" if single else "norm of the feature's weights")
        axis.set_title(f"{result.penalty} path")
        axis.legend(fontsize="small", ncols=2)

    def _scores(self, axis: Any, strengths: list[float]) -> None:
        result = self.result
        axis.set_xlabel("log10(strength)")
        axis.set_ylabel("validation loss")
        if not any(map(math.isfinite, result.scores)):
            axis.plot(strengths, result.counts)
            axis.set_ylabel("features in use")
            return
        axis.errorbar(strengths, result.scores, yerr=result.errors, fmt=".-", ecolor="0.7")
        for index, style, label in ((result.best, ":", "best"), (result.one_se, "--", "one SE")):
            axis.axvline(strengths[index], linestyle=style, color="0.3", label=label)
        axis.legend(fontsize="small")
