from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import translation  # noqa: E402

ENGLISH = "# a\n\ntop\n\n## One\n\n```sh\n## not a heading\n```\n\n## Two\n\ntext\n"
CHINESE = "# 甲\n\n顶\n\n## 一\n\n```sh\n## not a heading\n```\n\n## 二\n\n文字\n"


def test_the_readme_has_a_translation():
    assert (ROOT / "README.md", ROOT / "README.zh-CN.md") in translation.pairs()


@pytest.mark.parametrize("pair", translation.pairs(), ids=lambda pair: pair[1].name)
def test_translations_are_up_to_date(pair):
    english, chinese = (path.read_text("utf-8") for path in pair)
    assert translation.stale(english, chinese) == []


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
