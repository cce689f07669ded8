from __future__ import annotations

import json
import shutil

import pytest

from sample_runs import fit_run
from tikhon import report

pytestmark = pytest.mark.browser
KINDS = ["fitted", "demoed", "tuned", "pathed", "diagnosed", "cured", "compared", "hostile"]
DRAWN = "document.documentElement.dataset.charts !== undefined"


def opened(tab, run, folder, **options):
    page = report.write(run, output=folder / "page.html", **options)
    tab.open(page.as_uri(), ready=DRAWN)
    return page


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_quiet_and_alone(tab, kind, tmp_path, request):
    page = opened(tab, request.getfixturevalue(kind), tmp_path)
    assert tab.complaints == []
    assert tab.requests == [page.as_uri()]
    places = tab.run("document.querySelectorAll('.chart').length")
    assert places > 0
    assert tab.run("document.querySelectorAll('.chart svg.main-svg').length") >= places


def test_hostile_names_are_shown_not_run(tab, hostile, tmp_path):
    opened(tab, hostile, tmp_path)
    assert tab.run("document.querySelectorAll('img, svg a').length") == 0
    assert tab.run("document.body.innerText.includes('<img src=x onerror=alert(1)>0.weight')")
    assert tab.run("document.body.innerHTML.includes('<script>alert(2)')") is False


def test_language_switch(tab, demoed, tmp_path):
    opened(tab, demoed, tmp_path)
    heading = "document.querySelector('h2').innerText"
    assert tab.run(heading) == "Verdict"
    tab.click("[data-switch=zh]")
    tab.wait("[...document.querySelectorAll('.chart')].every(c => c.dataset.drawn === 'zh')")
    assert tab.run(heading) == "结论"
    assert "轮次" in tab.run("[...document.querySelectorAll('.xtitle')].map(e => e.textContent)")
    assert tab.run("document.documentElement.lang") == "zh-CN"
    assert "过拟合" in tab.run("document.title")
    assert tab.run("document.querySelector('.chart').ariaLabel").startswith("每种方法")
    assert tab.complaints == []


def test_numbers_behind_a_chart(tab, fitted, tmp_path):
    opened(tab, fitted, tmp_path)
    tab.click("details.numbers summary")
    tab.wait("document.querySelectorAll('details.numbers table tbody tr').length === 40")
    head = "[...document.querySelectorAll('details.numbers thead th')].map(e => e.textContent)"
    assert tab.run(head) == ["Epoch", "Valid", "Train"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_contrast_and_width(tab, demoed, tmp_path, width, dark):
    tab.size(width, dark=dark)
    opened(tab, demoed, tmp_path)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run(LOW_CONTRAST) == []
    names = "[...document.querySelectorAll('.chart, .scroll[role]')].every(e => e.ariaLabel)"
    assert tab.run(names)


def test_charts_fit_the_sheet_from_any_window(tab, demoed, tmp_path):
    """A sheet is narrower than the window that the charts were drawn in, and tells no script."""
    tab.size(1400)
    opened(tab, demoed, tmp_path)
    tab.call("Emulation.setEmulatedMedia", media="print")
    tab.run("document.querySelector('main').style.width = '690px'")
    overflowing = """[...document.querySelectorAll('.chart')].filter(chart => {
        const held = chart.closest('figure').getBoundingClientRect();
        return [...chart.querySelectorAll('svg.main-svg')].some(svg => {
          const box = svg.getBoundingClientRect();
          return box.width > held.width || box.bottom > held.bottom + 1;
        });
      }).length"""
    assert tab.run(overflowing) == 0
    assert len(tab.call("Page.printToPDF", printBackground=True)["data"]) > 20_000


def test_the_language_is_the_browsers(tab, fitted, tmp_path):
    chinese = "Object.defineProperty(navigator, 'language', {get: () => 'zh-CN'})"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=chinese)
    opened(tab, fitted, tmp_path)
    assert tab.run("document.documentElement.lang") == "zh-CN"
    opened(tab, fitted, tmp_path, language="en")
    assert tab.run("document.documentElement.lang") == "en"


def test_without_scripts_the_tables_remain(tab, fitted, tmp_path):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    page = report.write(fitted, output=tmp_path / "page.html")
    tab.call("Page.navigate", url=page.as_uri())
    tab.wait(
        "document.readyState === 'complete' && document.querySelectorAll('table').length >= 3"
    )
    assert "JavaScript" in tab.run("document.querySelector('noscript').innerText")


def test_a_run_that_diverged(tab, tmp_path):
    run = fit_run(tmp_path / "diverged", epochs=3)
    history = (run / "history.jsonl").read_text().splitlines()
    broken = '{"epoch": 4, "train/loss": null, "valid/loss": null, "train/accuracy": null}\n{"epo'
    (run / "history.jsonl").write_text("\n".join([*history, broken]))
    opened(tab, run, tmp_path)
    assert tab.complaints == []
    assert "The training diverged" in tab.run("document.body.innerText")


# Every text whose contrast with the painted background is under WCAG's 4.5:1 (3:1 if large).
LOW_CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255];
  };
  const found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.textContent.trim() || !e.offsetParent && !e.closest('svg') || e.closest('script, .skip')) continue;
    const svg = e.closest('svg');
    const [a, b] = [light(rgba(svg ? style.fill : style.color)), light(ground(svg ? svg.parentElement : e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.add(node.textContent.trim().slice(0, 30) + ' ' + ratio.toFixed(2));
  }
  return [...found];
})()
"""  # noqa: E501


@pytest.mark.parametrize("kind", ["compared", "tuned", "diagnosed"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_widest_tables_fit_a_window_of_900(tab, kind, language, tmp_path, request):
    """Nine columns, with names and numbers as wide as a real comparison has them."""
    run = request.getfixturevalue(kind)
    if kind == "compared":
        result = json.loads((run / "result.json").read_text())
        for row in result["methods"]:
            row |= {"method": "label_smoothing", "size": 0.775, "zeros": 0.00156, "seed_std": 0.1}
            row |= {"low": 0.9, "high": 0.95} if result["metric"] == "accuracy" else {}
        run = copied(run, tmp_path / "wide", result)
    tab.size(900)
    opened(tab, run, tmp_path, language=language)
    held = "[...document.querySelectorAll('.scroll')]"
    wider = f"{held}.filter(e => e.scrollWidth > e.clientWidth + 1 && !e.closest('details'))"
    assert tab.run(f"{wider}.map(e => e.innerText.slice(0, 60))") == []
    tab.size(390)  # on a phone, tables with sentences have no columns
    prose = f"{wider}.filter(e => e.matches('.prose'))"
    assert tab.run(f"{prose}.map(e => e.innerText.slice(0, 60))") == []


def copied(run, folder, result):
    """The run in another folder with another result, not sealed."""
    shutil.copytree(run, folder)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def test_a_curve_of_one_value_does_not_reach_beyond_what_a_share_can_be(tab, fitted, tmp_path):
    """plotly draws an accuracy that stays at 0.99 on an axis from 0 to 2."""
    run = shutil.copytree(fitted, tmp_path / "flat")
    rows = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    flat = [row | {"train/accuracy": 0.97, "valid/accuracy": 0.97} for row in rows]
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    (run / "manifest.json").unlink(missing_ok=True)
    opened(tab, run, tmp_path)
    ticks = tab.run("[...document.querySelectorAll('.chart')[0].querySelectorAll('.ytick')]"
                    ".map(e => Number(e.textContent))")  # fmt: skip
    assert ticks and all(0.9 < tick <= 1 for tick in ticks)
