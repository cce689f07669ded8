"""What the tutorials show is what their code gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import executed  # noqa: E402

PAGE = """# A page

<!-- executed: A line -->
```python
x = 1.5
print("x is", x)
```

text

<!-- executed -->
```console
$ tikhon --version
old output
```
"""


# long, and beside a guide of the same calls: quickstart, regularize, sparsity, hypergradient
LONG = (
    *("1_overfit_and_cure.md", "4_genes.md", "5_fine_tuning.md", "6_sparse_to_small.md"),
    "7_strength_without_grid.md",
)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in LONG else ())
        for page in executed.PAGES
    ],
)
def test_a_page_shows_what_its_code_gives(page: Path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    given = executed.run(page)
    for shown in filter(Path.exists, (page, executed.twin(page))):
        text = shown.read_text("utf-8")
        assert executed.masked(text) == executed.masked(executed.written(text, given))
    pictures = [one.picture for one in given.values() if one.picture]
    assert all((page.parent / picture).is_file() for picture in pictures)


def test_what_code_gives_is_written_below_it_once():
    given = {
        'x = 1.5\nprint("x is", x)\n': executed.Given(
            'x = 1.5\nprint("x is", x)\n', "x is 1.5\n", "images/a.svg"
        ),
        "$ tikhon --version\n": executed.Given("$ tikhon --version\ntikhon 1.0\n"),
    }
    text = executed.written(PAGE, given)
    assert "```\n\n<!-- printed -->\n```text\nx is 1.5\n```\n\n<!-- drawn -->\n![A line](" in text
    assert "$ tikhon --version\ntikhon 1.0\n```" in text and "old output" not in text
    assert executed.written(text, given) == text
    assert executed.masked(text) == executed.masked(
        text.replace("1.5", "2.25").replace("1.0", "3")
    )
    assert executed.masked(text) == executed.masked(text.replace("tikhon 1.0", "of a training"))
    assert executed.masked(text) != executed.masked(text.replace("x is", "x was"))
