"""Commands x files: one answer for what means the same, or one sentence that refuses it.

The cells of `tests/test_verbs.py` for what reads its data from a file: the commands, and
`compare`, whose data are what `load` gives. Every command runs in this process.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tikhon as tk
from tikhon.cli import main
from tikhon.comparison import compare
from tikhon.data import load, split
from tikhon.data.table import TableOptions
from tikhon.errors import DataError, InputError
from tikhon.models import build
from tikhon.training.losses import NAMES

ROWS = 60
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 3)).round(3).astype(np.float32)
CLASSES = np.arange(ROWS) % 3
NUMBERS = (X @ [1.0, -1.0, 0.5] + 0.3).round(3)
MODEL = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, {outputs})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- commands


def told(capsys: Any, *arguments: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([*arguments, "--json", "--quiet"])
    out, err = capsys.readouterr()
    if code:
        raise Refused(re.sub(r"^(tikhon|error): |\s+", " ", err.strip()).strip())
    return json.loads(out)


class Refused(Exception):
    """What a command says where it refuses."""


def fit(capsys: Any, *data: str) -> float:
    return told(capsys, "fit", *data, "--epochs", "1", "--no-linear")["metrics"]["valid/loss"]


def tune(capsys: Any, *data: str) -> float:
    few = ("--epochs", "1", "--budget", "1runs", "--model", "mlp:4")
    return told(capsys, "tune", *data, *few)["score"]


def path(capsys: Any, *data: str) -> float:
    return told(capsys, "path", *data, "--strengths", "0.1", "--folds", "2")["scores"][0]


FEW: dict[str, Any] = {"splits": 1, "trials": 1, "epochs": 1}


def compare_command(capsys: Any, *data: str) -> float:
    few = [text for name, value in FEW.items() for text in (f"--{name}", str(value))]
    return told(capsys, "compare", *data, "--methods", "none", *few)["methods"][0]["test"]


def compare_call(capsys: Any, *data: str) -> float:
    return compare(source_of(*data), ["none"], **FEW).rows[0]["test"]


def source_of(spec: str, *options: str) -> Any:
    return load(spec, table=TableOptions(options[1]) if options else None)


COMMANDS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (fit, tune, path, compare_command, compare_call)
}


def answer(command: str, capsys: Any, *data: str) -> float | str:
    try:
        return COMMANDS[command](capsys, *data)
    except (Refused, InputError, DataError) as error:
        return re.sub(r"\(\d[\d, ]*\)|'[^']*'", "*", str(error))


# ---- data x commands


def table(x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(x, columns=list("abc")).assign(t=y)


def npz(x: np.ndarray, y: np.ndarray) -> tuple[str, ...]:
    np.savez("d.npz", X=x, y=y)
    return ("d.npz",)


def npy(x: np.ndarray, y: np.ndarray) -> tuple[str, ...]:
    Path("d").mkdir()
    np.save("d/X.npy", x)
    np.save("d/y.npy", y)
    return ("d",)


def text(suffix: str, **style: Any) -> Callable[..., tuple[str, ...]]:
    def write(x: np.ndarray, y: np.ndarray) -> tuple[str, ...]:
        table(x, y).to_csv(f"d{suffix}", index=False, **style)
        return (f"d{suffix}", "--target", "t")

    return write


def lines(x: np.ndarray, y: np.ndarray) -> tuple[str, ...]:
    table(x, y).to_json("d.jsonl", orient="records", lines=True)
    return ("d.jsonl", "--target", "t")


def columns(x: np.ndarray, y: np.ndarray) -> tuple[str, ...]:
    pytest.importorskip("pyarrow")
    table(x, y).to_parquet("d.parquet")
    return ("d.parquet", "--target", "t")


FILES: dict[str, Callable[..., tuple[str, ...]]] = {
    "npz": npz,
    "npy": npy,
    "csv": text(".csv"),
    "semicolons": text(".csv", sep=";", decimal=","),
    "tabs": text(".tsv", sep="\t"),
    "gzip": text(".csv.gz"),
    "lines": lines,
    "columns": columns,
}
FEW_FILES = ("npz", "csv", "lines")
TARGETS: dict[str, dict[str, np.ndarray]] = {  # by what they mean; arrays alone have shapes
    "column": {"(n,)": NUMBERS, "(n, 1)": NUMBERS[:, None], "float32": NUMBERS.astype("f4")},
    "classes": {"int64": CLASSES, "int8": CLASSES.astype("i1"), "(n, 1)": CLASSES[:, None],
                "text": np.array(["u", "v", "w"])[CLASSES]},
    "bits": {"boolean": CLASSES > 0, "int": (CLASSES > 0).astype(int),
             "text": np.where(CLASSES > 0, "yes", "no")},
}  # fmt: skip


@pytest.mark.parametrize("meaning", ["column", "classes"])
@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_every_form_give_the_same_answer(command, meaning, capsys, tmp_path, monkeypatch):
    y, found = next(iter(TARGETS[meaning].values())), {}
    for form, write in FILES.items():
        if form not in FEW_FILES and command not in ("fit", "compare_call"):
            continue  # the same door, and they take longer
        (tmp_path / form).mkdir()
        monkeypatch.chdir(tmp_path / form)
        found[form] = answer(command, capsys, *write(X, y))
    assert isinstance(found["npz"], float), found
    assert found == {form: pytest.approx(found["npz"], rel=1e-4) for form in found}


@pytest.mark.parametrize(
    ("command", "meaning"),
    [
        *itertools.product(("fit", "compare_call"), TARGETS),
        ("compare_command", "classes"),  # the same door as the call
    ],
)
def test_targets_of_every_shape_give_the_same_answer(
    command, meaning, capsys, tmp_path, monkeypatch
):
    found = {}
    for place, (kind, y) in enumerate(TARGETS[meaning].items()):
        for form in ("npz", "csv") if y.ndim == 1 else ("npz",):
            (tmp_path / f"{place}{form}").mkdir()
            monkeypatch.chdir(tmp_path / f"{place}{form}")
            found[kind, form] = answer(command, capsys, *FILES[form](X, y))
    first = next(iter(found.values()))
    assert isinstance(first, float), found
    assert found == {cell: pytest.approx(first, rel=1e-4) for cell in found}


def missing(x: Any, y: Any) -> tuple[str, ...]:
    table(x, y).to_csv("d.csv", index=False)
    return ("d.csv", "--target", "nothing")


def bare(x: Any, y: Any) -> tuple[str, ...]:
    table(x, y).to_csv("d.csv", index=False)
    return ("d.csv",)


NONSENSE: dict[str, Callable[..., tuple[str, ...]]] = {
    "no target": bare,
    "an unknown target": missing,
    "an unknown name": lambda x, y: ("nothing_of_the_kind",),
    "no file": lambda x, y: ("there/is/no.npz",),
    "another number of rows": lambda x, y: npz(x, y[:-1]),
    "one class": lambda x, y: npz(x, np.zeros(ROWS, int)),
    "no rows": lambda x, y: npz(x[:0], y[:0]),
    "a value that is not finite": lambda x, y: npz(np.where(x > 2, np.nan, x), y),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_in_one_sentence_by_all(what, capsys):
    data = NONSENSE[what](X, CLASSES)
    found = {command: answer(command, capsys, *data) for command in COMMANDS}
    assert all(isinstance(v, str) for v in found.values()), found
    assert len(set(found.values())) == 1, found


# ---- losses x commands

FITTING = {
    "column": ("mse", "mae", "half_mse", "huber", "auto"),
    "classes": ("cross_entropy", "auto"),
}


@pytest.mark.parametrize(
    ("meaning", "loss"), [(m, loss) for m, losses in FITTING.items() for loss in losses]
)
def test_a_loss_of_the_shell_is_that_of_python(meaning, loss, capsys):
    data = npz(X, next(iter(TARGETS[meaning].values())))
    found = told(capsys, "fit", *data, "--loss", loss, "--epochs", "2", "--no-linear")
    parts = split(load(data[0]), valid=0.2, test=0.2, seed=0)
    torch.manual_seed(0)
    net = build("mlp", parts.train.shape, parts.train.outputs, rows=parts.train.x)
    train, valid = (parts.train.x, parts.train.y), (parts.valid.x, parts.valid.y)
    run = tk.fit(net, train, valid=valid, loss=loss, epochs=2, linear=False)
    assert found["metrics"]["valid/loss"] == pytest.approx(run.metrics["valid/loss"], rel=1e-6)


@pytest.mark.parametrize("meaning", FITTING)
@pytest.mark.parametrize("loss", [*NAMES, "cross_entrophy"])
def test_a_loss_that_does_not_fit_is_refused_in_one_sentence(meaning, loss, capsys):
    if loss in FITTING[meaning] or (meaning, loss) == ("column", "bce"):
        return
    data = npz(X, next(iter(TARGETS[meaning].values())))
    found = {
        command: answer(command, capsys, *data, "--loss", loss) for command in ("fit", "tune")
    }
    if loss == "nll" and meaning == "classes":  # of log probabilities: no command can know
        assert all(isinstance(v, float) for v in found.values())
        return
    assert all(isinstance(v, str) for v in found.values()), found
    assert len(set(found.values())) == 1, found
