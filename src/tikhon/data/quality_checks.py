"""Warnings about a table that cast doubt on its scores."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np

from tikhon.data.column import Column
from tikhon.data.encoding import iterate_columns
from tikhon.data.number_parsing import MISSING, parse_number
from tikhon.data.source import Source, quote_names
from tikhon.data.text_cells import FALSE, TRUE
from tikhon.languages import Sentence, sentence
from tikhon.options import format_options

_RARE_SHARE = 0.1
_LARGE_CLASS = 0.3  # share of the largest class below which constant predictions score low
_LEAK_ERRORS = 0.02  # share of a constant prediction's errors that a leak may leave
_SAMPLE = 5_000
_DAYS = 8  # fewest distinct dates whose order is not by chance
_EXACT = 1e-8  # residual share of the target's variance for an exact combination of columns
_MAX_TERMS = 6  # most columns in such a sum or product
_MAX_COLUMNS = 50  # most numeric columns searched for it
_CHANCE_LEVEL = 1e-3  # probability that columns are equal by accident
_WIDE, _REPEATED = 10, 0.01  # a range, and a share of rows, of numbers with a sentinel beside them
_ABBREVIATION = 4  # letters
_NO_VALUES = MISSING - {"none", "nil", "-", "--", "."}  # also in a category
_DAY_AND_MONTH = re.compile(r"\d{1,2}-[A-Z][a-z]{2}|[A-Z][a-z]{2}-\d\d")
_RANGE = re.compile(r"\d+ ?- ?\d+")
_MIN_GROUPS = 10  # fewest distinct values of a column of groups
_BLOCK = 10_000  # rows hashed at a time
_TOTAL = re.compile(
    r"\s*(?:(?:grand|sub)[- ]?)?(?:totals?|sum|overall|all|summe|gesamt|insgesamt|total général|"
    r"totale|suma|итого|всего|合计|总计|合計|総計|average|mean|mittelwert|平均)"
    r"(?:\s+\d{4})?\s*:?\s*|.*\s(?:sub)?total\s*",
    re.IGNORECASE,
)
_GROUP_NAME = re.compile(
    r"(?i:(?:^|[_\s.-])(?:id|uuid|guid)$|^(?:patient|subject|participant|person|user|customer|client|"
    r"member|household|session|speaker|animal|device|machine)s?(?:[_\s.-]?(?:no|nr|number|#))?$)"
    r"|(?<=[a-z])I[dD]$"
)
_SENTINELS = frozenset(
    [-1.0, 777.0, 888.0, 7777.0, 8888.0, 32767.0, 65535.0, 2147483647.0, -999.25, 1e20, 9.96921e36]
)  # with those of nines (-999, -99.9): of surveys, instruments and well logs, and of netCDF


def report_formats(columns: Sequence[Column]) -> list[Sentence]:
    """Report columns that were parsed in an unusual format."""
    told = [f"{quote_names([c.name])}: {c.reading}" for c in columns if c.reading]
    more = f"; and {len(told) - 12} more" if len(told) > 12 else ""
    return [sentence("notice_read", columns="; ".join(told[:12]) + more)] if told else []


def describe_dropped(columns: Sequence[Column]) -> str:
    """List the unused columns and the reasons."""
    shown = "; ".join(f"{quote_names([c.name])} ({c.reason})" for c in columns[:8])
    return shown + (f" and {len(columns) - 8} more" if len(columns) > 8 else "")


def find_na_labels(source: Source, target: str) -> list[Sentence]:
    """Report labels that look like "no value"."""
    text = source.frame[target].astype("string").str.strip()
    found = text[text.str.lower().isin(["na", "n/a", "nan", "null", "none"])]
    return [
        sentence(
            "notice_text_na",
            rows=int(count),
            word=str(word),
            column=target,
            option=format_options("--na-values", str(word)),
        )
        for word, count in found.value_counts().items()
    ]


def find_similar_labels(name: str, labels: Sequence[str]) -> list[Sentence]:
    """Report labels that are kept apart although they differ only in case (single letters), in
    trailing punctuation (`>50K.`), or as an abbreviation and its word.
    """
    words = [label for label in labels if label.isalpha()]
    short = [label for label in words if len(label) <= _ABBREVIATION]
    letters = [label for label in short if len(label) == 1]
    groups = [[x for x in letters if x.lower() == letter] for letter in "".join(letters).lower()]
    bare: dict[str, list[str]] = {}
    for x in dict.fromkeys(labels):
        if len(x) > 1:
            bare.setdefault(re.sub(r"[\s.,;:!]+$", "", x).lower(), []).append(x)
    groups += bare.values()
    groups += [[x for x in words if x.lower() in truths] for truths in (TRUE, FALSE)]  # Y, yes
    longer = [
        [x, *(y for y in words if len(y) > len(x) + 2 and y.lower().startswith(x.lower()))]
        for x in short
    ]
    longer = [group for group in longer if len(group) > 1]
    groups += longer if len(longer) > 1 else []  # M, male, F, female
    alike = list(dict.fromkeys(quote_names(group) for group in groups if len(group) > 1))
    return [sentence("notice_kept_apart", labels="; ".join(alike), name=name)] if alike else []


def find_combined_labels(name: str, labels: Sequence[str]) -> list[Sentence]:
    """Report combined labels such as `action|drama`, each of which counts as one value."""
    for mark in "|;,":
        parts = {part.strip() for label in labels for part in label.split(mark)}
        joined = [label for label in labels if mark in label]
        if len(joined) > 1 and len(parts) < len(labels):
            count = len(labels)
            return [sentence("notice_combined", label=joined[0], name=name, count=count)]
    return []


def find_misspelt_labels(name: str, rows: Mapping[str, int]) -> list[Sentence]:
    """Report rare labels that are one edit from a common one (`Yse`), or differ in dots (`O.K.`).

    `rows` counts the rows of each label.
    """
    words = {label: re.sub(r"[.\s'-]", "", label).lower() for label in rows}
    common = sorted((label for label in rows if words[label].isalpha()), key=lambda x: -rows[x])
    return [
        sentence("notice_misspelt", label=label, usual=usual, name=name, rows=rows[label])
        for label in common
        for usual in [x for x in common if _is_misspelt(words[label], words[x])][:1]
        if rows[label] <= _RARE_SHARE * rows[usual]
    ]


def _is_misspelt(word: str, other: str) -> bool:
    """Return whether two words are one letter apart, or two swapped ones; short ones only by a
    letter more or less.
    """
    if word == other:
        return True
    short, long = sorted((word, other), key=len)
    same = next((i for i, (a, b) in enumerate(zip(short, long)) if a != b), len(short))
    if len(short) < len(long):
        return len(short) > 1 and short[same:] == long[same + 1 :]
    rest, others = short[same:], long[same:]
    swapped = rest[:2] == others[1::-1] and rest[2:] == others[2:]
    return swapped or (len(short) > _ABBREVIATION and rest[1:] == others[1:])


def check_levels(column: Column) -> list[Sentence]:
    """Report levels of a category that may be one, several that all look like "no value", and
    `5-Mar` among ranges such as `6-9`, which a spreadsheet changed.
    """
    levels, name = column.categories, quote_names([column.name])
    notices = find_similar_labels(column.name, levels)
    notices += find_combined_labels(column.name, levels)
    missing = [level for level in levels if level.lower() in _NO_VALUES]
    if len(missing) > 1:
        options = format_options("--na-values", *missing)
        labels = quote_names(missing)
        notices.append(
            sentence("notice_no_values", labels=labels, name=column.name, options=options)
        )
    dates = [level for level in levels if _DAY_AND_MONTH.fullmatch(level)]
    if dates and any(map(_RANGE.fullmatch, levels)):
        cells = quote_names(dates)
        notices.append(sentence("notice_dates_by_spreadsheet", cells=cells, column=name))
    return notices


def find_imbalance(y: np.ndarray, target: Column, task: str) -> list[Sentence]:
    """Report a rare class."""
    if task != "classification":
        return []
    shares = np.bincount(y) / len(y)
    least = int(shares.argmin())
    name, share, most = target.categories[least], float(shares[least]), float(shares.max())
    if share >= _RARE_SHARE / (len(shares) / 2) or most < _LARGE_CLASS:
        return []
    return [sentence("notice_imbalance", name=name, share=share, most=most)]


def find_leaks(
    values: np.ndarray, columns: Sequence[Column], y: np.ndarray, task: str
) -> list[Sentence]:
    """Report columns that alone determine the target, often recorded after it."""
    some = np.random.default_rng(0).permutation(len(y))[:_SAMPLE]  # a leak shows in a sample
    certain, nearly = [], []
    for column, cells in iterate_columns(values, columns):
        unordered = column.kind == "category"
        share = 0.0
        for part in () if column.kind == "text" else cells.T:
            told = _leak_share(part[some], y[some], task, unordered)
            if told and len(y) > _SAMPLE:
                told = _leak_share(part, y, task, unordered)
            share = max(share, told)
            if share == 1:
                break
        if share == 1:
            certain.append(column.name)
        elif share:
            nearly.append((column.name, share))
    told = [(certain, 1.0)] if certain else []
    return [
        sentence(
            "notice_leak_nearly"
            if share < 1
            else "notice_leak"
            if len(names) == 1
            else "notice_leaks",
            columns=quote_names(names),
            share=share,
            options=format_options("--drop", *names),
        )
        for names, share in [*told, *(([name], share) for name, share in nearly)]
    ]


def _leak_share(cells: np.ndarray, y: np.ndarray, task: str, unordered: bool) -> float:
    """Return the share of rows whose target follows from these cells by order, by level, or by
    being empty; 0 if it is not a leak.
    """
    there = ~np.isnan(cells)
    if task == "classification" and 10 <= there.sum() < len(cells) - 10:
        if share := _purity_by_level(there, y):
            return share
    if there.sum() < 10 or len(np.unique(cells[there])) < 2:
        return 0.0
    cells, y = cells[there], y[there]
    if task == "regression":
        return float(_is_monotone(cells, y))
    levels, classes = len(np.unique(cells)), len(np.unique(y))
    if (unordered and len(cells) >= 4 * levels) or (
        levels <= 2 * classes and len(cells) >= 2 * levels
    ):
        return _purity_by_level(cells, y)  # enough rows for each level to be mixed by chance
    pairs = np.unique(np.stack([cells, y]), axis=1)  # sorted by the cell
    pure = classes > 1 and pairs.shape[1] == levels
    return float(pure and 1 + int((np.diff(pairs[1]) != 0).sum()) == classes)


def _purity_by_level(cells: np.ndarray, y: np.ndarray) -> float:
    """Return the share of rows in the majority class of their level; 0 if more than 2 % of the
    errors of always predicting the majority class remain.
    """
    classes, y = np.unique(y, return_inverse=True)
    levels, codes = np.unique(cells, return_inverse=True)
    counts = np.bincount(codes * len(classes) + y, minlength=len(levels) * len(classes))
    wrong = len(y) - int(counts.reshape(len(levels), -1).max(axis=1).sum())
    blind = len(y) - int(np.bincount(y).max())
    return 1 - wrong / len(y) if blind and wrong <= _LEAK_ERRORS * blind else 0.0


def _is_monotone(cells: np.ndarray, y: np.ndarray) -> bool:
    """Return whether the target is monotone in the cells, up to rounding."""
    if len(np.unique(y)) < 2:
        return False
    if abs(np.corrcoef(cells, y)[0, 1]) > 0.9999:
        return True
    ranks = np.stack([np.unique(v, return_inverse=True)[1] for v in (cells, y)])
    many = min(len(np.unique(r)) for r in ranks) > len(y) / 2
    return many and abs(np.corrcoef(ranks[0], ranks[1])[0, 1]) > 0.9999


def find_combined_leaks(
    values: np.ndarray, columns: Sequence[Column], y: np.ndarray, target: Column, task: str
) -> list[Sentence]:
    """Report columns whose weighted sum, or product of powers, equals the target.

    For classes these are their numbers, or the indicator of every class (one-hot columns).
    """
    found = [
        (column.name, cells[:_SAMPLE, 0])
        for column, cells in iterate_columns(values, columns)
        if column.kind in ("number", "boolean")
    ]
    if not 2 <= len(found) <= _MAX_COLUMNS:
        return []
    cells, y = np.stack([part for _, part in found], axis=1), y[:_SAMPLE].astype(float)
    names = [name for name, _ in found]
    if task == "classification":
        return _report_combination(
            "notice_leak_sum", names, _combination_of_classes(cells, y, target)
        )
    for key, transform in (("notice_leak_sum", lambda v: v), ("notice_leak_product", np.log)):
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = _exact_combination(transform(cells), transform(y))
        if terms:
            return _report_combination(key, names, terms)
    return []


def _report_combination(key: str, names: Sequence[str], terms: Sequence[int]) -> list[Sentence]:
    found = [names[i] for i in terms]
    options = format_options("--drop", *found)
    return [sentence(key, columns=quote_names(found), options=options)] if found else []


def _combination_of_classes(cells: np.ndarray, codes: np.ndarray, target: Column) -> list[int]:
    """Return the columns that equal the number of the class, or the indicators of all classes."""
    labels = [parse_number(label) for label in target.categories]
    numbers = [one.value(".") for one in labels if one is not None]
    if len(numbers) == len(target.categories) > 2 and None not in numbers:
        if terms := _exact_combination(cells, np.array(numbers, float)[codes.astype(int)]):
            return terms
    found: set[int] = set()
    for code in range(len(target.categories)):
        terms = _exact_combination(cells, (codes == code).astype(float), least=1)
        if not terms:
            return []
        found |= set(terms)
    return sorted(found)


def _exact_combination(cells: np.ndarray, y: np.ndarray, *, least: int = 2) -> list[int]:
    """Return the few columns whose weighted sum is y; empty if there are none."""
    usable = np.flatnonzero(np.isfinite(cells).mean(axis=0) > 0.5)
    rows = np.isfinite(cells[:, usable]).all(axis=1) & np.isfinite(y)
    if rows.sum() < max(20, 0.5 * len(y), 3 * len(usable)):
        return []
    x, y = cells[rows][:, usable], y[rows] - y[rows].mean()
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-12)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    told = np.abs(weights) > 1e-3 * y.std()
    if not least <= told.sum() <= _MAX_TERMS or y.std() == 0:
        return []
    left = y - x[:, told] @ np.linalg.lstsq(x[:, told], y, rcond=None)[0]
    return usable[told].tolist() if left.var() <= _EXACT * y.var() else []


def find_duplicate_columns(values: np.ndarray, columns: Sequence[Column]) -> list[Sentence]:
    """Report columns that are equal in every row, unless that may be chance."""
    found: dict[bytes, list[str]] = {}
    for column, cells in iterate_columns(values, columns):
        counts = np.unique(cells[:, 0], return_counts=True)[1]
        chance = float(np.square(counts / len(cells)).sum()) ** len(cells) * len(columns) ** 2
        if chance < _CHANCE_LEVEL:
            key = hashlib.sha256(cells.tobytes(order="C")).digest()
            found.setdefault(key, []).append(column.name)
    return [
        sentence("notice_alike", columns=quote_names(names))
        for names in found.values()
        if len(names) > 1
    ][:8]


def find_groups(values: np.ndarray, columns: Sequence[Column]) -> list[Sentence]:
    """Report a column that names groups of rows, judged by its name and values."""
    for column, cells in iterate_columns(values, columns):
        first = cells[:, 0]
        many = len(np.unique(first[~np.isnan(first)]))
        named = column.kind in ("number", "category") and _GROUP_NAME.search(column.name)
        if named and _MIN_GROUPS <= many <= len(cells) / 2:
            name = quote_names([column.name])
            return [
                sentence(
                    "notice_groups",
                    column=name,
                    count=many,
                    rows=len(cells),
                    option=format_options("--group", column.name),
                )
            ]
    return []


def find_identifiers(values: np.ndarray, columns: Sequence[Column]) -> list[Sentence]:
    """Report numbers that look like identifiers but are kept."""
    found = [
        column.name
        for column, cells in iterate_columns(values, columns)
        if column.kind == "number"
        and not (column.words or column.unit)
        and _all_different(cells[:, 0])
    ]
    return [sentence("notice_identifier", columns=quote_names(found))] if found else []


def _all_different(cells: np.ndarray) -> bool:
    """Return whether distinct whole numbers count rows, or are codes of equal length."""
    if not np.all(cells == np.floor(cells)) or not len(np.unique(cells)) == len(cells) > 20:
        return False
    lengths = {len(f"{number:.0f}") for number in (cells.min(), cells.max())}
    return len(lengths) == 1 or bool(np.ptp(cells) < 2 * len(cells))


def find_sentinels(values: np.ndarray, columns: Sequence[Column]) -> list[Sentence]:
    """Report repeated outliers such as -999."""
    return [
        found
        for column, cells in iterate_columns(values, columns)
        if column.kind == "number"
        for found in _sentinels(cells[:, 0], column.name)
    ][:8]


def target_sentinels(y: np.ndarray, target: Column) -> list[Sentence]:
    """Report them in a target of numbers, or of numbers as classes, which would be learned."""
    numbers = [parse_number(label) for label in target.categories]
    values = [one.value(".") if one is not None else None for one in numbers]
    if None in values:
        return []
    return _sentinels(np.array(values, float)[y] if values else y, target.name)


def _sentinels(cells: np.ndarray, name: str) -> list[Sentence]:
    present = cells[~np.isnan(cells)]
    found = []
    for mark in (present.min(), present.max()) if len(present) else ():
        rest = present[present != mark]
        count = len(present) - len(rest)
        if count < 2 or len(np.unique(rest)) < 5:
            continue
        negative = mark < 0 <= rest.min()
        known = mark in _SENTINELS or set(f"{abs(mark):.10g}") <= {"9", "."}
        if not (known or (negative and mark == np.floor(mark))):
            continue
        width = max(float(np.ptp(rest)), 1e-12)
        gap = min(abs(mark - rest.min()), abs(mark - rest.max()))
        if negative and mark == -1 and width >= _WIDE and count >= _REPEATED * len(present):
            gap = np.inf  # -1 in 0 to 100
        if gap > width:
            column = quote_names([name])
            found.append(sentence("notice_sentinel", column=column, mark=float(mark), rows=count))
    return found


def find_merged_cells(values: np.ndarray, columns: Sequence[Column]) -> list[Sentence]:
    """Report columns with values at regular distances and empty cells below them."""
    found = []
    for column, cells in iterate_columns(values, columns):
        rows = np.flatnonzero(~np.isnan(cells[:, 0]))
        blocks = np.diff(np.append(rows, len(cells)))
        regular = len(rows) > 1 and rows[0] == 0 and blocks.std() < 0.5 * blocks.mean()
        if regular and len(rows) <= len(cells) / 2 and not column.words and column.kind != "text":
            if np.all(np.diff(cells[rows, 0]) != 0):
                name, count = quote_names([column.name]), len(cells) - len(rows)
                found.append(sentence("notice_merged_cells", column=name, count=count))
    return found


def find_garbled_text(source: Source) -> list[Sentence]:
    """Report text decoded with the wrong encoding, with the first such cell."""
    for name in source.frame.columns:
        cells = source.frame[name].head(_SAMPLE)
        for cell in cells.unique() if cells.dtype == object or cells.dtype == "string" else ():
            if not isinstance(cell, str):
                continue
            column = quote_names([str(name)])
            if "\ufffd" in cell:
                return [sentence("notice_lost", column=column, cell=cell[:40])]
            if meant := _redecode(cell):
                return [
                    sentence("notice_garbled", column=column, cell=cell[:40], meant=meant[:40])
                ]
    return []


def _redecode(text: str) -> str | None:
    """Undo UTF-8 decoded as Western European; None if it was not."""
    if text.isascii():
        return None
    try:
        return text.encode("cp1252").decode("utf-8")
    except ValueError:
        return None


def find_total_row(
    source: Source, values: np.ndarray, columns: Sequence[Column]
) -> list[Sentence]:
    """Report rows that are totals: the last by its label or its sums, others by their label."""
    last = source.line(len(source.frame) - 1)
    for name in source.frame.columns:
        cells = source.frame[name].to_numpy(object)
        cell, column = cells[-1], quote_names([str(name)])
        if isinstance(cell, str) and _TOTAL.fullmatch(cell) and cell not in cells[:-1]:
            return [sentence("notice_total", line=last, word=cell.strip(), column=column)]
    for column in columns:
        if found := [c for c in column.categories if _TOTAL.fullmatch(c) and "total" in c.lower()]:
            name = quote_names([column.name])
            return [sentence("notice_totals", words=quote_names(found), column=name)]
    summed = [
        column.name
        for column, cells in iterate_columns(values, columns)
        if column.kind == "number" and _is_summed(cells[:, 0])
    ]
    if len(summed) < 2:
        return []
    return [sentence("notice_total_sums", line=last, columns=quote_names(summed))]


def _is_summed(cells: np.ndarray) -> bool:
    """Return whether the last cell is the sum of several different ones above it."""
    above = cells[:-1][~np.isnan(cells[:-1])]
    total = float(above.sum())
    return len(np.unique(above)) > 2 and total != 0 and abs(cells[-1] - total) < 1e-6 * abs(total)


def find_sorted_dates(values: np.ndarray, columns: Sequence[Column]) -> list[Sentence]:
    """Report dates that are monotone over the rows, where rows are split at random."""
    for column, cells in iterate_columns(values, columns):
        days = cells[:, 0]
        if column.kind != "date" or np.isnan(days).any() or len(np.unique(days)) < _DAYS:
            continue
        steps = np.diff(days)
        if (steps >= 0).all() or (steps <= 0).all():
            return [sentence("notice_in_order", column=quote_names([column.name]))]
    return []


def expected_duplicates(values: np.ndarray, rows: np.ndarray) -> float:
    """Expected number of repeated rows if columns were independent: pairs of rows times the
    probability that a pair is equal.
    """
    pairs = len(rows) ** 2 / 2
    for cells in values[rows[:_SAMPLE]].T:
        shares = np.unique(cells, return_counts=True)[1] / len(cells)
        pairs *= float(np.sum(shares**2))
    return pairs


def find_repeated_rows(train: Set[int], other: Sequence[int], part: str) -> list[Sentence]:
    """Report rows (inputs and target) of another part that also occur in training.

    `train` and `other` hold their `hash_rows`.
    """
    count = sum(digest in train for digest in other)
    return [sentence(f"notice_repeated_{part}", count=count, rows=len(other))] if count else []


def hash_rows(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> Iterator[int]:
    """Yield a 64-bit hash of each row with its target."""
    for block in np.split(rows, range(_BLOCK, len(rows), _BLOCK)):
        for row, target in zip(np.ascontiguousarray(x[block]), y[block].tolist(), strict=True):
            yield hash((row.tobytes(), target))


def find_untested_classes(
    classes: Sequence[str], train: np.ndarray, others: Sequence[np.ndarray]
) -> list[Sentence]:
    """Report classes with too few rows for every part; counts of rows by class."""
    few = [name for i, name in enumerate(classes) if train[i] and min(o[i] for o in others) == 0]
    return [sentence("notice_untested", names=quote_names(few))] if few else []


CHECKS = (find_identifiers, find_duplicate_columns, find_sentinels, find_merged_cells)
