"""The target column: numbers, or classes with their spellings merged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tikhon.data import number_parsing
from tikhon.data.column import Column
from tikhon.data.columns import (
    find_unread_numbers,
    infer_decimal_mark,
    number_column,
    refuse_infinite,
    refuse_misspelt,
    refuse_units,
)
from tikhon.data.on_disk import gather_columns
from tikhon.data.quality_checks import (
    find_combined_labels,
    find_misspelt_labels,
    find_similar_labels,
)
from tikhon.data.raw_column import RawColumn
from tikhon.data.source import Source, quote_names
from tikhon.data.text_cells import TRUE, TextCells, are_truth_values, normalize_label
from tikhon.errors import DataError
from tikhon.languages import Sentence, sentence

if TYPE_CHECKING:
    import pandas as pd

_FEW = 20  # most distinct values for whole numbers to be classes


@dataclass(frozen=True, eq=False)
class TargetColumn:
    """The target of the rows that have one, and the choices made about it."""

    column: Column
    y: np.ndarray
    task: str
    why: str
    source: Source  # rows with a target
    notices: tuple[Sentence, ...]


def read_target(source: Source, name: str, task: str | None) -> TargetColumn:
    """Parse the target as numbers or classes; rows without one are dropped and counted.

    Raises `DataError` for a target that cannot be learned, or is neither numbers nor classes.
    """
    raw = RawColumn(source, name)
    if raw.foreign:
        raise DataError(
            f"{source.name}: the target {name!r} holds {raw.foreign}, not one value per cell"
        )
    cells, found = raw.cells, None if task is None and _are_ranges(raw) else _numbers(raw)
    empty = cells.codes < 0
    if found is not None:
        empty |= np.append(cells.is_missing, False)[cells.codes]
    if empty.all():
        raise DataError(f"{source.name}: the target {name!r} is empty in every row")
    notices = []
    if empty.any():
        count = int(empty.sum())
        notices = [sentence("notice_no_target", name=name, count=count)]
        if found and cells.missing:
            words = quote_names(cells.missing)
            notices = [sentence("notice_no_target_read", name=name, count=count, words=words)]
        source = _select_rows(source, ~empty)
        raw = RawColumn(source, name)
        cells = raw.cells
    if found is None:
        _refuse_mixtures(raw)
        notices += _find_padded_labels(source, name)
        return _classes(source, name, cells, task, None, notices)
    column, values = found[0], found[1][~empty]
    if column.reading:
        notices.append(sentence("notice_target_read", name=name, reading=column.reading))
    levels = len(np.unique(values))
    whole = bool(np.all(values == np.floor(values)))
    few = levels == 2 or (whole and levels <= min(_FEW, max(2, len(values) // 5)))
    if task == "classification" or (task is None and few):
        return _classes(source, name, cells, task, values, notices)
    _refuse_constants(source, name, levels, cells)
    refuse_infinite(source, name, values)
    why = f"regression: {name!r} holds {levels} different numbers"
    why = why if task is None else f"{task}: as asked for"
    return TargetColumn(column, values, "regression", why, source, tuple(notices))


def _are_ranges(raw: RawColumn) -> bool:
    """Return whether the texts name a few ranges (`>50K`, `<=50K`)."""
    cells = raw.cells
    limits = [one is not None and one.bound in ("<", ">") for one in raw.parsed_numbers]
    return len(cells.texts) <= _FEW and cells.share(np.array(limits, bool)) > 0.5


def _numbers(raw: RawColumn) -> tuple[Column, np.ndarray] | None:
    """Return the column as numbers; None if any cell is other text or a code (`007`)."""
    from pandas.api import types

    name, series, cells = raw.name, raw.series, raw.cells
    if types.is_bool_dtype(series) or types.is_datetime64_any_dtype(series):
        return None
    if types.is_numeric_dtype(series):
        return Column(name, "number"), series.to_numpy(float, na_value=np.nan)
    if any(re.fullmatch(r"0\d+", text) for text in cells.texts):
        return None
    if (plain := raw.plain_numbers(raw.source.format.decimal or "")) is not None:
        return Column(name, "number"), plain
    found = [one for one, none in zip(raw.parsed_numbers, cells.is_missing) if not none]
    numbers = [one for one in found if one is not None]
    if not numbers or len(numbers) < len(found):
        return None
    if (units := number_parsing.common_unit(numbers)) is None:
        return None
    decimal = infer_decimal_mark(raw)
    values, bounds = number_parsing.values_and_bounds(raw.parsed_numbers, decimal)
    if np.isnan(values).any(where=~cells.is_missing):
        return None
    return number_column(name, numbers, units, decimal, bounds), cells.expand_to_rows(values)


def _select_rows(source: Source, there: np.ndarray) -> Source:
    """Return some rows; of a table on disk, column by column, as it may not fit into memory."""
    lines = [line for line, is_there in zip(source.lines, there, strict=False) if is_there]
    frame: Any = source.frame
    if source.on_disk:
        columns = ((n, frame[n][there].reset_index(drop=True)) for n in frame.columns)
        selected = gather_columns(columns)  # each is written to a file before the next is read
    else:
        selected = frame[there].reset_index(drop=True)
    return replace(source, frame=selected, lines=lines)


def _refuse_mixtures(raw: RawColumn) -> None:
    """Raise for a target of many numbers and some texts or several units, or of many dates or
    times.
    """
    cells = raw.cells
    numbers = [one for one in raw.parsed_numbers if one is not None]
    is_number = np.array([one is not None for one in raw.parsed_numbers])
    if number_parsing.common_unit(numbers) is None:
        refuse_units(raw.name, cells, numbers, "or name another target")
    if is_number.sum() > _FEW and cells.share(is_number) > 0.5 and not is_number.all():
        refuse_misspelt(raw.source, raw.name, cells, ~is_number, "numbers", target=True)
    is_date = np.array([one is not None for one in raw.parsed_dates])
    if is_date.sum() > _FEW and cells.share(is_date) > 0.5:
        raise DataError(sentence("refused_dates", name=raw.name, count=int(is_date.sum())))
    is_time = ~np.isnan(raw.times)
    if is_time.sum() > _FEW and cells.share(is_time) > 0.5:
        text = cells.texts[cells.codes[cells.first(is_time)]]
        raise DataError(sentence("refused_times", name=raw.name, text=text))


def _classes(
    source: Source,
    name: str,
    cells: TextCells,
    task: str | None,
    values: np.ndarray | None,
    notices: Sequence[Sentence],
) -> TargetColumn:
    """Build a target of classes, merging spellings of one label with a notice."""
    if task == "regression":
        raise DataError(
            f"{source.name}: regression needs numbers, but {name!r} holds "
            f"{cells.texts[cells.codes[0]]!r}; leave --task out or correct the target"
        )
    keys: Sequence[str | float] = _label_keys(cells.texts)
    if values is not None:
        number = dict(zip(cells.codes.tolist(), values.tolist(), strict=True))
        keys = [number[code] for code in range(len(cells.texts))]
    spellings: dict[str | float, list[int]] = {}
    for i, key in enumerate(keys):
        spellings.setdefault(key, []).append(i)
    _refuse_constants(source, name, len(spellings), cells)
    if len(spellings) > max(_FEW, len(cells.codes) // 2):
        what = "texts" if values is None else "numbers"
        raise DataError(
            f"{source.name}: {name!r} holds {len(spellings)} different {what} in "
            f"{len(cells.codes)} rows; too many to learn as classes: "
            + ("name another target" if values is None else "leave --task out")
        )
    label = {
        key: cells.texts[max(places, key=lambda i: cells.counts[i])]
        for key, places in spellings.items()
    }
    shown: list[str | float] = sorted(
        spellings, key=lambda key: (label[key].lower(), label[key]) if values is None else key
    )
    merged = [[cells.texts[i] for i in spellings[key]] for key in shown]
    told = [
        sentence("notice_merged", labels=quote_names(labels), name=name)
        for labels in merged
        if len(labels) > 1
    ]
    if values is None:
        told += find_similar_labels(name, [label[key] for key in shown])
        told += find_misspelt_labels(
            name, {label[key]: sum(cells.counts[i] for i in spellings[key]) for key in shown}
        )
        told += find_combined_labels(name, [label[key] for key in shown])
        if cell := find_unread_numbers(sorted(label.values())):
            reading = sentence("reading_unread", cell=cell)
            told.append(sentence("notice_target_read", name=name, reading=reading))
    code = {key: i for i, key in enumerate(shown)}
    y = np.array([code[key] for key in keys], np.int64)[cells.codes]
    held = "text" if values is None else f"{len(shown)} different numbers"
    why = f"classification: {name!r} holds {held}" if task is None else f"{task}: as asked for"
    if task is None and values is not None and len(shown) > 2:
        why += "; --task regression predicts the number"
    column = Column(name, "category", categories=tuple(label[key] for key in shown))
    return TargetColumn(column, y, "classification", why, source, (*notices, *told))


def _label_keys(texts: Sequence[str]) -> list[str]:
    """Return the key that identifies labels: spelling, or the truth value if all are."""
    if are_truth_values(texts):
        return [str(text.lower() in TRUE) for text in texts]
    return [normalize_label(text) for text in texts]


def _find_padded_labels(source: Source, name: str) -> list[Sentence]:
    """Report labels that differ only in outer blanks, which `texts_of` strips."""
    raw = cast("pd.Series", source.frame[name]).dropna().astype("string")
    different = raw.drop_duplicates()
    stripped = different.str.strip()
    twice = [str(text) for text in different[stripped.duplicated(keep=False).to_numpy()]]
    return (
        [sentence("notice_blanks", labels=quote_names(sorted(twice)), name=name)] if twice else []
    )


def _refuse_constants(source: Source, name: str, levels: int, cells: TextCells) -> None:
    if levels < 2:
        raise DataError(
            f"{source.name}: the target {name!r} is {cells.texts[cells.codes[0]]!r} in all "
            f"{len(cells.codes)} rows; two or more different values are needed"
        )
