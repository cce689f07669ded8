"""A disk that is full at any one write of any command: exit code 5, in bytes, nothing spoiled."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
from jobs import JOBS, left_in, prepare
from tally import SHARE, Tally, count, disorder, rng

from tikhon.cli import main
from tikhon.runs import files, temporary

QUICK = ("fit", "predict")


class Disk:
    """Counts the writes at the seams; the one numbered `full` finds no space.

    The seams are where bytes leave the process: temporary files, their content on disk, the
    folder's entry, appended lines, the lock, folders, stdout.
    """

    def __init__(self, monkeypatch, full: int = 0) -> None:
        self.count, self.full = 0, full
        for holder, name in (
            (temporary.tempfile, "mkstemp"),
            (files.os, "fsync"),
            (files.os, "replace"),
            (os, "write"),
            (os, "mkdir"),
        ):
            monkeypatch.setattr(holder, name, self.seam(getattr(holder, name)))
        opened = Path.open

        def open_(path, mode="r", *more, **options):
            return (self.seam(opened) if mode.startswith(("a", "w")) else opened)(
                path, mode, *more, **options
            )

        monkeypatch.setattr(Path, "open", open_)
        monkeypatch.setattr(sys.stdout, "flush", self.seam(sys.stdout.flush), raising=False)

    def seam(self, original):
        def call(*arguments, **options):
            self.count += 1
            if self.count == self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        return call


def run(arguments, monkeypatch, full=0):
    with monkeypatch.context() as patch:
        disk = Disk(patch, full)
        try:
            return main(list(arguments)), disk.count
        finally:
            disk.full = 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    prepare(folder)
    given = "fit iris --epochs 3 --no-linear --quiet --output"
    assert main([*given.split(), str(folder / "fitted")]) == 0
    return folder


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", JOBS if SHARE else QUICK)
def test_a_full_disk_at_one_write(name, prepared, tmp_path, monkeypatch, capsys):
    draw, tally = rng(f"disk {name}"), Tally(f"a full disk at one write of {name}")
    job = JOBS[name]
    arguments = list(job.arguments)
    if name == "fit":
        arguments = [a if a != "40" else "3" for a in arguments]
    shutil.copytree(prepared, tmp_path / "whole")
    monkeypatch.chdir(tmp_path / "whole")
    code, writes = run(arguments, monkeypatch)
    assert code in (0, 3)
    places = list(range(1, writes + 1))
    if (some := count(6, 1_000)) < writes:
        places = sorted(draw.sample(places, some))
    for full in places:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(prepared, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "run")
        before = left_in(tmp_path / "run/fitted")
        capsys.readouterr()
        code, _ = run(arguments, monkeypatch, full)
        said = capsys.readouterr().err
        trouble = disorder(said)
        if not trouble and code == 5:
            counted = "bytes are needed" in said and "free" in said
            trouble = "noticed" if counted else f"without bytes: {said}"
        elif not trouble and code in (0, 3):  # a checkpoint or progress that can be done without
            trouble = "survived"
        if left_in(tmp_path / "run/fitted") != before:
            trouble = "the run that was there is not as it was"
        litter = [p.name for p in (tmp_path / "run").rglob("*.tmp")]
        if litter or list((tmp_path / "run").rglob(".probe")):
            trouble = f"left behind: {litter or '.probe'}"
        tally.add(trouble or f"code {code}: {said[-300:]}", f"write {full} of {writes}")
    tally.close()
