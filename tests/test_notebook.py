"""What a notebook shows of every value: short in text, one screen of safe HTML with its chart."""

import re
import xml.etree.ElementTree as ET

import pytest

import results
import tikhon as tk
from tikhon import notebook
from tikhon.comparison.compare import Comparison

EVIL = "<img src=x onerror=alert(1)>"


def comparison():
    row = {"test": 0.9, "low": 0.8, "high": 0.95, "tied": True, "behind": (0, -0.1, 0.1)}
    rows = ({"method": "none", **row}, {"method": EVIL, **row})
    return Comparison("digits", "accuracy", rows, 1, 3, 5, 1.0)


VALUES = {
    "run": results.run,
    "recipe": lambda: tk.Recipe({"*": tk.L1(1e-3)}, dropout=0.5),
    "audit": results.audit,
    "regularizer": results.regularizer,
    "trace": lambda: results.regularizer().trace()[0],
    "path": lambda: results.path(strengths=20, feature_names=(EVIL, *"bcd")),
    "tune": results.tune,
    "comparison": comparison,
}
CHARTS = ("run", "path", "tune")


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_one_screen(name):
    value = VALUES[name]()
    text, shown = repr(value), value._repr_html_()
    assert len(text) < 400 and text.count("\n") < 4
    ET.fromstring(shown)  # well formed, so that nothing of it is a stray tag
    assert "<img" not in shown and "<script" not in shown
    assert shown.count("<tr>") <= 14 and len(shown) < 30_000
    assert ("<polyline" in shown) == (name in CHARTS)
    assert "nan" not in re.sub(r"<[^>]*>", " ", shown).split()


def test_a_long_table_says_what_it_leaves_out():
    shown = notebook.html_card("t", (), ("n",), [(k,) for k in range(100)])
    assert "and 88 more rows" in shown


def test_a_chart_needs_two_points_and_leaves_out_what_is_not_finite():
    assert notebook.svg_lines({"a": ([1.0], [2.0])}, "x", "y") == ""
    shown = notebook.svg_lines(
        {EVIL: ([1.0, 2.0, 3.0, 4.0], [1.0, None, float("nan"), 2.0])}, "x", "y"
    )
    assert len(re.findall(r"points=\"([^\"]*)\"", shown)[0].split()) == 2
    assert "<img" not in shown
    ET.fromstring(shown)
    assert "0.01" in notebook.svg_lines(
        {"a": ([0.0, 0.01, 1.0], [1.0, 2.0, 3.0])}, "x", "y", log=True
    )
