"""Every file of the corpus is read as it was written down, cell by cell, now and for new rows."""

from __future__ import annotations

import json
from datetime import datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import corpus
from data.corpus import Case, Flag, Text
from tikhon.data import split
from tikhon.data.column import Column
from tikhon.data.encoding import encode_columns, iterate_columns
from tikhon.data.reading import read_table
from tikhon.data.source import Format
from tikhon.data.table import TableOptions, load_table
from tikhon.errors import InputError

CASES = corpus.cases()


def decoded(column: Column, cells: np.ndarray) -> Any:
    """A cell as a person would name it, from the numbers it was encoded as."""
    value, code = cells[0], cells[-1]
    if column.kind == "text":
        return None if np.isnan(value) else round(np.expm1(value))
    if column.kind == "category":
        return None if np.isnan(value) else column.categories[int(value)]
    if column.words and not np.isnan(code):
        return Flag(column.words[int(code)], None if np.isnan(value) else float(value))
    if np.isnan(value):
        return None
    return bool(value) if column.kind == "boolean" else float(value)


def expected(cell: Any) -> Any:
    if isinstance(cell, datetime):
        return (cell - datetime(1970, 1, 1)).total_seconds() / 86400
    if isinstance(cell, time):
        return (cell.hour * 3600 + cell.minute * 60 + cell.second) / 86400
    return len(cell.text) if isinstance(cell, Text) else cell


def test_the_corpus_is_large():
    assert len(CASES) >= 80 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_file_is_read_as_it_was_written_down(case: Case, tmp_path: Path):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    options = TableOptions("y", format=Format(**case.options))
    if case.error:
        with pytest.raises(InputError, match=case.error):
            load_table(path, options)
        return
    data = load_table(path, options)
    assert data.table is not None
    assert {c.name for c in data.table.dropped} == set(case.dropped)
    for column in data.table.dropped:
        assert case.dropped[column.name] in column.reason
    if case.columns:
        assert [c.name for c in data.table.columns] == [n for n in case.columns
                                                        if n not in case.dropped]  # fmt: skip
        judge(data.table.columns, data.x.numpy(), case)
    if case.target is not None:
        found = [data.classes[i] for i in data.y] if data.classes else data.y.tolist()
        assert found == case.target
    assert case.said in " ".join(data.notices)


def judge(columns: tuple[Column, ...], values: np.ndarray, case: Case) -> None:
    for column, cells in iterate_columns(values, columns):
        found = [decoded(column, row) for row in cells]
        for row, (received, right) in enumerate(
            zip(found, case.columns[column.name], strict=True)
        ):
            right = expected(right)
            same = received == right or received == pytest.approx(right, rel=1e-12, abs=1e-9)
            assert same, f"{case.name}, column {column.name}, row {row}: {received} for {right}"


@pytest.mark.parametrize("case", [c for c in CASES if c.columns], ids=lambda case: case.name)
def test_new_rows_are_read_alike_through_what_a_run_keeps(case: Case, tmp_path: Path):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    data = load_table(path, TableOptions("y", format=Format(**case.options)))
    assert data.table is not None
    plain = json.loads(json.dumps([c.to_dict() for c in data.table.columns], allow_nan=False))
    columns = tuple(Column.from_dict(column) for column in plain)
    assert columns == data.table.columns
    again = encode_columns(read_table(path, Format(**case.options)), columns)
    np.testing.assert_array_equal(again, data.x.numpy())


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_the_larger_tables_are_learnt_from_whole(name: str, tmp_path: Path):
    corpus.write(tmp_path)
    data = load_table(tmp_path / f"{name}.csv", TableOptions({"c": "hot", "r": "total"}[name[0]]))
    assert data.table is not None and not data.table.dropped
    kinds = {c.name: c.kind for c in data.table.columns}
    assert kinds == {"price": "number", "dose": "number", "sold": "date", "shop": "category",
                     "note": "text"}  # fmt: skip
    assert data.task == name
    assert data.classes == (("no", "YES") if name[0] == "c" else ())
    parts = split(data)
    assert all(np.isfinite(p.x.numpy()).all() for p in (parts.train, parts.valid, parts.test))


MARKS = [
    ("1.336 | 2.5 | 7.25", "1,336 | 2,5 | 7,25", [1.336, 2.5, 7.25]),
    ("1.336 | 2.5 | 7.25", "1,336 | 2,125 | 0,250", [1.336, 2.125, 0.25]),
    ("1,336 | 2,5 | 7,25", "1.336 | 2.5 | 7.25", [1.336, 2.5, 7.25]),
    ("1.336 | 2.5 | 7.25", "1.336 | 2.125 | 3.250", [1.336, 2.125, 3.25]),
    ("1,336 | 2,5 | 7,25", "1,336 | 2,125 | 3,250", [1.336, 2.125, 3.25]),
]


@pytest.mark.parametrize(("learnt", "new", "right"), MARKS)
def test_new_rows_prove_their_own_decimal_mark(
    learnt: str, new: str, right: list[float], tmp_path
):
    found = []
    for name, cells in (("learnt", learnt), ("new", new)):
        path = tmp_path / f"{name}.csv"
        path.write_bytes(corpus.column(name, cells).content)
        found.append(path)
    data = load_table(found[0], TableOptions("y"))
    assert data.table is not None
    assert encode_columns(read_table(found[1]), data.table.columns)[:, 0].tolist() == right


@pytest.mark.parametrize(
    ("sure", "right"), [("0,5 | 1,25 | 2,75", 1.336), ("0.5 | 1.25 | 2.75", 1336)]
)
def test_another_column_of_the_new_file_decides_for_one_in_doubt(sure, right, tmp_path):
    numbers = ("1.5 | 2.5 | 7.25",) * 2
    (tmp_path / "learnt.csv").write_bytes(corpus.pair("learnt", *numbers, ([], [])).content)
    new = corpus.pair("new", "1,336 | 2,125 | 3,250", sure, ([], []), separator=";")
    (tmp_path / "new.csv").write_bytes(new.content)
    data = load_table(tmp_path / "learnt.csv", TableOptions("y"))
    assert data.table is not None
    assert encode_columns(read_table(tmp_path / "new.csv"), data.table.columns)[0, 0] == right


REMARKS = [
    ("5% | 7.5% | 90%", "0.05 | 0.5", "'a': no cell says '%', as in training"),
    ("yes | no | ", "yes | maybe | Y", "'a': 1 value that training never saw"),
    ("yes | no | Yes", "yes | maybe | Y", "'a': 1 value that training never saw"),  # and no gap
    ("<1 | 2.5 | 7.5", "<1 | >9 | 3", "'a': 1 value that training never saw"),
]


@pytest.mark.parametrize(("learnt", "new", "said"), REMARKS)
def test_new_rows_unlike_those_of_training_are_told(learnt, new, said, tmp_path):
    for name, cells in (("learnt", learnt), ("new", new)):
        (tmp_path / f"{name}.csv").write_bytes(corpus.column(name, f"{cells} | {cells}").content)
    fitted = split(load_table(tmp_path / "learnt.csv", TableOptions("y"))).preprocessing
    assert fitted is not None
    source = read_table(tmp_path / "new.csv")
    (told,) = [r for r in fitted.remarks(source, encode_columns(source, fitted.columns))
               if "'y'" not in r and "far outside" not in r]  # fmt: skip
    assert told.startswith(said.replace("1 value", "2 values"))


def test_words_of_older_runs_stay_words(tmp_path):
    path = tmp_path / "new.csv"
    path.write_bytes(corpus.column("new", "7 years | 10+ years").content)
    column = Column("a", "number", unit="years", words=("10+ years",))
    np.testing.assert_array_equal(encode_columns(read_table(path), [column])[1], [np.nan, 0])
