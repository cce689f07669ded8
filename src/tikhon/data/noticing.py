"""What a person should be told about a table before its scores are believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tikhon.data.columns import Column
from tikhon.data.encoding import blocks
from tikhon.data.reading import Source, listed

_RARE_CLASS = 0.1
_SAMPLE = 5_000
_SENTINELS = (-1.0, -9.0, -99.0, -999.0, -9999.0, -99999.0, 99.0, 999.0, 9999.0, 99999.0, 999999.0)


def readings(columns: Sequence[Column]) -> list[str]:
    """How columns were read that are not written in the usual way."""
    said = [f"{listed([c.name])}: {c.reading}" for c in columns if c.reading]
    more = f"; and {len(said) - 12} more" if len(said) > 12 else ""
    return ["read as " + "; ".join(said[:12]) + more] if said else []


def left_out(columns: Sequence[Column]) -> str:
    """The columns that are not used, with the reasons."""
    shown = "; ".join(f"{listed([c.name])} ({c.reason})" for c in columns[:8])
    return shown + (f" and {len(columns) - 8} more" if len(columns) > 8 else "")


def text_na(source: Source, target: str) -> list[str]:
    """Labels that look like "no value"."""
    text = source.frame[target].astype("string").str.strip()
    found = text[text.str.lower().isin(["na", "n/a", "nan", "null", "none"])]
    return [
        f"{count} rows hold text {word!r} in {target!r}; if it means no value, use "
        f"--na-values {word}"
        for word, count in found.value_counts().items()
    ]


def imbalance(y: np.ndarray, target: Column, task: str) -> list[str]:
    """A class that is rare."""
    if task != "classification":
        return []
    shares = np.bincount(y) / len(y)
    least = int(shares.argmin())
    if shares[least] >= _RARE_CLASS / (len(shares) / 2):
        return []
    return [
        f"class {target.categories[least]!r} is {shares[least]:.1%} of the rows: accuracy alone "
        f"misleads (always answering the largest class gives {shares.max():.1%})"
    ]


def leaks(values: np.ndarray, columns: Sequence[Column], y: np.ndarray, task: str) -> list[str]:
    """Columns that alone tell the target: usually they were written down after it."""
    some = np.random.default_rng(0).permutation(len(y))[
        :_SAMPLE
    ]  # what they do not tell, no row does
    found = []
    for column, place in zip(columns, blocks(columns), strict=True):
        unordered = column.kind == "category"
        cells = [] if column.kind == "text" else values[:, place].T
        if any(
            _tells(part[some], y[some], task, unordered)
            and (len(y) <= _SAMPLE or _tells(part, y, task, unordered))
            for part in cells
        ):
            found.append(column.name)
    if not found:
        return []
    return [
        f"{listed(found)} alone tells the target: was it known beforehand? (--drop leaves it out)"
    ]


def _tells(cells: np.ndarray, y: np.ndarray, task: str, unordered: bool) -> bool:
    """Whether the target follows from these cells: by order, by level, or by being empty."""
    there = ~np.isnan(cells)
    if task == "classification" and 10 <= there.sum() < len(cells) - 10:
        pairs = np.unique(np.stack([there.astype(int), y]), axis=1).shape[1]
        if pairs == len(np.unique(y)) == 2:
            return True
    if there.sum() < 10 or len(np.unique(cells[there])) < 2:
        return False
    cells, y = cells[there], y[there]
    if task == "regression":
        return _ranks_agree(cells, y)
    levels, classes = np.unique(cells, return_inverse=True), len(np.unique(y))
    pairs = np.unique(np.stack([cells, y]), axis=1)  # sorted by the cell
    pure = pairs.shape[1] == len(levels[0])
    if classes < 2 or not pure:
        return False
    if unordered:  # as many rows a level as chance would not leave pure
        return len(cells) >= 4 * len(levels[0])
    runs = 1 + int((np.diff(pairs[1]) != 0).sum())
    return runs == classes or len(levels[0]) <= 2 * classes


def _ranks_agree(cells: np.ndarray, y: np.ndarray) -> bool:
    """Whether the target rises (or falls) with the cells in every row but for rounding."""
    if len(np.unique(y)) < 2:
        return False
    if abs(np.corrcoef(cells, y)[0, 1]) > 0.9999:
        return True
    ranks = np.stack([np.unique(v, return_inverse=True)[1] for v in (cells, y)])
    many = min(len(np.unique(r)) for r in ranks) > len(y) / 2
    return many and abs(np.corrcoef(ranks[0], ranks[1])[0, 1]) > 0.9999


def identifiers(values: np.ndarray, columns: Sequence[Column]) -> list[str]:
    """Numbers that look like identifiers, and are kept."""
    found = [
        column.name
        for column, place in zip(columns, blocks(columns), strict=True)
        if column.kind == "number" and not column.words and _all_different(values[:, place][:, 0])
    ]
    if not found:
        return []
    return [
        f"{listed(found)}: another whole number in every row; if it is an identifier, --drop it"
    ]


def _all_different(cells: np.ndarray) -> bool:
    whole = bool(np.all(cells == np.floor(cells)))
    return whole and len(np.unique(cells)) == len(cells) > 20


def sentinels(values: np.ndarray, columns: Sequence[Column]) -> list[str]:
    """Numbers such as -999 that repeat far from all others."""
    said = []
    for column, place in zip(columns, blocks(columns), strict=True):
        if column.kind != "number":
            continue
        cells = values[:, place][:, 0]
        present = cells[~np.isnan(cells)]
        for mark in (present.min(), present.max()) if len(present) else ():
            rest = present[present != mark]
            count = len(present) - len(rest)
            if mark not in _SENTINELS or count < 2 or len(np.unique(rest)) < 5:
                continue
            width = max(float(np.ptp(rest)), 1e-12)
            if min(abs(mark - rest.min()), abs(mark - rest.max())) > width:
                said.append(
                    f"{listed([column.name])} is {mark:g} in {count} rows, far from all others; "
                    f"if it means no value, use --na-values {mark:g}"
                )
    return said[:8]


def repeated(train: set[int], other: Sequence[int], rows: int, part: str) -> list[str]:
    """Rows (inputs and target) of another part that stand among the training rows too.

    `train` and `other` hold their `digests`, `rows` is how many training rows there are. Tables
    with few possible rows repeat them anyway, and are not told of.
    """
    if len(train) < rows / 2 or not other:
        return []
    count = sum(digest in train for digest in other)
    if not count:
        return []
    return [
        f"{count} of {len(other)} {part} rows stand among the training rows too, target included: "
        "they do not test new rows (leave duplicates out, or hold them together with --group)"
    ]


def digests(x: np.ndarray, y: np.ndarray) -> list[int]:
    """A number of 64 bits for each row and its target: equal rows have the same."""
    return [hash((row.tobytes(), target)) for row, target in zip(x, y.tolist(), strict=True)]


def untested(classes: Sequence[str], train: np.ndarray, others: Sequence[np.ndarray]) -> list[str]:
    """Classes that have too few rows to be in every part; counts of rows by class."""
    few = [name for i, name in enumerate(classes) if train[i] and min(o[i] for o in others) == 0]
    if not few:
        return []
    return [
        f"too few rows to be held out everywhere: class {listed(few)}; learnt from the training "
        "rows, hardly tested"
    ]
