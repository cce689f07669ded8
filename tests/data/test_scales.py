"""Words of a known scale become a number, in order; other words stay a category."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tikhon.data import TableOptions, load
from tikhon.data.encoding import encode_columns
from tikhon.data.reading import read_table
from tikhon.errors import DataError

SCALES = [
    ["Strongly disagree", "disagree", "Neutral", "agree", "strongly agree"],
    ["low", "Medium", "HIGH"],
    ["small", "medium", "large"],
    ["Never", "sometimes", "often"],
    ["none", "mild", "moderate", "severe"],
    ["非常不同意", "不同意", "同意"],
    ["低", "中", "高"],
]


def csv(folder: Path, words: list[str]) -> Path:
    rows = [words[i % len(words)] for i in range(60)]
    frame = pd.DataFrame({"x": rows, "z": np.arange(60) / 7, "y": np.arange(60) % 2})
    frame.to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


@pytest.mark.parametrize("words", SCALES, ids=lambda words: words[0])
def test_words_of_a_scale_are_numbers_in_its_order_and_said(tmp_path, words):
    path = csv(tmp_path, words)
    data = load(path, table=TableOptions("y"))
    values = data.x[: len(words), 0].tolist()
    assert values == sorted(set(values)) and data.table.columns[0].kind == "number"
    assert words[0] in " ".join(map(str, data.notices))
    np.testing.assert_array_equal(
        encode_columns(read_table(path), data.table.columns), data.x.numpy()
    )


@pytest.mark.parametrize("words", [["low", "green", "high"], ["low", "high"], ["a", "b", "c"]])
def test_other_words_stay_a_category(tmp_path, words):
    data = load(csv(tmp_path, words), table=TableOptions("y"))
    assert data.table.columns[0].kind == "category"


def test_a_scale_is_a_category_on_request_and_refuses_new_words(tmp_path):
    path = csv(tmp_path, ["low", "medium", "high"])
    data = load(path, table=TableOptions("y", categorical=("x",)))
    assert data.table.columns[0].kind == "category"
    data = load(path, table=TableOptions("y"))
    path.write_text("x,z\nlow,1.5\ngreen,2.5\n")
    with pytest.raises(DataError, match="green"):
        encode_columns(read_table(path), data.table.columns)
