"""Rows that stand in two parts of a split."""

from pathlib import Path

import numpy as np
import pandas as pd

from tikhon.data import load, split
from tikhon.data.table import TableOptions


def said_of(folder: Path, frame: pd.DataFrame) -> str:
    frame.to_csv(folder / "t.csv", index=False)
    notices = split(load(str(folder / "t.csv"), table=TableOptions("y"))).train.notices
    return " ".join(notices)


def test_a_table_of_few_rows_written_many_times_is_told_of(tmp_path: Path):
    """The distinct rows are few, yet many more are possible: they are copies, not chance."""
    rng = np.random.default_rng(0)
    y = ["yes", "no"] * 25
    rows = pd.DataFrame({"a": rng.normal(size=50), "b": rng.normal(size=50), "y": y})
    said = said_of(tmp_path, pd.concat([rows] * 5))
    assert "validation rows are also in the training rows" in said
    switches = pd.DataFrame({"a": rng.integers(0, 3, 250), "b": rng.integers(0, 3, 250)})
    said = said_of(tmp_path, switches.assign(y=y * 5))
    assert "are also in the training rows" not in said
