"""What the terminal shows: tables that are never cut, warnings as one line."""

from __future__ import annotations

import warnings

import pytest

from tikhon.cli.streams import one_line_warnings
from tikhon.cli.terminal import Terminal

HEADS = ["Method", "Verdict", "Test", "95% interval", "Train minus test", "Exact zeros",
         "Size left", "Seed spread", "Time"]  # fmt: skip
ROWS = [["label_smoothing", "tied", "0.863", "0.808–0.918", "0.130", "68.3%", "56.8%", "0.005",
         "0.957 s"],
        ["l2", "first", "0.861", "0.813–0.909", "-0.118", "0%", "100%", "0.003",
         "1.59 s"]]  # fmt: skip


def test_no_cell_of_a_wide_table_is_cut(capsys, monkeypatch):
    for columns in (120, 80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        Terminal().table(HEADS, ROWS)
        out = capsys.readouterr().out
        assert "…" not in out
        if columns >= 80:
            assert all(cell in out for row in ROWS for cell in row)
            assert max(map(len, out.splitlines())) <= columns
    monkeypatch.setenv("COLUMNS", "80")
    Terminal().table(["Feature", "Comes in at strength"], [["a", "0.1"]])
    assert "Comes in at strength" in capsys.readouterr().out  # there is room for the whole head


@pytest.mark.parametrize("columns", [40, 80])
def test_a_table_wider_than_any_window_keeps_every_cell(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [[f"method {i}", *(f"{i}.{k:03}" for k in range(24))] for i in range(2)]
    Terminal().table(["Method", *(f"number {k}" for k in range(24))], rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-2:]] == [" ".join(row).split() for row in rows]
    Terminal().table(HEADS[:3], [["Validation", *ROWS[0][1:3]]])
    assert "Validation" in capsys.readouterr().out


def test_a_warning_is_one_line_once(capsys):
    with warnings.catch_warnings(), one_line_warnings():
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("valid is small", stacklevel=1)
    assert capsys.readouterr().err == "warning: valid is small\n"
