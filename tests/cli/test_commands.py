import json
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tikhon import __version__, report
from tikhon.cli import COMMANDS, main
from tikhon.comparison import demonstration
from tikhon.report.page import Label, PageTable
from tikhon.report.saved import read


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_and_version_import_nothing_heavy():
    """In one process of its own: what is imported is read from sys.modules, not timed."""
    program = """
import sys
from tikhon.cli import COMMANDS, main
for arguments in (["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)):
    assert main(arguments) == 0, arguments
    heavy = {"torch", "numpy", "pandas", "sklearn", "plotly"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout and done.stdout.count("Usage") == len(COMMANDS) + 1


def test_a_fit_imports_no_compiler_and_trains_the_same(folder, capsys):
    """torch's optimizers import `torch._dynamo` at their first step; the command spares it."""
    arguments = ["fit", "iris", "--epochs", "3", "--l2", "1e-3", "--json", "-q", "-o"]
    program = (
        "import sys; from tikhon.cli import main; code = main(); "
        "sys.exit(code or ('torch._dynamo' in sys.modules and 99))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "a"],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "b"]) == 0
    spared, usual = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert spared["metrics"] == usual["metrics"]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_tikhon_alone_shows_its_help(arguments, capsys):
    assert main(arguments) == 0
    assert "diagnose" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command):
    """And `-o` is `--output` wherever there is one."""
    import typer

    from tikhon.cli import build

    group: Any = typer.main.get_command(build())
    for option in group.commands[command].params:
        assert option.help or option.name == "help", f"{command} {option.name}"
        if "--output" in option.opts:
            assert "-o" in option.opts


def test_fit_writes_a_run_and_prints_what_it_found(folder, capsys):
    arguments = ["fit", "iris", "--l1", "1e-2", "--l2", "1e-3", "--epochs", "3", "--verbose"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    run = folder / "runs/iris-1"
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "history.jsonl", "manifest.json", "model.safetensors"),
        *("report.html", "result.json"),
    }
    for part in ("Training", "Validation", "Test", "fc1.weight/L1", "report: runs/iris-1"):
        assert part in out
    for part in ("90 rows to train on", "data loss", "penalty", "fc1 |w|1", "fc1 |w|2", "zeros"):
        assert part in err
    config = json.loads((run / "config.json").read_text())
    assert config["kind"] == "fit" and config["data"]["rows"]["train"] == 90
    assert config["data"]["scaling"]["mean"] and config["model"]["name"] == "mlp"
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    result = json.loads((run / "result.json").read_text())
    assert result["schema_version"] == 1 and result["weights"]["fc1.weight"]["zeros"] >= 0
    assert main(["fit", "iris", "--epochs", "1", "--quiet"]) == 0
    assert (folder / "runs/iris-2/result.json").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("data", ["iris", "diabetes"])
def test_the_terminal_and_the_page_say_the_same(folder, capsys, data):
    """All sentences and numbers of the page's first section are printed, with the yardsticks."""
    assert main(["fit", data, "--epochs", "3", "-q", "-o", "run"]) == 0
    out = capsys.readouterr().out
    page = report.build(read(folder / "run"))
    for words in page.sentences:
        assert words.text("en") in out
    tables = [block for block in page.sections[0].blocks if isinstance(block, PageTable)]
    cells = [cell for table in tables for row in table.rows for cell in row]
    assert len(cells) > 10
    for cell in cells:
        assert (cell.text("en") if isinstance(cell, Label) else str(cell)) in out
    assert "Always" in out and "Linear model, validation" in out
    assert all(command in out for command in page.next_commands) and page.next_commands


def test_without_epochs_it_trains_until_it_no_longer_improves(folder, capsys):
    assert main(["fit", "iris", "-o", "run"]) == 0
    out, err = capsys.readouterr()
    assert "until the validation loss has not improved for 50 epochs" in err
    assert "stopped after" in out and "Still improving" not in out
    assert len(err.splitlines()) < 20  # a line for some of the epochs, where there is no terminal
    config = json.loads((folder / "run/config.json").read_text())
    assert config["recipe"]["early_stopping"] == 50
    assert main(["fit", "iris", "--schedule", "cosine", "-o", "fixed"]) == 0
    assert "20 epochs, because schedule cosine spans them" in capsys.readouterr().err
    history = (folder / "fixed/history.jsonl").read_text().splitlines()
    assert len(history) == 20


def test_progress_prints_an_error_as_the_table_of_scores_does(folder, capsys):
    """Four decimals of an error of 20,000 say nothing."""
    rows = "".join(f"{i},{(i * 7919 % 101) * 1000}\n" for i in range(200))
    (folder / "t.csv").write_text("a,price\n" + rows)
    assert main(["fit", "t.csv", "--target", "price", "--epochs", "1", "--categorical", "a"]) == 0
    out, err = capsys.readouterr()
    shown = next(line.split() for line in err.splitlines() if line.split()[:1] == ["1"])
    scores = next(line.split() for line in out.splitlines() if line.startswith("Training"))
    assert scores[1] in shown and "," in scores[1]


def test_a_linear_yardstick_can_be_left_out(capsys):
    assert main(["fit", "iris", "--epochs", "2", "-q", "--no-linear"]) == 0
    out = capsys.readouterr().out
    assert "Linear" not in out and "Always" in out


def test_json_is_one_document_and_quiet_is_silent(capsys):
    assert main(["fit", "iris", "--epochs", "2", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["metrics"]["test/accuracy"] == told["test"]["accuracy"] >= 0 and err == ""
    assert len(out) < 5000, "the histograms and curves are in result.json"


def test_same_seed_same_result(capsys):
    runs = []
    for seed in ("3", "3", "4"):
        assert main(["fit", "iris", "--epochs", "2", "--json", "-q", "--seed", seed]) == 0
        runs.append(json.loads(capsys.readouterr().out)["metrics"])
    assert runs[0] == runs[1] != runs[2]


def test_overwrite_replaces_the_run_and_nothing_else(folder):
    arguments = ["fit", "iris", "--epochs", "1", "-q", "--output", "run"]
    assert main(arguments) == 0
    (folder / "run/notes.txt").write_text("mine")
    before = (folder / "run/model.safetensors").read_bytes()
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert (folder / "run/model.safetensors").read_bytes() != before
    assert (folder / "run/notes.txt").read_text() == "mine"


def test_settings_from_a_file_are_defaults(folder, capsys):
    (folder / "tikhon.toml").write_text(
        'epochs = 2\nseed = 3\n[fit]\nbatch-size = 30\nl1 = "1e-3"\npenalty = ["fc1*=l2:1e-2"]\n'
    )
    assert main(["fit", "iris", "-q", "--seed", "4", "--output", "run"]) == 0
    config = json.loads((folder / "run/config.json").read_text())
    assert config["optimizer"]["batch_size"] == 30 and config["optimizer"]["epochs"] == 2
    assert config["seed"] == 4
    assert [p["penalty"] for p in config["recipe"]["penalties"]] == ["l1", "l2"]


def test_a_recipe_file_and_a_run_are_recipes(folder):
    (folder / "r.toml").write_text(
        'dropout = 0.25\n[[penalties]]\npenalty = "l1"\nstrength = 1e-3\n'
    )
    fit = ["fit", "iris", "--epochs", "1", "-q"]
    assert main([*fit, "--recipe", "r.toml", "--clip-norm", "1", "--output", "a"]) == 0
    assert main([*fit, "--recipe", "a", "--output", "b"]) == 0
    recipes = [json.loads((folder / n / "config.json").read_text())["recipe"] for n in "ab"]
    assert (
        recipes[0]
        == recipes[1]
        == {
            "penalties": [{"pattern": "*", "penalty": "l1", "strength": 1e-3, "how": "objective"}],
            "dropout": 0.25,
            "clip_norm": 1.0,
        }
    )


def test_own_files_regression_and_models(folder, capsys):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(80, 36)).astype(np.float32)
    np.savez(folder / "own.npz", X=x, y=x[:, 0] * 3 + 1)
    assert main(["fit", "own.npz", "--epochs", "2", "-q", "--model", "linear"]) == 0
    assert "RMSE" in capsys.readouterr().out
    assert main(["fit", "diabetes", "--epochs", "1", "-q", "--model", "mlp:8,4"]) == 0
    assert main(["fit", "digits", "--epochs", "1", "-q", "--model", "convnet"]) == 0


def test_strength_auto_moves(folder):
    assert main(["fit", "iris", "--l2", "auto", "--epochs", "60", "-q", "--output", "run"]) == 0
    rows = [json.loads(line) for line in (folder / "run/history.jsonl").read_text().splitlines()]
    assert len({row["penalty/fc1.weight/L2/strength"] for row in rows}) > 2


@pytest.mark.parametrize("option", ["--l2", "--weight-decay", "--elastic-net"])
def test_what_auto_found_can_be_typed_back(folder, capsys, monkeypatch, option):
    """A strength is printed with its mode; as an option it gives weights of the same size."""
    arguments = ["fit", "iris", option, "auto", "--epochs", "25", "-q", "-o", "auto"]
    monkeypatch.setattr(sys, "argv", ["tikhon", *arguments])
    assert main() == 0
    out = capsys.readouterr().out
    mode = "decoupled" if option == "--weight-decay" else "objective"
    shown = [line for line in out.splitlines() if line.startswith(("fc1.weight/", "fc2.weight/"))]
    assert len(shown) == 2 and all(mode in line for line in shown)
    auto = json.loads((folder / "auto/result.json").read_text())
    assert {told["how"] for told in auto["penalties"].values()} == {mode}
    config = json.loads((folder / "auto/config.json").read_text())
    assert config["recipe"]["penalties"][0]["how"] == mode
    command = shlex.split(auto["next"][-1])
    assert command.count("--penalty") == 2 and option not in command and auto["next"][-1] in out
    assert main([*command[1:], "-q", "-o", "typed"]) == 0
    typed = json.loads((folder / "typed/result.json").read_text())
    for name, told in auto["penalties"].items():
        assert typed["penalties"][name]["strength"] == pytest.approx(told["strength"], rel=1e-3)
        assert typed["penalties"][name]["how"] == mode
    for name, weight in auto["weights"].items():
        assert typed["weights"][name]["l2"] == pytest.approx(weight["l2"], rel=0.15)


def test_weight_decay_is_decoupled_and_l2_part_of_the_objective(folder):
    """One name, one unit: of the objective's, Adam's metric makes another move."""

    def trained(run, *options):
        assert main(["fit", "digits", *options, "--epochs", "4", "-q", "-o", run]) == 0
        found = json.loads((folder / run / "result.json").read_text())
        (how,) = {told["how"] for told in found["penalties"].values()}
        return how, found["weights"]["fc1.weight"]["l2"]

    decay = trained("decay", "--weight-decay", "0.05")
    assert decay == trained("named", "--penalty", "l2:0.05,how=decoupled")
    assert decay == trained("by how", "--l2", "0.05", "--how", "decoupled")
    assert decay == trained("kept", "--weight-decay", "0.05", "--how", "objective")
    how, norm = trained("objective", "--l2", "0.05")
    assert (decay[0], how) == ("decoupled", "objective") and decay[1] > 1.5 * norm


def test_report_rewrites_the_page(folder, capsys):
    assert main(["fit", "iris", "--epochs", "1", "-q", "--output", "run"]) == 0
    (folder / "run/report.html").unlink()
    assert main(["report", "run"]) == 0
    assert (folder / "run/report.html").stat().st_size > 10_000


def test_quick_demo(folder, capsys, monkeypatch):
    quick = demonstration.quick

    def quicker(setting):
        """One strength of each method on two seeds."""
        setting, methods = quick(setting)
        few = tuple(replace(method, strengths=method.strengths[-1:]) for method in methods)
        return replace(setting, seeds=setting.seeds[:2]), few

    monkeypatch.setattr(demonstration, "quick", quicker)
    assert main(["demo", "--quick", "--quiet"]) == 0
    out, err = capsys.readouterr()
    result = json.loads((folder / "runs/demo/result.json").read_text())
    page = report.build(read(folder / "runs/demo"))
    table, *_ = page.sections[0].blocks
    assert all(str(cell.text("en") if isinstance(cell, Label) else cell) in out
               for row in table.rows for cell in row[1:])  # fmt: skip
    assert result["verdict"] == page.verdict.text("en") and result["verdict"] in out
    assert err == "" and [arm["name"] for arm in result["arms"]] == ["none", "l1", "l2", "dropout"]
    plain, *others = (arm["test_accuracy"]["mean"] for arm in result["arms"])
    assert max(others) > plain
    assert result["arms"][1]["zeros"] > 0.3 and result["arms"][2]["zeros"] == 0
    assert (folder / "runs/demo/report.html").exists()
    assert result["kind"] == "demo"


def test_a_demo_does_not_replace_another_run(folder, capsys):
    assert main(["fit", "iris", "--epochs", "1", "-q", "--output", "runs/demo"]) == 0
    assert main(["demo", "--quick"]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["report.html", "manifest.json"], ["manifest.json"]])
def test_resume_completes_a_run_that_was_killed_after_its_training(folder, capsys, missing):
    arguments = ["fit", "iris", "--epochs", "2", "--output", "run"]
    assert main(arguments) == 0
    result = (folder / "run/result.json").read_bytes()
    for name in missing:
        (folder / "run" / name).unlink()
    assert main([*arguments, "--resume"]) == 0
    assert "written now" in capsys.readouterr().out
    assert (folder / "run/report.html").exists() and (folder / "run/manifest.json").exists()
    assert (folder / "run/result.json").read_bytes() == result
    assert main([*arguments, "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_the_page_is_opened_or_it_is_said_that_it_cannot_be(folder, monkeypatch, capsys, there):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or there)
    assert main(["fit", "iris", "--epochs", "1", "--no-linear", "--quiet", "--output", "run"]) == 0
    assert main(["report", "run", "--open"]) == 0
    assert opened == [(folder / "run/report.html").resolve().as_uri()]
    assert ("no browser was found" in capsys.readouterr().err) is not there
