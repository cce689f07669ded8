"""One word for one thing: what `docs/words.md` says not to write stands nowhere else."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = ROOT / "docs" / "words.md"
# Words that are right where they mean another thing, so that only a reader can tell.
AMBIGUOUS = {
    "p", "alpha", "group", "run", "candidate", "metric", "trace", "symptom", "issue", "fix",
    "baseline", "config", "experiment", "bracket", "blocks", "reg",
}  # fmt: skip
# A page where the word is another thing, or the title of what is cited.
ALLOWED = {("regularizer", "article.md"), ("regularizer", "article_faq.md")}


def banned() -> list[str]:
    """The last column of every table, without what is in brackets."""
    rows = [line.split("|")[1:-1] for line in WORDS.read_text("utf-8").splitlines() if "|" in line]
    found = [
        word.strip()
        for row in rows
        if row[-1].strip() != "not" and not set(row[0]) <= set("- ")
        for word in re.sub(r"\([^)]*\)", "", row[-1]).split(",")
    ]
    return [word for word in found if word not in AMBIGUOUS]


def pages() -> Iterator[tuple[str, str]]:
    """Name and prose of README, docs, the texts of the report, and what the shell prints."""
    code = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
    docs = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")]
    for path in (ROOT / "README.md", *docs):
        if path != WORDS and not path.name.endswith(".zh-CN.md") and path.stem != "changelog":
            yield path.name, code.sub("", path.read_text("utf-8"))
    source = ROOT / "src" / "tikhon"
    texts = json.loads((source / "languages" / "en.json").read_text("utf-8"))
    yield "en.json", re.sub(r"\{\w+\}", "", "\n".join(texts.values()))
    for path in (source / "options.py", *(source / "cli").glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        constants = [n.value for n in nodes if isinstance(n, ast.Constant)]
        yield path.name, "\n".join(c for c in constants if isinstance(c, str) and " " in c)


@pytest.mark.parametrize("word", banned())
def test_no_other_word_is_used(word):
    cased = re.NOFLAG if word.isupper() else re.IGNORECASE
    whole = re.compile(rf"\b{re.escape(word)}(?!\w)", cased)
    found = [
        f"{name}: {text[max(0, match.start() - 40) : match.end() + 20]!r}"
        for name, text in pages()
        if (word, name) not in ALLOWED
        for match in whole.finditer(text)
    ]
    assert found == []


def test_the_tables_are_read():
    assert {"shrinkage", "hard penalty", "arm", "ended by epochs"} <= set(banned())
    assert len(list(pages())) > 40
