"""Turns a `Page` into one self-contained HTML document."""

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
from tikhon.report.charts import literal, short
from tikhon.report.page import (
    LANGUAGES,
    Block,
    Chart,
    Label,
    Name,
    Page,
    Section,
    check_language,
    say,
)

SCRIPTS = ("plotly-cartesian.min.js", "page.js")


def render(page: Page, language: str | None = None, *, served: Sequence[str] = ()) -> str:
    """The page as HTML: texts in both languages, charts as data, script and style inside.

    Without a `language` the page follows the browser's. The content security policy allows these
    scripts by their hash and no connection at all, so the page makes no network requests and a
    name that looks like markup stays a name. A server gives the addresses of script and style
    files in `served` instead, and sends the policy itself.
    """
    follows, language = language is None, check_language(language or "en")
    scripts = [] if served else [asset(name) for name in SCRIPTS]
    sections = tuple(replace(s, blocks=tuple(arranged(s))) for s in page.sections)
    page = replace(page, sections=sections)
    charts = [block for s in sections for block in s.blocks if isinstance(block, Chart)]
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
            charts=Markup(script_json({c: resolved(chart) for c, chart in enumerate(charts)})),
            titles={name: plain(page.title, name) for name in LANGUAGES},
            numbers={id(chart): i for i, chart in enumerate(charts)},
            say=say,
            version=tikhon.__version__,
        )
    )


@cache
def asset(name: str) -> str:
    """One of the files that every page carries."""
    return (files("tikhon.report") / "static" / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Jinja2 with escaping on, and the page's own filters."""
    loader = PackageLoader("tikhon.report", "static")
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"both": both, "plain": plain, "anchor": anchor, "shape": shape}
    made.filters |= {"short": lambda text: short(text, 400), "address": id}
    made.filters |= {"unbroken": unbroken}
    return made


def policy(scripts: list[str]) -> str:
    """The content security policy: nothing from outside, no script but ours."""
    hashes = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def digest(script: str) -> str:
    """SHA-256 of a script as a policy wants it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def both(text: Label | Name | str) -> Markup:
    """A text in every language, of which the style shows one; a name once, isolated."""
    if isinstance(text, Name):
        return Markup("<bdi>{}</bdi>").format(short(str(text), text.width))
    if isinstance(text, str):
        return Markup.escape(text)
    texts = {name: text.text(name) for name in LANGUAGES}
    if len(set(texts.values())) == 1:
        return unbroken(texts["en"])
    spans = (
        Markup('<span class="{}" lang="{}">{}</span>').format(
            name, LANGUAGES[name], unbroken(words)
        )
        for name, words in texts.items()
    )
    return Markup("").join(spans)


def unbroken(words: str) -> Markup:
    """A text whose options (`--budget`) stay on one line."""
    parts = re.split(r"(?<![\w-])(--[a-z][\w-]*)", words)
    return Markup("").join(
        Markup('<span class="option">{}</span>').format(part) if i % 2 else Markup.escape(part)
        for i, part in enumerate(parts)
    )


def plain(text: Label | Name | str, language: str) -> str:
    """A text in one language, for an attribute."""
    return text.text(language) if isinstance(text, Label) else str(text)


def shape(cell: object) -> str:
    """What kind of table cell this is: name, label, mark or number."""
    return "number" if isinstance(cell, str) else type(cell).__name__.lower()


def anchor(section: Section) -> str:
    """The fragment of a section's heading."""
    words = plain(section.title, "en").lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())[:40]


def arranged(section: Section) -> list[Block]:
    """The blocks in rows of two: a chart that would stand alone in its row takes all of it."""
    blocks, row = list(section.blocks), 0
    for i, block in enumerate(blocks):
        if not _narrow(block):
            row = 0
            continue
        if row % 2 == 0 and not any(map(_narrow, blocks[i + 1 : i + 2])):
            blocks[i] = replace(block, wide=True)
        row += 1
    return blocks


def _narrow(block: Block) -> TypeGuard[Chart]:
    return isinstance(block, Chart) and not block.wide


def resolved(chart: Chart) -> dict[str, object]:
    """A figure as JSON data: labels in every language, numbers without NaN."""
    return {"title": jsonable(chart.title), **jsonable(chart.figure)}


def jsonable(value: object) -> Any:
    """Plain JSON: labels become one text a language, what is not finite becomes null."""
    if isinstance(value, Label):
        return {name: marked_up(value, name) for name in LANGUAGES}
    if isinstance(value, Name):
        return literal(str(value))
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def marked_up(label: Label, language: str) -> str:
    """A label for plotly, which reads markup: the values filled in are literal."""
    values = {
        name: value if isinstance(value, Label) else literal(str(value))
        for name, value in label.values.items()
    }
    return Label(label.key, values).text(language)


def script_json(value: object) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
