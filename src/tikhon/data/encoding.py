"""Encode cells as numbers with the inferred columns, alike for training and new rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tikhon.data import dates, memory, number_parsing
from tikhon.data.column import Column
from tikhon.data.columns import (
    find_never_dates,
    parse_dates_as,
    refuse_infinite,
    refuse_misspelt,
    time_cells,
)
from tikhon.data.raw_column import RawColumn
from tikhon.data.scales import level_key, ranks_of
from tikhon.data.source import Source, quote_names
from tikhon.data.text_cells import FALSE, TRUE, TextCells, days_since_1970, normalize_label
from tikhon.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def encode_columns(source: Source, columns: Sequence[Column]) -> np.ndarray:
    """Encode cells as float64 (rows, widths): NaN is missing, categories are codes, -1 is unseen.

    Numbers and dates with `words` have a second value, the code of the word; free text gives its
    length and hashed words. Columns are matched by name, in any order. Raises `DataError` for
    missing columns, listing them, and for cells that do not match the kind of their column.
    """
    there = set(map(str, source.frame.columns))
    names = {column.name for column in columns}
    found = there | ({n for n in names if n.strip() in there - names})  # ignoring outer blanks
    if missing := [c.name for c in columns if c.name not in found]:
        extra = sorted(there - {c.name for c in columns})
        raise DataError(
            f"{source.name} lacks columns that the model was trained on: {quote_names(missing)}"
            + (f"; it has besides: {quote_names(extra)}" if extra else "")
        )
    if not columns:
        return np.zeros((len(source.frame), 0))
    return concatenate_columns(
        [encode_column(matching_column(source, column), column) for column in columns]
    )


def matching_column(source: Source, column: Column) -> RawColumn:
    """Return the column of a source with this name, outer blanks aside."""
    named = column.name in source.frame.columns
    return RawColumn(source, column.name if named else column.name.strip())


def concatenate_columns(parts: list[np.ndarray]) -> np.ndarray:
    """Join columns (rows, width) into one array in column-major order.

    The list is emptied as its columns are copied, so that the table is not held twice.
    """
    found = memory.empty(len(parts[0]), sum(part.shape[1] for part in parts), by_column=True)
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        found[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return found


def iterate_columns(
    values: np.ndarray, columns: Sequence[Column]
) -> Iterator[tuple[Column, np.ndarray]]:
    """Yield each column with its part (rows, width) of the result of `encode_columns`."""
    start = 0
    for column in columns:
        yield column, values[:, start : start + column.width]
        start += column.width


def encode_column(raw: RawColumn, column: Column) -> np.ndarray:
    """Encode one column (rows, width); one of a source on disk to a file."""
    values = _encode_column(raw, column)
    return memory.move_to_file(values) if raw.source.on_disk else values


def _encode_column(raw: RawColumn, column: Column) -> np.ndarray:
    if raw.foreign:
        raise DataError(
            f"{raw.source.name}: column {raw.name!r} holds {raw.foreign}, not one value per cell"
        )
    if column.scale:
        ranks = ranks_of(column.scale)
        values = np.array([ranks.get(level_key(text), np.nan) for text in raw.cells.texts], float)
        return _with_flags(raw.source, column, raw.cells, values, raw.cells.texts, "levels")
    if column.kind == "number":
        return _numbers(raw, column)
    if column.kind == "date":
        return _dates(raw, column)
    if column.kind == "time":
        cells = time_cells(raw)
        values = raw.parse_times(minutes=column.format == "minutes")
        return _with_flags(raw.source, column, cells, values, cells.texts, "times")
    if column.kind == "text":
        return _hashed(column, raw.texts)
    return _codes(column, raw.texts)[:, None]


def _numbers(raw: RawColumn, column: Column) -> np.ndarray:
    from pandas.api import types

    source, series = raw.source, raw.series
    if types.is_numeric_dtype(series) and not types.is_bool_dtype(series):
        values = series.to_numpy(float, na_value=np.nan)
        refuse_infinite(source, column.name, values)
        return _with_empty_flags(column, values)
    plain = raw.plain_numbers("") if column.decimal == "." else None
    mark = column.decimal if plain is not None else _new_decimal_mark(raw, column.decimal)
    plain = raw.plain_numbers(mark) if plain is None and mark == "." else plain
    if plain is not None:
        refuse_infinite(source, column.name, plain)
        return _with_empty_flags(column, plain)
    cells = raw.cells
    _check_units(raw, column)
    values, bounds = number_parsing.values_and_bounds(raw.parsed_numbers, mark)
    refuse_infinite(source, column.name, cells.expand_to_rows(values))
    words = [bound or text for bound, text in zip(bounds, cells.texts, strict=True)]
    for i, text in enumerate(cells.texts):
        if text in column.words:  # in runs of versions that did not read `3 or more`
            values[i], words[i] = np.nan, text
    return _with_flags(source, column, cells, values, words, "numbers")


def _check_units(raw: RawColumn, column: Column) -> None:
    """Raise for numbers in a unit unlike the training data, naming the first one.

    A missing unit and an additional currency sign are accepted.
    """
    known = number_parsing.normalize_unit(column.unit)
    money = number_parsing.is_currency(column.unit) or not column.unit
    for one, text in zip(raw.parsed_numbers, raw.cells.texts, strict=True):
        unit = number_parsing.normalize_unit(one.unit) if one is not None else ""
        if unit in ("", known) or (money and unit == "*"):
            continue
        if one is not None and not column.unit and number_parsing.is_currency(one.unit):
            continue
        where = raw.source.line(raw.cells.first([other == text for other in raw.cells.texts]))
        raise DataError(
            f"column {column.name!r} holds {text[:40]!r} in {where}, and what the model was "
            f"trained on is {f'in {column.unit}' if column.unit else 'without a unit'}: convert "
            "the column"
        )


def _new_decimal_mark(raw: RawColumn, known: str) -> str:
    """Return the decimal mark of new rows: another one only if their cells or file prove it."""
    votes = number_parsing.proved_marks(one for one in raw.parsed_numbers if one is not None)
    proved = votes - {"?"} or ({raw.source.decimal} - {""} if votes else set[str]())
    return next(iter(proved)) if known and len(proved) == 1 else known


def _dates(raw: RawColumn, column: Column) -> np.ndarray:
    from pandas.api import types

    if types.is_datetime64_any_dtype(raw.series):
        return _with_never_dates(column, days_since_1970(raw.series))
    if "%" not in column.format and raw.iso_days is not None:
        return _with_never_dates(column, raw.iso_days)
    if column.format in dates.UNITS:
        days = np.array([dates.parse_timestamp(text, column.format) for text in raw.cells.texts])
    elif "%" in column.format:
        days = parse_dates_as(raw.cells.texts, column.format)
    else:  # "datetime" columns of typed files are ISO dates where they are text
        parsed_dates = raw.dates_with_serials if column.serial else raw.parsed_dates
        days = dates.days_of_dates(
            parsed_dates, "ymd" if column.format == "datetime" else column.format
        )
    words, values, no_date = list(raw.cells.texts), days.copy(), raw.cells.is_missing.copy()
    for i, word in find_never_dates(days).items():
        words[i], values[i] = word, np.nan
        no_date[i] |= word not in column.words  # the column had no such dates in training
    cells = replace(raw.cells, is_missing=no_date)
    return _with_flags(raw.source, column, cells, values, words, "dates")


def _with_never_dates(column: Column, days: np.ndarray) -> np.ndarray:
    never = find_never_dates(days)
    values = _with_empty_flags(column, days)
    values[list(never), 0] = np.nan
    for row, word in never.items() if column.words else ():
        values[row, 1] = column.words.index(word) if word in column.words else -1
    return values


def _with_flags(
    source: Source,
    column: Column,
    cells: TextCells,
    values: np.ndarray,
    words: Sequence[str],
    kind: str,
) -> np.ndarray:
    """Return values and, where the column has flags (words or bounds), their codes beside."""
    other = np.isnan(values) & ~cells.is_missing
    if not column.words:
        if other.any():
            refuse_misspelt(source, column.name, cells, other, kind, new=True)
        return cells.expand_to_rows(values)[:, None]
    index = {word: code for code, word in enumerate(column.words)}
    codes = np.array([index.get(word, np.nan) for word in words], float)
    unseen = np.array([w in number_parsing.FLAGS and w not in index for w in words], bool)
    codes[(other & np.isnan(codes)) | unseen] = -1
    return np.stack([cells.expand_to_rows(values), cells.expand_to_rows(codes)], axis=1)


def _with_empty_flags(column: Column, values: np.ndarray) -> np.ndarray:
    """Return values, with an empty flag column if the column has flags."""
    return np.stack([values, np.full(len(values), np.nan)], axis=1)[:, : column.width]


def _hashed(column: Column, texts: pd.Series) -> np.ndarray:
    """Return the log length of each text and its hashed words or letters."""
    from sklearn.feature_extraction.text import HashingVectorizer

    by: dict[str, Any] = {"analyzer": "word"}
    if column.format == "letters":
        by = {"analyzer": "char_wb", "ngram_range": (2, 3)}
    vectorizer = HashingVectorizer(n_features=column.hashes, dtype=np.float64, **by)
    filled = texts.fillna("").to_list()
    lengths = np.log1p(texts.str.len().to_numpy(float, na_value=np.nan))
    hashed = cast("Any", vectorizer.transform(filled)).toarray()
    return np.concatenate([lengths[:, None], hashed], axis=1)


def _codes(column: Column, texts: pd.Series) -> np.ndarray:
    """Return the code of each cell: unseen truth values are missing, unseen categories -1."""
    if column.kind == "boolean":
        codes = dict.fromkeys(TRUE, 1.0) | dict.fromkeys(FALSE, 0.0)
        return texts.str.lower().map(codes).to_numpy(float, na_value=np.nan)
    levels = {level: float(code) for code, level in enumerate(column.categories)}
    alike = {normalize_label(level): code for level, code in levels.items()}
    if len(alike) == len(levels):  # otherwise spelling distinguishes levels
        different = texts.dropna().unique().tolist()
        levels = {text: alike.get(normalize_label(text), -1.0) for text in different} | levels
    encoded = np.array(texts.map(levels).to_numpy(float, na_value=np.nan))
    encoded[np.isnan(encoded) & texts.notna().to_numpy()] = -1
    return encoded
