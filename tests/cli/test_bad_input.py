"""Every bad input: exit code, a message that names the thing and the fix, nothing half-written."""

import json
import os
import resource

import numpy as np
import pytest
import torch

from tikhon import cli, data
from tikhon.cli import main
from tikhon.runs import checkpoint

X = np.random.default_rng(0).normal(size=(60, 4))
Y = np.arange(60) % 3
NAN = np.where((np.arange(60)[:, None] == 7) & (np.arange(4) == 1), np.nan, X)
FILES = {
    "good": {"X": X, "y": Y},
    "lengths": {"X": X, "y": Y[:-1]},
    "nan": {"X": NAN, "y": Y, "feature_names": list("pqrs")},
    "one": {"X": X, "y": np.zeros(60, int)},
}

CASES = {  # arguments after `tikhon fit` -> exit code, parts of the message
    "digit": (2, "unknown data 'digit'", "did you mean 'digits'"),
    "absent.npz": (4, "no file or folder 'absent.npz'", "digits"),
    "lengths.npz": (4, "X has 60 rows but y has 59", "one target per row"),
    "nan.npz": (4, "column 'q'", "first in row 7", "remove or fill"),
    "one.npz": (4, "one class only", "two or more"),
    "mnist --data-dir .": (4, "--data-dir", "TIKHON_DATA", "cache", "network"),
    "iris --l1 -1e-3": (2, "--l1", "finite number >= 0", "'-1e-3'"),
    "iris --l2 nan": (2, "--l2", "finite number >= 0", "'nan'"),
    "iris --l1 lots": (2, "--l1", "'lots'"),
    "iris --dropout 1.0": (2, "dropout must be in [0, 1), received 1.0"),
    "iris --dropout -0.1": (2, "dropout must be in [0, 1), received -0.1"),
    "iris --model mpl": (2, "unknown model 'mpl'", "did you mean 'mlp'"),
    "iris --model mlp-5-3": (2, "does not fit the data", "write mlp-4-3"),
    "iris --optimizer adm": (2, "unknown optimizer 'adm'", "did you mean 'adam'"),
    "iris --penalty lasso:1": (2, "unknown penalty 'lasso'", "group_lasso"),
    "iris --penalty l1:1:2": (2, "--penalty l1", "finite number >= 0", "'1:2'"),
    "iris --penalty fc9*=l1:1e-3": (2, "no parameter matches", "'fc9*'", "fc1.weight"),
    "iris --penalty =,": (2, "[PATTERN=]NAME:STRENGTH", "'=,'"),
    "iris --penalty mcp:1,gama=3": (2, "unknown setting of mcp 'gama'", "did you mean 'gamma'"),
    "iris --l1 1e-3 --group-lasso 1e-3": (
        2,
        "GroupLasso and L1",
        "fc1.weight",
        "SparseGroupLasso",
    ),
    "iris --mixup 1 --cutmix 1": (2, "choose one of them"),
    "iris --lr 0": (2, "lr must be finite and > 0, received 0.0"),
    "iris --batch-size 0": (2, "batch_size must be a whole number, 1 or more"),
    "iris --budget soon": (2, "budget must be a time such as 60s", "'soon'"),
    "iris --valid 1.5": (2, "valid must be a fraction", "1.5"),
    "iris --device gpu": (2, "unknown device 'gpu'", "cpu"),
    "iris --recipe none.toml": (2, "recipe none.toml cannot be read"),
    "iris --early-stopping 0": (2, "early_stopping must be > 0"),
    "iris --epohcs 3": (2, "--epohcs", "tikhon fit --help"),
    "iris --lr fast": (2, "--lr", "received 'fast'", "tikhon fit --help"),
    "iris --output file": (2, "output file is a file", "give a folder"),
    "iris --output other": (2, "files that are not a run's", "notes.txt"),
    "iris --output used": (2, "already holds a run", "--overwrite", "--resume"),
    "iris --output /proc/run": (5, "cannot write /proc/run", "--output"),
    "iris --resume": (2, "--resume needs --output"),
    "iris --resume --output nothing": (2, "nothing to resume", "nothing"),
    "iris --optimizer sgd --lr 1e30": (2, "the loss is", "Lower lr"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIKHON_DATA", raising=False)
    for name, arrays in FILES.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/config.json").write_text('{"kind": "fit"}')
    return tmp_path


def everything(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("arguments", CASES)
def test_bad_input(arguments, folder, capsys):
    code, *parts = CASES[arguments]
    before = everything(folder)
    assert main(["fit", *arguments.split(), "--quiet", "--epochs", "2"]) == code
    out, err = capsys.readouterr()
    for part in parts:
        assert part in err
    assert "Traceback" not in err and out == ""
    left = everything(folder)
    if "1e30" in arguments:  # it had begun: the configuration is there, no result is
        assert not list(folder.rglob("result.json")) and not list(folder.rglob("*.safetensors"))
        return
    assert left == before


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["fti"], ("unknown command 'fti'", "did you mean 'fit'")),
        (["report", "nowhere"], ("no run directory at nowhere",)),
        (["fit"], ("DATA", "tikhon fit --help")),
        (["fit", "iris", "--learning-rate", "1"], ("did you mean --lr?",)),
        (["diagnose", "mlp", "--lr=1"], ("--lr; did you mean --optimizer adam:1e-3?",)),
        (["diagnose", "train.py", "--data", "iris"], ("train.py:make_model",)),
    ],
)
def test_bad_commands(arguments, parts, folder, capsys):
    assert main(arguments) == 2
    _, err = capsys.readouterr()
    assert all(part in err for part in parts) and "Traceback" not in err


def test_help_of_a_command_by_name(capsys):
    assert main(["help", "live"]) == main(["live", "--help"]) == 0
    out, _ = capsys.readouterr()
    assert out[: len(out) // 2] == out[len(out) // 2 :] and "tikhon live" in out


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="unknown data"):
        main(["fit", "digit", "--debug"])


TOML = {
    "epohcs = 3": "unknown key 'epohcs'; did you mean 'epochs'",
    "[fti]\nepochs = 3": "unknown table 'fti'; did you mean 'fit'",
    "[fit]\ndropuot = 0.5": "in [fit]: unknown key 'dropuot'; did you mean 'dropout'",
    "epochs = ": "tikhon.toml",
    "epochs = 3\nepochs = 4": "tikhon.toml",
}


@pytest.mark.parametrize("text", TOML)
def test_bad_configuration_file(text, folder, capsys):
    (folder / "tikhon.toml").write_text(text)
    assert main(["fit", "iris"]) == 2
    assert TOML[text] in capsys.readouterr().err


FIT = ["fit", "iris", "--epochs", "40", "--quiet", "--output", "run"]


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_ends_with_exit_code_5_and_leaves_no_torn_file(folder, command):
    ended = command.run(*FIT, "--checkpoint-every", "0.001", cwd=folder, before=limited(4000))
    assert ended.code == 5
    assert "no space to write" in ended.err and "bytes are needed" in ended.err
    names = {p.name for p in (folder / "run").rglob("*") if p.is_file()}
    assert names <= {"config.json", "history.jsonl"}
    assert json.loads((folder / "run/config.json").read_text())["kind"] == "fit"


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run_continues_later(folder, command):
    whole = command.run(*FIT[:-1], "whole", cwd=folder)
    assert whole.code == 0

    def full_after_three():
        original, count = checkpoint.write_tensors, iter(range(100))

        def write(path, tensors):
            if next(count) >= 3:
                limited(2000)()
            return original(path, tensors)

        checkpoint.write_tensors = write

    ended = command.run(*FIT, "--checkpoint-every", "0.001", cwd=folder, before=full_after_three)
    assert ended.code == 5
    assert 0 < checkpoint.load(folder / "run/checkpoint")["step"] < 40 * 2
    assert command.run(*FIT, "--resume", cwd=folder).code == 0
    models = [(folder / run / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert models[0] == models[1]


def test_two_processes_do_not_share_a_folder(folder, command):
    from tikhon.runs.run_directory import RunDirectory

    with RunDirectory("run") as held:
        held.create()
        ended = command.run(*FIT, cwd=folder)
    assert ended.code == 2
    assert f"in use by process {os.getpid()}" in ended.err


def test_resume_with_a_changed_configuration(folder, command, capsys):
    child = command.start([*FIT, "--l1", "1e-3", "--checkpoint-every", "0.001"], folder)
    child.until(lambda: checkpoint.exists(folder / "run/checkpoint"))
    child.send(9)
    child.wait()
    before = everything(folder)
    assert main([*FIT, "--l1", "2e-3", "--model", "linear", "--seed", "5", "--resume"]) == 2
    err = capsys.readouterr().err
    for part in ("model.name", "mlp", "linear", "penalties[0].strength", "0.001", "0.002", "seed"):
        assert part in err
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--ray"], ["--ray=local"]),
        (["tune", "--ray", "--seed", "1"], ["tune", "--ray=local", "--seed", "1"]),
        (["--ray", "auto", "-q"], ["--ray", "auto", "-q"]),
        (["--ray=10.0.0.1:6379"], ["--ray=10.0.0.1:6379"]),
    ],
)
def test_ray_without_an_address_is_this_machine(given, meant):
    assert cli._complete_ray_option(given) == meant


@pytest.mark.parametrize(
    "takes", [lambda: torch.empty(10**16), lambda: np.empty(10**17), lambda: bytearray(10**17)]
)
def test_a_full_memory_is_told_as_that(monkeypatch, capsys, takes):
    monkeypatch.setattr(data, "load", lambda *a, **k: takes())
    assert main(["fit", "iris"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tikhon: out of memory (") and "fewer rows" in said


@pytest.mark.parametrize(
    "error",
    [
        IsADirectoryError(21, "Is a directory", "config.json"),
        PermissionError(13, "Permission denied", "config.json"),
    ],
)
def test_a_file_that_cannot_be_opened_is_named(monkeypatch, capsys, error):
    def load(*a, **k):
        raise error

    monkeypatch.setattr(data, "load", load)
    assert main(["fit", "iris"]) == 5
    assert capsys.readouterr().err.startswith(f"tikhon: config.json: {error.strerror}")


@pytest.mark.parametrize("command", ["fit", "tune", "path", "compare"])
@pytest.mark.parametrize(
    "given", [("--drop", "a"), ("--na-values", "?"), ("--on-bad-row", "skip"), ("--time", "t")]
)
def test_options_of_a_table_without_its_target_are_refused(command, given, capsys):
    assert main([command, "iris", *given]) == 2
    assert (
        f"{given[0]} is for a table, whose column to predict --target" in capsys.readouterr().err
    )
