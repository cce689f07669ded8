from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import translation  # noqa: E402

TRANSLATED = [
    ROOT / "docs" / "quickstart.md",
    ROOT / "docs" / "concepts.md",
    *(
        page
        for page in sorted((ROOT / "docs" / "tutorials").glob("*.md"))
        if not page.name.endswith(".zh-CN.md")
    ),
]
CHINESE_PAGES = [
    *(chinese for _, chinese in translation.pairs()),
    ROOT / "src" / "tikhon" / "languages" / "zh.json",
]
ENGLISH = "# a\n\ntop\n\n## One\n\n```sh\n## not a heading\n```\n\n## Two\n\ntext\n"
CHINESE = "# 甲\n\n顶\n\n## 一\n\n```sh\n## not a heading\n```\n\n## 二\n\n文字\n"


def test_the_readme_has_a_translation():
    assert (ROOT / "README.md", ROOT / "README.zh-CN.md") in translation.pairs()


@pytest.mark.parametrize("pair", translation.pairs(), ids=lambda pair: pair[1].name)
def test_translations_are_up_to_date(pair):
    english, chinese = (path.read_text("utf-8") for path in pair)
    assert translation.stale(english, chinese) == []


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_the_first_pages_and_tutorials_are_there_in_chinese_with_the_same_code(page):
    twin = page.with_suffix(".zh-CN.md").read_text("utf-8")
    fences = re.compile(r"```.*?```", re.DOTALL)
    assert fences.findall(twin) == fences.findall(page.read_text("utf-8"))
    assert "<!-- executed -->" not in twin  # the English page runs it


@pytest.mark.parametrize("page", CHINESE_PAGES, ids=lambda page: page.name)
def test_a_space_stands_between_chinese_and_latin_words(page):
    fences = re.compile(r"```.*?```", re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "x", fences.sub("", page.read_text("utf-8")))
    prose = re.sub(r"\{\w+\}", "、", prose)  # filled in with words of either kind
    touching = re.compile(r"[\u4e00-\u9fff]{1,6}[A-Za-z0-9]+|[A-Za-z0-9%]+[\u4e00-\u9fff]{1,6}")
    assert touching.findall(prose) == []


def test_update_records_what_was_translated():
    assert len(translation.stale(ENGLISH, CHINESE)) == 3
    recorded = translation.update(ENGLISH, CHINESE)
    assert translation.stale(ENGLISH, recorded) == []
    assert translation.update(ENGLISH, recorded) == recorded
    assert "## not a heading" in recorded


def test_a_changed_section_is_named():
    recorded = translation.update(ENGLISH, CHINESE)
    [line] = translation.stale(ENGLISH.replace("text", "new text"), recorded)
    assert line.startswith("'Two' (二)")
    [line] = translation.stale(ENGLISH + "\n## Three\n", recorded)
    assert line.startswith("4 sections in English, 3 in the translation")
    assert translation.stale(ENGLISH.replace("text", "text   "), recorded) == []
