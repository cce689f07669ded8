"""Searches by a metric of the user's own, and in a study of the user's own."""

from __future__ import annotations

import json

import optuna
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    log_loss,
    make_scorer,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from torch import nn

from tikhon.errors import InputError
from tikhon.training.losses import Loss, loss_of
from tikhon.tuning.metric import metric_of
from tikhon.tuning.searches import Random
from tikhon.tuning.space import Choice, Int, Log, Space
from tikhon.tuning.tune import tune

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = Space(lr=Log(1e-3, 3e-2))


def rows(count=160):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] + 0.5 * torch.randn(count, generator=generator) > 0.3).long()


def network(width=8):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))


def macro(known, answers):
    return f1_score(known, answers, average="macro")


LOGITS = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(40) % 3
SINGLE, EITHER = LOGITS[:, :1], (torch.arange(40) % 2)[:, None].float()
NUMBERS = LOGITS[:, 0].clone()
LABELS = (torch.randn(40, 3, generator=torch.Generator().manual_seed(2)) > 0).float()
EITHER_SIGN = 2 * EITHER - 1
SCORERS = [
    ("accuracy", "classes", LOGITS, CLASSES, accuracy_score(CLASSES, LOGITS.argmax(1))),
    ("f1_macro", "classes", LOGITS, CLASSES, macro(CLASSES, LOGITS.argmax(1))),
    (make_scorer(macro), "classes", LOGITS, CLASSES, macro(CLASSES, LOGITS.argmax(1))),
    ("neg_log_loss", "classes", LOGITS, CLASSES, -log_loss(CLASSES, LOGITS.double().softmax(1))),
    ("roc_auc_ovr", "classes", LOGITS, CLASSES,
     roc_auc_score(CLASSES, LOGITS.double().softmax(1), multi_class="ovr")),
    ("roc_auc", "binary", SINGLE, EITHER, roc_auc_score(EITHER[:, 0], SINGLE[:, 0])),
    ("roc_auc", "classes", LOGITS[:, :2], EITHER[:, 0].long(),
     roc_auc_score(EITHER[:, 0], LOGITS[:, 1] - LOGITS[:, 0])),
    ("r2", "numbers", SINGLE, NUMBERS + 0.1 * EITHER[:, 0],
     r2_score(NUMBERS + 0.1 * EITHER[:, 0], SINGLE[:, 0])),
    ("neg_mean_absolute_error", "numbers", SINGLE, EITHER,
     -mean_absolute_error(EITHER, SINGLE)),
    ("f1_macro", "binary", LOGITS, LABELS, macro(LABELS.int(), (LOGITS > 0).int())),
    ("accuracy", "binary", LOGITS, LABELS, accuracy_score(LABELS, LOGITS > 0)),
    ("roc_auc", "binary", LOGITS, LABELS, roc_auc_score(LABELS, LOGITS)),
    ("roc_auc", "custom", SINGLE, EITHER_SIGN, roc_auc_score(EITHER[:, 0], SINGLE[:, 0])),
    ("average_precision", "custom", SINGLE, EITHER,
     average_precision_score(EITHER[:, 0], SINGLE[:, 0])),
    (make_scorer(roc_auc_score, response_method="decision_function"), "classes", LOGITS[:, :2],
     EITHER[:, 0].long(), roc_auc_score(EITHER[:, 0], LOGITS[:, 1] - LOGITS[:, 0])),
]  # fmt: skip


def of(kind):
    return Loss(kind, nn.functional.mse_loss, kind)


@pytest.mark.parametrize(("metric", "kind", "output", "y", "expected"), SCORERS)
def test_a_scorer_gives_what_scikit_learn_gives(metric, kind, output, y, expected):
    found = metric_of(metric, None, of(kind))
    assert found.maximised
    assert found.signed(found.score(output, y)) == pytest.approx(expected, abs=1e-6)
    pseudo = found.pseudo_values(output, y)
    assert found.signed(float(pseudo.mean())) == pytest.approx(expected, abs=1e-6)


def test_a_scorer_of_counts_gets_rates_and_not_their_logarithms():
    counts = torch.arange(1.0, 41.0)
    found = metric_of("neg_mean_poisson_deviance", None, loss_of(nn.PoissonNLLLoss()))
    assert found.score(counts.log()[:, None], counts) == pytest.approx(0, abs=1e-6)


def test_a_metric_of_nothing_is_zero_and_not_minus_zero():
    found = metric_of(lambda output, y: 0.0, "maximize", loss_of("mse"))
    assert str(found.signed(found.score(NUMBERS, NUMBERS))) == "0.0"


def test_pseudo_values_have_the_error_of_a_mean():
    """For a mean over rows the jackknife's error is the usual one, up to how rows are blocked."""
    generator = torch.Generator().manual_seed(2)
    output, y = torch.randn(4000, 1, generator=generator), torch.zeros(4000, 1)
    found = metric_of(lambda o, t: (o - t).square().mean(), "minimize", of("numbers"))
    pseudo = found.pseudo_values(output, y)
    error = float(pseudo.std()) / len(pseudo) ** 0.5
    assert error == pytest.approx(float(output.square().std()) / 4000**0.5, rel=0.5)


@pytest.mark.parametrize("folds", [0, 2])
def test_the_choice_is_by_the_metric_and_in_its_own_numbers(folds):
    """A metric that rewards what the loss punishes turns the choice around."""

    def size(output, target):
        return output.abs().mean()

    given = {"space": Space(lr=Log(1e-3, 0.3)), "epochs": 8, "folds": folds, "refit": False}
    given["search"] = lambda space, plan: Random(space, count=5, budget=plan.epochs)
    most = tune(network, rows(), metric=size, direction="maximize", **given)
    least = tune(network, rows(), metric=size, direction="minimize", **given)
    assert most.config["lr"] > 3 * least.config["lr"]
    assert most.config == max(most.history, key=lambda o: -o.score).trial.config
    assert most.audit.chosen_score > least.audit.chosen_score > 0
    assert "size" in repr(most) and json.loads(json.dumps(most.to_dict()))["metric"] == "size"
    curve = most._curves(sorted(most.history, key=lambda o: o.score))
    assert all(min(scores) > 0 for _, scores in curve.values())


def test_a_search_by_a_scorer_reports_the_scorer():
    result = tune(
        network, rows(), metric="roc_auc", space=SPACE, budget="4runs", epochs=8, folds=2
    )
    assert 0.5 < result.audit.chosen_score <= 1
    assert all(-1 <= o.score <= 0 for o in result.history)
    assert "of the chosen roc_auc" in str(result)


class Higher(nn.Module):
    """A metric in the manner of torchmetrics."""

    higher_is_better = True

    def forward(self, output, target):
        return (output.argmax(1) == target).float().mean()


def test_a_metric_that_knows_its_direction_needs_none():
    study = optuna.create_study(direction="maximize")
    assert metric_of(Higher(), None, of("classes")).maximised
    assert not metric_of(nn.CrossEntropyLoss(), None, of("classes")).maximised
    assert not metric_of(nn.functional.mse_loss, None, of("numbers")).maximised

    def accuracy(output, target):
        return (output.argmax(1) == target).float().mean()

    given = {"space": SPACE, "budget": "2runs", "epochs": 2, "folds": 0, "refit": False}
    result = tune(network, rows(), metric=accuracy, study=study, **given)
    assert result.audit.maximised and 0 <= study.best_value <= 1


def test_a_study_whose_grid_is_used_up_ends_the_search():
    space = Space(width=Choice([4, 8]))
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"width": [4, 8]}))
    given = {"budget": "40runs", "epochs": 1, "folds": 0, "refit": False}
    result = tune(network, rows(), space=space, study=study, **given)
    assert {trial.params["width"] for trial in study.trials} == {4, 8}
    assert len(study.trials) == len(result.history) - 1 < 40
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)


def test_scorers_that_need_what_outputs_do_not_tell_are_refused_by_name():
    with pytest.raises(InputError, match="from which output on the answer is the second"):
        metric_of("accuracy", None, of("custom")).score(SINGLE, EITHER_SIGN)
    with pytest.raises(InputError, match="the metric roc_auc failed on 40 validation rows"):
        metric_of("roc_auc", None, of("numbers")).score(SINGLE, NUMBERS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "roc_aucc"}, "did you mean 'roc_auc'"),
        ({"metric": 3}, "a scorer's name or a function"),
        ({"metric": f1_score}, r"make_scorer\(f1_score\)"),
        ({"metric": "roc_auc", "direction": "minimize"}, "leave direction out"),
        ({"metric": "roc_auc", "direction": "up"}, "unknown direction"),
        ({"direction": "maximize"}, "give metric= too"),
        ({"metric": lambda output, target: 0.5}, "does not say which way is better"),
        (
            {"metric": lambda output, target: (output - target).sum(), "direction": "minimize"},
            "the metric .* failed on",
        ),
        ({"metric": Higher(), "direction": "minimize"}, "says higher_is_better=True"),
    ],
)
def test_metrics_that_cannot_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        tune(network, rows(), space=SPACE, budget="2runs", epochs=2, folds=0, **given)


def test_another_metric_does_not_resume_a_search(tmp_path):
    given = {"space": SPACE, "budget": "2runs", "epochs": 4, "folds": 0, "output": tmp_path}
    tune(network, rows(), metric="roc_auc", **given)
    for other in ({}, {"metric": "accuracy"}):
        with pytest.raises(InputError, match="different metric"):
            tune(network, rows(), resume=True, **other, **given)


def test_a_study_proposes_the_trials_and_is_told_of_them():
    space = Space(
        depth=Choice([1, 2]), width=Int(4, 16, log=True).when(depth=2), lr=Log(1e-3, 10.0)
    )

    def build(depth, width=4):
        return nn.Linear(6, 2) if depth == 1 else network(width)

    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1)
    )
    study.enqueue_trial({"depth": 2, "width": 5, "lr": 0.01})
    result = tune(
        build, rows(), metric="accuracy", space=space, study=study, budget="6runs", epochs=4,
        folds=0,
    )  # fmt: skip
    assert len(study.trials) == 6 and {t.state.name for t in study.trials} <= {"COMPLETE", "FAIL"}
    assert dict(result.history.of(0).trial.config) == {"depth": 2, "width": 5, "lr": 0.01}
    for trial in study.trials:
        outcome = result.history.of(trial.number)
        assert ("width" in trial.params) == (trial.params["depth"] == 2)
        if not outcome.failed:
            assert trial.value == pytest.approx(-outcome.score) and 0 <= trial.value <= 1


def test_a_study_of_another_direction_or_beside_a_search_is_refused():
    study = optuna.create_study(direction="maximize")
    given = {"space": SPACE, "budget": "2runs", "epochs": 2, "folds": 0}
    with pytest.raises(InputError, match=r"create_study\(direction='minimize'\)"):
        tune(network, rows(), study=study, **given)
    with pytest.raises(InputError, match="give one of them"):
        tune(network, rows(), study=study, search=lambda s, p: None, **given)
    with pytest.raises(InputError, match="must be an Optuna study"):
        tune(network, rows(), study="study.db", **given)


def test_a_search_goes_on_with_a_study_made_anew(tmp_path):
    """Its trials are numbered from 0 again, and none takes the place of an earlier one."""
    seen = []
    given = {"space": SPACE, "budget": "6runs", "epochs": 4, "folds": 0, "output": tmp_path}
    tune(
        network, rows(), study=optuna.create_study(), on_event=seen.append,
        stop=lambda: any(e["event"] == "outcomes" for e in seen), **given,
    )  # fmt: skip
    resumed = tune(network, rows(), study=optuna.create_study(), resume=True, **given)
    ids = [outcome.trial.id for outcome in resumed.history]
    assert len(ids) == len(set(ids)) == 7  # the untuned one too


def test_a_study_whose_search_is_stopped_has_no_open_trials():
    study = optuna.create_study()
    seen = []
    result = tune(
        network, rows(), study=study, space=SPACE, budget="40runs", epochs=4, folds=0,
        stop=lambda: any(e["event"] == "outcomes" for e in seen), on_event=seen.append,
    )  # fmt: skip
    assert result.stopped and "RUNNING" not in {t.state.name for t in study.trials}
