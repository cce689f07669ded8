"""A report page as plain values, independent of HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar, cast

from tikhon.errors import InputError, unknown_name
from tikhon.languages import fill, strings
from tikhon.numbers import format_number as format_number
from tikhon.runs.documents import SavedSentence

Part = TypeVar("Part")
LANGUAGES = {"en": "en", "zh": "zh-CN"}  # our name -> `lang` in HTML
Level = Literal["good", "watch", "bad", "plain"]


def check_language(language: str) -> str:
    """Normalise to one of `LANGUAGES` ("zh-CN" counts as "zh"); raise `InputError` otherwise."""
    short = str(language).replace("_", "-").split("-")[0].lower()
    if short not in LANGUAGES:
        raise InputError(unknown_name("language", language, LANGUAGES))
    return short


@dataclass(frozen=True)
class Label:
    """A translatable text: a key and the values to fill in."""

    key: str
    values: Mapping[str, object] = field(default_factory=dict)

    def text(self, language: str) -> str:
        """Return the text in one language; values may be `Label`s too."""
        values = {
            name: value.text(language) if isinstance(value, Label) else value
            for name, value in self.values.items()
        }
        return fill(language, self.key, values)


def label(key: str, **values: object) -> Label:
    """Return the `Label` of a key; raise `KeyError` if a language lacks it."""
    for language in LANGUAGES:
        strings(language)[key]
    return Label(key, values)


def saved_label(saved: SavedSentence) -> Label:
    """Return the `Label` of a stored sentence."""
    values = saved["values"].items()
    return label(
        saved["key"], **{k: saved_label(v) if isinstance(v, dict) else v for k, v in values}
    )


def saved_text(saved: object) -> Label | Name:
    """Return a stored sentence; older runs store only its text."""
    if not isinstance(saved, Mapping):
        return Name(str(saved), 400)
    return (
        saved_label(cast("SavedSentence", saved))
        if "key" in saved
        else Name(str(saved["text"]), 400)
    )


def joined(parts: Sequence[Part]) -> Part | Label | None:
    """Join texts in order; None for an empty sequence."""
    found: Part | Label | None = None
    for part in reversed(parts):
        found = part if found is None else label("evidence_and", first=part, rest=found)
    return found


@dataclass(frozen=True)
class Name:
    """A text from the data (a column, a layer), never translated.

    Texts longer than `width` are cut.
    """

    text: str
    width: int = 80

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Mark:
    """A verdict in a table cell: an icon with its meaning in words."""

    level: Level
    label: Label


Cell = str | Name | Label | Mark  # str is a formatted number


@dataclass(frozen=True)
class PageTable:
    """Rows under a head; the first column names the row. `chosen` is tagged with `tag`.

    `note` explains words in the cells.
    """

    caption: Label
    head: tuple[Label | Name, ...]
    rows: tuple[tuple[Cell, ...], ...]
    chosen: int | None = None
    tag: str = "chosen"
    note: Label | None = None
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chart:
    """A plotly figure as plain data; texts may be `Label`s, colours are palette names.

    `alt` describes it for readers who cannot see it.
    """

    title: Label | Name
    figure: dict[str, object]
    alt: Label
    note: Label | None = None
    wide: bool = False
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    body: Label | Name
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class CodeBlock:
    """Lines to copy: shell commands or Python code."""

    lines: tuple[str, ...]
    title: Label | None = None
    kind: ClassVar[str] = "code"


Block = PageTable | Chart | Text | CodeBlock


@dataclass(frozen=True)
class Section:
    """A heading with blocks; `lead` says in one sentence what to look for."""

    title: Label | Name
    blocks: tuple[Block, ...]
    lead: Label | None = None


@dataclass(frozen=True)
class Fact:
    """A main figure at the top of the page."""

    label: Label
    value: str
    note: Label | None = None
    level: Level = "plain"


@dataclass(frozen=True)
class Page:
    """A whole report: the verdict, then the sections that support it.

    `remarks` are sentences after the verdict, `next_commands` what to run next. The terminal
    prints these and the tables of the first section from the same value.
    """

    title: Label | Name
    level: Level
    verdict: Label | Name
    remarks: tuple[Label | Name, ...] = ()
    next_commands: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    about: tuple[tuple[Label, Label | str], ...] = ()  # details: data, model, seed, versions
    sections: tuple[Section, ...] = ()
    running: bool = False  # shows the time since the run last wrote

    @property
    def sentences(self) -> tuple[Label | Name, ...]:
        """The verdict and the remarks."""
        return (self.verdict, *self.remarks)


def strength(value: object) -> str:
    """Format a strength compactly.

    >>> strength(0.001), strength(0.3), strength(0.0)
    ('0.001', '0.3', '0')
    """
    finite = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.3g}" if finite else "–"


def percent(value: object) -> str:
    """Format a fraction as a percentage.

    >>> percent(0.694), percent(0.0), percent(0.0004), percent(0.9999), percent(None)
    ('69.4%', '0%', '<0.1%', '>99.9%', '–')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if 0 < value < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= value < 1 else f"{100 * value:.3g}%"


def seconds(value: object) -> str:
    """Format a duration.

    >>> seconds(0.42), seconds(75), seconds(3725)
    ('0.42 s', '1 min 15 s', '1 h 2 min')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
