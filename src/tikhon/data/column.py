"""One column of a table: its kind, and how its cells were read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import reduce
from typing import Any, Literal

from tikhon.data import dates, number_parsing
from tikhon.data.source import quote_names
from tikhon.data.text_cells import TRUE
from tikhon.languages import Sentence, sentence

Kind = Literal["number", "boolean", "category", "date", "time", "text", "dropped"]

DAYS_AS_NUMBERS = "%Y%m%d"
_FORMATS = {
    "ISO8601": "ymd",
    "%Y/%m/%d": "ymd",
    "%d.%m.%Y": "dmy",
    "%d/%m/%Y": "dmy",
    "%m/%d/%Y": "mdy",
}  # names in older runs


_FORMAT_READINGS = {
    "dmy": "reading_day_first",
    "mdy": "reading_month_first",
    DAYS_AS_NUMBERS: "reading_days",
    "duration": "reading_spans",
    "calendar": "reading_spans_long",
    "minutes": "reading_minutes",
    "hours": "reading_hours",
}


@dataclass(frozen=True)
class Column:
    """One column: its kind, and everything needed to parse and encode new cells like it."""

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    format: str = ""  # of dates: ymd, dmy, mdy, or a strptime format; of text: words or letters
    clock: bool = False  # dates include a time of day
    reason: Sentence | None = None  # why it was dropped
    decimal: str = "."  # "" if each cell determines its own decimal mark
    whole: bool = False  # no cell has a decimal mark
    unit: str = ""  # a currency, "%" or letters around the numbers
    multiples: tuple[str, ...] = ()  # suffixes that scale the number: k, M, million
    hashes: int = 0  # number of hashed features of free text
    words: tuple[str, ...] = ()  # texts and bounds among numbers or dates, each with a flag
    missing: tuple[str, ...] = ()  # texts among numbers or dates read as missing
    short: bool = False  # two-digit years
    serial: bool = False  # some dates are spreadsheet day numbers
    scale: tuple[str, ...] = ()  # ordered words read as numbers, lowest first
    spellings: tuple[str, ...] = ()  # alternative spellings of its categories
    unread: str = ""  # a text of a category or free text that holds numbers: 120/80

    def to_dict(self) -> dict[str, object]:
        """Return plain values; inverse of `from_dict`."""
        usual = {f.name: f.default for f in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != usual[key]}

    @classmethod
    def from_dict(cls, plain: dict[str, Any], *, decimal: str = ".") -> Column:
        """Invert `to_dict`; `decimal` is the mark that older runs stored for all columns."""
        names = ("categories", "multiples", "words", "missing", "scale", "spellings")
        lists = {k: tuple(plain.get(k, ())) for k in names}
        format = plain.get("format", "")
        found = {"decimal": decimal, **plain, **lists, "format": _FORMATS.get(format, format)}
        return cls(**found)

    @property
    def width(self) -> int:
        """Number of values that encode one cell."""
        if self.kind == "text":
            return 1 + self.hashes
        return 2 if self.words else 1

    @property
    def reading(self) -> Sentence | None:
        """All `readings` as one sentence."""
        told = self.readings
        return (
            reduce(
                lambda rest, first: sentence("evidence_and", first=first, rest=rest), told[::-1]
            )
            if told
            else None
        )

    @property
    def readings(self) -> tuple[Sentence, ...]:
        """Describe unusual formats detected in its cells."""
        found = []
        if self.decimal != "." and not self.whole:
            found.append(sentence("reading_comma" if self.decimal else "reading_own_mark"))
        if self.scale:
            found.append(sentence("reading_scale", words=" < ".join(self.scale)))
        if self.unit:
            found.append(sentence("reading_unit", unit=self.unit))
        if self.multiples:
            found.append(sentence("reading_multiples", words=quote_names(self.multiples)))
        if self.format in _FORMAT_READINGS:
            found.append(sentence(_FORMAT_READINGS[self.format]))
        if self.kind == "date" and self.format in dates.UNITS:
            found.append(sentence("reading_epoch", unit=self.format))
        if self.serial:
            found.append(sentence("reading_serial"))
        if self.short:
            found.append(sentence("reading_years"))
        if bounds := [w for w in self.words if w in number_parsing.FLAGS]:
            key = "reading_marks" if bounds == ["*"] else "reading_limits"
            found.append(sentence(key, marks=" ".join(bounds)))
        if words := [w for w in self.words if w not in number_parsing.FLAGS]:
            found.append(sentence("reading_words", words=quote_names(words)))
        if self.missing:
            found.append(sentence("reading_missing", words=quote_names(self.missing)))
        if self.kind == "boolean" and self.spellings:
            true, false = (
                quote_names([w for w in self.spellings if (w.lower() in TRUE) is truth])
                for truth in (True, False)
            )
            found.append(sentence("reading_truth", true=true, false=false))
        elif self.spellings:
            found.append(sentence("reading_spelling", words=quote_names(self.spellings)))
        if self.kind == "text":
            found.append(sentence(f"reading_text_{self.format}"))
        if self.unread:
            found.append(sentence("reading_unread", cell=self.unread))
        return tuple(found)
