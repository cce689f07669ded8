"""Predictions on test rows: confusion and calibration, or predicted against true values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tikhon.report.charts import Figure, axis, literal
from tikhon.report.page import Block, Chart, Label, Section, number, say

_DIAGONAL = {"mode": "lines", "line": {"color": "muted", "width": 1, "dash": "dot"}}


def section(found: Mapping[str, Any]) -> Section | None:
    """Chart the predictions of a run, if any are stored."""
    blocks: list[Block] = []
    if found.get("confusion"):
        blocks.append(confusion(found["confusion"], found["classes"]))
    if found.get("calibration"):
        blocks.append(calibration(found["calibration"]))
    if found.get("pairs"):
        blocks.append(pairs(found))
    return Section(say("predictions"), tuple(blocks)) if blocks else None


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Chart:
    """Plot the confusion matrix: rows of each true class by predicted class."""
    names = [literal(name, 16) for name in classes]
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
            "name": say("test_rows"),
        }
    ]
    ticks = {"tickvals": places, "ticktext": names, "showgrid": False}
    layout = {
        "xaxis": axis(say("predicted_class"), **ticks),
        "yaxis": axis(say("true_class"), **ticks, autorange="reversed"),
        "hovermode": "closest",
    }
    rows = sum(map(sum, counts))
    wrong = rows - sum(counts[i][i] for i in places)
    alt = say("alt_confusion", wrong=f"{wrong:,}", rows=f"{rows:,}")
    return Chart(say("confusion"), {"data": data, "layout": layout}, alt, say("confusion_note"))


def calibration(bins: Sequence[Mapping[str, float]]) -> Chart:
    """Plot accuracy over confidence: how far the predicted probabilities can be trusted."""
    rows = sum(b["rows"] for b in bins)
    error = sum(b["rows"] / rows * abs(b["accuracy"] - b["confidence"]) for b in bins)
    points = [(b["confidence"], b["accuracy"]) for b in bins]
    figure = _against([(0.0, 0.0), (1.0, 1.0)], points, say("confidence"), say("metric_accuracy"))
    figure["data"][1] |= {"mode": "lines+markers", "line": {"color": "series-1", "width": 2}}
    note = say("calibration_note", error=number(error))
    return Chart(say("calibration"), figure, note, note)


def pairs(found: Mapping[str, Any]) -> Chart:
    """Plot predicted against true values."""
    points = [(true, predicted) for true, predicted in found["pairs"]]
    ends = [min(map(min, points)), max(map(max, points))]
    figure = _against(
        [(end, end) for end in ends], points, say("true_value"), say("predicted_value")
    )
    figure["data"][1] |= {"mode": "markers", "marker": {"size": 6, "color": "series-1"}}
    half, largest = number(found["median_error"]), number(found["largest_error"])
    note = say("residuals_note", half=half, largest=largest)
    return Chart(say("residuals"), figure, note, note)


def _against(
    ideal: list[tuple[float, float]], points: list[tuple[float, float]], x: Label, y: Label
) -> Figure:
    lines = [(say("ideal"), ideal), (say("measured_line"), points)]
    data = [
        {**_DIAGONAL, "name": name, "x": [p[0] for p in line], "y": [p[1] for p in line]}
        for name, line in lines
    ]
    return {"data": data, "layout": {"xaxis": axis(x), "yaxis": axis(y), "hovermode": "closest"}}
