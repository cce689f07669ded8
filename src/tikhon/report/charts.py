"""Charts as plain plotly figures: data in, `{"data": [...], "layout": {...}}` out.

Colours are names of the page's palette (page.css) and texts may be `Label`s; the page resolves
both when it draws, so that one figure serves light and dark, English and Chinese.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from tikhon.report.page import Label, Name, label

PALETTE = ("series-1", "series-2", "series-3", "series-4", "series-5", "series-6")
Figure = dict[str, Any]
_STEPS = ((1.0, (1, 2, 3, 5, 7)), (1.5, (1, 2, 5)), (2.5, (1, 3)))  # decades, ticks within one
Numbers = Sequence[float | None]


def short(text: str, width: int) -> str:
    """Shorten a name to one line of at most `width` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def escape_name(text: str, width: int = 48) -> str:
    """Shorten a name from the data and escape its markup for plotly.

    >>> escape_name("<b>age</b>")
    '&lt;b&gt;age&lt;/b&gt;'
    """
    return escape(short(str(text), width), quote=False)


def title(text: Label | Name | str) -> Label | str:
    """Return chart text: labels unchanged, names escaped."""
    return text if isinstance(text, Label) else escape_name(str(text))


def axis(text: Label | Name | str = "", **more: object) -> dict[str, object]:
    """Return an axis with its title."""
    return {"title": {"text": title(text)}, **more}


def flat_range(values: Iterable[object]) -> dict[str, object]:
    """Return a narrow range for an axis whose values are all equal; plotly would start at 0.

    >>> flat_range([0.99, None, 0.99]), flat_range([0.9, 1.0])
    ({'range': [0.9801, 0.9999]}, {})
    """
    known = finite(values)
    if not known or min(known) < max(known) or not known[0]:
        return {}
    around = abs(known[0]) / 100
    return {"range": [known[0] - around, known[0] + around]}


def logarithmic(values: Iterable[object]) -> dict[str, object]:
    """Return a log axis with ticks at round numbers, or a linear one if too few would fit.

    >>> logarithmic([0.002, 0.06])["ticktext"]
    ['0.002', '0.005', '0.01', '0.02', '0.05']
    >>> logarithmic([0.0003, 0.05])["ticktext"]  # fits half of a page
    ['0.0003', '0.001', '0.003', '0.01', '0.03']
    >>> logarithmic([0.21, 0.24])
    {}
    """
    known = [v for v in finite(values) if v > 0]
    if len(known) < 2:
        return {}
    low, high = math.log10(min(known)), math.log10(max(known))
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = max(1, -(-len(powers) // 8))
    steps = next((steps for most, steps in _STEPS if high - low <= most), (1,))
    powers = [p for p in powers if p % every == 0] if steps == (1,) else powers
    ticks = [m * 10.0**p for p in powers for m in steps]
    ticks = [t for t in ticks if low - 0.02 <= math.log10(t) <= high + 0.02]
    if len(ticks) < 2:
        return {}
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}


def finite(values: Iterable[object]) -> list[float]:
    """Return the finite numbers among `values`."""
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def line(
    x: Iterable[object],
    y: Iterable[object],
    name: Label | str,
    colour: str,
    width: float = 2,
    **style: object,
) -> Figure:
    """Return a line through points; `style` sets its dash or shape."""
    points: Figure = {"mode": "lines", "x": list(x), "y": list(y), "name": name}
    if len(finite(points["y"])) == 1:
        points |= {"mode": "lines+markers", "marker": {"size": 6, "color": colour}}
    return {**points, "line": {"color": colour, "width": width, **style}}


def ring(x: object, y: object, name: Label, colour: str = "chosen") -> Figure:
    """Return a ring around a point."""
    marker = {"size": 15, "symbol": "circle-open", "color": colour}
    marker["line"] = {"width": 3, "color": colour}
    return {"mode": "markers", "x": [x], "y": [y], "name": name, "marker": marker}


def annotation(x: float, y: float, text: Label, colour: str, size: int, **more: object) -> Figure:
    """Return a text at a position on the x axis and a relative height, 0 to 1."""
    font = {"color": colour, "size": size}
    return {"x": x, "y": y, "yref": "paper", "showarrow": False, "font": font, "text": text} | more


def learning_curves(
    epochs: Numbers,
    train: Numbers,
    valid: Numbers,
    y: Label,
    *,
    higher: bool,
    best: int | None = None,
    **range_: object,
) -> Figure:
    """Return training and validation curves, with the gap shaded where training is better."""
    better = max if higher else min
    edge = [None if None in (t, v) else better(t, v) for t, v in zip(train, valid)]  # type: ignore
    shade = {"hoverinfo": "skip", "fill": "tonexty", "fillcolor": "gap"}
    data = [
        line(epochs, valid, label("valid"), "valid", 2.5),
        line(epochs, edge, label("gap"), "gap", 0) | shade,
        line(epochs, train, label("train"), "train"),
    ]
    scale = {**flat_range([*train, *valid]), **range_}
    layout: Figure = {"xaxis": axis(label("epoch")), "yaxis": axis(y, **scale)}
    if best is not None:
        late = len(epochs) > 1 and best > (finite(epochs)[0] + finite(epochs)[-1]) / 2
        layout["shapes"] = [vertical(best)]
        text, across = label("best_epoch_short", epoch=best), "right" if late else "left"
        height, upright = (0.03, "bottom") if higher else (0.97, "top")
        note = annotation(best, height, text, "muted", 11, yanchor=upright, xanchor=across)
        layout["annotations"] = [note]
    return {"data": data, "layout": layout}


def vertical(x: float) -> dict[str, object]:
    """Return a dotted vertical line at x."""
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", **ends, "line": {"color": "muted", "width": 1, "dash": "dot"}}


def lines_over_epochs(
    epochs: Numbers, series: Mapping[str, Numbers], y: Label, *, log: bool = False, **more: object
) -> Figure:
    """Return one line over epochs for each name."""
    data = [
        line(epochs, values, escape_name(name), PALETTE[i % len(PALETTE)])
        for i, (name, values) in enumerate(series.items())
    ]
    known = [v for values in series.values() for v in values]
    scale = logarithmic(known) if log else flat_range(known)
    layout = {"xaxis": axis(label("epoch")), "yaxis": axis(y, **{**scale, **more})}
    return {"data": data, "layout": {**layout, "showlegend": len(data) > 1}}


def lines_over_names(
    x: Sequence[str], series: Mapping[str, Numbers], x_title: Label, y_title: Label
) -> Figure:
    """Return one line over named positions for each name."""
    data = [
        line(x, values, escape_name(name, 24), PALETTE[i % len(PALETTE)], dash=_dash(i))
        | {"mode": "lines+markers"}
        for i, (name, values) in enumerate(series.items())
    ]
    across = axis(x_title, type="category")
    return {"data": data, "layout": {"xaxis": across, "yaxis": axis(y_title)}}


def _dash(place: int) -> str:
    """Return solid until the palette repeats, then dashed."""
    return "solid" if place < len(PALETTE) else "dash"


@dataclass(frozen=True)
class Response:
    """Scores of one method at several strengths, one of which was chosen."""

    x: Label
    y: Label
    strengths: Sequence[float]
    scores: Numbers
    chosen: float | None = None
    zeros: Numbers = ()
    baseline: float | None = None
    colour: str = "series-1"


def score_against_strength(response: Response, **range_: object) -> Figure:
    """Plot validation score against strength, ringing the chosen one; zeros on a second axis."""
    zeros = list(response.zeros) or [None] * len(response.scores)
    points = sorted(zip(response.strengths, response.scores, zeros))
    points = [p for p in points if p[0] is not None]
    log = spans_decades([s for s, _, _ in points])
    if log:
        points = [p for p in points if p[0] > 0]
    x = [s for s, _, _ in points]
    scores = line(x, [v for _, v, _ in points], response.y, response.colour)
    data = [scores | {"mode": "lines+markers", "marker": {"size": 6}}]
    for s, v, _ in points:
        if response.chosen is not None and math.isclose(s, response.chosen, rel_tol=1e-6):
            data.append(ring(s, v, label("chosen")))  # equal up to the rounding of JSON
    layout: Figure = {
        "xaxis": axis(response.x, **(logarithmic(x) if log else {})),
        "yaxis": axis(response.y, **range_),
    }
    if response.baseline is not None and x:
        level = [response.baseline] * 2
        data.append(line((x[0], x[-1]), level, label("unregularized"), "muted", 1.5, dash="dash"))
    if any(finite([z for _, _, z in points])) and any(z for _, _, z in points):
        dots = line(x, [z for _, _, z in points], label("zeros"), "zeros", 1.5, dash="dot")
        data.append(dots | {"yaxis": "y2"})
        beside = {"overlaying": "y", "side": "right", "showgrid": False}
        shares = {"range": [-0.02, 1.02], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
        layout["yaxis2"] = axis(label("zeros"), **beside, **shares)
    return {"data": data, "layout": layout}


def spans_decades(values: Iterable[object], factor: float = 30) -> bool:
    """Return whether positive values span at least `factor`, so that a log axis is clearer."""
    positive = [v for v in finite(values) if v > 0]
    return len(positive) > 1 and max(positive) / min(positive) >= factor


def histogram(edges: Sequence[float], counts: Sequence[int], zeros: float | None) -> Figure:
    """Plot a histogram of weights, with exact zeros stacked separately in their bin."""
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    exact = round((zeros or 0) * sum(counts))
    home = next((i for i, b in enumerate(edges[1:]) if edges[i] <= 0 < b), None)
    if home is None or exact > counts[home]:
        exact = 0
    rest = [c - exact if i == home else c for i, c in enumerate(counts)]
    width = edges[1] - edges[0] if len(edges) > 1 else 1
    bars = {"type": "bar", "x": centres, "width": width}
    data = [{**bars, "y": rest, "name": label("nonzero_weights"), "marker": {"color": "series-1"}}]
    layout: Figure = {"xaxis": axis(label("weight")), "yaxis": axis(label("count")), "bargap": 0}
    if exact and home is not None:
        only = [exact if i == home else None for i in range(len(counts))]
        data.append(
            {**bars, "y": only, "name": label("exact_zeros"), "marker": {"color": "zeros"}}
        )
        top = 1.3 * max(max(rest), 1)
        layout |= {"barmode": "stack", "yaxis": axis(label("count"), range=[0, top])}
        text = label("zeros_of", zeros=f"{exact:,}", all=f"{sum(counts):,}")
        place = centres[home] + width
        anchors = {"xanchor": "left", "yanchor": "top"}
        layout["annotations"] = [annotation(place, 0.97, text, "zeros", 12, **anchors)]
    return {"data": data, "layout": layout}


def intervals(
    names: Sequence[Label | Name | str],
    means: Numbers,
    lows: Numbers,
    highs: Numbers,
    x: Label,
    colours: Sequence[str] = PALETTE,
) -> Figure:
    """Plot a dot for each name, the first on top, with its interval if it has one."""
    bar = {"type": "data", "symmetric": False, "thickness": 2.5, "width": 7}
    data = []
    for i, (mean, low, high) in enumerate(zip(means, lows, highs)):
        marker = {"size": 11, "color": colours[i % len(colours)]}
        dot: Figure = {"mode": "markers", "x": [mean], "y": [i], "name": title(names[i])}
        if mean is not None and low is not None and high is not None:
            dot["error_x"] = {**bar, "array": [high - mean], "arrayminus": [mean - low]}
        data.append({**dot, "marker": marker})
    ticks = {"tickvals": list(range(len(names))), "ticktext": [title(n) for n in names]}
    rows = {"autorange": False, "range": [len(names) - 0.5, -0.5], "showgrid": False}
    layout = {"xaxis": axis(x), "yaxis": axis("", **ticks, **rows, automargin=True)}
    return {"data": data, "layout": {**layout, "showlegend": False, "hovermode": "closest"}}


def steps_over_strength(x: Numbers, y: Numbers, x_title: Label, y_title: Label) -> Figure:
    """Plot a step function over a log axis from strong to weak."""
    data = [line(x, y, y_title, "series-2", shape="hv")]
    across = axis(x_title, **logarithmic(x), autorange="reversed")
    layout = {"xaxis": across, "yaxis": axis(y_title, rangemode="tozero"), "showlegend": False}
    return {"data": data, "layout": layout}


def importance_lines(
    x: Numbers,
    rows: Sequence[Numbers],
    names: Sequence[str],
    y_title: Label,
    named: int,
    first: Sequence[int] = (),
) -> Figure:
    """Plot a line for each feature from strong to weak; `named` are coloured, from `first` on."""
    peaks = [max(finite([row[j] for row in rows]), default=0.0) for j in range(len(names))]
    leading = {j: place for place, j in enumerate(first)}
    order = sorted(range(len(names)), key=lambda j: (leading.get(j, len(leading)), -peaks[j]))
    data = []
    for rank, j in enumerate(order):
        if not peaks[j]:
            continue
        colour = PALETTE[rank % len(PALETTE)] if rank < named else "rule"
        width = 2 if rank < named else 1
        trail = line(x, [row[j] for row in rows], escape_name(names[j], 24), colour, width)
        trail["line"]["dash"] = _dash(rank)
        data.append(trail | {"showlegend": rank < named})
    across = axis(label("strength"), **logarithmic(x), autorange="reversed")
    return {"data": data, "layout": {"xaxis": across, "yaxis": axis(y_title)}}


def score_with_band(
    x: Numbers,
    y: Numbers,
    errors: Numbers,
    x_title: Label,
    y_title: Label,
    marks: Mapping[str, int],
    *,
    is_reversed: bool = True,
) -> Figure:
    """Plot a curve with its error band over a log axis from strong to weak, or as numbers rise."""
    whole = [i for i, v in enumerate(y) if v is not None and x[i]]
    xs, ys = [x[i] for i in whole], [float(y[i] or 0) for i in whole]
    spread = [float(errors[i] or 0) for i in whole]
    above, below = ([v + sign * e for v, e in zip(ys, spread)] for sign in (1, -1))
    upper, lower = (line(xs, v, label("one_error"), "band", 0) for v in (above, below))
    data = [
        upper | {"hoverinfo": "skip", "showlegend": False},
        lower | {"hoverinfo": "skip", "fill": "tonexty", "fillcolor": "band"},
        line(xs, ys, y_title, "series-1", 2.5),
    ]
    colours = {"chosen": "chosen", "lowest_loss": "muted", "knee": "series-2"}
    data += [ring(x[i], y[i], label(key), colours[key]) for key, i in marks.items()]
    across = axis(x_title, **logarithmic(x), autorange="reversed" if is_reversed else True)
    return {"data": data, "layout": {"xaxis": across, "yaxis": axis(y_title)}}
