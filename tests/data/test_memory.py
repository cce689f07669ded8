"""A table that does not fit into memory is read from disk, or refused with its figures."""

from __future__ import annotations

import errno
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pandas
import pytest

from data import corpus
from tikhon.data import csv_files, file_heads, large_tables, memory, reading, split
from tikhon.data.csv_files import read_csv_in_pieces
from tikhon.data.large_tables import estimate_size, read_parquet_by_columns, read_source
from tikhon.data.memory import free_memory
from tikhon.data.on_disk import gather_texts
from tikhon.data.reading import read_table
from tikhon.data.source import Format, Source
from tikhon.data.table import TableOptions, load_table
from tikhon.errors import DataError

ROWS = 20_000


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One table as CSV, gzipped and not, as Parquet and as JSON lines."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("files")
    write(folder, ROWS, 6, "numbers")
    (folder / "d.csv.gz").write_bytes(gzip.compress((folder / "d.csv").read_bytes()))
    return folder


@pytest.fixture
def files(written, tmp_path, monkeypatch):
    """A copy of the table's files, of which short heads are read."""
    monkeypatch.setattr(file_heads, "_LENGTHS", (40_000, 160_000))
    return shutil.copytree(written, tmp_path / "files")


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


@pytest.mark.parametrize("name", NAMES[:3])
def test_what_does_not_fit_is_read_from_disk_alike(files, monkeypatch, name):
    usual = load_table(files / name, TableOptions("y"))
    monkeypatch.setattr(csv_files, "PIECE", 3_000)
    monkeypatch.setattr(large_tables, "_ROW", 1)
    monkeypatch.setattr(memory, "free_memory", lambda: 200_000)
    parts = []
    monkeypatch.setattr(memory, "file_array", lambda *args: parts.append(args) or made(*args))
    mapped = load_table(files / name, TableOptions("y"))
    assert parts
    assert mapped.notices[0].key == "notice_on_disk"
    assert mapped.notices[1:] == usual.notices
    assert mapped.fingerprint() == usual.fingerprint()
    assert mapped.origin == usual.origin
    for large, small in zip(all_parts(mapped), all_parts(usual), strict=True):
        assert large.x.is_contiguous()
        assert large.fingerprint() == small.fingerprint()


made = memory.file_array


def all_parts(data):
    parts = split(data)
    return parts.train, parts.valid, parts.test


def refused(path, monkeypatch, free):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    with pytest.raises(DataError, match=r"rows of 7 columns need .* GB are free; ") as caught:
        load_table(path, TableOptions("y"))
    return str(caught.value)


def test_what_cannot_be_read_in_pieces_is_refused_with_the_rows_that_fit(files, monkeypatch):
    size = estimate_size(files / "d.jsonl")
    assert size.rows == pytest.approx(ROWS, rel=0.25)
    assert size.columns == 7
    message = refused(files / "d.jsonl", monkeypatch, int(size.needed / 2))
    assert "only CSV and Parquet" in message
    said = re.search(r"at most ([\d,]+) such rows", message)
    assert said
    assert 0.4 * size.rows < int(said[1].replace(",", "")) < 0.5 * size.rows


def test_too_many_rows_too_little_disk_and_old_libraries_are_told(files, monkeypatch):
    path = files / "d.csv"
    assert "it would still take" in refused(path, monkeypatch, 200_000)
    monkeypatch.setattr(large_tables, "_ROW", 1)
    full = shutil.disk_usage(files)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert "set TMPDIR to another disk" in refused(path, monkeypatch, 200_000)
    monkeypatch.setattr(large_tables, "has_mapped_strings", lambda: False)
    assert "install pandas 3 and pyarrow" in refused(path, monkeypatch, 200_000)


def test_rows_of_the_wrong_length_are_not_left_out_in_pieces(files, monkeypatch):
    path = files / "d.csv"
    path.write_text(path.read_text() + "1,2\n")
    monkeypatch.setattr(large_tables, "_ROW", 1)
    monkeypatch.setattr(memory, "free_memory", lambda: 200_000)
    for on_bad, told in (("error", ""), ("skip", "in pieces no rows are left out: .*")):
        with pytest.raises(DataError, match=rf"{told}line {ROWS + 2}: 2 fields"):
            load_table(path, TableOptions("y", format=Format(bad_rows=on_bad)))


def test_a_compressed_file_is_judged_before_it_is_unpacked(files, monkeypatch):
    path = files / "d.csv.gz"
    monkeypatch.setattr(large_tables, "_ROW", 1)
    monkeypatch.setattr(memory, "free_memory", lambda: 200_000)
    monkeypatch.setattr(csv_files, "MAX_UNPACKED", 99_999)
    with pytest.raises(DataError, match="unpacks to more than 99,999 bytes"):
        read_source(path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-3_000])
    with pytest.raises(DataError, match="not a complete gzip file"):
        read_csv_in_pieces(path, None, gather_texts)


def test_pieces_are_the_rows_of_the_whole_file(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(csv_files, "PIECE", 2)
    count = 0
    for case in corpus.cases():
        path, format = tmp_path / case.name, Format(**case.options)
        path.write_bytes(case.content)
        try:
            whole = read_table(path, format)
        except DataError as error:
            whole = error
        if isinstance(whole, Source) and case.content.startswith(b"PAR1"):
            pieces = read_parquet_by_columns(path, format)
        elif not isinstance(whole, Source) or not is_csv(path):
            continue
        else:
            try:
                pieces = read_csv_in_pieces(path, format, gather_texts)
            except DataError as error:
                assert re.search("in pieces", str(error)), case.name
                continue
        pandas.testing.assert_frame_equal(pieces.frame, whole.frame, obj=case.name)
        assert list(pieces.lines) == list(whole.lines)
        assert pieces.notices == whole.notices
        assert pieces.origin == whole.origin
        assert pieces.foreign == whole.foreign
        count += 1
    assert count > 200


def is_csv(path):
    name = path.name.lower().removesuffix(".gz")
    content = path.read_bytes()
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    return reading._detect_type(path, name, content) == "csv"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free", [None, 10**9], ids=["unknown", "enough"])
def test_what_fits_or_cannot_be_told_is_read(files, monkeypatch, name, free):
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    monkeypatch.setattr(large_tables, "_PACKED", 10**9)
    source = read_source(files / name)
    assert len(source.frame) == ROWS
    assert not source.on_disk


def test_a_file_that_has_no_beginning_of_rows_is_left_to_its_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    for name, content, error in (
        ("a.csv", b"x" * 99, "no data rows"),
        ("b.parquet", b"PAR1" + bytes(99), "not a complete Parquet"),
        ("c.csv", b"", "is empty"),
        ("d.csv.gz", gzip.compress(b"a,b\n1,2\n" * 999)[:40], "not a complete gzip"),
        ("none.csv", None, "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=error):
            read_source(tmp_path / name)


def test_a_full_disk_is_an_error_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    assert memory.empty(2, 3).T.flags.c_contiguous  # by column, in a file

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert memory.empty(2, 3).flags.c_contiguous  # in memory after all
    with pytest.raises(OSError, match="no space"):
        memory.move_to_file(np.ones(3))


def test_files_go_to_a_disk_unless_told_otherwise(monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert memory.temporary_directory() in ("/var/tmp", tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", "/somewhere")
    assert memory.temporary_directory() == tempfile.gettempdir()


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
        needed = estimate_size(tmp_path / name).needed
        taken = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / name)], capture_output=True, check=True
        )
        print(f"{kind} {name}: {needed / 1e6:.0f} MB told, {int(taken.stdout) / 1e6:.0f} MB taken")
        assert 0.7 < needed / int(taken.stdout) < 1.4
