"""What the documentation shows is run: docstring examples, README, marked blocks of the pages."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import tikhon

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import executed  # noqa: E402

SKIPPED = ("tikhon.integrations.",)  # each needs a framework; tests/integrations runs them
BLOCK = re.compile(r"(<!--[^>]*-->\n)?```python\n(.*?)```", re.DOTALL)


def modules() -> list[str]:
    found = pkgutil.walk_packages(tikhon.__path__, "tikhon.", onerror=lambda name: None)
    return ["tikhon", *(m.name for m in found if not m.name.startswith(SKIPPED))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import torch

    module = importlib.import_module(name)
    shown = {"torch": torch, "nn": torch.nn, "tk": tikhon}  # what every example may use
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    report = io.StringIO()
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=shown):
        torch.manual_seed(0)
        runner.run(test, out=report.write)
    assert runner.failures == 0, report.getvalue()


def pages() -> list[Path]:
    names = sorted(ROOT.glob("README*.md")) + sorted((ROOT / "docs").glob("**/*.md"))
    return [p for p in names if "_build" not in p.parts and "api" not in p.parts]


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page that are to run: all of a README, marked ones elsewhere."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    if page.parent == ROOT:
        return [code for mark, code in found if "not executed" not in mark]
    return [code for mark, code in found if mark.strip() == "<!-- executed -->"]


def repeats(page: Path) -> bool:
    """Whether it is a translation whose code, apart from comments, is that of the original."""
    first = page.with_name(page.name.replace(".zh-CN", ""))
    if first == page:
        return False
    ours, theirs = ([ast.dump(ast.parse(code)) for code in blocks(p)] for p in (page, first))
    return ours == theirs


OTHERS = [  # than those that test_executed runs
    p for p in pages() if blocks(p) and p not in executed.PAGES and not repeats(p)
]


@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), namespace)


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    built = ("api/",)
    missing = [
        t for t in local if not t.startswith(built) and not (page.parent / t).resolve().exists()
    ]
    assert missing == []


def test_contributing_names_the_smallest_penalty():
    """The page that shows its source would build with an empty block if it moved."""
    from tikhon.penalties import L1

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    home = Path(importlib.import_module(L1.__module__).__file__ or "").relative_to(ROOT)
    assert f"`L1` in `{home}`" in text
    page = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    assert f"```{{literalinclude}} ../{home}\n:pyobject: L1\n```" in page
    assert text.count("<!-- penalty -->") == text.count("<!-- penalty-end -->") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the extensions of sphinx about each other
def test_documentation_builds_without_a_warning(tmp_path):
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="sphinx is in the extra `docs`")
    assert sphinx.main(["-q", "-W", "-b", "html", str(ROOT / "docs"), str(tmp_path)]) == 0
