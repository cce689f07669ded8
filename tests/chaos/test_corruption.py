"""Every file of finished and interrupted runs, damaged at random: noticed by name, or harmless."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from jobs import JOBS, left_in
from tally import Tally, count, disorder, rng

from tikhon.cli import main
from tikhon.runs import checkpoint
from tikhon.runs.interrupt import Stopped

FOREIGN = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"[" * 100_000,
    b"\xff\xfe\x00",
    b'{"schema_version": 1}',
    b'{"schema_version": 99}',
    b'{"kind": "fit", "data": [], "model": 3}',
    b"\x00" * 64,
)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One random damage."""
    kind = draw.choice(("bit", "zeros", "cut", "foreign", "twice", "grown"))
    place = draw.randrange(max(len(content), 1))
    if kind == "bit" and content:
        return (
            content[:place]
            + bytes([content[place] ^ 1 << draw.randrange(8)])
            + content[place + 1 :]
        )
    if kind == "zeros":
        return content[:place] + bytes(64) + content[place + 64 :]
    if kind == "cut":
        return content[:place]
    if kind == "twice":
        return content + content
    if kind == "grown":
        return content + draw.randbytes(32)
    return draw.choice(FOREIGN)


def interrupted(path: Path, name: str, monkeypatch) -> None:
    """A run of the command that was killed under way."""
    calls = 0

    def dies(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise SystemExit(9)
        return original(*arguments, **options)

    from tikhon.runs import journal

    holder, what = (checkpoint, "save") if name == "fit" else (journal.Journal, "append")
    calls = -2
    with monkeypatch.context() as patch:
        if name == "path":
            holder, what = checkpoint, "save"
            patch.setitem(checkpoint.PeriodicCheckpoint.__init__.__kwdefaults__, "every", 0.0)
        original = getattr(holder, what)
        patch.setattr(holder, what, dies)
        often = ["0.0001" if word == "0.02" else word for word in JOBS[name].arguments[:-1]]
        with pytest.raises((SystemExit, Stopped)):
            main([*often, str(path)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> (what the finished run left, its folder, the folder of one that was killed)."""
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    found = {}
    for name in ("fit", "tune", "compare", "path"):
        whole, cut = folder / name, folder / f"{name}-cut"
        assert main([*JOBS[name].arguments[:-1], str(whole)]) == 0
        interrupted(cut, name, patch)
        found[name] = left_in(whole), whole, cut
    return found


def answers(run: Path, out: Path) -> tuple[int, bytes]:
    code = main(["predict", str(run), "iris", "--quiet", "--output", str(out)])
    return code, out.read_bytes() if code == 0 else b""


def judge(code: int, said: str, file: Path, *, same: bool) -> str:
    """What became of it."""
    if trouble := disorder(said):
        return trouble
    if code == 0:
        return "survived" if same else "another answer and exit code 0"
    if code not in (2, 4, 5):
        return f"code {code}: {said[-300:]}"
    return "noticed" if file.name.split(".")[0] in said or "config" in said else f"unnamed: {said}"


@pytest.mark.timeout(36_000)
def test_files_of_finished_runs(runs, tmp_path, capsys):
    draw, tally = rng("finished"), Tally("damaged files of finished runs")
    expected = {
        name: answers(runs[name][1], tmp_path / "p.csv") for name in ("fit", "tune", "path")
    }
    for _ in range(count(8, 200)):
        name = draw.choice(list(runs))
        run = shutil.copytree(runs[name][1], tmp_path / "run")
        file = draw.choice([p for p in sorted(run.rglob("*")) if p.is_file()])
        before = file.read_bytes()
        content = damaged(before, draw)
        file.write_bytes(content)
        capsys.readouterr()
        (tmp_path / "p.csv").unlink(missing_ok=True)
        if name in expected and draw.random() < 0.6:
            code, told = answers(run, tmp_path / "p.csv")
            outcome = judge(code, capsys.readouterr().err, file, same=told == expected[name][1])
        else:
            code = main(["report", str(run), "--quiet"])
            read = file.name in ("config.json", "result.json", "manifest.json", "history.jsonl")
            same = content == before or not read
            outcome = judge(code, capsys.readouterr().err, file, same=same)
        tally.add(outcome, f"{name}: {file.relative_to(run)} {content[:40]!r}")
        shutil.rmtree(run)
    tally.close()


@pytest.mark.timeout(36_000)
def test_files_of_interrupted_runs(runs, tmp_path, capsys):
    draw, tally = rng("interrupted"), Tally("damaged files of interrupted runs")
    for _ in range(count(4, 100)):
        name = draw.choice(list(runs))
        run = shutil.copytree(runs[name][2], tmp_path / "run")
        (run / ".lock").unlink(missing_ok=True)
        file = draw.choice([p for p in sorted(run.rglob("*")) if p.is_file()])
        content = damaged(file.read_bytes(), draw)
        file.write_bytes(content)
        capsys.readouterr()
        code = main([*JOBS[name].arguments[:-1], str(run), "--resume"])
        same = code == 0 and left_in(run) == runs[name][0]
        outcome = judge(code, capsys.readouterr().err, file, same=same)
        tally.add(outcome, f"{name}: {file.relative_to(run)} {content[:40]!r}")
        shutil.rmtree(run)
    tally.close()
