"""What a file holds decides how it is read; cells that mislead are read as what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from datetime import datetime

import numpy as np
import pytest

from tikhon.data import load, split
from tikhon.data.encoding import encode_columns
from tikhon.data.reading import read_table
from tikhon.data.table import TableOptions
from tikhon.errors import DataError, InputError

pa = pytest.importorskip("pyarrow")
from pyarrow import feather, parquet  # noqa: E402

ROWS = [(i % 7, f"{i * i % 11}.5", "pq"[i % 2]) for i in range(60)]
TEXT = "a,b,y\n" + "".join(f"{a},{b},{y}\n" for a, b, y in ROWS)


def _written(write):
    out = io.BytesIO()
    write(pa.table({"a": [r[0] for r in ROWS], "y": [r[2] for r in ROWS]}), out)
    return out.getvalue()


def _sheet():
    pytest.importorskip("openpyxl")
    out = io.BytesIO()
    read_back = parquet.read_table(io.BytesIO(CONTENTS["parquet"])).to_pandas()
    read_back.to_excel(out, index=False)
    return out.getvalue()


def _tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("d.csv"), io.BytesIO())
    return out.getvalue()


def _zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("d.csv", TEXT)
    return out.getvalue()


CONTENTS = {
    "parquet": _written(parquet.write_table),
    "feather": _written(lambda table, out: feather.write_feather(table, out)),
    "json": "".join(json.dumps({"a": a, "y": y}) + "\n" for a, _, y in ROWS).encode(),
    "text": TEXT.encode(),
}
NAMES = ("d.csv", "d.tsv", "d.csv.gz", "d.parquet", "d.xlsx", "d.feather", "d.jsonl", "d.txt.gz")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["parquet", "feather", "json", "xlsx", "gzip of parquet"])
def test_a_name_does_not_hide_what_a_file_is(tmp_path, kind, name):
    packed = kind.startswith("gzip")
    content = _sheet() if kind == "xlsx" else CONTENTS[kind.split()[-1]]
    if kind == "json" and name.endswith((".parquet", ".xlsx", ".feather")):
        return  # the next test
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    frame = read_table(tmp_path / name).frame
    assert [int(a) for a in frame["a"]] == [r[0] for r in ROWS]
    assert frame["y"].tolist() == [r[2] for r in ROWS]


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.txt"])
def test_a_table_that_a_server_has_unpacked_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS["text"])
    assert len(read_table(tmp_path / name).frame) == 60


FOREIGN = {
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        "git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html>\n<html><body>not found</body></html>", "web page"),
    "page in capitals": (b"<HTML><head></head></HTML>", "web page"),
    "pickle": (pickle.dumps(ROWS), "pickle, which is never opened"),
    "bzip2": (bz2.compress(TEXT.encode()), "bzip2"),
    "gzip of gzip": (gzip.compress(gzip.compress(TEXT.encode())), "compressed twice"),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(100), "NumPy"),
    "Avro": (b"Obj\x01" + bytes(60), "Avro"),
    "tar": (_tar(), "tar archive"),
    "gzip of tar": (gzip.compress(_tar()), "tar archive"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FOREIGN)  # not the bytes: gzip's hold the time
def test_what_is_no_table_is_called_by_its_name(tmp_path, name, kind):
    content, said = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_table(tmp_path / name)


def test_a_zip_is_unpacked_by_whoever_knows_which_file_is_meant(tmp_path):
    (tmp_path / "d.csv").write_bytes(_zip())
    with pytest.raises(DataError, match="zip archive"):
        read_table(tmp_path / "d.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_marks_of_byte_order(tmp_path, encoding):
    path = tmp_path / "d.csv"
    path.write_bytes(TEXT.encode(encoding))
    assert list(read_table(path).frame.columns) == ["a", "b", "y"]
    if encoding == "utf-8-sig":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert list(read_table(path).frame.columns) == [
            "a",
            "b",
            "y",
        ]  # two marks, of two programs


def loaded(path, content, target="y"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(str(path), table=TableOptions(target))


@pytest.mark.parametrize(
    "never",
    [
        "9999-12-31 23:59:59.999999",
        "9999-12-31T23:59:59.9999999Z",
        "9999-12-31T23:00:00-05:00",
        "0001-01-01T00:00:00+05:00",
        "9999-12-31",
    ],
)
def test_the_last_moment_there_is_stands_for_never(tmp_path, never):
    days = [never if i % 5 == 0 else f"2020-01-{i % 28 + 1:02} 10:00" for i in range(60)]
    if "T" in never:
        days = [d.replace(" 10:00", "T10:00:00Z") for d in days]
    data = loaded(
        tmp_path / "d.csv", "d,y\n" + "".join(f"{d},{'pq'[i % 2]}\n" for i, d in enumerate(days))
    )
    (column,) = data.table.columns
    assert column.kind == "date" and column.words in (("9999-12-31",), ("0001-01-01",))
    assert np.isfinite(split(data).train.x.numpy()).all()


def test_the_last_moment_of_a_typed_file(tmp_path):
    parsed_dates = [datetime.max, datetime.min, datetime(2020, 5, 1), datetime(2021, 5, 1)] * 15
    out = io.BytesIO()
    parquet.write_table(
        pa.table(
            {"d": pa.array(parsed_dates, pa.timestamp("us", tz="UTC")), "y": list("pqqp") * 15}
        ),
        out,
    )
    data = loaded(tmp_path / "d.parquet", out.getvalue())
    assert data.table.columns[0].words == ("0001-01-01", "9999-12-31")


def test_midnight_is_a_time_of_day(tmp_path):
    rows = [f"{i % 3 * 8:02}:00:00,{'pq'[i % 2]}" for i in range(60)]
    data = loaded(tmp_path / "d.csv", "t,y\n" + "\n".join(rows))
    (column,) = data.table.columns
    assert column.kind == "time" and not column.missing
    assert data.x[:3, 0].tolist() == [0.0, 8 / 24, 16 / 24]
    path = tmp_path / "new.csv"
    path.write_text("t\n00:00:00\n08:00:00\n")
    assert encode_columns(read_table(path), data.table.columns)[:, 0].tolist() == [0.0, 8 / 24]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_durations_of_every_unit_are_numbers_of_one_unit(tmp_path, unit):
    ticks = [i % 7 * 1_000_000 for i in range(60)]
    out = io.BytesIO()
    table = pa.table({"t": pa.array(ticks, pa.duration(unit)), "y": list("pq") * 30})
    parquet.write_table(table, out)
    data = loaded(tmp_path / "d.parquet", out.getvalue())
    seconds = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[unit]
    assert data.x[:, 0].tolist() == pytest.approx([t * seconds * 1e6 for t in ticks])


UNSEEN = ["\u200b", "\u00ad", "\ufeff", "\u200e", "\u2060"]


@pytest.mark.parametrize("unseen", UNSEEN)
def test_labels_and_numbers_with_characters_that_nobody_sees(tmp_path, unseen):
    rows = []
    for i in range(60):
        before, after = unseen * bool(i % 3), unseen * bool(i % 5)
        rows.append(f"{before}{i % 9}.5,{'yes' if i % 2 else 'no'}{after}")
    data = loaded(tmp_path / "d.csv", "a,y\n" + "\n".join(rows))
    assert len(data.classes) == 2 and any("one class" in n for n in data.notices)
    assert data.table.columns[0].kind == "number" and data.x[:9, 0].tolist() == [
        i + 0.5 for i in range(9)
    ]


def test_digits_are_not_said_to_differ_in_capitals(tmp_path):
    rows = [f"{i},{('0', '1', 'True')[i % 3]}" for i in range(60)]
    data = loaded(tmp_path / "d.csv", "a,y\n" + "\n".join(rows))
    assert not any("kept apart" in notice for notice in data.notices)


def test_numbers_that_differ_beyond_their_digits_are_not_called_the_same(tmp_path):
    rows = [f"{2**64 - 1 - i % 9},{i % 7},{'pq'[i % 2]}" for i in range(60)]
    data = loaded(tmp_path / "d.csv", "big,a,y\n" + "\n".join(rows))
    (column,) = data.table.dropped
    assert column.name == "big" and "one number, to the 16 digits" in column.reason


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": ("a", "b"), "drop": ("b",)}, "'b' is to be used and to be dropped"),
        ({"categorical": ("b",), "drop": ("b",)}, "'b' is to be used and to be dropped"),
        ({"features": ("a", "a")}, "'a' is named twice"),
        ({"features": ("a", "b"), "group": "a"}, "'a' is no feature"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        TableOptions("y", **options)


def test_a_column_is_not_served_by_another_that_differs_in_blanks(tmp_path):
    rows = "".join(f"{i % 7},{i * i % 11},{'pq'[i % 2]}\n" for i in range(60))
    columns = loaded(tmp_path / "d.csv", "a, a,y\n" + rows).table.columns
    assert [c.name for c in columns] == ["a", " a"]
    (tmp_path / "new.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"lacks columns.* ' a'"):
        encode_columns(read_table(tmp_path / "new.csv"), columns)
    (tmp_path / "new.csv").write_text("a\n1\n")
    assert encode_columns(read_table(tmp_path / "new.csv"), columns[1:]).tolist() == [[1.0]]
