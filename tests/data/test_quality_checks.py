"""What a person is told of a table, and what is too likely by chance to be told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tikhon.data import Dataset, TableOptions, load

RNG = np.random.default_rng(0)
A, B, C = RNG.uniform(1, 9, (3, 300))
NOISE = RNG.normal(size=300)


def table(folder: Path, target: str = "y", /, **columns: object) -> Dataset:
    path = folder / "t.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return load(path, table=TableOptions(target))


def said(data: Dataset, key: str) -> list[str]:
    return [str(notice) for notice in data.notices if notice.key == key]


@pytest.mark.parametrize(
    ("key", "y"),
    [
        ("notice_leak_sum", A + B),
        ("notice_leak_sum", np.round(2 * A - 0.5 * B, 6)),
        ("notice_leak_product", A * B),
        ("notice_leak_product", A / B**2),
    ],
)
def test_columns_that_together_are_the_target_are_told_with_how_to_leave_them_out(
    tmp_path, key, y
):
    data = table(tmp_path, a=A, b=B, c=C, y=y)
    (told,) = said(data, key)
    assert "of 'a', 'b' is the target" in told
    (notice,) = [n for n in data.notices if n.key == key]
    assert notice.values["options"] == "--drop=a --drop=b"


@pytest.mark.parametrize("y", [A + B + 1e-3 * NOISE, A * B * (1 + 1e-3 * NOISE), NOISE])
def test_columns_that_nearly_are_the_target_are_what_is_learnt(tmp_path, y):
    data = table(tmp_path, a=A, b=B, c=C, y=y)
    assert not said(data, "notice_leak_sum") and not said(data, "notice_leak_product")


def test_a_column_that_repeats_another_is_told_unless_chance_makes_it(tmp_path):
    data = table(tmp_path, a=A, again=A, word=["u", "v", "w"] * 100, term=["u", "v", "w"] * 100,
                 y=NOISE)  # fmt: skip
    told = said(data, "notice_alike")
    assert [t.split(":")[0] for t in told] == [
        "'a', 'again' hold the same in every row",
        "'word', 'term' hold the same in every row",
    ]
    rare = {f"w{i}": (np.arange(300) == i % 7).astype(int) for i in range(30)}
    assert not said(table(tmp_path, **rare, y=NOISE), "notice_alike")


@pytest.mark.parametrize("name", ["patient_id", "userId", "Subject", "ID"])
def test_rows_of_one_thing_are_told_with_the_option_that_keeps_them_together(tmp_path, name):
    ids = [f"p{i // 6}" for i in range(300)]
    (told,) = said(table(tmp_path, **{name: ids}, a=A, y=NOISE), "notice_groups")
    assert "50 values in 300 rows" in told and f"--group={name}" in told
    path = tmp_path / "t.csv"
    assert not said(load(path, table=TableOptions("y", group=name)), "notice_groups")


@pytest.mark.parametrize(("name", "each"), [("colour", 6), ("patient_id", 60)])
def test_a_column_of_another_name_or_of_few_values_names_no_groups(tmp_path, name, each):
    ids = [f"p{i // each}" for i in range(300)]
    assert not said(table(tmp_path, **{name: ids}, a=A, y=NOISE), "notice_groups")


@pytest.mark.parametrize("mark", [-200, -999, -7, 8888, 32767])
def test_a_number_far_from_all_others_is_told(tmp_path, mark):
    a = np.where(np.arange(300) % 20 == 0, mark, np.round(A / 9, 2))
    (told,) = said(table(tmp_path, a=a, y=NOISE), "notice_sentinel")
    assert f"'a' is {mark} in 15 rows" in told


@pytest.mark.parametrize("mark", [-200.5, 400, -5])
def test_a_number_that_may_be_measured_is_not(tmp_path, mark):
    a = np.where(np.arange(300) % 20 == 0, mark, A - 5 if mark == -5 else A)
    assert not said(table(tmp_path, a=a, y=NOISE), "notice_sentinel")


def test_quantities_are_not_called_identifiers(tmp_path):
    """Codes are of one length, or count the rows; money and people have any number of digits."""
    some = RNG.choice(10**6, 300, replace=False)
    codes = 10**8 + some
    data = table(tmp_path, income=some, price=[f"${v:,}" for v in codes], code=codes, y=NOISE)
    (told,) = said(data, "notice_identifier")
    assert told.startswith("'code':")


@pytest.mark.parametrize(
    ("unit", "scale"), [("s", 1), ("ms", 10**3), ("µs", 10**6), ("ns", 10**9)]
)
@pytest.mark.parametrize("name", ["timestamp", "created_at", "eventTime", "ts"])
def test_moments_since_1970_are_dates_by_name_and_size(tmp_path, unit, scale, name):
    days = pd.date_range("2021-03-01 06:00", periods=300, freq="12h")
    data = table(tmp_path, **{name: [int(day.timestamp()) * scale for day in days]}, y=NOISE)
    assert data.table is not None
    (column,) = data.table.columns
    assert column.kind == "date" and column.clock
    wanted = (days - pd.Timestamp("1970-01-01")) / pd.Timedelta(days=1)
    np.testing.assert_allclose(data.x[:, 0], wanted, atol=1e-6)
    assert f"moments in {unit} since 1970" in said(data, "notice_read")[0]
    assert said(data, "notice_in_order")


@pytest.mark.parametrize(("name", "scale"), [("amount", 1), ("timestamp", 10), ("timestamp", 0)])
def test_other_numbers_are_no_moments(tmp_path, name, scale):
    cells = [1_600_000_000 * scale + 86_400 * i for i in range(300)]
    data = table(tmp_path, **{name: cells}, y=NOISE)
    assert data.table is not None
    assert [c.kind for c in (*data.table.columns, *data.table.dropped)] == ["number"]


def test_few_dates_in_the_order_of_the_rows_are_no_accident(tmp_path):
    days = [f"2021-03-{1 + i // 30:02}" for i in range(300)]
    assert said(table(tmp_path, day=days, y=NOISE), "notice_in_order")
    assert not said(table(tmp_path, day=RNG.permutation(days), y=NOISE), "notice_in_order")


CLASSES = np.array(["red", "green", "blue"])[np.arange(300) % 3]


@pytest.mark.parametrize(
    ("columns", "y"),
    [
        ({f"is {c}": (CLASSES == c).astype(int) for c in ("red", "green", "blue")}, CLASSES),
        ({"a": np.arange(300) % 4, "b": np.arange(300) // 7 % 3},
         np.arange(300) % 4 + np.arange(300) // 7 % 3),
    ],
    ids=["one-hot", "sum"],
)  # fmt: skip
def test_columns_that_together_are_the_class_are_a_leak(tmp_path, columns, y):
    data = table(tmp_path, **columns, noise=NOISE, y=y)
    assert data.task == "classification"
    [notice] = said(data, "notice_leak_sum")
    assert all(name in notice for name in columns) and "noise" not in notice
    shuffled = np.random.default_rng(1).permutation(y)
    assert not said(table(tmp_path, **columns, noise=NOISE, y=shuffled), "notice_leak_sum")
