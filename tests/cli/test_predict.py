from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.cli import main
from tikhon.compaction.latency import onnx_of
from tikhon.errors import DataError
from tikhon.training.saved_model import SavedModel


def frame(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age, city = rng.normal(40, 10, rows), rng.choice(["Rome", "Oslo", "Bonn"], rows)
    hot = age + 8 * (city == "Oslo") > 42
    data = pd.DataFrame({"age": age.round(1), "city": city, "joined": "2021-03-04"})
    data["joined"] = pd.date_range("2021-01-01", periods=rows).strftime("%Y-%m-%d")
    data.loc[::9, "age"] = np.nan
    return data.assign(price=100 + 10 * age, churned=np.where(hot, "yes", "no"))


def fit(tmp_path: Path, *arguments: str, target: str = "churned") -> Path:
    other = {"churned": "price", "price": "churned"}[target]
    frame().to_csv(tmp_path / "data.csv", index=False)
    run = tmp_path / "run"
    code = main(
        ["fit", str(tmp_path / "data.csv"), "--target", target, "--drop", other, "--epochs", "8",
         "--lr", "0.01", "--model", "mlp:16", "--output", str(run), "--quiet", *arguments]
    )  # fmt: skip
    assert code == 0
    return run


def test_a_table_from_fit_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tmp_path)
    new = frame(50, seed=3)
    shuffled = new[["joined", "city", "age"]].assign(extra=1)
    shuffled.loc[0, "city"] = "Atlantis"
    shuffled.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "predictions.csv"
    assert main(["predict", str(run), str(tmp_path / "new.csv"), "-o", str(out), "-q"]) == 0
    found = pd.read_csv(out)
    assert list(found.columns) == ["prediction", "probability_no", "probability_yes"]
    assert len(found) == 50 and set(found["prediction"]) <= {"yes", "no"}
    np.testing.assert_allclose(found.iloc[:, 1:].sum(axis=1), 1)
    assert (found["prediction"] == new["churned"])[1:].mean() > 0.75
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "new.csv")]) == 0
    said = capsys.readouterr()
    assert said.out == out.read_text()
    assert "columns not used: 'extra'" in said.err
    assert "'city': 1 value that training never saw" in said.err
    assert main(["predict", str(run), str(tmp_path / "new.csv"), "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["predictions"] == found["prediction"].tolist()


def test_columns_are_kept_before_the_predictions(tmp_path, capsys):
    run = fit(tmp_path)
    new = frame(6, seed=3).assign(id=[f"00{i}" for i in range(6)], note=["=1+1", "", *"abcd"])
    new.to_csv(tmp_path / "new.csv", index=False)
    asked = ["predict", str(run), str(tmp_path / "new.csv"), "--keep", "id", "--keep", "note"]
    capsys.readouterr()
    assert main(asked) == 0
    said = capsys.readouterr()
    found = pd.read_csv(io.StringIO(said.out), dtype=str)
    assert list(found)[:3] == ["id", "note", "prediction"] and "'id'" not in said.err
    assert found["id"].tolist() == new["id"].tolist() and found["note"][0] == "=1+1"
    assert main([*asked, "--spreadsheet"]) == 0
    assert "'=1+1" in capsys.readouterr().out
    assert main([*asked, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == found["prediction"].tolist()
    for name, told in (("ID", "did you mean 'id'"), ("prediction", "have a column of this name")):
        new.rename(columns={"note": "prediction"}).to_csv(tmp_path / "new.csv", index=False)
        assert main([*asked[:3], "--keep", name]) == 2
        assert told in capsys.readouterr().err


def test_a_comparison_says_what_it_inferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    frame(60).assign(unit="mm").to_csv(tmp_path / "data.csv", index=False)
    code = main(
        ["compare", str(tmp_path / "data.csv"), "--target", "churned", "--methods", "none,l2",
         "--splits", "2", "--trials", "1", "--epochs", "1", "--output", str(tmp_path / "run")]
    )  # fmt: skip
    said = capsys.readouterr().err
    assert code == 0 and "classification: 'churned' holds text" in said
    assert "columns not used: 'unit'" in said


def test_the_test_rows_score_as_the_run_says(tmp_path: Path):
    from tikhon.data import split
    from tikhon.data.table import TableOptions, load_table

    run = fit(tmp_path)
    saved = SavedModel.load(run)
    parts = split(load_table(tmp_path / "data.csv", TableOptions("churned", drop=("price",))))
    answers = saved.predict(parts.test.x)["prediction"]
    labels = np.array(parts.test.classes)[parts.test.y.numpy()]
    stored = json.loads((run / "result.json").read_text())["metrics"]["test/accuracy"]
    assert (answers == labels).mean() == pytest.approx(stored)


def test_regression_answers_in_the_targets_unit(tmp_path: Path):
    run = fit(tmp_path, "--epochs", "25", target="price")
    out = tmp_path / "p.csv"
    assert main(["predict", str(run), str(tmp_path / "data.csv"), "-o", str(out), "-q"]) == 0
    found = pd.read_csv(out)
    assert list(found.columns) == ["prediction"]
    truth = frame()
    known = truth["age"].notna()
    assert np.abs(found["prediction"] - truth["price"])[known].mean() < 40


MALFORMED = {
    "a list for the model": {"model": []},
    "a number for the name": {"model": {"name": 5, "shape": [3], "outputs": 2}, "data": {}},
    "a text for the shape": {"model": {"name": "linear", "shape": "x", "outputs": 2}, "data": {}},
    "a list for the data": {"model": {"name": "linear", "shape": [3], "outputs": 2}, "data": []},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_foreign_configuration_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text(json.dumps({"schema_version": 1, **MALFORMED[kind]}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["predict", str(tmp_path), "new.csv"]) == 4
    assert "config.json is not a valid configuration of a run" in capsys.readouterr().err


def test_labels_that_a_spreadsheet_would_run_can_be_escaped(tmp_path: Path):
    rows = [f"{i % 9},{['=1+1', '-2', '@x', 'fine'][i % 4]}" for i in range(120)]
    (tmp_path / "t.csv").write_text("a,y\n" + "\n".join(rows) + "\n")
    run, out = tmp_path / "run", tmp_path / "p.csv"
    base = ["fit", str(tmp_path / "t.csv"), "--target", "y", "--epochs", "1", "-q"]
    assert main([*base, "--output", str(run)]) == 0
    ask = ["predict", str(run), str(tmp_path / "t.csv"), "-o", str(out), "-q"]
    assert main(ask) == 0
    plain = pd.read_csv(out, dtype=str)
    assert set(plain["prediction"]) <= {"=1+1", "-2", "@x", "fine"}
    assert main([*ask, "--spreadsheet"]) == 0
    safe = pd.read_csv(out, dtype=str)
    written = {"=1+1": "'=1+1", "@x": "'@x"}
    assert list(safe["prediction"]) == [written.get(v, v) for v in plain["prediction"]]
    assert list(safe.columns) == list(plain.columns)


@pytest.mark.parametrize("name", ["cut.csv.gz", "cut.parquet", "cut.xlsx", "broken.jsonl"])
def test_damaged_tables_end_with_4_and_their_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from data import corpus

    case = next(case for case in corpus.cases() if case.name == name)
    (tmp_path / name).write_bytes(case.content)
    assert main(["fit", str(tmp_path / name), "--target", "y"]) == 4
    said = capsys.readouterr().err
    assert name in said and "unexpected" not in said


@pytest.mark.parametrize("verb", ["fit", "tune", "path", "compare"])
def test_every_verb_has_the_option_that_its_question_names(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [f"{1 + i % 9}.{i:03d},{'pn'[i % 2]}" for i in range(100, 180)]
    (tmp_path / "t.csv").write_text("a,y\n" + "\n".join(rows) + "\n")
    less = {"tune": ["--budget", "1runs"], "path": ["--strengths", "3"],
            "compare": ["--methods", "none", "--splits", "2", "--trials", "1"]}  # fmt: skip
    ask = [verb, str(tmp_path / "t.csv"), "--target", "y", *less.get(verb, [])]
    ask += ["--output", str(tmp_path / "run"), *(["--epochs", "1"] if verb != "path" else [])]
    assert main(ask) == 4 and "say --decimal . or --decimal ," in capsys.readouterr().err
    assert main([*ask, "--decimal", ","]) == 0


def test_new_rows_may_be_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = "\n".join(f"{i};{'ja' if i % 3 else 'nein'}" for i in range(60))
    (tmp_path / "old.csv").write_bytes(f"Fläche;Käufer\n{rows}\n".encode("cp1252"))
    (tmp_path / "new.csv").write_text("Fläche\n3\n4\n", encoding="utf-8")
    run = str(tmp_path / "run")
    assert main(["fit", str(tmp_path / "old.csv"), "--target", "Käufer"]) == 4
    assert "--encoding cp1252 reads 'Fläche'" in capsys.readouterr().err
    fit = ["fit", str(tmp_path / "old.csv"), "--target", "Käufer", "--encoding", "cp1252"]
    assert main([*fit, "--epochs", "1", "-o", run, "--quiet"]) == 0
    assert main(["predict", run, str(tmp_path / "new.csv")]) == 4
    assert main(["predict", run, str(tmp_path / "new.csv"), "--encoding", "utf-8"]) == 0


def test_named_data_predict_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    base = ["fit", "wine", "--epochs", "5", "--lr", "0.01", "--output", str(run), "-q"]
    assert main(base) == 0
    capsys.readouterr()
    assert main(["predict", str(run), "wine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prediction,probability_class_0,probability_class_1,probability_class_2"
    assert len(lines) == 179


def test_errors_have_codes_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tmp_path)
    capsys.readouterr()

    def fails(code: int, text: str, *arguments: str) -> None:
        assert main(["predict", *arguments, "-q"]) == code
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error

    frame().drop(columns="age").to_csv(tmp_path / "short.csv", index=False)
    fails(4, "lacks columns that the model was trained on: 'age'", str(run),
          str(tmp_path / "short.csv"))  # fmt: skip
    fails(4, "no file", str(run), str(tmp_path / "absent.csv"))
    fails(2, "no run directory", str(tmp_path / "nowhere"), "x.csv")
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    fails(4, "is damaged", str(run), str(tmp_path / "data.csv"))


def test_what_is_read_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tmp_path)
    rows = tmp_path / "data.csv"
    (tmp_path / "link.csv").symlink_to(rows)
    kept = {path: path.read_bytes() for path in (rows, *run.iterdir()) if path.is_file()}
    capsys.readouterr()
    for output in (rows, tmp_path / "link.csv", run / "result.json", run / "model.safetensors"):
        assert main(["predict", str(run), str(rows), "-o", str(output), "-q"]) == 2
        assert "give another name" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept
    assert main(["predict", str(run), str(rows), "-o", str(run / "new.csv"), "-q"]) == 0


def test_of_a_text_among_new_numbers_only_what_can_be_done_is_said(tmp_path, capsys):
    run = fit(tmp_path)
    frame(5).assign(age="old").to_csv(tmp_path / "new.csv", index=False)
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "new.csv"), "-q"]) == 4
    said = capsys.readouterr().err
    assert "'old' in line 2; correct them, or leave the cells empty" in said
    assert "--na-values" not in said and "--categorical" not in said


@pytest.mark.slow
def test_compact_and_export(tmp_path: Path):
    run = fit(tmp_path, "--penalty", "group_lasso:0.02,rows=in", "--compact", "--export", "onnx")
    result = json.loads((run / "result.json").read_text())
    before, after = result["compaction"]["parameters"]
    assert after < before
    assert (run / "compact.safetensors").exists()
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime absent")
    session = runtime.InferenceSession(str(run / "model.onnx"))
    assert session.get_inputs()[0].name == "x"


@pytest.mark.slow
def test_an_exported_small_model_answers_as_the_large_one(tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime absent")
    pytest.importorskip("onnxscript", reason="onnxscript absent")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 16, 20), nn.ReLU(), nn.Linear(20, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[5:] = 0
        model[5].weight[12:] = 0
    example = torch.randn(16, 1, 8, 8)
    small = tk.compact(model, example)
    (tmp_path / "model.onnx").write_bytes(onnx_of(small, (example,)))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for rows in (1, 7, 16):
        (answers,) = session.run(None, {"x": example[:rows].numpy()})
        torch.testing.assert_close(
            torch.as_tensor(answers), model(example[:rows]).detach(), rtol=1e-4, atol=1e-5
        )


def test_compact_writes_a_smaller_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tmp_path, "--penalty", "group_lasso:0.03,rows=in", "--compact", "--json")
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((run / "result.json").read_text())
    assert printed["compaction"] == stored["compaction"]
    before, after = stored["compaction"]["parameters"]
    assert after < before and (run / "compact.safetensors").exists()


def test_unknown_exports_are_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["fit", "iris", "--export", "onyx"]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err


def test_a_table_is_refused_by_a_model_of_no_table(tmp_path):
    run = tmp_path / "run"
    assert main(["fit", "iris", "--epochs", "1", "--quiet", "-o", str(run)]) == 0
    table = tmp_path / "rows.csv"
    with pytest.raises(DataError, match="no file"):
        SavedModel.load(run).read_rows(table)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is a table; the model was trained on iris"):
        SavedModel.load(run).read_rows(table)
