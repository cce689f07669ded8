"""What a command says to run next: it parses, runs, and has the settings of what came before."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tikhon.cli import main, parser
from tikhon.cli.terminal import Terminal
from tikhon.cli.tune import _longer_command
from tikhon.cli.user_objects import parse_optimizer
from tikhon.cures.cure import Cure
from tikhon.cures.treatment import optimizer_option
from tikhon.cures.treatments import (
    ADAMS,
    BATCHES_OF_32,
    BATCHNORM,
    CLIP,
    NEGATED_LOSS,
    NO_PENALTY,
    RATES,
    decay,
)
from tikhon.cures.trials import Trials
from tikhon.diagnosis.samples import samples
from tikhon.report.document import build
from tikhon.report.saved import SavedRun

FEW = {
    "fit": ("--epochs", "12", "--model", "mlp:4", "--batch-size", "16", "--seed", "3"),
    "tune": ("--epochs", "8", "--budget", "2runs", "--model", "mlp:4", "--seed", "3"),
    "path": ("--strengths", "0.3,0.01", "--folds", "2", "--seed", "3"),
    "compare": ("--methods", "l2", "--splits", "1", "--trials", "1", "--epochs", "2",
                "--model", "mlp:4", "--batch-size", "16", "--seed", "3"),
}  # fmt: skip
OF_THE_RUN = {"output", "budget", "epochs", "overwrite", "quiet", "json_", "json"}


def parsed(words):
    verb, *arguments = words[1:]
    context = parser().commands[verb].make_context(verb, arguments)
    return verb, context.params


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    a, b, noise = np.random.default_rng(0).normal(size=(3, 120)).round(3)
    frame = pd.DataFrame({"a": a, "b": b, "y": np.where(a + b + 0.1 * noise > 0, "yes", "no")})
    frame.to_csv("rows/t.csv", index=False, sep=";")


@pytest.mark.parametrize("verb", FEW)
def test_a_command_to_run_next_has_the_settings_of_this_one(verb, table, capsys):
    command = ["tikhon", verb, "t.csv", "--data-dir", "rows", "--target", "y", "--sep", ";"]
    command += FEW[verb]
    assert main([*command[1:], "-o", "run", "-q", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["next"]
    before = parsed(command)[1]
    for line in found["next"]:
        following, after = parsed(shlex.split(line))
        if following == "predict":
            assert main(shlex.split(line)[1:]) == 0
            assert len(capsys.readouterr().out.splitlines()) == 121
            continue
        for name in set(before) & set(after) - OF_THE_RUN:
            assert after[name] == before[name], f"{line} has another {name}"


def test_a_search_that_ended_before_its_plan_leads_to_a_longer_one():
    config = {"command": ["tikhon", "tune", "t.csv", "--target", "y", "--budget=15s", "-o", "run"]}
    (line,) = _longer_command(config, "15s")
    assert line == "tikhon tune t.csv --target y --budget 60s"
    assert _longer_command(config, "8runs") == []


TREATED = {t.name: t for t in (*RATES, *ADAMS, decay(0.1), NO_PENALTY, BATCHES_OF_32, CLIP)}
STARTS = ("sgd:0.1,momentum=0.9", "adam:0.001", "adamw:0.1,weight_decay=0.5")


def treated(treatment, start, model="net.py:make"):
    """The treated program, and the page of its cure as started from the shell."""
    kept = parse_optimizer(start, Terminal(quiet=True))
    rows = samples((torch.randn(40, 3), torch.randint(2, (40,))))
    trials = Trials(
        model=lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        loss=nn.CrossEntropyLoss(), optimizer=kept, clip=None, source=rows,
        penalty=lambda net: net[0].weight.abs().sum(), valid_batch=None, batch_size=8,
        seeds=[0], codes=(),
    )  # fmt: skip
    decayed = {"weight_decay": 0.5 if "decay" in start else 0.0}
    diagnosis = SimpleNamespace(record=SimpleNamespace(optimizer=decayed))
    cure = Cure(diagnosis, (), treatment, lambda seed: trials.build(treatment, seed), 8, rows,
                None, nn.CrossEntropyLoss())  # fmt: skip
    command = ["tikhon", "cure", model, "--data", "t.csv", "--target=y", "--optimizer", start,
               "--batch-size", "8", "--penalty", "net.py:lasso", "--budget", "9s"]  # fmt: skip
    kinds = {"kind": "cure", "confirmed": True, "treatment": treatment.name, "patch": "..."}
    arm = {"steps": 1, "scores": [1.0], "effect": 1.0, "effects": [1.0], "verdict": "confirmed"}
    arms = [{**arm, "name": name} for name in ("nothing", treatment.name)]
    result = {**kinds, "place": cure.place, "options": cure.options, "arms": arms}
    return cure.program(0), build(SavedRun(Path("run"), {"command": command}, (), result))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", TREATED)
def test_after_a_cure_the_next_command_has_the_cured_settings(name, start):
    """It named the optimizer that had failed, so that whoever ran it found the fault again."""
    if (name, start) == (ADAMS[0].name, "adam:0.001"):
        pytest.skip("this is its optimizer")
    program, page = treated(TREATED[name], start)
    (line,) = page.next_commands
    verb, options = parsed(shlex.split(line))
    again = parse_optimizer(options["optimizer"], Terminal(quiet=True))(program.model.parameters())
    kept = ("lr", "momentum", "weight_decay")
    wanted = {k: v for k, v in program.optimizer.param_groups[0].items() if k in kept}
    assert {k: v for k, v in again.param_groups[0].items() if k in kept} == pytest.approx(wanted)
    assert type(again) is type(program.optimizer)
    assert (verb, options["target"], options["data"]) == ("diagnose", "y", "t.csv")
    assert options["clip"] == (1.0 if name == CLIP.name else None)
    assert options["batch_size"] == (32 if name == BATCHES_OF_32.name else 8)
    assert options["penalty"] == (None if name == "no penalty" else "net.py:lasso")


def test_a_change_of_code_is_said_before_the_command_that_checks_it():
    _, page = treated(BATCHNORM & ADAMS[1], "sgd:0.1")
    assert "into net.py:make" in page.remarks[0].text("en")
    assert page.next_commands == (
        "tikhon diagnose net.py:make --data t.csv --target=y --batch-size 8 "
        "--penalty net.py:lasso --optimizer adam:0.01",
    )
    for treatment, model in ((BATCHNORM, "mlp:8"), (NEGATED_LOSS, "net.py:make")):
        _, page = treated(treatment, "sgd:0.1", model)  # no option says it
        assert not page.next_commands and "training program" in page.remarks[0].text("en")


def test_a_network_by_name_is_trained_with_the_cured_optimizer():
    _, page = treated(RATES[0] & NO_PENALTY, "sgd:10,momentum=0.9", "mlp:8")
    diagnose, fit = page.next_commands
    assert diagnose.endswith("--optimizer sgd:0.1,momentum=0.9")
    assert parsed(shlex.split(fit))[1]["target"] == "y"
    assert fit == (
        "tikhon fit t.csv --target=y --model mlp:8 --optimizer sgd --lr 0.1 --momentum 0.9 "
        "--batch-size 8"
    )


def test_an_optimizer_that_no_option_says_has_none():
    weights = [torch.zeros(1), torch.zeros(1)]
    apart = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}]
    assert optimizer_option(torch.optim.SGD(apart, lr=1.0)) is None
    assert optimizer_option(torch.optim.Adam(weights, betas=(0.5, 0.9))) is None
    assert optimizer_option(torch.optim.Rprop(weights)) is None
