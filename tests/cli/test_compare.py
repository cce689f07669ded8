from __future__ import annotations

import json
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


def test_a_bad_request_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ["--output", str(tmp_path / "run"), "-q"]
    assert main(["compare", "wine", "--widths", "4,x", *run]) == 2
    assert "--widths takes whole numbers" in capsys.readouterr().err
    assert main(["compare", "wine", "--methods", "none,l3", *run]) == 2
    assert "unknown method 'l3'" in capsys.readouterr().err
