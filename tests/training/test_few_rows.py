"""What few rows prove: intervals as wide as Student's t makes them."""

import pytest
import torch
from scipy.stats import t

from tikhon.numbers import Z_95, t_quantile
from tikhon.training.baselines import _paired_margins


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 20, 300])
def test_the_reach_of_an_interval_is_students(rows):
    assert t_quantile(rows) == pytest.approx(t.ppf(0.975, rows - 1), rel=2e-3)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_few_rows_prove_little(rows):
    """Two answers without knowledge: one is called the better one in 2.5% of draws, not in 10%."""
    told = 0
    for seed in range(400):
        torch.manual_seed(seed)
        y = torch.randint(0, 2, (rows,))
        chance, guess = torch.zeros(rows, 2), 0.3 * torch.randn(rows, 2)
        mean, error = _paired_margins("constant", chance, guess, y, 1.0)["loss"]
        told += mean > Z_95 * error
    assert told <= 0.05 * 400
