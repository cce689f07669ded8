"""What killed writers leave is removed by the next writer; what living ones hold is not."""

import os
import signal
import subprocess
import sys
import warnings

import pytest

from tikhon.runs import run_directory, temporary
from tikhon.runs.files import write_bytes
from tikhon.runs.run_directory import RunDirectory
from tikhon.runs.temporary import remove_leftovers, temporary_file

DIES = """
import os, signal, sys
from pathlib import Path
from tikhon.runs import files
files.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes(Path(sys.argv[1]), b"half")
"""


def leave(path):
    """What a process that is killed before the last step of writing `path` leaves."""
    ended = subprocess.run([sys.executable, "-c", DIES, str(path)])
    assert ended.returncode == -signal.SIGKILL
    return [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["report.html", "a[1]*.csv", ".hidden", "é 年"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, name):
    assert len(leave(tmp_path / name)) == 1
    foreign = [".other.abcdefgh.tmp", f".{name}.tmp", f".{name}.abcdefgh.tmp.txt"]
    for other in foreign:
        (tmp_path / other).write_text("of another program")
    write_bytes(tmp_path / name, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, *foreign])


def test_what_a_living_writer_holds_stays(tmp_path):
    path = tmp_path / "report.html"
    with temporary_file(path) as (handle, name):
        os.write(handle, b"first")
        os.close(handle)  # as a writer does before it renames
        write_bytes(path, b"second")
        remove_leftovers(tmp_path)
        os.replace(name, path)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["report.html"]


def test_a_file_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, made = temporary.tempfile.mkstemp, []

    def swept_at_once(**options):
        handle, name = real(**options)
        made.append(name)
        if len(made) == 1:
            remove_leftovers(tmp_path)  # of another process
        return handle, name

    monkeypatch.setattr(temporary.tempfile, "mkstemp", swept_at_once)
    write_bytes(tmp_path / "file", b"x")
    assert len(made) == 2 and os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_written_and_said(tmp_path, monkeypatch):
    def no_locks(handle):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(temporary, "try_lock", no_locks)
    (tmp_path / ".file.abcdefgh.tmp").write_text("nobody can tell whose")
    write_bytes(tmp_path / "file", b"x")
    assert len(os.listdir(tmp_path)) == 2
    with pytest.warns(UserWarning, match="has no locks .*Operation not supported"):
        with RunDirectory(tmp_path / "run") as folder:
            folder.create()
    monkeypatch.setattr(temporary, "can_lock", lambda: False)
    with warnings.catch_warnings(), RunDirectory(tmp_path / "other") as folder:
        folder.create()
    assert folder.path.is_dir()


def test_taking_a_run_removes_the_litter_of_all_its_folders(tmp_path):
    for place in ("config.json", "checkpoint/3.json", "states/7.safetensors", "a/b/report.html"):
        (tmp_path / "run" / place).parent.mkdir(parents=True, exist_ok=True)
        leave(tmp_path / "run" / place)
    (tmp_path / "run" / run_directory.CONFIG).write_text("{}")
    with RunDirectory(tmp_path / "run") as folder:
        folder.lock()
    assert not list((tmp_path / "run").rglob(".*"))
