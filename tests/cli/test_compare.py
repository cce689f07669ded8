from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from tikhon.cli import main


def test_compare_writes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    arguments = ["compare", "wine", "--methods", "none,l2+dropout", "--splits", "2", "--trials",
                 "1", "--epochs", "2", "--widths", "4", "--output", str(run), "-q"]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "interval" in shown and "l2+dropout" in shown and "egularization" in shown
    assert (run / "report.html").exists() and "next:   tikhon" in shown
    result = json.loads((run / "result.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert result["kind"] == config["kind"] == "compare"
    assert {row["width"] for row in result["architecture"]["rows"]} == {4}
    assert main([*arguments, "--json", "--overwrite"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["scores"] for row in again["methods"]] == [
        row["scores"] for row in result["methods"]
    ]


@pytest.mark.parametrize(("long", "said"), [(0, ", about "), (10**9, "epochs\n")])
def test_it_tells_how_much_it_is_before_it_begins(tmp_path, capsys, monkeypatch, long, said):
    """Two methods on two splits, three trials each, and two more seeds of each choice."""
    monkeypatch.setattr("tikhon.cli.training_length._ANNOUNCED_FROM", long)
    arguments = ["compare", "iris", "--methods", "none,l2", "--splits", "2", "--trials", "3",
                 "--epochs", "2", "--output", str(tmp_path / "run")]  # fmt: skip
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert told.count("plan: 16 trainings of 2 epochs") == 1 and said in told


def test_a_bad_request_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ["--output", str(tmp_path / "run"), "-q"]
    assert main(["compare", "wine", "--widths", "4,x", *run]) == 2
    assert "--widths takes whole numbers" in capsys.readouterr().err
    assert main(["compare", "wine", "--methods", "none,l3", *run]) == 2
    assert "unknown method 'l3'" in capsys.readouterr().err


SHORT = ["compare", "wine", "--methods", "none,l2,dropout", "--splits", "2", "--trials", "2",
         "--epochs", "2", "--widths", "4", "--quiet", "--output"]  # fmt: skip


def left_in(run: Path):
    found = json.loads((run / "result.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in found["methods"]]
    return rows, found["architecture"], found["verdict"]


def under_way(run: Path, trainings: int = 3):
    journal = run / "journal.jsonl"
    return lambda: journal.exists() and journal.read_text().count('"found"') >= trainings


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("whole")
    assert command.run(*SHORT, "run", cwd=folder).code == 0
    return left_in(folder / "run")


def test_kill_9_in_a_comparison_then_resume_gives_the_uninterrupted_one(tmp_path, whole, command):
    child = command.start([*SHORT, "run"], tmp_path)
    child.until(under_way(tmp_path / "run"))
    child.send(signal.SIGKILL)
    assert child.wait().code == -9
    again = command.run(*SHORT, "run", cwd=tmp_path)
    assert again.code == 2 and "continue it with --resume" in again.err
    other = command.run(*SHORT, "run", "--resume", "--epochs", "5", cwd=tmp_path)
    assert other.code == 2 and "different epochs" in other.err
    assert command.run(*SHORT, "run", "--resume", cwd=tmp_path).code == 0
    assert left_in(tmp_path / "run") == whole
    over = command.run(*SHORT, "run", "--resume", cwd=tmp_path)
    assert over.code == 2 and "is finished" in over.err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_names_what_is_kept_and_the_command_that_goes_on(
    tmp_path, whole, command, number, code
):
    child = command.start([a for a in SHORT if a != "--quiet"] + ["run"], tmp_path)
    child.until(under_way(tmp_path / "run"))
    child.send(number)
    ended = child.wait()
    assert ended.code == code and ended.out == "" and "trainings are kept in run" in ended.err
    again = shlex.split(ended.err.strip().splitlines()[-1])
    assert again[0] == "tikhon" and again[-1] == "--resume"
    assert command.run(*again[1:], cwd=tmp_path).code == 0
    assert left_in(tmp_path / "run") == whole


def test_a_page_that_a_kill_left_out_is_written(tmp_path, whole, command):
    def killed_at_the_page():
        from tikhon.report import document

        document.write_page = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)

    child = command.start([*SHORT, "run"], tmp_path, before=killed_at_the_page)
    assert child.wait().code == -9
    assert not (tmp_path / "run/report.html").exists()
    assert command.run(*SHORT, "run", "--resume", cwd=tmp_path).code == 0
    assert (tmp_path / "run/report.html").exists() and left_in(tmp_path / "run") == whole
