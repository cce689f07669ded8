"""Every command, killed at a random moment by every signal: nothing is lost, nothing is wrong."""

from __future__ import annotations

import shutil
import signal
import time

import pytest
from jobs import JOBS, PROGRAM, SAME, left_in, leftovers
from tally import SHARE, Tally, count, disorder, rng

from cli.process import Tikhon
from tikhon.cli import main
from tikhon.runs.manifest import is_sealed, verify

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
QUICK = ("fit", "compare")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a program and a fitted run, and all that the commands import."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "program.py").write_text(PROGRAM)
    given = "fit iris --epochs 3 --no-linear --quiet --output"
    assert main([*given.split(), str(folder / "fitted")]) == 0
    return folder


def finished(job, folder, *more):
    return Tikhon([*job.arguments, *more], folder).wait(timeout=400)


def verified(path) -> str:
    """What is wrong with a finished folder."""
    if not path.is_dir() or not is_sealed(path):
        return "" if path.exists() else f"{path} is missing"
    verify(path, *(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    return ""


def completed(job, folder) -> str:
    """Take the job up after a kill; what goes wrong with it."""
    started = (folder / job.output / "config.json").exists()
    again = finished(job, folder, *([job.again] if job.again and started else []))
    if trouble := disorder(again.err):
        return trouble
    if again.code not in ((0, 3) if "cure" in job.arguments else (0,)):
        if not (job.resumable and "is finished" in again.err):
            return f"code {again.code}: {again.err[-400:]}"
    return ""


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", JOBS if SHARE else QUICK)
def test_a_command_that_is_killed(name, prepared, tmp_path):
    job, draw, tally = JOBS[name], rng(name), Tally(f"kills of {name}")
    shutil.copytree(prepared, tmp_path / "whole")
    finished(job, tmp_path / "whole")  # imports what the first one imports
    shutil.rmtree(tmp_path / "whole")
    shutil.copytree(prepared, tmp_path / "whole")
    began = time.perf_counter()
    told = finished(job, tmp_path / "whole")
    length = time.perf_counter() - began
    assert told.code in (0, 3), told.err
    whole = left_in(tmp_path / "whole" / job.output)
    for number in range(count(2, 100)):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        child, sent = Tikhon(list(job.arguments), folder), draw.choice(SIGNALS)
        time.sleep(draw.uniform(0, length))
        child.send(sent)
        ended = child.wait(timeout=120)
        what = f"{sent.name} to {name}"
        trouble = disorder(ended.err)
        if ended.code not in (0, 3, -sent, 128 + sent) and not trouble:
            trouble = f"code {ended.code}: {ended.err[-400:]}"
        trouble = trouble or ("" if ended.code in (0, 3) else completed(job, folder))
        trouble = trouble or verified(folder / job.output)
        if not trouble and (left := leftovers(folder / job.output)):
            trouble = f"left behind: {left}"
        if not trouble and name in SAME and left_in(folder / job.output) != whole:
            trouble = "another result"
        tally.add(trouble or "survived", what)
        shutil.rmtree(folder)
    tally.close()
