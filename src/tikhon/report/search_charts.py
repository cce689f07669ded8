"""Charts of many trials: curves, responses to hyperparameters, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tikhon.report.charts import (
    Figure,
    Numbers,
    axis,
    escape_name,
    finite,
    line,
    logarithmic,
    ring,
    spans_decades,
    title,
)
from tikhon.report.page import Label, Name, label


def scatter(
    x: Sequence[object],
    y: Numbers,
    x_title: Label | Name,
    y_title: Label,
    chosen: int | None,
    faint: Sequence[bool],
    log: bool,
) -> Figure:
    """Plot one dot for each trial; `faint` ones are hollow, the chosen one is ringed.

    If any value is a word ("auto"), the axis is categorical.
    """
    data = []
    across: dict[str, object] = logarithmic(x) if log else {}
    if len(finite(x)) < len(x):
        numbers = sorted(set(finite(x)))
        words = sorted({"–" if v is None else str(v) for v in x if v not in numbers})
        order = [f"{v:.3g}" for v in numbers] + words
        x = [f"{v:.3g}" if v in numbers else "–" if v is None else str(v) for v in x]
        across = {"type": "category", "categoryorder": "array", "categoryarray": order}
    kinds = ((True, "stopped_early", "muted"), (False, "finished", "series-1"))
    for hollow, name, colour in kinds:
        shown = [i for i, f in enumerate(faint) if f == hollow]
        marker = {"size": 7, "color": colour, "symbol": "circle-open" if hollow else "circle"}
        points = {"x": [x[i] for i in shown], "y": [y[i] for i in shown]}
        data.append({"mode": "markers", **points, "name": label(name), "marker": marker})
    if chosen is not None:
        data.append(ring(x[chosen], y[chosen], label("chosen")))
    layout = {
        "xaxis": axis(x_title, **across),
        "yaxis": axis(y_title, **(logarithmic(y) if spans_decades(y, 10) else {})),
    }
    return {"data": data, "layout": {**layout, "hovermode": "closest"}}


def curves_by_outcome(
    curves: Sequence[tuple[Sequence[float], Numbers, Label]], y: Label, colours: Mapping[str, str]
) -> Figure:
    """Plot many curves grouped by outcome (label and colour)."""
    traces: dict[str, dict[str, Any]] = {}
    for x, values, fate in curves:
        thick = 3 if fate.key == "chosen" else 1
        opacity = 1 if thick > 1 else 0.55
        still = {"hoverinfo": "skip", "connectgaps": False, "opacity": opacity}
        trace = traces.setdefault(fate.key, line([], [], fate, colours[fate.key], thick) | still)
        trace["x"] += [*x, None]
        trace["y"] += [*values, None]
    data = [traces[key] for key in colours if key in traces]
    heights = [v for trace in data for v in trace["y"]]
    log = logarithmic(heights) if spans_decades(heights) else {}
    layout = {"xaxis": axis(label("epoch")), "yaxis": axis(y, **log), "hovermode": False}
    return {"data": data, "layout": layout}


@dataclass(frozen=True)
class Coordinate:
    """One axis of a parallel plot: the position of each line, 0 to 1."""

    name: str | Label
    places: Numbers
    low: str
    high: str


def parallel(coordinates: Sequence[Coordinate], shares: Sequence[float], chosen: int) -> Figure:
    """Plot parallel coordinates, one line for each trial, coloured by rank (0 is best)."""
    bands = (("best_quarter", 0.25, "series-1"), ("other_trials", 1.01, "rule"))
    data, floor = [], -0.01
    for key, ceiling, colour in bands:
        members = [i for i, s in enumerate(shares) if floor < s <= ceiling and i != chosen]
        data.append(_lines(coordinates, members, label(key), colour, 1.2))
        floor = ceiling
    data = [*reversed(data), _lines(coordinates, [chosen], label("chosen"), "chosen", 3.5)]
    places = list(range(len(coordinates)))
    ticks = {"tickvals": places, "ticktext": [title(c.name) for c in coordinates]}
    notes = [
        {"x": i, "y": y, "text": escape_name(text, 11), "showarrow": False, "yshift": shift}
        | {"font": {"color": "muted", "size": 11}}
        for i, c in enumerate(coordinates)
        for y, text, shift in ((0, c.low, -11), (1, c.high, 11))
    ]
    layout = {
        "xaxis": axis("", **ticks, showgrid=True, range=[-0.3, len(coordinates) - 0.7]),
        "yaxis": axis("", showticklabels=False, showgrid=False, range=[-0.13, 1.13]),
        "annotations": notes,
        "hovermode": False,
    }
    return {"data": data, "layout": layout}


def _lines(
    coordinates: Sequence[Coordinate],
    members: Sequence[int],
    name: Label,
    colour: str,
    width: float,
) -> Figure:
    x, y = [], []
    for i in members:
        x += [*range(len(coordinates)), None]
        y += [*(c.places[i] for c in coordinates), None]
    return line(x, y, name, colour, width) | {"hoverinfo": "skip"}


def relative_positions(values: Sequence[object], log: bool) -> list[float | None]:
    """Return relative positions of values along their axis, 0 to 1."""
    known, numbers = [v for v in values if v is not None], finite(values)
    if len(numbers) < len(known):  # words are evenly spaced in alphabetical order
        words = sorted({str(v) for v in known})
        step = max(len(words) - 1, 1)
        return [None if v is None else words.index(str(v)) / step for v in values]
    scale = math.log if log and min(numbers) > 0 else float
    low, high = scale(min(numbers)), scale(max(numbers))
    width = (high - low) or 1.0
    return [(scale(v) - low) / width if isinstance(v, int | float) else None for v in values]
