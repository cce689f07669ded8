"""The time of reading a large table is told from its head."""

from __future__ import annotations

import numpy as np
import pytest

from tikhon.data import file_heads, reading_time
from tikhon.data.reading_time import estimate_reading_time

ROWS = 40_000


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A CSV and a Parquet file that count as large."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    draw = np.random.default_rng(0)
    columns = {f"x{i}": draw.normal(size=ROWS).round(4) for i in range(4)}
    table = pa.table({**columns, "y": np.where(columns["x0"] > 0, "a", "b")})
    csv.write_csv(table, tmp_path / "d.csv")
    parquet.write_table(table, tmp_path / "d.parquet")
    monkeypatch.setattr(reading_time, "LARGE", 10_000)
    monkeypatch.setattr(file_heads, "_LENGTHS", (40_000, 160_000))
    return tmp_path


@pytest.mark.parametrize("name", ["d.csv", "d.parquet"])
def test_what_grows_with_the_rows_is_counted_and_what_does_not_is_not(large, monkeypatch, name):
    """Also where other programs make every other reading wait."""
    clock, readings = 0.0, 0

    def use(source):
        nonlocal clock, readings
        readings += 1
        clock += 3 + 0.01 * len(source.frame) + 500 * (readings % 2)

    monkeypatch.setattr(reading_time.time, "perf_counter", lambda: clock)
    assert estimate_reading_time(large / name, use) == pytest.approx(3 + 0.01 * ROWS, rel=0.05)


def test_what_is_small_or_does_not_tell_has_no_time(large, monkeypatch):
    def refuses(source):
        raise ValueError

    assert estimate_reading_time(large / "d.csv", refuses) is None
    (large / "quoted.csv").write_text('a,b\n"' + "x\n" * 300_000 + '",2\n')
    assert estimate_reading_time(large / "quoted.csv", len) is None
    (large / "long.csv").write_text("a" * 300_000)
    assert estimate_reading_time(large / "long.csv", len) is None
    (large / "d.parquet").write_bytes(b"PAR1" + bytes(200_000))
    assert estimate_reading_time(large / "d.parquet", len) is None
    assert estimate_reading_time(large / "none.csv", len) is None
    monkeypatch.undo()
    assert estimate_reading_time(large / "d.csv", len) is None
