"""Every command, killed at a random moment by every signal: nothing is lost, nothing is wrong.

The commands run in forks of this process, which spares them the import of torch; in the long form
some are programs of their own. Some are killed by two signals, some again while they resume.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import signal
import sys
import time

import pytest
from jobs import JOBS, SAME, difference, left_in, leftovers, prepare
from tally import SHARE, Tally, count, disorder, rng

from cli.process import Tikhon
from tikhon.cli import main
from tikhon.runs.manifest import has_manifest, verify

CAUGHT = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*CAUGHT, signal.SIGKILL, signal.SIGKILL, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT)
QUICK = ("fit", "compare")
REAL = 33  # one in so many is a program of its own, in the long form


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a program and a fitted run, and all that the commands import."""
    folder = tmp_path_factory.mktemp("kills")
    prepare(folder)
    given = "fit iris --epochs 3 --no-linear --quiet --output"
    assert main([*given.split(), str(folder / "fitted")]) == 0
    return folder


def start(job, folder, *more, real=False):
    """The command, in a fork of this process or as a program of its own."""
    arguments = [*job.arguments, *more]
    program = [sys.executable, "-m", "tikhon", *arguments]

    def before():
        faulthandler.disable()  # pytest's, which would answer SIGABRT with the stacks
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if real:
            os.execv(program[0], program)

    return Tikhon(arguments, folder, before=before)


def timed(job, folder, prepared, **how):
    """How it ended when nothing happened to it, and after how many seconds."""
    shutil.copytree(prepared, folder)
    began = time.perf_counter()
    ended = start(job, folder, **how).wait(timeout=400)
    assert ended.code in (0, 3), ended.err
    return time.perf_counter() - began


def killed(child, draw, length):
    """Send one signal or two; how it ended, and the codes that are in order."""
    sent = draw.choices(SIGNALS, k=draw.choice((1, 1, 1, 2)))
    time.sleep(draw.uniform(0, length))
    for number in sent:
        child.send(number)
        time.sleep(draw.uniform(0, 0.05))
    ended = child.wait(timeout=120)
    names = "+".join(number.name for number in sent)
    return ended, names, {0, 3, *(-n for n in sent), *(128 + n for n in sent if n in CAUGHT)}


def verified(path) -> str:
    """What is wrong with a finished folder."""
    if not path.is_dir() or not has_manifest(path):
        return "" if path.exists() else f"{path} is missing"
    verify(path, *(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    return ""


def completed(job, folder, draw, length) -> str:
    """Take the job up after a kill; what goes wrong with it."""
    again = None
    if draw.random() < 0.25:  # killed while it resumes, too
        again, names, in_order = killed(start(job, folder, *more(job, folder)), draw, length)
        if again.code not in in_order and "is finished" not in again.err:
            return f"code {again.code} of {names} to the second try: {again.err[-400:]}"
    if again is None or again.code not in (0, 3):
        again = start(job, folder, *more(job, folder)).wait(timeout=400)
    if trouble := disorder(again.err):
        return trouble
    if again.code not in ((0, 3) if "cure" in job.arguments else (0,)):
        if not (job.resumable and "is finished" in again.err):
            return f"code {again.code}: {again.err[-400:]}"
    return ""


def more(job, folder):
    """The option that takes up what is there, if anything is."""
    return [job.again] if job.again and (folder / job.output / "config.json").exists() else []


def state_of(name, path, whole, *, is_killed) -> str:
    """What is wrong with what a finished job has left; one killed since keeps its lock."""
    if trouble := verified(path):
        return trouble
    if not is_killed and (left := leftovers(path)):
        return f"left behind: {left}"
    return difference(left_in(path), whole) if name in SAME else ""


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", JOBS if SHARE else QUICK)
def test_a_command_that_is_killed(name, prepared, tmp_path):
    job, draw, tally = JOBS[name], rng(name), Tally(f"kills of {name}")
    if SHARE:
        timed(job, tmp_path / "first", prepared)  # imports what the first one imports
    length = timed(job, tmp_path / "whole", prepared)
    of_program = timed(job, tmp_path / "program", prepared, real=True) if SHARE else length
    whole = left_in(tmp_path / "whole" / job.output)
    for number in range(count(2, 100)):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        real = bool(SHARE) and number % REAL == REAL - 1
        child = start(job, folder, real=real)
        ended, names, in_order = killed(child, draw, of_program if real else length)
        trouble = disorder(ended.err)
        if ended.code not in in_order and not trouble:
            trouble = f"code {ended.code}: {ended.err[-400:]}"
        is_whole = ended.code in (0, 3)
        if not trouble and not is_whole and draw.random() < job.anew:
            trouble, is_whole = completed(job, folder, draw, length), True
        if is_whole or has_manifest(folder / job.output):
            how = {"is_killed": not is_whole}
            trouble = trouble or state_of(name, folder / job.output, whole, **how)
        tally.add(trouble or "survived", f"{names} to {'the program ' if real else ''}{name}")
        shutil.rmtree(folder)
    tally.close()
