"""`tikhon fit DATA --sparsify SHARE`."""

from __future__ import annotations

import json

from tikhon.cli import main
from tikhon.report.saved import read


def test_a_share_is_asked_in_the_shell_and_shown_beside_what_was_reached(tmp_path, capsys):
    path = tmp_path / "run"
    code = main(
        [
            "fit",
            "iris",
            "--sparsify",
            "90%",
            "--epochs",
            "30",
            "--no-linear",
            "--output",
            str(path),
        ]
    )
    said = capsys.readouterr()
    assert code == 0
    assert "sparsify 0.9" in said.err
    assert "weights are exactly zero; 90.00% requested." in " ".join(said.out.split())
    result = json.loads((path / "result.json").read_text())
    assert abs(result["sparsity"]["share"] - 0.9) < 1e-3
    assert result["sparsity"]["asked"] == 0.9
    assert "What sparsify left" in (path / "report.html").read_text()
    assert read(path).result["sparsity"]["of"] == "weights"


def test_a_share_that_cannot_be_is_refused_before_anything_is_read(tmp_path, capsys):
    code = main(["fit", "iris", "--sparsify", "100%", "--output", str(tmp_path / "run")])
    assert code == 2 and "share must be in (0, 1)" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
