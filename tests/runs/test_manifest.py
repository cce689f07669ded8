"""Every damage to a finished folder is noticed by whoever reads it, and names the file."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon import report
from tikhon.errors import DataError, InputError, StorageError
from tikhon.runs import files
from tikhon.runs.manifest import MANIFEST, has_manifest, update_manifest, verify, write_manifest
from tikhon.runs.run_directory import LOCK, RunDirectory
from tikhon.training.saved_model import SavedModel


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 64]) + content[-4:]


def zeroed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


DAMAGE = {
    "one bit": flipped,
    "64 zero bytes": zeroed,
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another document": lambda content: b"null",
    "a list": lambda content: b"[]",
    "deep nesting": lambda content: b"[" * 100_000,
    "not text": lambda content: b"\xff\xfe\x00",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was trained by name, so that it can predict."""
    path = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    about = {
        "command": ["tikhon", "fit"],
        "data": {"classes": ["a", "b"]},
        "model": {"name": "linear", "shape": [4], "outputs": 2},
    }
    from tikhon.models import build

    model = build("linear", (4,), 2)
    tk.fit(
        model,
        (x, (x[:, 0] > 0).long()),
        tk.Recipe(),
        epochs=1,
        output=path,
        about=about,
    )
    np.save(path.parent / "rows.npy", x.numpy())
    return path


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_an_intact_run_is_read(copied):
    SavedModel.load(copied)
    assert report.write(copied).exists()
    assert has_manifest(copied)
    verify(copied, "report.html", "result.json", "history.jsonl")  # the new page is in it too


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
def test_predict_refuses_a_damaged_run(copied, name, damage):
    file = copied / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=name):
        SavedModel.load(copied)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "result.json", "history.jsonl", MANIFEST])
def test_a_report_refuses_a_damaged_run(copied, name, damage):
    file = copied / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=name):
        report.write(copied)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_documents_of_an_unfinished_run_are_checked_for_what_they_are(copied, damage):
    (copied / MANIFEST).unlink()
    file = copied / "config.json"
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    try:
        report.write(copied)
    except DataError as error:
        assert "config.json" in str(error)
    else:
        assert damaged.startswith(b"{")  # a changed letter inside a text: still a document


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
@pytest.mark.parametrize("stands", ["a folder", "a link to itself"])
def test_what_stands_in_the_place_of_a_file_is_named(copied, name, stands):
    file = copied / name
    file.unlink()
    file.mkdir() if stands == "a folder" else file.symlink_to(file)
    with pytest.raises((DataError, InputError), match=name):
        SavedModel.load(copied)


@pytest.mark.parametrize("files", ["[]", "null", '"config.json"', "5"])
def test_a_manifest_whose_files_are_no_object_is_damaged(copied, files):
    content = f'{{"schema_version": 1, "files": {files}, "sha256": ""}}'
    (copied / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        verify(copied, "result.json")


def test_a_missing_file_is_named(copied):
    (copied / "result.json").unlink()
    with pytest.raises(DataError, match=r"result\.json is missing"):
        verify(copied, "result.json")


def test_a_rewritten_document_unfinishes_the_run_until_it_is_sealed(copied):
    folder = RunDirectory(copied)
    folder.write("result.json", {"kind": "fit"})
    assert not folder.is_finished
    folder.finish()
    assert folder.read("result.json")["kind"] == "fit"


def test_the_manifest_leaves_out_what_is_not_the_runs_to_keep(tmp_path):
    for name in ("a.json", "sub/b.bin", ".hidden", LOCK, "checkpoint/1.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    write_manifest(tmp_path)
    update_manifest(tmp_path, "absent")
    import json

    assert list(json.loads((tmp_path / MANIFEST).read_text())["files"]) == ["a.json", "sub/b.bin"]


# -- one holder ------------------------------------------------------------------------------


def test_a_lock_taken_on_a_removed_file_is_not_a_lock(tmp_path, monkeypatch):
    """A second process opens it, the first removes it and leaves, a third makes a new one."""
    first = RunDirectory(tmp_path / "run")
    first.create()
    original, calls = os.open, []

    def opened(path, *rest, **options):
        handle = original(path, *rest, **options)
        if str(path).endswith(LOCK) and not calls:
            calls.append(path)
            first.unlock()  # between our opening and our locking
        return handle

    monkeypatch.setattr(os, "open", opened)
    second = RunDirectory(tmp_path / "run")
    second.lock()
    monkeypatch.undo()
    assert (tmp_path / "run" / LOCK).exists()
    with pytest.raises(InputError, match="in use"):
        RunDirectory(tmp_path / "run").lock()
    second.unlock()


def test_what_a_kill_leaves_is_ours_and_goes(tmp_path):
    (tmp_path / ".probe").write_text("tikhon")
    (tmp_path / ".config.json.abc.tmp").write_text("{")
    with RunDirectory(tmp_path) as folder:
        folder.create()
        assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK]


def test_a_full_disk_at_the_lock_is_a_storage_error(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(StorageError, match="no space"):
        RunDirectory(tmp_path).lock()
    assert not (tmp_path / LOCK).exists()


def test_a_network_without_a_name_says_so(tmp_path):
    x = torch.randn(20, 3)
    path = tmp_path / "run"
    tk.fit(nn.Linear(3, 1), (x, x[:, :1]), tk.Recipe(), epochs=1, output=path)
    with pytest.raises(ValueError, match="by name"):
        SavedModel.load(path)
