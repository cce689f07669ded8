"""Every file appears whole or not at all; each guard has been seen to fail without it."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from tikhon.errors import DataError, InputError, StorageError
from tikhon.report.saved import read
from tikhon.runs import files
from tikhon.runs.files import json_text, write_bytes, write_tensors
from tikhon.runs.run_directory import RunDirectory, check_same_configuration


@pytest.mark.parametrize("point", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failure_at_any_point_leaves_the_old_file_and_no_litter(
    tmp_path, monkeypatch, point, code
):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, point, fail)
    with pytest.raises(StorageError, match=str(path)) as caught:
        write_bytes(path, b"new content")
    monkeypatch.undo()
    if code == errno.ENOSPC:
        assert "11 bytes are needed" in str(caught.value) and "free" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, n=name, f=original: (events.append(n), f(*a))[1]
        )
    write_bytes(tmp_path / "file", b"x")
    assert events == ["fsync", "replace", "fsync"]  # the content, the name, the folder


def test_what_was_not_written_is_noticed(tmp_path, monkeypatch):
    original = os.fdopen

    def lossy(handle, mode):
        file = original(handle, mode)
        write = file.write

        class Lossy:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *a):
                file.close()

            def write(self, content):
                return write(content[:-1])

        return Lossy()

    monkeypatch.setattr(files.os, "fdopen", lossy)
    with pytest.raises(StorageError, match="read back differs"):
        write_bytes(tmp_path / "file", b"abc")
    assert not list(tmp_path.iterdir())


def test_modes_follow_the_umask_and_the_replaced_file(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_bytes(tmp_path / "new", b"y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_links_stay_links_and_devices_are_refused(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(StorageError, match="not a regular file"):
            write_bytes(path, b"x")


def test_json_has_no_nan_and_numbers_of_any_library():
    document = {"a": float("nan"), "b": [float("inf"), 1], "c": torch.tensor(2.5), 3: None}
    assert json.loads(json_text(document)) == {"a": None, "b": [None, 1], "c": 2.5, "3": None}


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = {"w": torch.randn(3, 4).t(), "n": torch.tensor(3), "b": torch.zeros(0)}
    write_tensors(tmp_path / "m.safetensors", tensors)
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_folder_is_proved_writable_before_training(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="no space"), RunDirectory(tmp_path / "run") as folder:
        folder.create()
    assert not list((tmp_path / "run").iterdir())


def test_a_probe_whose_folder_cannot_be_synced_goes_too(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_sync_folder", full)
    with pytest.raises(StorageError, match="no space"), RunDirectory(tmp_path / "run") as folder:
        folder.create()
    assert not list((tmp_path / "run").iterdir())


def test_litter_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".config.json.abcdefgh.tmp").write_text("half")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/.1.safetensors.abcdefgh.tmp").write_text("half")
    with RunDirectory(tmp_path) as folder:
        folder.create(overwrite=True)
    assert not list(tmp_path.rglob("*.tmp"))


def test_one_process_at_a_time(tmp_path):
    with RunDirectory(tmp_path / "run") as first:
        first.create()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            RunDirectory(tmp_path / "run").create()
    with RunDirectory(tmp_path / "run") as again:
        again.create()
    assert not (tmp_path / "run/.lock").exists()


def test_history_leaves_out_a_torn_line(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.write("config.json", {"kind": "fit"})
    assert read(tmp_path).history == ()
    folder.append({"epoch": 1, "loss": float("nan")})
    folder.append({"epoch": 2})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"epo')
    assert read(tmp_path).history == ({"epoch": 1, "loss": None}, {"epoch": 2})


def test_unreadable_documents(tmp_path):
    with pytest.raises(InputError, match="folder of a run"):
        RunDirectory(tmp_path).read("config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json cannot be read"):
        RunDirectory(tmp_path).read("config.json")


def test_a_kill_at_the_mark_of_the_end_leaves_no_checkpoint_behind(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("tikhon.runs.run_directory.write_manifest", killed)
    with RunDirectory(tmp_path / "run") as folder:
        folder.take({"kind": "fit"})
        (folder.path / "checkpoint").mkdir()
        with pytest.raises(KeyboardInterrupt):
            folder.finish()
        assert not folder.is_finished and not (folder.path / "checkpoint").exists()


def test_entries_that_may_differ_are_whole_names():
    one = {"model": {"name": "a", "members": ["a"], "names": 1}}
    other = {"model": {"name": "b", "members": ["b", "c"], "names": 1}}
    apart = ("model.name", "model.members")
    check_same_configuration(one, other, apart=apart)
    other["model"]["names"] = 2
    with pytest.raises(InputError, match=r"model\.names"):
        check_same_configuration(one, other, apart=apart)
