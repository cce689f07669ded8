"""Summarise a table for reports: columns, missing cells, targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tikhon.data.column import Column
from tikhon.data.dates import format_day
from tikhon.data.encoding import iterate_columns

if TYPE_CHECKING:
    from tikhon.data.dataset import Dataset
    from tikhon.data.splits import Split

_LEVELS = 8  # categories listed


def describe_table(source: Dataset, parts: Split) -> dict[str, object]:
    """Return plain values describing a table and its split; empty for other data.

    `columns` has name, kind, missing cells, number of inputs, how cells were parsed, and a summary
    over all rows (mean and standard deviation, levels, or first and last day); `left_out` has the
    other columns with the reasons; `target` the rows of each class by part, or mean, standard
    deviation and range in the target's own unit; `notices` the printed messages.
    """
    table, fitted = source.table, parts.preprocessing
    if table is None or fitted is None:
        return {}
    values, inputs = source.x.numpy(), fitted.inputs
    return {
        "columns": [
            {
                "name": column.name,
                "kind": column.kind,
                "missing": _missing(column, cells),
                "inputs": len(inputs[i]),
                "readings": [told.with_text() for told in column.readings],
                **_cells(column, cells),
            }
            for i, (column, cells) in enumerate(iterate_columns(values, table.columns))
        ],
        "left_out": [
            {"name": c.name, "reason": c.reason.with_text()} for c in table.dropped if c.reason
        ],
        "target": _target(parts),
        "notices": [notice.with_text() for notice in parts.train.notices],
    }


def _missing(column: Column, cells: np.ndarray) -> int:
    """Count missing cells; a word or bound among numbers is a value."""
    empty = np.isnan(cells)
    return int((empty[:, :2].all(axis=1) if column.words else empty[:, 0]).sum())


def _cells(column: Column, cells: np.ndarray) -> dict[str, object]:
    """Summarise the values of a column."""
    if column.kind in ("category", "boolean"):
        return {"levels": list(column.categories[:_LEVELS]), "of": len(column.categories)}
    present = cells[:, 0][~np.isnan(cells[:, 0])]
    if column.kind == "number" and len(present):
        with np.errstate(over="ignore"):
            return {"mean": float(present.mean()), "deviation": float(present.std())}
    if column.kind == "date" and len(present):
        return {"first": format_day(present.min()), "last": format_day(present.max())}
    return {}


def _target(parts: Split) -> dict[str, object]:
    named = {"train": parts.train, "valid": parts.valid, "test": parts.test}
    classes = parts.train.classes
    if classes:
        counts = {
            name: np.bincount(part.y.numpy(), minlength=len(classes)).tolist()
            for name, part in named.items()
        }
        return {"classes": list(classes), "rows": counts}
    return {"numbers": {name: _figures(part, parts.scaling) for name, part in named.items()}}


def _figures(part: Dataset, scaling: Mapping[str, object]) -> dict[str, float]:
    """Return mean, standard deviation and range of a target in its own unit."""
    y = part.y.double().numpy().reshape(len(part.y), -1)
    y = y * np.array(scaling["target_scale"]) + np.array(scaling["target_mean"])
    if not len(y):
        return {}
    return {
        "mean": float(y.mean()),
        "deviation": float(y.std()),
        "least": float(y.min()),
        "largest": float(y.max()),
    }
