"""The pictures of the README, made from a real run of `tikhon demo`, so that they cannot go stale.

    python docs/pictures.py [RUN]      # runs `tikhon demo` first if RUN (runs/demo) is not there

Writes docs/images/: the learning curves before and after, and the report's first screen, each for
light and dark pages. Needs Chromium.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402
from tikhon import report  # noqa: E402
from tikhon.report import charts  # noqa: E402
from tikhon.report.html import render  # noqa: E402
from tikhon.report.kinds import demo  # noqa: E402
from tikhon.report.page import Chart, Name, Page, Section, format_number, label  # noqa: E402
from tikhon.report.saved import SavedRun, read  # noqa: E402

IMAGES = ROOT / "docs" / "images"
DRAWN = "document.documentElement.dataset.charts !== undefined"
BARE = """
header, footer, .hero, h2, .numbers { display: none !important }
main, section, .blocks { padding: 0; margin: 0; max-width: none } body { background: var(--paper) }
"""
WIDE = "document.querySelector('.chart svg').clientWidth > 420"


def curves(run: SavedRun) -> Page:
    """The same network without regularization and with the chosen method, side by side."""
    methods = run.result["arms"]
    bare, best = demo.baseline(methods), demo.best_method(methods)
    assert bare is not None and best is not None
    blocks = []
    for method in (bare, best):
        records = demo.history(method)
        epochs, train, valid = (
            [r[key] for r in records] for key in ("epoch", "train/accuracy", "valid/accuracy")
        )
        figure = charts.learning_curves(
            epochs, train, valid, label("metric_accuracy"), higher=True, range=[0.4, 1.02]
        )
        name = demo.method_label(method)
        words = name.text("en") if not isinstance(name, Name) else name.text
        title = f"{words}: test accuracy {format_number(demo.test_accuracy(method))}"
        blocks.append(Chart(Name(title), figure, label("alt_arms")))
    return Page(
        Name("curves"), "plain", Name("curves"), sections=(Section(Name("c"), tuple(blocks)),)
    )


def shoot(page: Path, name: str, width: int, height: int, *, bare: bool = False) -> None:
    """One picture of a page in light and one in dark."""
    chromium = browser.Browser(browser.executable())
    try:
        for dark in (False, True):
            tab = browser.Tab(chromium)
            tab.size(width, height, dark=dark, scale=2)
            tab.open(page.as_uri(), ready=DRAWN)
            if bare:
                tab.run(
                    "document.head.appendChild(document.createElement('style'))"
                    f".textContent = {BARE!r}"
                )
                tab.run("window.dispatchEvent(new Event('resize'))")
                tab.wait(WIDE)
            IMAGES.mkdir(exist_ok=True)
            tab.screenshot(IMAGES / f"{name}{'-dark' if dark else ''}.png")
            tab.close()
    finally:
        chromium.close()


def main() -> None:
    """Make every picture."""
    run_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "demo"
    if not (run_dir / "result.json").exists():
        subprocess.run(["tikhon", "demo", "--output", str(run_dir)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "curves.html"
        page.write_text(render(curves(read(run_dir))), encoding="utf-8")
        shoot(page, "curves", 960, 372, bare=True)
        shoot(report.write(run_dir, output=Path(folder) / "report.html"), "report", 1200, 860)


if __name__ == "__main__":
    main()
