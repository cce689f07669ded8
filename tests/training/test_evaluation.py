"""Confusion, calibration and errors on new rows, held to scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, median_absolute_error
from torch import nn

from tikhon.layers import expected_calibration_error
from tikhon.training import measures
from tikhon.training.evaluation import MOST_CLASSES, MOST_ROWS, evaluate


def problem(classes: int, rows: int = 300):
    torch.manual_seed(0)
    return nn.Linear(6, classes), torch.randn(rows, 6), torch.randint(0, classes, (rows,))


@pytest.mark.parametrize("classes", [2, 5])
def test_confusion_counts_true_classes_in_rows(classes):
    model, x, y = problem(classes)
    found = evaluate(model, x, y, classes=[f"c{i}" for i in range(classes)])
    assert np.array_equal(found["confusion"], confusion_matrix(y, model(x).argmax(1)))
    assert found["classes"] == [f"c{i}" for i in range(classes)]


def test_calibration_is_that_of_the_most_likely_class():
    model, x, y = problem(4)
    with torch.no_grad():
        probabilities = (model(x) * 3).double().softmax(1)
        model.weight.mul_(3)
        model.bias.mul_(3)
    bins = evaluate(model, x, y)["calibration"]
    confidence, taken = probabilities.max(1)
    accuracy, mean = calibration_curve((taken == y).numpy(), confidence.numpy(), n_bins=10)
    assert np.allclose([b["accuracy"] for b in bins], accuracy)
    assert np.allclose([b["confidence"] for b in bins], mean)
    error = sum(b["rows"] / 300 * abs(b["accuracy"] - b["confidence"]) for b in bins)
    assert error == pytest.approx(expected_calibration_error(probabilities, y, bins=10))


def test_many_classes_have_no_matrix():
    model, x, y = problem(MOST_CLASSES + 1)
    assert "confusion" not in evaluate(model, x, y, classes=["?"] * (MOST_CLASSES + 1))


def test_numbers_are_in_their_own_unit():
    model, x, _ = problem(1, 1000)
    y = torch.randn(1000)
    found = evaluate(model, x, y, unit=10.0, center=50.0)
    predicted = 50 + 10 * model(x).detach().double()[:, 0]
    true = 50 + 10 * y.double()
    assert found["median_error"] == pytest.approx(median_absolute_error(true, predicted), rel=0.02)
    assert found["largest_error"] == pytest.approx(float((true - predicted).abs().max()))
    assert len(found["pairs"]) <= MOST_ROWS
    assert np.allclose(found["pairs"][0], [float(true[0]), float(predicted[0])])


def test_scoring_gives_each_module_its_own_mode_back():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    model[0].eval()  # frozen by its owner
    measures.predict(model, torch.randn(8, 6))
    assert [module.training for module in model.modules()] == [True, False, True, True]
