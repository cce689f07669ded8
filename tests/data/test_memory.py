"""A table that does not fit into memory is refused with its figures, before it is read."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys

import numpy as np
import pytest

from tikhon.data import file_heads, memory
from tikhon.data.memory import estimate_memory, free_memory, refuse_too_large
from tikhon.data.table import TableOptions, load_table
from tikhon.errors import DataError

ROWS = 20_000


@pytest.fixture
def files(tmp_path, monkeypatch):
    """One table as CSV, gzipped and not, as Parquet and as JSON lines, cut into short heads."""
    pytest.importorskip("pyarrow")
    write(tmp_path, ROWS, 6, "numbers")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    monkeypatch.setattr(file_heads, "_LENGTHS", (40_000, 160_000))
    return tmp_path


def write(folder, rows, columns, kind):
    import pandas as pd

    draw = np.random.default_rng(0)
    cells = draw.normal(size=(rows, columns)).round(4)
    frame = pd.DataFrame(cells, columns=[f"x{i}" for i in range(columns)])
    if kind == "words":
        words = np.array(["red", "a green one", "blue and white"])
        frame = pd.DataFrame(words[draw.integers(0, 3, cells.shape)], columns=frame.columns)
    frame["y"] = np.where(draw.random(rows) > 0.5, "a", "b")
    frame.to_csv(folder / "d.csv", index=False)
    frame.to_parquet(folder / "d.parquet")
    frame.to_json(folder / "d.jsonl", orient="records", lines=True)


NAMES = ("d.csv", "d.csv.gz", "d.parquet", "d.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_with_rows_that_do(files, monkeypatch, name):
    needed, rows, columns = estimate_memory(files / name)
    assert rows == pytest.approx(ROWS, rel=0.25)
    assert columns == 7
    monkeypatch.setattr(memory, "free_memory", lambda: int(needed / 2))
    with pytest.raises(DataError, match=r"rows of 7 columns need .* GB are free; end") as caught:
        load_table(files / name, TableOptions("y"))
    said = re.search(r"at most ([\d,]+) such rows", str(caught.value))
    assert said
    fitting = int(said[1].replace(",", ""))
    assert 0.4 * rows < fitting < 0.5 * rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free", [None, 10**9], ids=["unknown", "enough"])
def test_what_fits_or_cannot_be_told_is_read(files, monkeypatch, name, free):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    monkeypatch.setattr(memory, "_PACKED", 10**9)
    assert len(load_table(files / name, TableOptions("y")).x) == ROWS


def test_a_file_that_has_no_beginning_of_rows_is_left_to_its_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    for name, content in (
        ("a.csv", b"x" * 99),
        ("b.parquet", b"PAR1" + bytes(99)),
        ("c.csv", b""),
    ):
        (tmp_path / name).write_bytes(content)
        refuse_too_large(tmp_path / name)
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n" * 999)[:40])
    refuse_too_large(tmp_path / "d.csv.gz")
    refuse_too_large(tmp_path / "none.csv")


def test_free_memory_is_the_least_of_the_machine_and_its_control_groups(tmp_path, monkeypatch):
    machine = free_memory()
    assert machine is None or 10**6 < machine < 10**15
    own, root = tmp_path / "own", tmp_path / "groups"
    for folder, limit, used, pages, numbers in (
        ("job", "memory.max", "memory.current", "inactive_file", (9_000, 5_000, 700)),
        (
            "memory/old",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
            (8_000, 5_000, 20),
        ),
    ):
        (root / folder).mkdir(parents=True)
        (root / folder / limit).write_text(f"{numbers[0]}\n")
        (root / folder / used).write_text(f"{numbers[1]}\n")
        (root / folder / "memory.stat").write_text(f"anon 3\n{pages} {numbers[2]}\n")
    (root / "job/inner").mkdir()
    (root / "job/inner/memory.max").write_text("max\n")
    (root / "job/inner/memory.current").write_text("1\n")
    (root / "job/inner/memory.stat").write_text("inactive_file 0\n")
    monkeypatch.setattr(memory, "_GROUPS", root)
    monkeypatch.setattr(memory, "_OWN", own)
    own.write_text("0::/job/inner\n")
    assert free_memory() == 9_000 - 5_000 + 700  # the limit of the group around it
    own.write_text("5:cpu:/\n4:blkio,memory:/old\n")
    assert free_memory() == 8_000 - 5_000 + 20
    own.write_text("0::/none\n")
    assert free_memory() == pytest.approx(machine, rel=0.5)


PEAK = """
import sys
from pathlib import Path
import pandas, pyarrow, sklearn.impute, sklearn.model_selection, sklearn.preprocessing
from tikhon.data.splits import split
from tikhon.data.table import TableOptions, load_table

def told(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

before = told("VmRSS")
split(load_table(Path(sys.argv[1]), TableOptions("y")))
print(told("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numbers", "words"])
def test_the_estimate_is_what_reading_takes(tmp_path, kind):
    write(tmp_path, 250_000, 20, kind)
    for name in ("d.csv", "d.parquet"):
        needed, _, _ = estimate_memory(tmp_path / name)
        taken = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / name)], capture_output=True, check=True
        )
        print(f"{kind} {name}: {needed / 1e6:.0f} MB told, {int(taken.stdout) / 1e6:.0f} MB taken")
        assert 0.7 < needed / int(taken.stdout) < 1.4
