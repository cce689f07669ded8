"""`tikhon diagnose` and `cure` on a user's own file: documents, exit codes, errors in one line."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from tikhon.cli import main, user_objects
from tikhon.cli.diagnose import load_program
from tikhon.cli.tables import TableArguments
from tikhon.cli.terminal import Terminal
from tikhon.report.document import build
from tikhon.report.saved import read

PROGRAM = """
import torch
from torch import nn

def make_model():
    layers = [m for _ in range(20) for m in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3))

def small():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def make_data():
    torch.manual_seed(1)
    y = torch.arange(240) % 3
    return torch.randn(240, 6) + 3 * nn.functional.one_hot(y, 6), y

def make_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.05)

def broken():
    return nn.Linear(9, 3)

number = 7
"""

LINES = """
from torch import nn

def line():
    return nn.Linear(2, 1)

def flat():
    return nn.Sequential(line(), nn.Flatten(0))
"""

COUNTED = """
CALLS = []

def counted():
    CALLS.append(1)
    return line()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_objects, "_modules", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.py").write_text(PROGRAM)
    return tmp_path


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("model", ["line", "flat"])
def test_numbers_to_predict_have_the_shape_of_the_answer(program, capsys, model):
    """The loss by name and the table are ours: no fault of the user's may come from them."""
    (program / "line.py").write_text(LINES)
    rows = "".join(f"{i % 17},{i % 7},{i % 17 - 2 * (i % 7) + i % 3}\n" for i in range(500))
    (program / "t.csv").write_text("a,b,y\n" + rows)
    run("diagnose", f"line.py:{model}", "--data", "t.csv", "--target", "y", "--loss", "mse",
        "--optimizer", "adam:1e-2", "--steps", 20)  # fmt: skip
    assert "broadcast_loss" not in capsys.readouterr().out


def test_a_factory_is_called_once_to_shape_the_targets_of_both_data(program):
    (program / "line.py").write_text(LINES + COUNTED)
    (program / "t.csv").write_text(
        "a,b,y\n" + "".join(f"{i},{i % 7},{i / 3}\n" for i in range(50))
    )
    loaded = load_program(
        *("line.py:counted", "t.csv", "mse", None, "t.csv", None),
        table=TableArguments("y"),
        seed=0,
        terminal=Terminal(quiet=True),
    )
    assert loaded["data"][1].ndim == loaded["valid"][1].ndim == 2
    assert loaded["model"].__globals__["CALLS"] == [1]


def test_findings_go_to_stdout_and_the_gate_fails(program, capsys):
    code = run("diagnose", "train.py:make_model", "--data", "train.py:make_data", "--steps", 10,
               "--optimizer", "train.py:make_optimizer", "--fail-on", "warning",
               "--output", "run")  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 3
    assert "vanishing_gradient" in out
    assert "running train.py for MODEL" in err
    result = json.loads((program / "run" / "result.json").read_text())
    assert result["kind"] == "diagnosis"
    assert "vanishing_gradient" in result["labels"]


def test_the_column_of_a_table_is_named(program, capsys):
    numbers = [
        [(k * step) % 1 for step in (0.37, 0.71, 0.13, 0.59, 0.83, 0.29)] for k in range(200)
    ]
    rows = (f"{','.join(f'{v:.3f}' for v in row)},{'abc'[k % 3]}" for k, row in enumerate(numbers))
    (program / "t.csv").write_text("a,b,c,d,e,f,kind\n" + "\n".join(rows) + "\n")
    asked = ("diagnose", "train.py:small", "--data", "t.csv", "--steps", 5, "--optimizer", "adam")
    assert run(*asked) == 2
    assert "--target" in capsys.readouterr().err
    assert run(*asked, "--target", "kind") == 0
    assert "tikhon diagnose: Sequential" in capsys.readouterr().out


def test_json_is_one_document_and_a_healthy_model_passes_the_gate(program, capsys):
    code = run(
        "diagnose", "train.py:small", "--data", "train.py:make_data", "--steps", 60,
        "--optimizer", "adam:0.01", "--fail-on", "warning", "--json", "--quiet",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, out[:500]
    assert json.loads(out)["ok"]
    assert err == ""


def test_cure_prints_what_helped(program, capsys):
    code = run("cure", "train.py:small", "--data", "train.py:make_data", "--steps", 30, "--seeds",
               2, "--optimizer", "sgd:1e-6", "--budget", "1h", "--output", "cured")  # fmt: skip
    out, _ = capsys.readouterr()
    assert code == 0
    assert "confirmed" in out
    assert "patch:" in out
    assert json.loads((program / "cured" / "result.json").read_text())["kind"] == "cure"


def test_a_cure_is_one_document(program, capsys):
    code = run("cure", "train.py:small", "--data", "train.py:make_data", "--steps", 3, "--seeds",
               2, "--optimizer", "sgd:1e-6", "--budget", "1s", "--json", "--quiet")  # fmt: skip
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["kind"] == "cure" and err == ""
    assert code == (0 if document["confirmed"] else 3)  # a second may be too short


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        (["iris"], ["fc1 Linear 4>128", "fc2 Linear 128>3"]),
        (["diabetes"], ["fc1 Linear 10>128", "fc2 Linear 128>1"]),
        (["mlp:7", "--data", "iris"], ["fc1 Linear 4>7", "fc2 Linear 7>3"]),
    ],
)
def test_a_network_of_fit_is_diagnosed_by_name_or_by_data_alone(
    program, capsys, arguments, layers
):
    assert run("diagnose", *arguments, "--steps", 5) == 0
    out, _ = capsys.readouterr()
    assert all(layer in out for layer in layers), out
    assert "Adam lr 0.001, 5 steps" in out


def test_a_table_that_has_changed_is_read_again(program, capsys):
    rows = [(i % 7, i % 5, i % 3, "pq"[i % 2]) for i in range(60)]
    for columns, header in ((3, "a,b,c,y"), (2, "a,b,y")):
        lines = [",".join(map(str, (*row[:columns], row[-1]))) for row in rows]
        (program / "t.csv").write_text("\n".join([header, *lines]) + "\n")
        assert run("diagnose", "t.csv", "--target", "y", "--steps", 5) == 0
        assert f"Linear {columns}>128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diagnose", "train.py:small"], "--data is needed"),
        (["cure", "train.py:small", "--data", "iris"], "--optimizer is needed"),
        (["diagnose", "mlp", "--data", "train.py:make_data"], "give FILE.py:NAME of your model"),
        (["diagnose", "mpl", "--data", "iris"], "did you mean 'mlp'"),
        (["diagnose", "mlp-4-9-2", "--data", "iris"], "write mlp-4-9-3"),
    ],
)
def test_what_is_missing_is_named(program, capsys, arguments, words):
    assert run(*arguments) == 2
    _, err = capsys.readouterr()
    assert words in err


BAD = [
    (["train.py:make_modle"], "did you mean 'make_model'"),
    (["nothing.py:make_model"], "there is no file"),
    (["train.py"], "such as train.py:make_model"),
    (["train.py:number"], "not a module"),
    (["train.py:broken"], "failed on a batch"),
    (["train.py:small", "--optimizer", "adm:1e-3"], "did you mean 'adam'"),
    (["train.py:small", "--optimizer", "adam:fast"], "not a number"),
    (["train.py:small", "--optimizer", "sgd:0.1,momentun=0.9"], "did you mean 'momentum'"),
    (["train.py:small", "--loss", "cross_entrpy"], "did you mean 'cross_entropy'"),
    (["train.py:small", "--fail-on", "alarm"], "severity"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[b[1] for b in BAD])
def test_errors_are_one_line_and_exit_code_two(program, capsys, arguments, words):
    assert run("diagnose", *arguments, "--data", "train.py:make_data") == 2
    _, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in err


UNLEARNED = {
    "NOTHING LEARNED": (
        "nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))",
        ("--data", "iris", "--steps", 40, "--optimizer", "sgd:0.01"),
        "Nothing was learned",
    ),
    "FAR BEHIND": (
        "nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))",
        ("--data", "digits", "--steps", 30, "--optimizer", "adam:3e-4"),
        "shallow",
    ),
}


@pytest.mark.parametrize("verdict", UNLEARNED)
def test_what_learned_little_is_not_called_well(verdict, program, capsys, monkeypatch):
    """The terminal says so; the page said that no problem was found, in green."""
    layers, options, words = UNLEARNED[verdict]
    (program / "train.py").write_text(f"from torch import nn\ndef net():\n    return {layers}\n")
    asked = ("train.py:net", *options)
    monkeypatch.setattr(sys, "argv", ["tikhon", "diagnose", *map(str, asked)])
    assert run("diagnose", *asked, "-o", "run") == 0
    assert verdict in capsys.readouterr().out.splitlines()[0]
    page = build(read(program / "run"))
    assert page.level == "watch" and words in page.verdict.text("en")
    assert page.next_commands[0].startswith("tikhon cure train.py:net")


def test_a_table_is_read_as_for_fit(program, capsys):
    """With its options, what was inferred from it, and both in the command to run next."""
    rows = "".join(f"{i % 17},5;{i % 7};{i}. Mai;{i % 2}\n" for i in range(200))
    (program / "t.csv").write_text("a;b c;day;y\n" + rows)
    options = "--target y --sep ; --decimal , --categorical day --task classification".split()
    options += ["--drop", "b c"]
    assert run("diagnose", "mlp", "--data", "t.csv", *options, "--steps", 20) in (0, 3)
    shown, told = capsys.readouterr()
    assert "decimal comma" in told and "Linear 3>128" in shown
    assert run("cure", "t.csv", *options, "--budget", "1s", "--steps", 10) in (0, 3)
    for command in (shown + capsys.readouterr().out).split("next:")[1:]:
        assert set(options) <= set(shlex.split(command.splitlines()[0]))


def test_options_of_a_table_are_refused_without_one(program, capsys):
    own = "train.py:make_model --data train.py:make_data --optimizer adam:1e-3 --sep ;".split()
    for verb in ("diagnose", "cure"):
        assert run(verb, *own) == 2
        assert "--sep is for a table, and train.py:make_data is" in capsys.readouterr().err
