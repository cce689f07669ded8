"""What a run keeps of the table it was made on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tikhon.data import split
from tikhon.data.description import describe_table
from tikhon.data.sources import load
from tikhon.data.table import TableOptions
from tikhon.languages import sentence


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = 200
    frame = pd.DataFrame({
        "age": rng.integers(18, 80, rows).astype(float), "plan": rng.choice(["a", "b"], rows),
        "since": pd.date_range("2020-01-01", periods=rows).strftime("%Y-%m-%d"),
        "dose": np.where(np.arange(rows) % 10, rng.normal(size=rows).round(3).astype(str), "<0.5"),
        "vip": rng.choice(["yes", "no"], rows), "country": "NL",
        "y": np.where(np.arange(rows) % 4, "no", "yes"),
    })  # fmt: skip
    frame.loc[::8, "age"] = np.nan
    return frame


def described(frame: pd.DataFrame, folder: Path) -> dict:
    frame.to_csv(folder / "t.csv", index=False)
    source = load(folder / "t.csv", table=TableOptions("y"))
    parts = split(source)
    found = describe_table(source, parts)
    assert parts.preprocessing is not None
    inputs = [i for places in parts.preprocessing.inputs for i in places]
    assert sorted(inputs) == list(range(parts.train.x.shape[1]))  # each of one column
    return json.loads(json.dumps(found))


def test_columns_targets_and_what_was_left_out(frame, tmp_path):
    found = described(frame, tmp_path)
    columns = {column["name"]: column for column in found["columns"]}
    assert list(columns) == ["age", "plan", "since", "dose", "vip"]
    assert [columns[name]["missing"] for name in columns] == [25, 0, 0, 0, 0]
    assert [columns[name]["inputs"] for name in columns] == [2, 2, 5, 2, 1]
    assert columns["age"]["mean"] == pytest.approx(frame.age.mean())
    assert (columns["since"]["first"], columns["since"]["last"]) == ("2020-01-01", "2020-07-18")
    assert columns["plan"]["levels"] == ["a", "b"] and columns["plan"]["of"] == 2
    assert columns["dose"]["readings"] == [sentence("reading_limits", marks="<").with_text()]
    [left] = found["left_out"]
    assert left == {"name": "country", "reason": sentence("reason_same", value="NL").with_text()}
    assert found["target"]["classes"] == ["no", "yes"]
    assert np.sum(list(found["target"]["rows"].values()), axis=0).tolist() == [150, 50]


def test_numbers_to_predict_are_told_in_their_own_unit(frame, tmp_path):
    frame["y"] = np.linspace(100.0, 300.0, len(frame))
    parts = described(frame, tmp_path)["target"]["numbers"]
    assert min(p["least"] for p in parts.values()) == pytest.approx(100, abs=0.01)
    assert max(p["largest"] for p in parts.values()) == pytest.approx(300, abs=0.01)
    assert parts["train"]["mean"] == pytest.approx(200, abs=15)


def test_other_data_have_no_columns():
    source = load("iris")
    assert describe_table(source, split(source)) == {}
