"""Notebook representations as plain HTML: sentences, a table, a line chart."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

_WIDTH, _HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 26, 34  # margins
_COLOURS = ("#3b6fd4", "#c2410c", "#0f9488", "#8b5cf6", "#db2777", "#65a30d")
_ROWS = 12  # rows of a table at most

Line = tuple[Sequence[float], Sequence[float | None]]


def html_card(
    title: str,
    sentences: Sequence[str] = (),
    head: Sequence[str] = (),
    rows: Sequence[Sequence[object]] = (),
    chart: str = "",
) -> str:
    """Return a summary as HTML; all text is escaped, long tables are truncated with a note.

    >>> html_card("Run", ["a < b"])
    '<div><strong>Run</strong><p>a &lt; b</p></div>'
    """
    parts = [f"<strong>{html.escape(title)}</strong>"]
    parts += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]
    if rows:
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(_format_cell(v))}</td>' for v in row)}</tr>"
            for row in rows[:_ROWS]
        )
        parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
        if len(rows) > _ROWS:
            parts.append(f"<p>and {len(rows) - _ROWS:,} more rows</p>")
    return f"<div>{''.join(parts)}{chart}</div>"


def svg_lines(series: Mapping[str, Line], x_title: str, y_title: str, *, log: bool = False) -> str:
    """Return an SVG line chart, with log x if `log`; empty with fewer than two points."""
    drawn = {name: _points(line, log) for name, line in list(series.items())[: len(_COLOURS)]}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return ""
    xs, ys = zip(*(point for points in drawn.values() for point in points))
    place = _scale(xs, ys)
    paths, labels = [], []
    for i, (name, points) in enumerate(drawn.items()):
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        paths.append(
            f'<polyline fill="none" stroke="{_COLOURS[i]}" stroke-width="2" points="{at}"/>'
        )
        labels.append(
            f'<tspan fill="{_COLOURS[i]}" dx="10">{html.escape(name[:24])}</tspan>'
        )  # in sequence
    ends = (10 ** min(xs), 10 ** max(xs)) if log else (min(xs), max(xs))
    texts = [
        _text(_LEFT, _HEIGHT - 18, _format_cell(float(ends[0]))),
        _text(_WIDTH - _RIGHT, _HEIGHT - 18, _format_cell(float(ends[1])), "end"),
        _text((_LEFT + _WIDTH) / 2, _HEIGHT - 4, x_title, "middle"),
        _text(_LEFT - 6, _HEIGHT - _BOTTOM, _format_cell(float(min(ys))), "end"),
        _text(_LEFT - 6, _TOP + 8, _format_cell(float(max(ys))), "end"),
        f'<text x="{_LEFT}" y="14">{html.escape(y_title)}{"".join(labels)}</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" font-size="12" font-family="sans-serif" fill="currentColor">'
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" '
        f'stroke="currentColor" opacity=".4"/>{"".join(paths)}{"".join(texts)}</svg>'
    )


def _points(line: Line, log: bool) -> list[tuple[float, float]]:
    found = []
    for x, y in zip(*line):
        if y is None or not math.isfinite(y) or (log and not x > 0):
            continue
        found.append((math.log10(x) if log else float(x), float(y)))
    return found


def _scale(
    xs: Sequence[float], ys: Sequence[float]
) -> Callable[[float, float], tuple[float, float]]:
    low_x, low_y = min(xs), min(ys)
    wide = (max(xs) - low_x) or 1.0
    high = (max(ys) - low_y) or 1.0
    return lambda x, y: (
        _LEFT + (x - low_x) / wide * (_WIDTH - _LEFT - _RIGHT),
        _HEIGHT - _BOTTOM - (y - low_y) / high * (_HEIGHT - _TOP - _BOTTOM),
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _format_cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
