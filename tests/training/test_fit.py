import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, Ridge

import tikhon as tk
from tikhon.data import load, split
from tikhon.errors import InputError
from tikhon.models import build
from tikhon.training import Diverged, fit
from tikhon.training.recipe import Recipe


@pytest.fixture(scope="module")
def iris():
    return split(load("iris"))


def network(parts, name="mlp:16", seed=0, rate=0.0):
    torch.manual_seed(seed)
    return build(name, parts.train.shape, parts.train.outputs, rate=rate)


def diabetes():
    data = load_diabetes()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return x, data.target - data.target.mean()


@pytest.mark.parametrize(
    ("optimizer", "lr", "momentum", "epochs"),
    [("sgd", 0.05, 0.9, 450), pytest.param("adam", 2.0, 0.0, 700, marks=pytest.mark.slow)],
)  # tests/regularizer has the law for every optimizer
def test_l1_is_the_lasso_of_the_textbooks(optimizer, lr, momentum, epochs):
    """1/(2m) sum (y - yhat)^2 + lambda sum |w|: support and coefficients of scikit-learn's."""
    x, y = diabetes()
    reference = Lasso(alpha=3.0, tol=1e-14, max_iter=100_000, fit_intercept=False).fit(x, y).coef_
    model = torch.nn.Linear(10, 1, bias=False, dtype=torch.float64)
    fit(
        model, (torch.tensor(x), torch.tensor(y)), Recipe(tk.L1(3.0)), loss="half_mse",
        optimizer=optimizer, lr=lr, momentum=momentum, batch_size=len(x), epochs=epochs,
        schedule="linear" if optimizer == "adam" else "constant",
    )  # fmt: skip
    found = model.weight.detach().numpy()[0]
    assert np.array_equal(found != 0, reference != 0)
    assert np.abs(found - reference).max() < 1e-5


def test_l2_is_ridge_with_alpha_m_lambda():
    x, y = diabetes()
    reference = Ridge(alpha=len(x) * 0.1, tol=1e-14, fit_intercept=False).fit(x, y).coef_
    model = torch.nn.Linear(10, 1, bias=False, dtype=torch.float64)
    fit(
        model, (torch.tensor(x), torch.tensor(y)), Recipe(tk.L2(0.1)), loss="half_mse",
        optimizer="sgd", lr=0.1, momentum=0.9, batch_size=len(x), epochs=400,
    )  # fmt: skip
    assert np.abs(model.weight.detach().numpy()[0] - reference).max() < 1e-5


def test_the_log_has_the_named_keys(iris):
    run = fit(network(iris), iris.train, Recipe(tk.L1(1e-2)), valid=iris.valid, epochs=2)
    row = run.history[-1]
    for key in (
        "epoch",
        "step",
        "seconds",
        "lr",
        "train/loss",
        "train/accuracy",
        "valid/loss",
        "valid/accuracy",
        "penalty/fc1.weight/L1/value",
        "penalty/fc1.weight/L1/strength",
        "penalty/fc1.weight/L1/zeros",
        "norm/fc1.weight/l1",
        "norm/fc1.weight/l2",
    ):
        assert key in row  # fmt: skip
    weight = run.model.fc1.weight.detach()
    assert row["norm/fc1.weight/l1"] == pytest.approx(float(weight.abs().sum()))
    assert row["penalty/fc1.weight/L1/value"] == pytest.approx(1e-2 * float(weight.abs().sum()))
    assert row["step"] == 2 * 2 and row["epoch"] == 2


def test_a_run_is_a_function_of_its_seed_and_leaves_the_random_state_alone(iris):
    before = torch.get_rng_state()
    runs = [fit(network(iris, rate=0.5), iris.train, seed=s, epochs=3) for s in (1, 1, 2)]
    weights = [run.model.fc1.weight for run in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.manual_seed(0)
    network(iris, rate=0.5)
    assert before.shape == torch.get_rng_state().shape


def test_random_state_outside_is_untouched(iris):
    model = network(iris, rate=0.5)
    before = torch.get_rng_state()
    fit(model, iris.train, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_early_stopping_restores_the_best_state(iris):
    run = fit(network(iris), iris.train, Recipe(early_stopping=3), valid=iris.valid, lr=0.3,
              epochs=60)  # fmt: skip
    losses = [row["valid/loss"] for row in run.history]
    assert run.ended == "early stopping"
    assert run.best_epoch == 1 + int(np.argmin(losses)) == len(losses) - 3
    assert run.metrics["valid/loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averages_are_what_comes_out(iris, averaging):
    last = fit(network(iris), iris.train, valid=iris.valid, epochs=8)
    run = fit(network(iris), iris.train, Recipe(averaging=averaging), valid=iris.valid, epochs=8)
    assert not torch.equal(run.model.fc1.weight, last.model.fc1.weight)
    assert run.metrics["valid/loss"] == pytest.approx(run.history[-1]["valid/loss"], rel=1e-5)


def test_a_model_in_evaluation_mode_is_trained_as_any_other(iris):
    weights = []
    for training in (True, False):
        model = network(iris, rate=0.5).train(training)
        fit(model, iris.train, epochs=1)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_dropout_of_the_recipe_reaches_the_layers(iris):
    model = network(iris)
    fit(model, iris.train, Recipe(dropout=0.25), epochs=1)
    assert float(model.dropout1.rate) == 0.25
    with pytest.raises(InputError, match="noise layer"):
        fit(torch.nn.Linear(4, 3), iris.train, Recipe(dropout=0.25), epochs=1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup_cosine"])
def test_schedules_end_low(iris, schedule):
    run = fit(network(iris), iris.train, schedule=schedule, lr=0.1, epochs=10)
    rates = [row["lr"] for row in run.history]
    assert rates[-1] < 0.1 * rates[1]


def test_budget_ends_the_run(iris):
    run = fit(network(iris), iris.train, epochs=100_000, budget="300ms")
    assert run.ended == "budget" and len(run.history) < 100_000


def test_regression_reports_its_error_in_the_targets_unit():
    parts = split(load("diabetes"))
    run = fit(network(parts), parts.train, valid=parts.valid, unit=parts.train.unit, epochs=60)
    assert 30 < run.metrics["valid/rmse"] < 80
    assert "RMSE" in str(run)


def test_auto_follows_validation_rows(iris):
    from tikhon.training.recipe import Auto

    recipe = Recipe({"*": tk.Term(tk.L2(), strength=Auto())})
    run = fit(network(iris), iris.train, recipe, valid=iris.valid, epochs=60)
    strengths = {row["penalty/fc1.weight/L2/strength"] for row in run.history}
    assert len(strengths) > 1 and max(strengths) > 0


def test_a_loss_that_is_not_finite_is_named(iris):
    with pytest.raises(Diverged, match=r"not finite first: the weight 'fc1.weight'. Lower lr"):
        fit(network(iris), iris.train, optimizer="sgd", lr=1e30, epochs=5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"loss": "cross"}, "did you mean 'cross_entropy'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"momentum": 0.9}, "momentum is for sgd"),
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more"),
        ({"budget": 60.0}, "budget must be a time such as 60s"),
        ({"recipe": Recipe(tk.L1(1e-3), early_stopping=2)}, "needs validation data"),
        ({"recipe": Recipe({"fc9.weight": tk.L1(1e-3)})}, "no parameter matches"),
    ],
)
def test_settings_out_of_range(iris, settings, message):
    with pytest.raises(InputError, match=message):
        fit(network(iris), iris.train, **settings)


X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20) % 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({"unit": unit}, "unit must be finite and > 0") for unit in
          (0, -1.0, float("nan"), float("inf"), "1", None, True)),
        *(({"seed": seed}, r"seed must be a whole number, 0 or more and below 2\*\*32")
          for seed in (-1, 2**32, 2**70, 1.5, None, "0", True)),
        ({"recipe": {"dropout": 0.2}}, r"received .*0.2}; Recipe\(\*\*options\) makes one"),
        ({"recipe": tk.L1(0.1)}, "recipe must be a Recipe, .* received L1"),
        ({"model": "mlp"}, "model must be a torch.nn.Module, .* received 'mlp'"),
        ({"model": None}, "received None"),
        ({"model": torch.nn.Linear}, "received the class Linear"),
        ({"checkpoint_every": -1}, "checkpoint_every must be >= 0"),
        ({"checkpoint_every": float("nan")}, "checkpoint_every must be >= 0"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_another_kind_are_named(given, said):
    given = {"model": torch.nn.Linear(2, 2), "recipe": None, **given}
    with pytest.raises(InputError, match=said):
        fit(given.pop("model"), (X, Y), given.pop("recipe"), epochs=1, **given)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, np.int64(3)])
def test_every_seed_is_taken_by_splits_and_by_trainings(iris, seed):
    parts = split(load("iris"), seed=seed)
    run = fit(network(parts), parts.train, valid=parts.valid, epochs=1, seed=seed)
    assert len(run.history) == 1


@pytest.mark.parametrize("verb", [
    lambda seed: split(load("iris"), seed=seed),
    lambda seed: tk.path(None, (X, X[:, 0]), tk.L1(), seed=seed),
    lambda seed: tk.tune(lambda: torch.nn.Linear(2, 2), (X, Y), budget="2runs", seed=seed),
])  # fmt: skip
def test_seeds_that_are_none_are_refused_by_every_verb(verb):
    for seed in (-1, 2**32, None, 1.5):
        with pytest.raises(InputError, match="seed must be a whole number"):
            verb(seed)


def test_a_kept_run_of_a_data_set_names_its_classes(iris, tmp_path):
    fit(network(iris), iris.train, valid=iris.valid, epochs=1, output=tmp_path / "run")
    saved = json.loads((tmp_path / "run/result.json").read_text())
    assert saved["answer"] in [repr(name) for name in iris.train.classes]
