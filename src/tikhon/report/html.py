"""Render a `Page` as one self-contained HTML document."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeGuard

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import tikhon
from tikhon.report.charts import escape_name, short
from tikhon.report.page import (
    LANGUAGES,
    Block,
    Chart,
    Label,
    Name,
    Page,
    PageTable,
    Section,
    check_language,
    label,
)

SCRIPTS = ("plotly-cartesian.min.js", "page.js")


def render(page: Page, language: str | None = None, *, served: Sequence[str] = ()) -> str:
    """Render the page as HTML, with texts in both languages, chart data, scripts and style inline.

    Without a `language` the page uses that of the browser. The content security policy allows its
    scripts by hash and no connections, so that it makes no network requests and cannot run markup
    in names. A server passes script and style addresses in `served`, and sends its own policy.
    """
    follows, language = language is None, check_language(language or "en")
    scripts = [] if served else [asset(name) for name in SCRIPTS]
    sections = tuple(replace(s, blocks=tuple(arrange_blocks(s))) for s in page.sections)
    page = replace(page, sections=sections)
    charts = [block for s in sections for block in s.blocks if isinstance(block, Chart)]
    figures = {i: {"title": c.title, **c.figure} for i, c in enumerate(charts)}
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            page=page,
            language=language,
            follows=follows,
            languages=LANGUAGES,
            policy=policy(scripts),
            style="" if served else Markup(asset("page.css")),
            served=served,
            scripts=[Markup(script) for script in scripts],
            charts=Markup(script_json(to_json(figures))),
            titles={name: plain(page.title, name) for name in LANGUAGES},
            numbers={id(chart): i for i, chart in enumerate(charts)},
            label=label,
            version=tikhon.__version__,
        )
    )


@cache
def asset(name: str) -> str:
    """Return the content of a file embedded in every page."""
    return (files("tikhon.report") / "static" / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Return the Jinja2 environment, with escaping and the page's filters."""
    loader = PackageLoader("tikhon.report", "static")
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (in_every_language, plain, anchor, cell_class, has_prose, keep_options_whole)
    made.filters |= {function.__name__: function for function in filters}
    made.filters |= {"short": lambda text: short(text, 400), "address": id}
    return made


def policy(scripts: list[str]) -> str:
    """Return the content security policy: own scripts only, nothing external."""
    hashes = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def digest(script: str) -> str:
    """Return the SHA-256 of a script, in base64 for the policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def in_every_language(text: Label | Name | str) -> Markup:
    """Render a text in every language (CSS shows one), and a name once, isolated."""
    if isinstance(text, Name):
        return Markup("<bdi>{}</bdi>").format(short(str(text), text.width))
    if isinstance(text, str):
        return Markup.escape(text)
    texts = {name: text.text(name) for name in LANGUAGES}
    if len(set(texts.values())) == 1:
        return keep_options_whole(texts["en"])
    spans = (
        Markup('<span class="{}" lang="{}">{}</span>').format(
            name, LANGUAGES[name], keep_options_whole(words)
        )
        for name, words in texts.items()
    )
    return Markup("").join(spans)


def keep_options_whole(words: str) -> Markup:
    """Keep options (`--budget`) on one line."""
    parts = re.split(r"(?<![\w-])(--[a-z][\w-]*)", words)
    return Markup("").join(
        Markup('<span class="option">{}</span>').format(part) if i % 2 else Markup.escape(part)
        for i, part in enumerate(parts)
    )


def plain(text: Label | Name | str, language: str) -> str:
    """Return a text in one language, for an attribute."""
    return text.text(language) if isinstance(text, Label) else str(text)


def cell_class(cell: object) -> str:
    """Return the CSS class of a table cell: name, label, mark or number."""
    return "number" if isinstance(cell, str) else type(cell).__name__.lower()


def has_prose(table: PageTable) -> bool:
    """Return whether cells beside the first column hold sentences or names, which need room."""
    return any(isinstance(cell, Label | Name) for row in table.rows[:1] for cell in row[1:])


def anchor(section: Section) -> str:
    """Return the fragment identifier of a section."""
    words = plain(section.title, "en").lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())[:40]


def arrange_blocks(section: Section) -> list[Block]:
    """Arrange blocks in rows of two; a chart alone in its row gets the full width."""
    blocks, row = list(section.blocks), 0
    for i, block in enumerate(blocks):
        if not _is_half_width(block):
            row = 0
            continue
        if row % 2 == 0 and not any(map(_is_half_width, blocks[i + 1 : i + 2])):
            blocks[i] = replace(block, wide=True)
        row += 1
    return blocks


def _is_half_width(block: Block) -> TypeGuard[Chart]:
    return isinstance(block, Chart) and not block.wide


def to_json(value: object) -> Any:
    """Convert to plain JSON: labels to a text for each language, non-finite numbers to null."""
    if isinstance(value, Label):
        return {name: escape_label(value, name) for name in LANGUAGES}
    if isinstance(value, Name):
        return escape_name(str(value))
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def escape_label(label: Label, language: str) -> str:
    """Format a label for plotly, escaping markup in its values."""
    values = {
        name: value if isinstance(value, Label) else escape_name(str(value))
        for name, value in label.values.items()
    }
    return Label(label.key, values).text(language)


def script_json(value: object) -> str:
    """Dump JSON that is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
