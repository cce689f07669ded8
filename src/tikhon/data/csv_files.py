"""Read CSV files, with checks that pandas omits."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from tikhon.data.fields import (
    BLANKS,
    MAX_FIELD,
    REPAIRS,
    SEPARATORS,
    FileLines,
    TextLines,
    allow_long_fields,
    blank_titles,
    csv_rows,
    default_separator,
    detect_separator,
    repair_quotes,
    skip_blanks,
)
from tikhon.data.source import Format, Source, origin_of, quote_names
from tikhon.errors import DataError, InputError
from tikhon.languages import Sentence, sentence

if TYPE_CHECKING:
    import pandas as pd

MAX_UNPACKED = 1 << 34  # bytes a compressed file may unpack to
PIECE = 50_000  # rows of a file read in pieces
_HEAD_SIZE = 1 << 20  # bytes of such a file in which its header stands


def read_csv_in_pieces(
    path: Path,
    format: Format | None,
    gather: Callable[[Iterable[pd.DataFrame]], pd.DataFrame],
) -> Source:
    """Read a CSV file as `read_table` does without holding it: `gather` joins frames of its rows.

    Raises `DataError` also for what can only be repaired in memory: UTF-16, quotes written in
    another way, rows of the wrong length.
    """
    format = format or Format()
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"

    def open_at(place: int) -> IO[bytes]:
        file = cast("IO[bytes]", gzip.open(path)) if is_packed else path.open("rb")
        file.seek(place)
        return file

    if is_packed:
        with open_gzip(path) as file:
            file.seek(MAX_UNPACKED)
            if file.read(1):
                refuse_unpacked(path)
    with open_at(0) as file:
        head = file.read(_HEAD_SIZE)
    head = head[: head.rfind(b"\n") + 1]
    is_wide = head.startswith(tuple(_MARKS))
    decoded = "" if is_wide else decode(path, head, format)
    text, told, above = split_preamble(path, decoded, format.separator)
    if is_wide or {one.key for one in above} & set(REPAIRS):
        raise DataError(
            f"{path} does not fit into memory, and in pieces neither UTF-16 is read nor quotes "
            "that are not doubled: save it as UTF-8, or as Parquet"
        )

    def open_rest() -> io.TextIOWrapper:
        return io.TextIOWrapper(open_at(len(head)), format.encoding, newline=None)

    try:
        with closing(FileLines(text.head(len(head)), open_rest)) as lines:
            return read_csv(path, lines, told, above, format, origin_of(path), gather)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{error.object[error.start]:02x} is not {format.encoding} text; give "
            "the file's encoding, for example --encoding cp1252"
        ) from error


@contextmanager
def open_gzip(path: Path, content: bytes | None = None) -> Iterator[IO[bytes]]:
    """Open a compressed file, or its `content`; `DataError` if it turns out to be damaged."""
    try:
        with gzip.open(path if content is None else io.BytesIO(content)) as file:
            yield cast("IO[bytes]", file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}); copy it again") from error


def refuse_unpacked(path: Path) -> NoReturn:
    """Raise `DataError` for a compressed file that unpacks to too much."""
    raise DataError(f"{path} unpacks to more than {MAX_UNPACKED:,} bytes, the limit")


def split_preamble(
    path: Path, text: str, separator: str | None
) -> tuple[TextLines, str | None, tuple[Sentence, ...]]:
    """Blank out what precedes the header; return the text, a declared separator and notices.

    `sep=;` is written by spreadsheets; lines with a # are comments unless they have as many fields
    as the header; titles are those detected by `blank_titles`.
    """
    if found := re.match(r'"?sep=(.)"?\n', text, re.IGNORECASE):
        return TextLines("\n" + text[found.end() :]), separator or found[1], ()
    notices: list[Sentence] = []
    text, repaired = repair_quotes(text, separator, default_separator(path))
    if repaired:
        notices.append(sentence(repaired))
    if comments := re.match(r"(?:#[^\n]*\n)+", text):
        header = text[comments.end() :].partition("\n")[0]
        marks = [separator] if separator else SEPARATORS
        lines = comments[0].splitlines()
        if any(0 < line.count(mark) == header.count(mark) for line in lines for mark in marks):
            return TextLines(text), separator, tuple(notices)
        notices.append(sentence("notice_comments", count=len(lines)))
        text = "\n" * len(lines) + text[comments.end() :]
    text, titles = blank_titles(text, separator, default_separator(path))
    if titles:
        notices.append(sentence("notice_titles", count=titles))
    if rule := _RULE.match(text):
        notices.append(sentence("notice_rule", line=text.count("\n", 0, rule.start(1)) + 1))
        text = text[: rule.start(1)] + text[rule.end(1) :]
    return TextLines(text), separator, tuple(notices)


# dashes below the header, as in Markdown and in the output of databases
_RULE = re.compile(r"\s*[^\n]+\n([ \t|+:]*-{3,}[-:= \t]*[|+][-|+:= \t]*)(?=\n)")


def read_csv(
    path: Path,
    text: TextLines,
    told: str | None,
    above: tuple[Sentence, ...],
    format: Format,
    origin: dict[str, object],
    gather: Callable[[Iterable[pd.DataFrame]], pd.DataFrame] | None = None,
) -> Source:
    """Read the rows of a text; with `gather` in pieces, whose frames it joins.

    `told` is the declared separator, `above` are notices on the lines above the header.
    """
    import pandas as pd

    separator = skip_blanks(text, told or detect_separator(path, text))
    header, rows, lines, skipped = _scan(path, text, separator, keep=format.bad_rows == "skip")
    if not lines and len(header) > 1 and {width for _, width in skipped} == {len(header) + 1}:
        if more := _extend_header(text, separator, header):
            header, above = more[0], (*above, more[1])
            lines, skipped = [line for line, _ in skipped], []
    empty = _find_nameless(text, separator, header)
    header = _check_header(path, header, separator[0], empty)
    if skipped and format.bad_rows == "error":
        raise DataError(_wrong_length(path, header, lines, skipped))
    if not lines:
        raise DataError(f"no data rows in {path}: it holds the header alone")
    if skipped and gather:
        raise DataError(
            f"{path} does not fit into memory, and in pieces no rows are left out: "
            f"{_wrong_length(path, header, lines, skipped)}"
        )
    missing = ["", *format.missing]
    try:
        if skipped:
            frame = pd.DataFrame(rows, columns=header, dtype=str)
        else:
            frame: Any = pd.read_csv(
                cast("Any", text),
                sep=r"\s+" if separator == BLANKS else separator[0],
                skipinitialspace=len(separator) > 1,
                dtype=str,
                keep_default_na=False,
                na_values=missing,
                header=0,
                names=header,
                index_col=False,
                chunksize=PIECE if gather else None,
            )
            frame = gather(frame) if gather else frame
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if skipped:
        frame = frame.mask(frame.isin(missing))
    notices = [*above, *_find_missing_header(header)]
    if again := _find_repeated_headers(frame):
        frame = frame.drop(index=again).reset_index(drop=True)
        notices.append(sentence("notice_headers", count=len(again), line=lines[again[0]]))
        lines = [line for row, line in enumerate(lines) if row not in set(again)]
    if empty:
        frame = frame.drop(columns=[header[i] for i in empty])
        notices.append(sentence("notice_nameless", count=len(empty)))
    if skipped:
        notices.append(sentence("notice_wrong_length", count=len(skipped)))
    if told is None and separator[0] != default_separator(path):
        notices.append(sentence("notice_separator", mark=separator[0]))
    return Source(frame, path.name, lines, tuple(notices), origin, format)


def _find_repeated_headers(frame: pd.DataFrame) -> list[int]:
    """Return the rows that hold the names of the columns, as in files joined end to end."""
    names = list(frame.columns)
    like = np.flatnonzero((frame[names[0]] == names[0]).to_numpy(bool)) if len(names) > 1 else ()
    return [int(row) for row in like if [str(c).strip() for c in frame.iloc[row]] == names]


def _extend_header(
    text: TextLines, separator: str, header: list[str]
) -> tuple[list[str], Sentence] | None:
    """Extend the header if every row has one field more: row names, or an empty last field.

    None if the header may lack a name instead.
    """
    with allow_long_fields():
        rows = [row for row in csv_rows(text, separator) if row][1:]
    if not any(row[-1].strip() for row in rows):
        return [*header, ""], sentence("notice_row_ends")
    first = [row[0] for row in rows]
    counted = first == [str(i) for i in range(1, len(rows) + 1)]
    named = len(set(first)) == len(rows) and not any(re.match(r"[-+.\d\s]|$", t) for t in first)
    if len(rows) < 2 or not (counted or named):
        return None
    return ["", *header], sentence("notice_row_names")


def _wrong_length(
    path: Path, header: list[str], lines: Sequence[int], skipped: list[tuple[int, int]]
) -> str:
    """Explain rows with a different number of fields than the header."""
    line, width = skipped[0]
    widths = [width for _, width in skipped]
    least = len(header) + (2 if line == 2 else 1)  # with one more, a name may be missing
    if len(skipped) > len(lines) and (width := max(widths, key=widths.count)) >= least:
        return (
            f"{path} line {line}: {width} fields{_more_rows(len(skipped) - 1)}, what stands for "
            f"the header has {len(header)} ({quote_names(header)}): remove the lines above the "
            "header"
        )
    return (
        f"{path} line {line}: {width} fields, the header has {len(header)} columns"
        f"{_more_rows(len(skipped) - 1)}; correct the rows, or leave them out with "
        "--on-bad-row skip"
    )


_MARKS = {
    **dict.fromkeys((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-32"),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "utf-16"),
}


def decode(path: Path, content: bytes, format: Format) -> str:
    """Decode the text and normalise line ends; a byte order mark sets the encoding."""
    encoding = "utf-8-sig" if format.encoding.lower() in ("utf-8", "utf8") else format.encoding
    marked = next((found for mark, found in _MARKS.items() if content.startswith(mark)), None)
    if marked is not None and marked[-2:] not in encoding:
        encoding = marked
    try:
        text = content.decode(encoding)
    except LookupError as error:
        raise InputError(f"unknown encoding {format.encoding!r}; try utf-8 or cp1252") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = _suggest_encodings(content, error.start)
        raise DataError(
            f"{path} line {line}: byte 0x{content[error.start]:02x} is not "
            f"{encoding.removesuffix('-sig')} text; give the file's encoding{hint}"
        ) from error
    except UnicodeError as error:
        raise DataError(f"{path} is not {encoding} text: {error}") from error
    if "\0" in text:
        if not marked and text[1:200:2].count("\0") + text[:200:2].count("\0") > 60:
            order = "le" if text[1] == "\0" else "be"
            raise DataError(f"{path} is UTF-16 without a mark: say --encoding utf-16-{order}")
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} line {line} holds a NUL byte: the file is damaged or not text")
    text = text.removesuffix("\x1a")  # DOS end of file
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _suggest_encodings(content: bytes, place: int) -> str:
    """Show the bytes around an offset in each plausible encoding.

    Letters of two bytes leave runs of even length, accents stand within words of ASCII letters.
    """
    start = max(content.rfind(mark, 0, place) for mark in b"\n,;\t") + 1
    piece = re.split(rb"[\n,;\t]", content[start : start + 60])[0].strip(b'\r"')
    runs = re.findall(rb"[\x80-\xff]+", content)
    even = sum(len(run) % 2 == 0 for run in runs)
    accents = len(re.findall(rb"(?i)[a-z][\x80-\xff]{1,2}(?=[a-z])", content))
    pairs = even > 0.8 * len(runs) and accents < len(runs) / 2
    found: dict[str, str] = {}
    for encoding in _OF_PAIRS if pairs else _ENCODINGS:
        with suppress(UnicodeDecodeError):
            text = piece.decode(encoding)
            if text.isprintable() and not _HALF_WIDTH.search(text):
                found.setdefault(text, f"--encoding {encoding} reads {text!r}")
    return ": " + ", ".join(found.values()) if found else ", for example --encoding latin-1"


_OF_PAIRS = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1252", "cp1251")
_ENCODINGS = ("shift_jis", "cp1252", "cp1250", "cp1251")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")  # accented letters decoded as shift_jis


def _find_missing_header(header: Sequence[str]) -> list[Sentence]:
    """Report a first line that looks like a row: numbers other than column indices as names."""
    numbers = [name for name in header if re.fullmatch(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?", name)]
    counts = [str(i) for i in range(len(header) + 1)]
    years = all(re.fullmatch(r"(19|20)\d\d", name) for name in numbers)
    if len(numbers) < 2 or set(numbers) <= set(counts) or years:
        return []
    return [sentence("notice_headless", cells=quote_names(numbers))]


def _scan(
    path: Path, text: TextLines, separator: str, *, keep: bool
) -> tuple[list[str], list[list[str]], Sequence[int], list[tuple[int, int]]]:
    """Return header, rows (if kept), their line numbers, and rows of the wrong length."""
    reader = csv_rows(text, separator)
    rows: list[list[str]] = []
    lines = array("q")
    bad: list[tuple[int, int]] = []
    header: list[str] | None = None
    start = 1
    try:
        with allow_long_fields():
            for row in reader:
                start = reader.line_num + 1
                if not row:
                    continue
                if header is None:
                    header = row
                elif len(row) != len(header):
                    bad.append((reader.line_num, len(row)))
                else:
                    lines.append(reader.line_num)
                    if keep:
                        rows.append(row)
    except csv.Error as error:
        raise DataError(
            _describe_csv_error(path, error, start, reader.line_num, separator)
        ) from error
    return header or [], rows, lines, bad


def _describe_csv_error(
    path: Path, error: csv.Error, start: int, line: int, separator: str
) -> str:
    """Explain an error of the csv module."""
    if "unexpected end of data" in str(error):
        return f"{path} line {start}: a quote is opened and never closed, up to line {line}"
    if "expected after" in str(error):
        return (
            f"{path} line {line}: a quoted field goes on after its closing quote; double the "
            f"quotes inside it, or put {separator!r} after it"
        )
    if "field larger" in str(error):
        return (
            f"{path} line {start}: a field of more than {MAX_FIELD:,} characters; most likely a "
            "quote is opened there and never closed"
        )
    return f"{path} line {line}: {error}"


def _find_nameless(text: TextLines, separator: str, header: Sequence[str]) -> list[int]:
    """Return the columns without name or values, if there are several."""
    found = [i for i, name in enumerate(header) if not name.strip()]
    if len(found) < 2:
        return []
    with allow_long_fields():
        rows = (row for row in csv_rows(text, separator) if row)
        next(rows)
        filled = any(row[i].strip() for row in rows for i in found if i < len(row))
    return [] if filled else found


def _check_header(
    path: Path, header: list[str], separator: str, empty: Sequence[int] = ()
) -> list[str]:
    """Strip the names where they stay unique; name the `empty` columns by index.

    Raises `DataError` for a wrong separator or duplicate names.
    """
    header = [f"\0{i}" if i in empty else name for i, name in enumerate(header)]
    stripped = [name.strip() for name in header]
    header = stripped if len(set(stripped)) == len(set(header)) else header
    if len(header) == 1:
        for other in (c for c in SEPARATORS if c != separator and c in header[0]):
            shown = "'\\t'" if other == "\t" else f"'{other}'"
            raise DataError(
                f"{path}: one column found ({header[0][:60]!r}); the file looks like it is "
                f"separated by {shown}: use --sep {shown}"
            )
    first: dict[str, int] = {}
    for position, name in enumerate(header, start=1):
        if name in first and not name:
            raise DataError(
                f"{path}: columns {first[name]} and {position} of the header have no name; name "
                "them, or remove the lines above the header"
            )
        if name in first:
            raise DataError(
                f"{path}: column {name[:60]!r} appears twice, as column {first[name]} and column "
                f"{position}; rename one of them"
            )
        first[name] = position
    return header


def _more_rows(count: int) -> str:
    return f" (and {count} more such rows)" if count > 0 else ""
