"""Permutation importances against closed forms and a loop of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import t
from torch import nn

from tikhon.training.importance import MOST_COLUMNS, MOST_ROWS, importances
from tikhon.training.losses import loss_of


def linear(weights: list[float]) -> nn.Linear:
    model = nn.Linear(len(weights), 1)
    model.load_state_dict({"weight": torch.tensor([weights]), "bias": torch.zeros(1)})
    return model


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def test_shuffling_a_column_of_a_linear_model_costs_twice_its_share():
    """E (w (x' - x))^2 = 2 w^2 var(x) where the model is exact."""
    x = normal(2000, 3)
    weights = [2.0, 0.5, 0.0]
    y = x @ torch.tensor(weights)
    found = importances(
        linear(weights), x, y, {"a": [0], "b": [1], "c": [2]}, loss_of("mse"), seed=1
    )
    told = {name: (mean, low, high) for name, mean, low, high in found["columns"]}
    for name, weight in zip("abc", weights):
        mean, low, high = told[name]
        assert mean == pytest.approx(2 * weight**2, rel=0.1, abs=1e-9)
        assert low <= 2 * weight**2 <= high or weight == 0
    assert [name for name, *_ in found["columns"]] == ["a", "b", "c"] and found["rows"] == 2000


def test_the_interval_is_that_of_the_paired_differences():
    x, y = normal(300, 4), torch.arange(300) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    [(_, mean, low, high)] = importances(
        model, x, y, {"pair": [1, 3]}, loss_of("cross_entropy"), seed=7
    )["columns"]
    assert model.training
    generator = torch.Generator().manual_seed(7)
    entropy = nn.CrossEntropyLoss(reduction="none")
    rises = []
    with torch.no_grad():
        model.eval()
        for _ in range(5):
            moved, order = x.numpy().copy(), torch.randperm(300, generator=generator)
            moved[:, [1, 3]] = moved[order][:, [1, 3]]
            rises.append((entropy(model(torch.tensor(moved)), y) - entropy(model(x), y)).numpy())
    of_rows = np.mean(rises, axis=0, dtype=float)
    half = t.ppf(0.975, 299) * of_rows.std(ddof=1) / np.sqrt(300)
    assert [low, mean, high] == pytest.approx(
        [of_rows.mean() - half, of_rows.mean(), of_rows.mean() + half], abs=1e-6
    )


def test_what_takes_long_or_has_no_loss_a_row_is_left_out():
    x = normal(3 * MOST_ROWS, 2)
    columns = {"a": [0], "b": [1]}
    model, loss = linear([1.0, 1.0]), loss_of("mse")
    assert importances(model, x, x[:, 0], columns, loss)["rows"] == MOST_ROWS
    many = {str(i): [0] for i in range(MOST_COLUMNS + 1)}
    assert importances(model, x, x[:, 0], many, loss) == {}
    assert importances(model, x[:1], x[:1, 0], columns, loss) == {}
    own = loss_of(lambda output, target: (output - target).square().mean())
    assert importances(model, x, x[:, :1], columns, own) == {}
