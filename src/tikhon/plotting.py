"""Plot with matplotlib; every `plot()` returns a `Display`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tikhon.errors import InputError
from tikhon.notebook import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#2b6cb0", "#c53030", "#718096"


@dataclass(eq=False)
class Display:
    """The result of `plot()`, as in scikit-learn.

    Args:
        figure_: the matplotlib figure.
        axes_: its axes, top to bottom.
    """

    figure_: Figure
    axes_: tuple[Axes, ...]

    @property
    def ax_(self) -> Axes:
        """The first axes."""
        return self.axes_[0]


def canvas(ax: Axes | Sequence[Axes] | None, *heights: float) -> Display:
    """Return the given axes, or a new figure with stacked axes.

    `heights` sets the number of axes and their relative heights in a new figure.

    Raises:
        InputError: for another number of axes, or without matplotlib.
    """
    heights = heights or (1.0,)
    if ax is not None:
        axes = tuple(ax) if isinstance(ax, Sequence) else (ax,)
        if len(axes) != len(heights):
            raise InputError(f"ax: this picture has {len(heights)} axes, received {len(axes)}")
        return Display(axes[0].get_figure(root=True), axes)  # type: ignore[arg-type]
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("plot() needs matplotlib: pip install 'tikhon[plot]'") from error
    figure, grid = plt.subplots(
        len(heights),
        1,
        squeeze=False,
        height_ratios=heights,
        figsize=(7, 1.2 + 2.8 * sum(heights)),
        layout="constrained",
    )
    return Display(figure, tuple(grid[:, 0]))


def lines(ax: Axes, series: Mapping[str, Line], *, x: str, y: str, log: bool = False) -> None:
    """Draw a line for each name, skipping non-finite points; `log` is the scale of y."""
    for name, (places, values) in series.items():
        known = [(p, v) for p, v in zip(places, values) if v is not None and math.isfinite(v)]
        if known:
            ax.plot(*zip(*known), label=name, marker="." if len(known) < 20 else "")
    ax.set(xlabel=x, ylabel=y)
    if log and all(v > 0 for line in ax.lines for v in line.get_ydata()):  # type: ignore[union-attr]
        ax.set_yscale("log")
    if len(series) > 1 and ax.lines:
        ax.legend(fontsize="small")


def level(ax: Axes, value: float, label: str) -> None:
    """Draw a dotted horizontal line, labelled at its end."""
    ax.axhline(value, linestyle=":", color=GREY)
    place = ax.get_yaxis_transform()
    ax.text(
        1, value, label, transform=place, ha="right", va="bottom", fontsize="small", color=GREY
    )


def bars(
    ax: Axes,
    names: Sequence[str],
    values: Sequence[float],
    *,
    x: str,
    spread: Sequence[float] | None = None,
    colours: Sequence[str] | None = None,
    log: bool = False,
) -> None:
    """Draw a bar for each name, the first on top, with error bars."""
    places = range(len(names))
    ax.barh(places, values, xerr=spread, color=colours or BLUE, ecolor=GREY)
    ax.set_yticks(places, [_short(name) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel(x)
    if log and any(v > 0 for v in values):
        ax.set_xscale("log")


def intervals(
    ax: Axes,
    names: Sequence[str],
    values: Sequence[float],
    ends: Sequence[tuple[float, float]],
    *,
    x: str,
    colours: Sequence[str],
) -> None:
    """Draw a point with its interval for each name, the first on top."""
    for place, (value, (low, high)) in enumerate(zip(values, ends)):
        ax.plot([low, high], [place, place], color=colours[place], linewidth=2)
        ax.plot(value, place, "o", color=colours[place])
    ax.set_yticks(range(len(names)), [_short(name) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel(x)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"
