"""Ctrl-C, SIGTERM and kill -9 on real processes; the resumed run equals the uninterrupted one."""

import json
import os
import shlex
import signal
import time

import pytest

from tikhon.runs import checkpoint

FIT = ["fit", "digits", "--l1", "1e-4", "--dropout", "0.3", "--epochs", "20", "--quiet",
       "--checkpoint-every", "0.1", "--output", "run"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("whole")
    assert command.run(*FIT, cwd=folder).code == 0
    return left_in(folder / "run")


def left_in(run):
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{**row, "seconds": 0} for row in rows], (run / "model.safetensors").read_bytes()


def under_way(run):
    """Some epochs are done and a checkpoint is written."""
    history = run / "history.jsonl"
    return lambda: (
        history.exists()
        and history.read_text().count("\n") >= 2
        and checkpoint.exists(run / "checkpoint")
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_good_order_and_the_printed_command_continues(
    tmp_path, whole, command, number, code
):
    arguments = [a for a in FIT if a != "--quiet"]
    child = command.start(arguments, tmp_path)
    child.until(under_way(tmp_path / "run"))
    child.send(number)
    ended = child.wait()
    assert ended.code == code and ended.out == ""
    again = shlex.split(ended.err.strip().splitlines()[-1])
    assert again[0] == "tikhon" and again[-1] == "--resume"
    assert not (tmp_path / "run/result.json").exists()
    assert command.run(*again[1:], cwd=tmp_path).code == 0
    assert left_in(tmp_path / "run") == whole


def test_kill_9_in_the_middle_of_a_fit(tmp_path, whole, command):
    child = command.start(FIT, tmp_path)
    child.until(under_way(tmp_path / "run"))
    child.send(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    state = checkpoint.load(tmp_path / "run/checkpoint")
    assert 0 < state["step"] < 20 * 17
    assert command.run(*FIT, "--resume", cwd=tmp_path).code == 0
    assert left_in(tmp_path / "run") == whole
    assert not [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_the_second_ctrl_c_stops_at_once_and_the_checkpoint_survives(tmp_path, command):
    def slow_saving():
        original = checkpoint.save
        checkpoint.save = lambda *a: (original(*a), time.sleep(60))

    child = command.start(FIT, tmp_path, before=slow_saving)
    child.until(lambda: checkpoint.exists(tmp_path / "run/checkpoint"))
    child.send(signal.SIGINT)
    time.sleep(0.3)  # two signals at once are one
    child.send(signal.SIGINT)
    ended = child.wait(timeout=30)
    assert ended.code == 130 and "--resume" not in ended.err
    assert checkpoint.load(tmp_path / "run/checkpoint")["step"] > 0


def test_a_demo_can_be_stopped(tmp_path, command):
    child = command.start(["demo", "--quick"], tmp_path)
    child.until((tmp_path / "runs/demo/config.json").exists)
    child.send(signal.SIGINT)
    assert child.wait().code == 130
    assert not (tmp_path / "runs/demo/result.json").exists()


def test_ctrl_c_before_there_is_anything_to_keep_is_said(tmp_path, command):
    def stopped_while_reading():
        from tikhon import data

        data.load = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)

    ended = command.start(FIT, tmp_path, before=stopped_while_reading).wait()
    assert (ended.code, ended.out, ended.err) == (130, "", "stopped\n")
    assert not (tmp_path / "run").exists()
