"""Infer the kind of each column from all its cells; raise where they are ambiguous."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from tikhon.data import dates, number_parsing
from tikhon.data.column import DAYS_AS_NUMBERS, Column
from tikhon.data.raw_column import RawColumn
from tikhon.data.scales import scale_of
from tikhon.data.source import Source, quote_names
from tikhon.data.text_cells import (
    TRUE,
    TextCells,
    are_truth_values,
    days_since_1970,
    normalize_label,
)
from tikhon.errors import DataError
from tikhon.languages import sentence
from tikhon.options import format_options

if TYPE_CHECKING:
    import pandas as pd

_MOSTLY = 0.5  # share of numbers (or dates) above which a column is numeric
_MISSPELT_SHARE = 0.05  # share of other texts below which they are misspelt numbers
_LARGEST = 1e150
_MAX_WORDS = 20  # most distinct words among numbers, and most levels that are always a category
_MAX_UNITS = 8  # most units in one column of numbers
_UNITS_SHARE = 0.8  # least share of numbers among texts for several units to be a fault
_PROSE_WORDS = 3  # mean number of words from which a column is free text
_WIDTHS = {"words": 64, "letters": 32}  # hashed features of free text
_ID_NAME = re.compile(
    r"(?i:(^|[_\s.-])(id|uuid|guid|key|index|rownames?)$|^unnamed|^__index_level_\d+__$|^$)"
    r"|(?<=[a-z])I[dD]$"
)
_TIME_NAME = re.compile(
    r"(?i:(?:^|[\W_])(?:ts|epoch|unix|utc)(?:[\W_]|$)|(?:time|stamp|date|[\W_]at)(?:[\W_]|s?$))"
    r"|(?<=[a-z])(?:At|Time|Timestamp|Date)$"
)
_FEW_DAYS = 8  # fewest distinct values: of such numbers, 1 in 30 is a date by chance
_DISTINCT = 0.9  # least share of distinct cells of an identifier: rows may repeat, cells be empty
_MEASURED = re.compile(r"[-+(]?\d*[.,]\d+(?![\d.,])")  # a number with a fraction, then anything
_WORD = re.compile(r"\b\w\w+\b")  # a hashed word
_IN_WORDS = re.compile(r"#\S? |[^#]*[:=.] ?#")  # a number in words: 5% of all, age: 12
_PAIR = re.compile(r"[-+~$€£(\[]*#.*#", re.DOTALL)  # two numbers in a cell
_SAMPLE = 1_000  # texts examined for numbers
_HEX = re.compile(r"[0-9a-f]{8,}(-[0-9a-f]{2,})*", re.IGNORECASE)
_PHONE = re.compile(r"(?=(?:\D*\d){7,15}\D*$)[+(\d][-+(). /\d]*")  # (555) 123-4567


def infer_column(raw: RawColumn, *, category: bool = False) -> Column:
    """Infer the kind of a column; constants and identifiers are dropped with a reason.

    `category` if the user declared it one. Raises `DataError` where the cells
    can be read in two ways and nothing in the file decides, and for infinities.
    """
    from pandas.api import types

    source, name, series = raw.source, raw.name, raw.series
    if raw.foreign:
        raise DataError(
            f"{source.name}: column {name!r} holds {raw.foreign}, not one value per cell; "
            f"{format_options('--drop', name)}, or spread them over columns of their own"
        )
    if not category and (plain := raw.short_numbers) is not None:
        return _number(Column(name, "number"), plain)
    present = series.dropna()
    if not len(present):
        return Column(name, "dropped", reason=sentence("reason_empty"))
    if category:
        return _category(name, raw.texts, forced=True)
    if types.is_bool_dtype(present) or all(isinstance(v, bool) for v in present.head(99)):
        return Column(name, "boolean", categories=("False", "True"))
    if types.is_datetime64_any_dtype(present):
        clock = bool((present.dt.normalize() != present).any())
        words = tuple(sorted(set(find_never_dates(days_since_1970(series)).values())))
        return Column(name, "date", format="datetime", clock=clock, words=words)
    if types.is_numeric_dtype(present):
        values = series.to_numpy(float, na_value=np.nan)
        refuse_infinite(source, name, values)
        return _number(Column(name, "number"), values)
    return _text(raw)


def _text(raw: RawColumn) -> Column:
    source, name, texts = raw.source, raw.name, raw.texts
    present = texts.dropna()
    if not len(present):
        return Column(name, "dropped", reason=sentence("reason_empty"))
    if (boolean := _truth_column(raw, present)) is not None:
        return boolean
    if bool(present.str.match(r"^0\d+$").any()):
        return _category(name, texts)
    if (values := raw.plain_numbers(source.format.decimal or "")) is not None:
        refuse_infinite(source, name, values)
        return _number(Column(name, "number"), values)
    if source.format.dates is None and (days := raw.iso_days) is not None:
        words = tuple(sorted(set(find_never_dates(days).values())))
        clock = bool(present.str.contains(":").any())
        return Column(name, "date", format="ymd", clock=clock, words=words)
    return _number_column(raw) or _date_column(raw) or _time_column(raw) or _category(name, texts)


def _truth_column(raw: RawColumn, present: pd.Series) -> Column | None:
    """Return a boolean column, possibly with missing values (`NA`), or None if it is not one."""
    name, few = raw.name, present.nunique() <= _MAX_WORDS
    texts = [t for t, none in zip(raw.cells.texts, raw.cells.is_missing) if not none and few]
    if not are_truth_values(texts):
        return None
    missing = raw.cells.missing
    words = sorted({text.lower() for text in texts}, key=lambda w: (w in TRUE, w))
    if len(words) == 2:
        return Column(name, "boolean", categories=tuple(words), missing=missing)
    spellings = tuple(sorted(texts))
    return Column(
        name, "boolean", categories=("false", "true"), spellings=spellings, missing=missing
    )


def _number_column(raw: RawColumn) -> Column | None:
    """Return a numeric column if most of its texts are numbers, else None."""
    source, name, cells, found = raw.source, raw.name, raw.cells, raw.parsed_numbers
    is_number = np.array([one is not None for one in found])
    if cells.share(is_number) <= _MOSTLY:
        return None
    numbers = [one for one in found if one is not None]
    if _are_times(raw, is_number) or raw.has_serial_dates:
        return None
    units = number_parsing.common_unit(numbers)
    if units is None:
        refuse_units(name, cells, numbers, f"or say {format_options('--categorical', name)}")
        return None
    decimal = infer_decimal_mark(raw)
    values, bounds = number_parsing.values_and_bounds(found, decimal)
    refuse_infinite(source, name, cells.expand_to_rows(values))
    fractions = bool(np.any(values != np.floor(values), where=~np.isnan(values)))
    words = _flag_words(source, name, cells, ~np.isnan(values), "numbers", ask=fractions)
    if words is None or (words and all(one.bound for one in numbers)):
        return None  # <10k, 10k-20k, 20k+ name ranges
    column = number_column(
        name, numbers, units, decimal, bounds, words=words, missing=cells.missing
    )
    return _number(column, cells.expand_to_rows(values))


def refuse_units(
    name: str, cells: TextCells, numbers: Sequence[number_parsing.ParsedNumber], remedy: str
) -> None:
    """Raise for many numbers in a few units, unless these are words (`12 Baker Street`)."""
    different = sorted({one.unit.strip("*") or "none" for one in numbers})
    many = len(different) > max(_MAX_UNITS, len(cells.texts) / 10)
    phrases = any(" " in unit.replace("per ", "") for unit in different)
    few = len(cells.texts) <= _MAX_WORDS or len(numbers) < _UNITS_SHARE * len(cells.texts)
    if not (many or phrases or few):
        raise DataError(
            f"column {name!r} holds numbers in several units ({quote_names(different)}); write "
            f"one unit, {remedy}"
        )


def number_column(
    name: str,
    numbers: Sequence[number_parsing.ParsedNumber],
    units: Sequence[str],
    decimal: str,
    bounds: Container[str],
    *,
    words: Sequence[str] = (),
    missing: tuple[str, ...] = (),
) -> Column:
    """Build the column for parsed numbers, with flags for their `bounds` and `words`."""
    return Column(
        name,
        "number",
        decimal=decimal,
        whole=not number_parsing.proved_marks(numbers),
        unit="".join(units),
        multiples=tuple(sorted({one.multiple for one in numbers} - {""})),
        words=(*(bound for bound in number_parsing.FLAGS if bound in bounds), *words),
        missing=missing,
    )


def _are_times(raw: RawColumn, is_number: np.ndarray) -> bool:
    """Return whether apparent units mean times of day (`8 am`) or durations that occur beside
    other durations (`20m` and `1h 20m`, `90 min` and `2 h`).
    """
    told = {
        number_parsing.normalize_unit(one.unit) for one in raw.parsed_numbers if one is not None
    }
    if told & {"am", "pm"}:
        return raw.cells.share(~np.isnan(raw.times)) > _MOSTLY
    if not told - {""} or (len(told) < 2 and bool(np.all(is_number | raw.cells.is_missing))):
        return False
    return bool(np.all(~np.isnan(raw.times) | raw.cells.is_missing))


def infer_decimal_mark(raw: RawColumn) -> str:
    """Return the decimal mark, "" if each cell determines its own; raise where both fit."""
    source, cells, found = raw.source, raw.cells, raw.parsed_numbers
    if source.format.decimal:
        return source.format.decimal
    votes = number_parsing.proved_marks(one for one in found if one is not None)
    certain = votes - {"?"}
    if len(certain) == 1:
        return next(iter(certain))
    if not votes:
        return source.decimal or "."
    if not certain and source.decimal:
        return source.decimal
    if "?" not in votes:
        return ""
    row = cells.first([one is not None and one.decimal_mark == "?" for one in found])
    text = cells.texts[cells.codes[row]]
    one = next(one for one in found if one is not None and one.decimal_mark == "?")
    raise DataError(
        f"column {raw.name!r}: {text!r} in {source.line(row)} can be {one.dot:.10g} or "
        f"{one.comma:.10g}, and nothing in the file decides; say --decimal . or --decimal ,"
    )


def _flag_words(
    source: Source, name: str, cells: TextCells, fits: np.ndarray, kind: str, *, ask: bool = True
) -> tuple[str, ...] | None:
    """Return texts among numbers or dates to keep as flags; None for a text column.

    Few repeated words are kept. Raises `DataError` where they may be misspelt numbers.
    """
    other = ~fits & ~cells.is_missing
    count, distinct = int(cells.counts[other].sum()), int(other.sum())
    if not count:
        return ()
    if distinct <= _MAX_WORDS and cells.counts[other].min() >= 2:
        return tuple(sorted(text for text, is_other in zip(cells.texts, other) if is_other))
    if not ask and count > _MISSPELT_SHARE * len(cells.codes):
        return None
    refuse_misspelt(source, name, cells, other, kind)


def refuse_misspelt(
    source: Source,
    name: str,
    cells: TextCells,
    other: np.ndarray,
    kind: str,
    *,
    new: bool = False,
    target: bool = False,
) -> NoReturn:
    """Raise for texts among numbers or dates, naming the first one and the remedies (fewer for
    `new` rows and for a `target`).
    """
    row = cells.first(other)
    text = cells.texts[cells.codes[row]]
    remedies = []
    if new:
        remedies = ["leave the cells empty, which means no value"]
    elif len(text) <= 40:
        remedies = [f"say {format_options('--na-values', text)} if it means no value"]
    if not new and not target:
        remedies += [f"say {format_options('--categorical', name)} to read the column as text"]
    count = int(cells.counts[other].sum())
    key = "refused_units" if count == 1 and row == 0 else "refused_texts"  # below the header
    found = sentence(key, name=name, kind=kind, count=count, text=text[:40], line=source.line(row))
    raise DataError(found + ", or ".join(remedies or ["leave the row out"]))


def _date_column(raw: RawColumn) -> Column | None:
    source, name, cells = raw.source, raw.name, raw.cells
    asked = source.format.dates
    if "%" in (asked or ""):
        return _custom_dates(source, name, cells, str(asked))
    found = raw.dates_with_serials if raw.has_serial_dates else raw.parsed_dates
    if cells.share(np.array([one is not None for one in found])) <= _MOSTLY:
        return None
    order = asked or _order(raw)
    doubtful = [one is not None and order in one.doubtful for one in found]
    if not asked and any(doubtful):
        row = cells.first(doubtful)
        text = cells.texts[cells.codes[row]]
        if not any(one is not None and len(set(one.days.values())) > 1 for one in found):
            order = "mdy" if text[0].isalpha() else "dmy"  # any would do, but for other columns
        raise DataError(
            f"column {name!r}: the year of {text!r} in "
            f"{source.line(row)} may be of either century; write four digits, or say --dates "
            f"{order} to read 00 to 68 as 20xx and 69 to 99 as 19xx, or "
            f"{format_options('--drop', name)}"
        )
    days = dates.days_of_dates(found, order)
    words = _flag_words(source, name, cells, ~np.isnan(days), "dates") or ()
    return Column(
        name,
        "date",
        format=order,
        clock=any(one is not None and one.clock for one in found),
        words=(*sorted(set(find_never_dates(days).values())), *words),
        missing=cells.missing,
        short=any(one is not None and one.short for one in found),
        serial=raw.has_serial_dates,
    )


def _order(raw: RawColumn) -> str:
    """Return the order of day and month shared by all dates of a column."""
    source, name, cells, found = raw.source, raw.name, raw.cells, raw.parsed_dates
    parsed_dates = [one for one in found if one is not None]
    fitting = [o for o in dates.ORDERS if all(o in one.days for one in parsed_dates)]
    dashed = any(one.separator == "-" for one in parsed_dates)
    short = any(one.short and len(set(one.days.values())) > 1 for one in parsed_dates)
    if len(fitting) > 1 and not dashed and short:
        fitting = _without_years_first(fitting, parsed_dates)
    if not fitting:
        raise DataError(
            f"column {name!r} holds dates in several orders of day and month; write them as "
            f"2021-12-31, or {format_options('--drop', name)}"
        )
    differ = [one is not None and len({one.days[o] for o in fitting}) > 1 for one in found]
    if not any(differ):
        return fitting[0]
    row = cells.first(differ)
    one = next(one for one, d in zip(found, differ) if d and one is not None)
    meanings = " or ".join(dates.format_day(one.days[o]) for o in fitting)
    raise DataError(
        f"column {name!r}: {cells.texts[cells.codes[row]]!r} in {source.line(row)} can be "
        f"{meanings}, and no other row decides; say --dates {' or --dates '.join(fitting)}"
    )


def _without_years_first(
    fitting: list[str], parsed_dates: Sequence[dates.ParsedDate]
) -> list[str]:
    """Drop ymd for two-digit years with slashes, where it is rare, unless there are fewer
    distinct years at the start of the cells than at their end.
    """
    others = [o for o in fitting if o != "ymd"]

    def years(order: str) -> int:
        return len({dates.format_day(one.days[order])[:4] for one in parsed_dates})

    first = "ymd" in fitting and years("ymd") < min(map(years, others))
    return fitting if first else others


def _custom_dates(source: Source, name: str, cells: TextCells, format: str) -> Column | None:
    days = parse_dates_as(cells.texts, format)
    if cells.share(~np.isnan(days)) <= _MOSTLY:
        return None
    words = _flag_words(source, name, cells, ~np.isnan(days), "dates") or ()
    clock = bool(np.any(days != np.floor(days), where=~np.isnan(days)))
    return Column(name, "date", format=format, clock=clock, words=words, missing=cells.missing)


def parse_dates_as(texts: Sequence[str], format: str) -> np.ndarray:
    """Parse texts with a strptime format to days since 1970, NaN where they do not match."""
    import pandas as pd

    parsed = pd.to_datetime(pd.Series(list(texts)), format=format, errors="coerce", utc=True)
    return days_since_1970(parsed)


def find_never_dates(days: np.ndarray) -> dict[int, str]:
    """Map cells to dates that mean "no end" or "no beginning" (9999-12-31, 0001-01-01)."""
    outside = (days < dates.NEVER[0]) | (days >= dates.NEVER[1])
    return {int(i): dates.format_day(days[i]) for i in np.flatnonzero(outside)}


def _time_column(raw: RawColumn) -> Column | None:
    cells = time_cells(raw)
    fits = ~np.isnan(raw.times)
    if cells.share(fits) <= _MOSTLY:
        return None
    words = _flag_words(raw.source, raw.name, cells, fits, "times") or ()
    format = dates.time_format([text for text, fit in zip(cells.texts, fits) if fit])
    return Column(raw.name, "time", format=format, words=words, missing=cells.missing)


def time_cells(raw: RawColumn) -> TextCells:
    """Return the cells of a column of times, where 00:00:00 is midnight and not missing."""
    return replace(raw.cells, is_missing=raw.cells.is_missing & np.isnan(raw.times))


def _number(column: Column, values: np.ndarray) -> Column:
    present = values[~np.isnan(values)]
    whole = bool(np.all(present == np.floor(present)))
    distinct = np.unique(present)
    known = len(distinct)
    if whole and not column.words and _look_like_days(distinct):
        return Column(column.name, "date", format=DAYS_AS_NUMBERS)
    if whole and not column.words and _TIME_NAME.search(column.name):
        if unit := _since_1970(distinct):
            return Column(column.name, "date", format=unit, clock=True)
    if whole and known > 1 and known >= _DISTINCT * len(present) and _ID_NAME.search(column.name):
        reason = sentence("reason_whole")
        if known < len(values):
            reason = sentence("reason_numbers", numbers=known, rows=len(values))
        return Column(column.name, "dropped", reason=reason)
    return column


def _look_like_days(numbers: np.ndarray) -> bool:
    """Return whether several whole numbers are all calendar days such as 20210304."""
    if len(numbers) < _FEW_DAYS or numbers[0] < 19000101 or numbers[-1] > 21001231:
        return False
    texts = [f"{number:.0f}" for number in numbers]
    return not np.isnan(parse_dates_as(texts, DAYS_AS_NUMBERS)).any()


def _since_1970(numbers: np.ndarray) -> str:
    """Return the unit in which several whole numbers are timestamps of 1985 to 2100, or ""."""
    if len(numbers) < _FEW_DAYS:
        return ""
    fits = (u for u, n in dates.UNITS.items() if 5e8 * n < numbers[0] <= numbers[-1] < 4.1e9 * n)
    return next(fits, "")


def _category(name: str, texts: pd.Series, *, forced: bool = False) -> Column:
    present = texts.dropna()
    levels = sorted(present.unique())
    if not forced and (scale := scale_of(levels)):
        return Column(name, "number", scale=scale)
    if not forced and len(levels) > _MAX_WORDS:
        distinct = len(levels) >= _DISTINCT * len(present)
        if distinct and _look_like_identifiers(name, levels):
            reason = sentence("reason_code", rows=len(levels))
            if len(levels) < len(texts):
                reason = sentence("reason_codes", codes=len(levels), rows=len(texts))
            return Column(name, "dropped", reason=reason)
        spaces = sum(level.count(" ") for level in levels) / len(levels)
        if spaces + 1 >= _PROSE_WORDS or len(levels) > len(present) / 2:
            bags = {tuple(_WORD.findall(level)) for level in levels} - {()}
            by = "words" if spaces >= 1 and len(bags) > len(levels) / 2 else "letters"
            hashes = 1 << max(3, min(_WIDTHS[by], len(texts) // 8).bit_length() - 1)
            unread = find_unread_numbers(levels)
            return Column(name, "text", format=by, hashes=hashes, unread=unread)
    counts = present.value_counts()
    chosen: dict[str, str] = {}
    for level in sorted(levels, key=lambda level: (-counts[level], level)):
        chosen.setdefault(normalize_label(level), level)
    return Column(
        name,
        "category",
        categories=tuple(sorted(chosen.values())),
        spellings=tuple(sorted(set(levels) - set(chosen.values()))),
        unread="" if forced else find_unread_numbers(levels),
    )


def find_unread_numbers(levels: Sequence[str]) -> str:
    """Return a text if most hold numbers that text hides: two in a cell (120/80), one in words
    (age: 12), or several units ($5, €4); else "".
    """
    some = levels[:_SAMPLE]
    shapes = {level: re.sub(r"\d+(?:[.,]\d+)*", "#", level) for level in some}
    one = len(set(shapes.values())) == 1 and _IN_WORDS.match(shapes[some[0]])
    pairs = [level for level, shape in shapes.items() if one or _PAIR.match(shape)]
    alike = len(set(shapes.values())) <= max(3, len(some) / 5)
    if len(some) > _MAX_UNITS and alike and len(pairs) > _MOSTLY * len(some):
        return pairs[0][:40]
    parsed = [number_parsing.parse_number(level) for level in some]
    numbers = [one for one in parsed if one is not None]
    few = len(numbers) <= max(2, _UNITS_SHARE * len(some))
    if few or any(one.bound for one in numbers) or any(re.match(r"0\d", level) for level in some):
        return ""
    plain = [one.unit for one in numbers if not one.unit or number_parsing.is_currency(one.unit)]
    return some[0][:40] if plain or any("%" in one.unit for one in numbers) else ""


def _look_like_identifiers(name: str, levels: Sequence[str]) -> bool:
    """Return whether levels look like codes: by column name, hexadecimal, or digit pattern."""
    if _ID_NAME.search(name) or all(_HEX.fullmatch(level) for level in levels):
        return True
    telephones = all(_PHONE.fullmatch(level) for level in levels)
    coded = all(re.search(r"\d", level) and " " not in level for level in levels)
    if not telephones and not coded:
        return False
    if sum(bool(_MEASURED.match(level)) for level in levels) > _MOSTLY * len(levels):
        return False
    few = max(1, len(levels) // 20)
    if any(re.search(r"[^\W\d_]", level) for level in levels):
        return len({re.sub(r"\d+", "#", level) for level in levels}) <= few
    # without letters, digit groups are quantities (120/80, 1:23.4), unless telephone numbers
    numbered = all(re.fullmatch(r"[-+.()_#\d]*", level) for level in levels)
    return (numbered or telephones) and len({re.sub(r"\d", "#", level) for level in levels}) <= few


def refuse_infinite(source: Source, name: str, values: np.ndarray) -> None:
    """Raise for infinite cells or those whose squares overflow, naming the first one."""
    bad = np.abs(values) > _LARGEST
    if bad.any():
        row = int(np.argmax(bad))
        key = "refused_infinite" if np.isinf(values[row]) else "refused_large"
        count, line = int(bad.sum()), source.line(row)
        raise DataError(sentence(key, name=name, count=count, line=line))
