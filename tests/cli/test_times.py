"""What takes long is said to, before it starts."""

from __future__ import annotations

import torch

import tikhon as tk
from tikhon.cli import main
from tikhon.cli.training_length import estimate_seconds, why_fixed_length
from tikhon.data import file_heads, reading_time
from tikhon.models.mlp import MLP
from tikhon.regularizer.terms import Term
from tikhon.strengths.schedules import Cosine
from tikhon.training.recipe import Auto, Recipe


def test_the_command_says_how_long_a_large_table_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading_time, "LARGE", 1_000)
    monkeypatch.setattr(file_heads, "_LENGTHS", (2_000, 8_000))
    monkeypatch.chdir(tmp_path)
    rows = "".join(
        f"{i * 37 % 101},{i * i % 23}.5,{'pq'[i * i % 101 > 50]}\n" for i in range(2_000)
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/d.csv").write_bytes(("é,b,y\n" + rows).encode("cp1252"))
    given = ["--target", "y", "--epochs", "1", "--no-linear", "--output", "run"]
    where = ["--data-dir", "data"]
    assert main(["fit", "d.csv", *where, "--encoding", "cp1252", *given]) == 0
    said = capsys.readouterr().err
    assert "d.csv: " in said and "to read" in said
    assert said.index("to read") < said.index("rows to train on")
    assert main(["predict", "run", "d.csv", *where, "--output", "p.csv"]) == 0
    assert "to read" in capsys.readouterr().err


def test_the_time_of_a_training_changes_nothing_and_grows_with_its_epochs():
    torch.manual_seed(0)
    x, network = torch.randn(2_000, 6), MLP([6, 64, 2], rate=0.5)
    y, before = (x[:, 0] > 0).long(), {n: t.clone() for n, t in network.state_dict().items()}
    state = torch.get_rng_state()
    training = {"batch_size": 10, "loss": "auto"}
    assert estimate_seconds(network, x, y, {**training, "epochs": 1}) is None
    short, long = (estimate_seconds(network, x, y, {**training, "epochs": n}) for n in (20, 400))
    assert long > 5 * short > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_a_strength_that_follows_the_validation_loss_leaves_the_length_open():
    for strength, is_open in ((Auto(), True), (0.1, True), (Cosine(0.0, 0.1, 5), False)):
        recipe = Recipe(Term(tk.L2(), strength=strength))
        needs = why_fixed_length(recipe, "constant", refit=False, validated=True)
        assert (not needs) == is_open
