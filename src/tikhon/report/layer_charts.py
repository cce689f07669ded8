"""Charts over the depth of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tikhon.report.charts import PALETTE, Figure, Numbers, axis, escape_name, line, logarithmic
from tikhon.report.page import Label, label


def lines_over_layers(
    layers: Sequence[str],
    series: Mapping[Label, Numbers] | Sequence[tuple[Label, Numbers]],
    y: Label,
    *,
    band: tuple[float, float] | None = None,
) -> Figure:
    """Plot lines over the layers on a log axis; `band` is the healthy range."""
    pairs = series.items() if isinstance(series, Mapping) else series
    data = [
        line(
            range(len(layers)),
            [v if v and v > 0 else None for v in values],
            name,
            PALETTE[i * 2 % len(PALETTE)],
        )
        | {"mode": "lines+markers", "marker": {"size": 6}}
        for i, (name, values) in enumerate(pairs)
    ]
    heights = [*(band or ()), *(v for trace in data for v in trace["y"])]
    layout: Figure = {"xaxis": layer_axis(layers), "yaxis": axis(y, **logarithmic(heights))}
    if band is not None:
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": band[0], "y1": band[1]}
        look = {"fillcolor": "healthy", "line": {"width": 0}, "layer": "below"}
        layout["shapes"] = [{"type": "rect", **ends, **look}]
    return {"data": data, "layout": layout}


def layer_axis(layers: Sequence[str]) -> dict[str, object]:
    """Return the layer axis, with at most about twelve labels."""
    every = -(-len(layers) // 12)
    shown = range(0, len(layers), max(every, 1))
    ticks = [escape_name(layers[i], 22) for i in shown]
    shown_at_the_edge = {"ticklabeloverflow": "allow"}  # the margin grows by them
    return axis(
        label("layer"), tickvals=list(shown), ticktext=ticks, tickangle=-35, **shown_at_the_edge
    )


def unit_shares(
    layers: Sequence[str], series: Sequence[tuple[Label, Numbers]], y: Label
) -> Figure:
    """Plot bars over the layers: shares of units."""
    colours = ("muted", "series-3")
    places = {"type": "bar", "x": list(range(len(layers)))}
    data = [
        {**places, "y": list(values), "name": name, "marker": {"color": colours[i % 2]}}
        for i, (name, values) in enumerate(series)
    ]
    upright = axis(y, range=[0, 1], tickformat=".0%")
    layout = {"xaxis": layer_axis(layers), "yaxis": upright, "barmode": "group"}
    return {"data": data, "layout": layout}


def update_heatmap(
    layers: Sequence[str], steps: Sequence[int], rows: Sequence[Numbers], ends: tuple[float, float]
) -> Figure:
    """Plot a heat map over layers and steps, for powers of ten between two ends."""
    scale = [[0.0, "low"], [0.5, "middle"], [1.0, "high"]]
    data = [
        {
            "type": "heatmap",
            "x": [str(s) for s in steps],
            "y": list(range(len(layers))),
            "z": [list(row) for row in rows],
            "zmin": ends[0],
            "zmax": ends[1],
            "colorscale": scale,
            "name": label("update_log"),
            "colorbar": {"thickness": 10, "title": {"text": "log₁₀"}, "outlinewidth": 0},
            "hovertemplate": "%{y} · %{x}: 10^%{z:.1f}<extra></extra>",
        }
    ]
    upright = {**layer_axis(layers), "autorange": "reversed", "showgrid": False, "tickangle": 0}
    layout = {"xaxis": axis(label("step"), type="category"), "yaxis": upright}
    return {"data": data, "layout": {**layout, "hovermode": "closest"}}
