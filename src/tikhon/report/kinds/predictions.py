"""Predictions on test rows: confusion and calibration, or predicted against true values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tikhon.report.charts import Figure, axis, escape_name
from tikhon.report.page import Block, Chart, Label, Section, format_number, label

_DIAGONAL = {"mode": "lines", "line": {"color": "muted", "width": 1, "dash": "dot"}}


def section(found: Mapping[str, Any]) -> Section | None:
    """Chart the predictions of a run, if any are stored."""
    blocks: list[Block] = []
    if found.get("confusion"):
        blocks.append(confusion(found["confusion"], found["classes"]))
    if found.get("calibration"):
        blocks.append(calibration(found["calibration"]))
    if found.get("pairs"):
        blocks.append(residuals(found))
    return Section(label("predictions"), tuple(blocks)) if blocks else None


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Chart:
    """Plot the confusion matrix: rows of each true class by predicted class."""
    names = [escape_name(name, 16) for name in classes]
    places = list(range(len(names)))
    data: list[dict[str, object]] = [
        {
            "type": "heatmap",
            "x": places,
            "y": places,
            "z": [list(row) for row in counts],
            "colorscale": [[0.0, "middle"], [1.0, "low"]],
            "showscale": False,
            "texttemplate": "%{z}",
            "name": label("test_rows"),
        }
    ]
    ticks = {"tickvals": places, "ticktext": names, "showgrid": False}
    layout = {
        "xaxis": axis(label("predicted_class"), **ticks),
        "yaxis": axis(label("true_class"), **ticks, autorange="reversed"),
        "hovermode": "closest",
    }
    rows = sum(map(sum, counts))
    wrong = rows - sum(counts[i][i] for i in places)
    alt = label("alt_confusion", wrong=f"{wrong:,}", rows=f"{rows:,}")
    return Chart(
        label("confusion"), {"data": data, "layout": layout}, alt, label("confusion_note")
    )


def calibration(bins: Sequence[Mapping[str, float]]) -> Chart:
    """Plot accuracy over confidence: how far the predicted probabilities can be trusted."""
    rows = sum(b["rows"] for b in bins)
    error = sum(b["rows"] / rows * abs(b["accuracy"] - b["confidence"]) for b in bins)
    points = [(b["confidence"], b["accuracy"]) for b in bins]
    figure = _compare_to_diagonal(
        [(0.0, 0.0), (1.0, 1.0)], points, label("confidence"), label("metric_accuracy")
    )
    figure["data"][1] |= {"mode": "lines+markers", "line": {"color": "series-1", "width": 2}}
    note = label("calibration_note", error=format_number(error))
    return Chart(label("calibration"), figure, note, note)


def residuals(found: Mapping[str, Any]) -> Chart:
    """Plot predicted against true values."""
    points = [(true, predicted) for true, predicted in found["pairs"]]
    ends = [min(map(min, points)), max(map(max, points))]
    figure = _compare_to_diagonal(
        [(end, end) for end in ends], points, label("true_value"), label("predicted_value")
    )
    figure["data"][1] |= {"mode": "markers", "marker": {"size": 6, "color": "series-1"}}
    half, largest = format_number(found["median_error"]), format_number(found["largest_error"])
    note = label("residuals_note", half=half, largest=largest)
    return Chart(label("residuals"), figure, note, note)


def _compare_to_diagonal(
    ideal: list[tuple[float, float]], points: list[tuple[float, float]], x: Label, y: Label
) -> Figure:
    lines = [(label("ideal"), ideal), (label("measured_line"), points)]
    data = [
        {**_DIAGONAL, "name": name, "x": [p[0] for p in line], "y": [p[1] for p in line]}
        for name, line in lines
    ]
    return {"data": data, "layout": {"xaxis": axis(x), "yaxis": axis(y), "hovermode": "closest"}}
