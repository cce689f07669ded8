"""The tables of docs/penalties.md say what the classes say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tikhon import penalties

PAGE = (Path(__file__).parents[2] / "docs/penalties.md").read_text(encoding="utf-8")
TABLE = {
    cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
    for cells in (line.strip("|").split(" | ") for line in PAGE.splitlines())
    if re.fullmatch(r"`\w+` ?", cells[0].strip("| ") + " ")
}
CLASSES = [
    getattr(penalties, name)
    for name in penalties.__all__
    if isinstance(getattr(penalties, name), type)
    and name not in ("Penalty", "Proximable", "Constraint")
]


@pytest.mark.parametrize("penalty", CLASSES, ids=lambda penalty: penalty.__name__)
def test_the_table_is_true(penalty):
    cells = TABLE[f"{penalty.__name__}"]
    yes = {True: "yes", False: "no"}
    assert cells[1] == yes[penalty.convex]
    assert cells[-1] == penalty.rows
    if not penalty.constraint:
        assert cells[2] == yes[penalty.smooth]
    if issubclass(penalty, penalties.Proximable):
        assert (cells[-2] != "refused") == penalty.diagonal
    else:
        assert cells[-2] == "gradient only"


def test_every_penalty_names_its_reference():
    for penalty in CLASSES:
        assert re.search(r"Reference: .* \(\d{4}\)", penalty.__doc__ or "", re.S), penalty
