"""Every command that can be resumed goes on over a table, whatever was written of its columns."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tikhon.cli import main
from tikhon.runs.manifest import has_manifest
from tikhon.runs.run_directory import CONFIG, RESULT, RunDirectory

JOBS = {
    "fit": "fit --epochs 2 --no-linear",
    "tune": "tune --budget 2runs --epochs 2 --model mlp:4 --folds 0",
    "path": "path --strengths 4 --folds 2",
    "compare": "compare --methods none,l2 --splits 2 --trials 1 --epochs 2",
}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A table with numbers, classes, words among numbers, dates and decimal commas."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    lines = ["a;b;c;d;y"]
    for _ in range(80):
        number = f"{draw.gauss(0, 1):.3f}".replace(".", ",")
        few = draw.choice(["low", "low", str(draw.randint(1, 50))])
        day = f"{draw.randint(1, 28)}.{draw.randint(1, 12)}.2021"
        lines.append(f"{number};{draw.choice('pqr')};{few};{day};{draw.choice('uv')}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return ["t.csv", "--target", "y", "--na-values", "none", "--quiet", "--output", "run"]


@pytest.mark.parametrize("verb", JOBS)
def test_a_run_over_a_table_that_was_killed_goes_on(verb, rows, monkeypatch, capsys):
    name, *options = JOBS[verb].split()
    arguments = [name, *rows, *options]
    taken = RunDirectory.take

    def dies(folder, config, **how):
        taken(folder, config, **how)
        raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunDirectory, "take", dies)
        main(arguments)
    assert main([*arguments, "--drop", "a", "--resume"]) == 2
    assert "the configuration changed" in capsys.readouterr().err
    table = Path(rows[0])
    text = table.read_text()
    table.write_text(text.replace(";p;", ";q;"))
    assert main([*arguments, "--resume"]) == 2
    said = capsys.readouterr().err
    assert ("sha256" in said or "data.fingerprint" in said) and "preprocessing" not in said
    table.write_text(text)  # the same rows, written again
    assert main([*arguments, "--resume"]) == 0
    assert main([*arguments, "--resume"]) == 2  # it is finished


LAST = [*((verb, RESULT) for verb in JOBS), ("tune", CONFIG)]  # it alone writes its CONFIG twice


@pytest.mark.parametrize(("verb", "last"), LAST)
def test_a_run_that_was_killed_after_its_last_files_is_completed(verb, last, rows, monkeypatch):
    name, *options = JOBS[verb].split()
    arguments = [name, *rows, *options]
    written = RunDirectory.write
    finished = []

    def dies(folder, document, content):
        written(folder, document, content)
        finished.append(document)
        if document == last and (last == RESULT or finished.count(CONFIG) > 1):
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunDirectory, "write", dies)
        main(arguments)
    assert not has_manifest(Path("run"))
    assert main([*arguments, "--resume"]) == 0
    assert has_manifest(Path("run"))
    left = [Path("run/.lock"), Path("run/.manifest.json.abcdefgh.tmp")]
    for file in left:  # of a kill after the last file
        file.touch()
    assert main([*arguments, "--resume"]) == 2  # it is finished
    assert not any(file.exists() for file in left)


def test_a_fit_that_is_killed_before_its_page_has_its_whole_result(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.csv"
    rows = (f"{k % 7},{k % 5},{'yes' if k % 2 else 'no'}" for k in range(60))
    table.write_text("\n".join(["a,b,kind", *rows]))
    given = ["fit", str(table), "--target", "kind", "--epochs", "2", "--quiet", "--output"]
    assert main([*given, str(tmp_path / "whole")]) == 0

    def killed(*args, **options):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr("tikhon.cli.fit_job.conclude_fit", killed)
        with pytest.raises(SystemExit):
            main([*given, str(tmp_path / "killed")])
    assert main([*given, str(tmp_path / "killed"), "--resume"]) == 0
    whole, found = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")
    )
    assert found.keys() == whole.keys() and found["predictions"] == whole["predictions"]
    assert (tmp_path / "killed" / "report.html").exists()
