"""tikhon path as a command: what it saves answers for new rows, by the chosen features alone."""

from __future__ import annotations

import itertools
import json
import os

import pytest

from tikhon.cli import main

pd = pytest.importorskip("pandas")

FEW = ("--strengths", "12", "--folds", "2")
KINDS = {
    "linear, two classes": FEW,
    "network": ["--penalty", "group_lasso", "--model", "mlp:16", *FEW],
    "network beside a linear map": ["--penalty", "hierarchical", "--model", "mlp:16", *FEW],
}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_a_path_depend_on_the_chosen_features_alone(kind, tmp_path, command):
    from sklearn.datasets import load_breast_cancer

    frame = load_breast_cancer(as_frame=True).frame[:240].copy()
    frame["target"] = frame["target"].map({0: "malignant", 1: "benign"})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    asked = ["path", "rows.csv", "--target", "target", *KINDS[kind], "--output", "run", "--json"]
    done = command.run(*asked, cwd=tmp_path)
    assert done.code == 0
    selected = json.loads((tmp_path / "run/result.json").read_text())["selected"]
    features = json.loads(done.out)["features"]
    assert list(features) == selected and all(f["importance"] > 0 for f in features.values())
    assert 0 < len(selected) < 30
    other = frame.copy()
    for name in set(frame.columns) - {*selected, "target"}:
        other[name] = other[name].mean()
    other.to_csv(tmp_path / "other.csv", index=False)
    found = []
    for rows in ("rows.csv", "other.csv"):
        told = command.run("predict", "run", rows, "--output", "p.csv", cwd=tmp_path)
        assert told.code == 0, told.err
        found.append(pd.read_csv(tmp_path / "p.csv"))
    assert (found[0]["prediction"] == frame["target"]).mean() > 0.9
    columns = ["probability_malignant", "probability_benign"]
    assert found[0][columns].sum(axis=1).to_numpy() == pytest.approx(1)
    assert (found[0][columns] - found[1][columns]).abs().to_numpy().max() < 1e-6


def test_regression_answers_in_the_unit_of_the_target(tmp_path, command):
    from sklearn.datasets import load_diabetes

    frame = load_diabetes(as_frame=True).frame
    frame.to_csv(tmp_path / "rows.csv", index=False)
    asked = ["path", "rows.csv", "--target", "target", "--strengths", "20", "--output", "run"]
    told = command.run(*asked, cwd=tmp_path)
    assert told.code == 0 and "next:   tikhon predict run rows.csv" in told.out
    page = (tmp_path / "run/report.html").read_text()
    assert "354 rows to choose and train on, 88 to test" in page  # of 442, in folds
    command.run("predict", "run", "rows.csv", "--output", "p.csv", cwd=tmp_path)
    guess = pd.read_csv(tmp_path / "p.csv")["prediction"]
    assert guess.mean() == pytest.approx(frame["target"].mean(), rel=0.05)
    assert guess.corr(frame["target"]) > 0.65


def test_a_path_of_weights_saves_the_chosen_zeros_and_a_page_with_the_knee(tmp_path, command):
    from safetensors.torch import load_file

    asked = ["path", "wine", "--of", "weights", "--model", "mlp:16", "--epochs", "40"]
    asked += ["--lr", "0.005", "--output", "r", "--json"]
    told = command.run(*asked, cwd=tmp_path)
    assert told.code == 0, told.err
    result = json.loads((tmp_path / "r/result.json").read_text())
    weights = [w for w in load_file(tmp_path / "r/model.safetensors").values() if w.ndim == 2]
    left = sum(int(w.count_nonzero()) for w in weights)
    assert result["counts"][result["chosen"]] == left < result["weights"] == 16 * (13 + 3)
    assert len(result["test_scores"]) == len(result["strengths"]) == 100
    page = (tmp_path / "r/report.html").read_text()
    assert "weights are enough" in page
    assert "a constant prediction" in page and "knee" in page and "拐点" in page
    assert command.run("predict", "r", "wine", "--output", "p.csv", cwd=tmp_path).code == 0
    for wrong, why in (
        (["--of", "weights", "--penalty", "mcp"], "that of MCP moves its threshold"),
        (["--of", "weights", "--model", "linear"], "is for networks"),
        (["--of", "rows"], "features"),
        (["--epochs", "3"], "are for --of weights"),
    ):
        told = command.run("path", "wine", *wrong, "--output", "q", cwd=tmp_path)
        assert told.code == 2 and why in told.err and not (tmp_path / "q").exists()


def test_a_spline_is_refused_before_anything_is_written(tmp_path, command):
    asked = [
        "path",
        "wine",
        "--penalty",
        "group_lasso",
        "--model",
        "spline:mlp:8",
        "--output",
        "r",
    ]
    told = command.run(*asked, cwd=tmp_path)
    assert told.code == 2 and "use 'mlp:8'" in told.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("penalty", "why"),
    [("total_variation", "no strength of TotalVariation"), ("max_norm", "MaxNorm is a constraint"),
     ("l2", "L2 gives no zeros"), ("elastic_net", None)],
)  # fmt: skip
def test_a_penalty_that_cannot_be_followed_is_named_before_anything_is_written(
    penalty, why, tmp_path, command
):
    asked = ["path", "diabetes", "--penalty", penalty, "--strengths", "3", "--output", "r"]
    told = command.run(*asked, cwd=tmp_path)
    if why is None:
        assert told.code == 0
        return
    assert told.code == 2 and why in told.err and "unexpected" not in told.err
    assert not (tmp_path / "r").exists()


def test_strengths_may_be_named(tmp_path, command):
    rows = "".join(f"{k % 7},{k % 5},{k % 3},{k % 7 - k % 3}.5\n" for k in range(60))
    (tmp_path / "t.csv").write_text("a,b,c,y\n" + rows)
    asked = ["path", "t.csv", "--target", "y", "--penalty", "total_variation", "--folds", "2"]
    told = command.run(*asked, "--strengths", "0.1,1,0", "--json", "--output", "r", cwd=tmp_path)
    assert told.code == 0 and json.loads(told.out)["strengths"] == [1.0, 0.1, 0.0]
    told = command.run("path", "diabetes", "--strengths", "many", cwd=tmp_path)
    assert told.code == 2 and "received 'many'" in told.err


def test_units_and_labels_do_not_change_the_features(tmp_path, command):
    from sklearn.datasets import make_regression

    x, y = make_regression(90, 5, n_informative=2, noise=20.0, random_state=0)
    frame = pd.DataFrame(x, columns=list("abcde"))
    found = []
    for scale in (1.0, 1e-8, 1e8):
        frame.assign(y=y * scale).to_csv(tmp_path / "t.csv", index=False)
        asked = ["path", "t.csv", "--target", "y", "--strengths", "10", "--json", "--overwrite"]
        found.append(json.loads(command.run(*asked, "--output", "r", cwd=tmp_path).out))
    assert found[0]["counts"] == found[1]["counts"] == found[2]["counts"]
    assert found[0]["selected"] == found[1]["selected"] == found[2]["selected"]
    frame.assign(y=(y > 50).astype(int) - (y < -50).astype(int)).to_csv(
        tmp_path / "signs.csv", index=False
    )
    asked = ["path", "signs.csv", "--target", "y", "--strengths", "10", "--output", "s"]
    assert command.run(*asked, cwd=tmp_path).code == 0
    command.run("predict", "s", "signs.csv", "--output", "p.csv", cwd=tmp_path)
    told = pd.read_csv(tmp_path / "p.csv")
    assert set(told["prediction"]) <= {-1, 0, 1} and "probability_-1" in told


def test_strengths_that_nothing_could_choose_among_are_refused_before_they_are_solved(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["path", "wine", "--strengths", "9", "--folds", "0"]) == 2
    assert "--folds 0 leaves no scores" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for one in ("1", "0.01", "universal"):
        told = ["--strengths", one, "--folds", "0", "--quiet", "--output", f"run-{one}"]
        assert main(["path", "diabetes", *told]) == 0


SHORT = ["path", "wine", *FEW, "--output"]


def left_in(run):
    result = json.loads((run / "result.json").read_text())
    return {**result, "seconds": 0, "next": []}, (run / "model.safetensors").read_bytes()


def at_the_twentieth_solution(number):
    """In the child: save at every solution, and get a signal at the twentieth."""

    def prepare():
        from tikhon.runs import checkpoint

        checkpoint.PeriodicCheckpoint.__init__.__kwdefaults__["every"] = 0.0
        save, calls = checkpoint.PeriodicCheckpoint.save_if_due, itertools.count(1)

        def interrupted(self, state):
            if next(calls) == 20:
                os.kill(os.getpid(), number)
            save(self, state)

        checkpoint.PeriodicCheckpoint.save_if_due = interrupted

    return prepare


def test_an_interrupted_path_resumes_to_the_uninterrupted_one(tmp_path, command):
    assert command.run(*SHORT, "whole", "--quiet", cwd=tmp_path).code == 0
    whole = left_in(tmp_path / "whole")
    child = command.start([*SHORT, "killed"], tmp_path, before=at_the_twentieth_solution(9))
    assert child.wait().code == -9
    assert command.run(*SHORT, "killed", "--resume", cwd=tmp_path).code == 0
    assert left_in(tmp_path / "killed") == whole
    assert not (tmp_path / "killed/checkpoint").exists()
    child = command.start([*SHORT, "cut"], tmp_path, before=at_the_twentieth_solution(15))
    ended = child.wait()
    assert ended.code == 143 and "what is solved is kept in cut" in ended.err
    again = ended.err.strip().splitlines()[-1].split()
    assert again[-1] == "--resume" and command.run(*again[1:], cwd=tmp_path).code == 0
    assert left_in(tmp_path / "cut") == whole
