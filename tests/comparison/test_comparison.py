from __future__ import annotations

import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.dummy import DummyClassifier, DummyRegressor

from tikhon.comparison import NAMES, Method, Records, balance, compare
from tikhon.comparison.architecture import DeepMLP, backprop_ratio
from tikhon.comparison.compare import (
    _affordable_rounds,
    _affordable_seeds,
    _beats_constant,
    _draw_split,
    _plan_trials,
)
from tikhon.comparison.methods import design
from tikhon.comparison.statistics import interval, p_value, tied
from tikhon.comparison.trainings import Fitted, Trainer
from tikhon.data import load, split
from tikhon.data.arrays import from_arrays
from tikhon.data.table import TableOptions
from tikhon.errors import DataError, InputError
from tikhon.runs.interrupt import Stopped
from tikhon.runs.journal import Journal


@pytest.mark.parametrize("name", [*NAMES, "l2+dropout", "l1+dropout+mixup"])
def test_every_method_gives_recipes_in_the_whole_cube(name: str):
    method = Method.of(name)
    rates = []
    for point in design(method.dimensions, 20):
        assert all(0 <= unit < 1 for unit in point)
        recipe, lr = method.recipe(point)
        rates.append(lr)
        assert recipe.from_dict(recipe.to_dict()) == recipe
    assert rates == [Method.of("none").recipe(p)[1] for p in design(2, 20)]
    assert min(rates) < 1e-3 < 1e-2 < max(rates)


def test_methods_that_cannot_be():
    with pytest.raises(InputError, match="unknown method 'dropuot'; did you mean 'dropout'"):
        Method.of("l2+dropuot")
    with pytest.raises(InputError, match="names a part twice"):
        Method.of("l2+l2")
    with pytest.raises(InputError, match="needs classes"):
        compare(load("diabetes"), ["mixup"])


def test_points_fill_the_cube():
    points = np.array(list(design(3, 64)))
    for axis in range(3):
        assert np.histogram(points[:, axis], bins=8, range=(0, 1))[0].min() >= 4


def test_interval_and_p_are_the_corrected_t_test():
    a = [0.9, 0.85, 0.88, 0.91, 0.87]
    mean, low, high = interval(a, share=0.0)
    expected = stats.t.interval(0.95, 4, loc=np.mean(a), scale=stats.sem(a))
    assert (mean, low, high) == pytest.approx((np.mean(a), *expected))
    assert p_value([x - 0.86 for x in a], share=0.0) == pytest.approx(
        stats.ttest_1samp(a, 0.86).pvalue
    )
    wide = interval(a, share=1 / 3)
    assert wide[2] - wide[0] == pytest.approx((high - mean) * math.sqrt(1 + 5 / 3))
    assert all(math.isnan(v) for v in interval([0.9], share=0.3)[1:])


def test_equal_shares_on_few_splits_are_no_certainty():
    same, other = [112 / 114] * 2, [111 / 114] * 2  # one test row of 114 apart, twice
    assert tied({"a": same, "b": other}, share=1 / 3, step=1 / 114) == {"a", "b"}
    _, low, high = interval(same, share=1 / 3, step=1 / 114)
    assert low < 111 / 114 and high > 113 / 114
    assert tied({"a": [0.9] * 5, "b": [0.5] * 5}, share=1 / 3, step=1 / 114) == {"a"}


def test_the_test_errs_rarely_where_nothing_differs():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        scores = {name: rng.normal(size=5) for name in "abc"}
        wrong += len(tied(scores, share=0.0)) < 3
    assert wrong / 200 < 0.12  # 0.05 for one pair; the best of three is compared with two


def test_a_planted_difference_is_found():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.01, 8)
    scores = {"good": 0.9 + base, "same": 0.9 + base + rng.normal(0, 0.001, 8), "bad": 0.7 + base}
    assert tied(scores, share=0.3) == {"good", "same"}


def noisy(rows: int = 90) -> object:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 30)).astype(np.float32)
    flip = rng.random(rows) < 0.15
    return from_arrays(x, (x[:, 0] + x[:, 1] > 0) ^ flip, name="noisy")


def test_compare_is_fair_and_complete():
    told = []
    found = compare(
        noisy(), ["none", "group_lasso", "early_stopping"], splits=2, trials=2, epochs=2,
        batch_size=30, seeds=2, on_event=lambda text, done, total: told.append((done, total)),
    )  # fmt: skip
    result = found.to_dict()
    assert result["kind"] == "compare" and len(result["methods"]) == 3
    assert told[-1][1] == 3 * 2 * 2 + 3 and told == sorted(told)
    for row in result["methods"]:
        assert len(row["scores"]) == 2 and 0 < row["size"] <= 1 and row["seed_std"] >= 0
        assert row["low"] <= row["test"] <= row["high"]
    by_name = {row["method"]: row for row in result["methods"]}
    assert by_name["group_lasso"]["recipe"]["penalties"][0]["rows"] == "in"
    assert result["verdict"] == found.verdict()
    tests = [row["test"] for row in result["methods"]]
    assert tests == sorted(tests, reverse=True)


@pytest.mark.parametrize(
    ("budget", "plan"),
    [(None, 6), (1000, 8), (100, 4), (64, 3), (40, 2), (3, 1)],
)
def test_a_short_budget_takes_splits_before_it_takes_the_tuning(budget, plan):
    assert _plan_trials(budget, 1.0, 4, 5, 8) == plan


@pytest.mark.parametrize(("budget", "seeds"), [(60, 3), (20, 3), (19, 1), (3, 1)])
def test_a_short_budget_goes_into_splits_before_it_goes_into_seeds(budget, seeds):
    """Three splits of four methods are 12 trainings, two more seeds another 8."""
    assert _affordable_seeds(budget, 1.0, 4, 3) == seeds


@pytest.mark.parametrize(
    ("left", "splits", "rounds"),
    [
        (80, 1, 4),
        (40, 1, 2),
        (30, 1, 1),
        (10, 1, 1),
        (9, 1, 0),
        (-1, 1, 0),
        (40, 2, 4),
        (40, 4, 4),
    ],
)
def test_a_split_has_the_trials_that_there_is_time_for(left, splits, rounds):
    """A round of all methods takes 10 s; up to the third, splits share the time that is left."""
    assert _affordable_rounds(left, 10.0, splits) == rounds


class Slow:
    """Trainings on a clock of its own, each of which takes longer than the one before."""

    def __init__(self, monkeypatch, growth):
        self.now, self.seconds, self.growth = 0.0, 1.0, growth
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(Trainer, "fit", lambda trainer, *args, **more: self.fit(*args[1:]))

    def fit(self, recipe, lr):
        self.now += self.seconds
        self.seconds *= self.growth
        metrics = {f"{part}/{name}": lr for part in ("train", "valid", "test")
                   for name in ("loss", "accuracy")}  # fmt: skip
        return Fitted(recipe, lr, metrics, self.seconds, 0.0, (1, 1))


@pytest.mark.parametrize("growth", [1.0, 1.02, 1.1, 2.0])
def test_a_budget_is_kept_on_a_machine_that_slows_down(growth, monkeypatch):
    slow = Slow(monkeypatch, growth)
    names = ["none", "l2", "l1", "dropout", "l2+dropout"]
    found = compare(noisy(), names, splits=5, epochs=1, seeds=1, budget="40s")
    assert slow.now <= 1.05 * 40 + found.trials * slow.seconds
    assert {len(row["scores"]) for row in found.rows} == {found.splits}
    left_out = set(names) - {row["method"] for row in found.rows}
    assert bool(left_out) == (growth == 2.0)
    assert all(name in str(found.notice) for name in left_out)


@pytest.mark.parametrize("seconds", [3.0, 9.0, 17.0, 30.0])
def test_no_method_is_begun_that_would_end_after_the_budget(seconds, monkeypatch):
    """A fifth training of 9 s was begun after 36 of 40 s, and 22.5 s of 20 s were taken so."""
    slow, told = Slow(monkeypatch, 1.0), []
    slow.seconds = seconds
    names = ["none", "l2", "l1", "dropout", "l2+dropout"]
    compare(noisy(), names, splits=5, epochs=1, seeds=1, budget="40s",
            on_event=lambda *event: told.append(event))  # fmt: skip
    least = 2 * seconds + 2 * seconds  # two methods, after two trainings to measure them by
    assert slow.now <= max(1.05 * 40 + 2 * seconds, least)
    announced = [text for text, _, total in told if total == 0]
    assert bool(announced) == (least > 40)
    assert all("two methods on one split" in text for text in announced)


def test_a_budget_that_is_spent_ends_the_comparison_and_says_so():
    found = compare(noisy(), ["none", "l2", "l1"], trials=2, epochs=2, seeds=1, budget="10ms")
    assert found.splits == 1 and [len(row["scores"]) for row in found.rows] == [1, 1]
    assert all(math.isnan(row["low"]) for row in found.rows)
    result, told = found.to_dict(), {"splits": 1, "asked": 5, "trials": 2, "methods": "l1"}
    assert result["notice"] == found.notice and "--budget" in result["notice"]
    assert result["sentences"]["notice"]["values"].items() >= told.items()


def test_methods_are_taken_once_and_there_is_one():
    with pytest.raises(InputError, match="needs a method"):
        compare(load("diabetes"), [])
    found = compare(load("diabetes"), ["l2", "l2"], splits=1, trials=1, epochs=1, seeds=1)
    assert len(found.rows) == 1


def test_regression_reports_errors():
    found = compare(load("diabetes"), ["none", "l2"], splits=2, trials=1, epochs=2, seeds=1)
    assert found.metric == "rmse" and all(row["test"] < 0 for row in found.rows)
    assert found.rows[0]["seed_std"] is None


def test_shapes_and_backprop():
    found = balance(noisy(), widths=[4], depths=[2, 12], strengths=(0.0, 1e-2), epochs=2)
    assert len(found.rows) == 2 * (1 + 2 * 4)
    ratio = {(r["depth"], r["remedy"]): r["backprop_ratio"] for r in found.rows if "depth" in r}
    assert ratio[12, "plain"] < 0.05 * ratio[12, "norm"]
    with pytest.raises(InputError, match="depths must be 1 or more"):
        balance(noisy(), depths=[0])


def test_the_ratio_is_of_the_first_and_last_weights():
    torch.manual_seed(0)
    model = DeepMLP(5, 8, 3, 2, "he")
    x, y = torch.randn(20, 5), torch.randint(0, 2, (20,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    by_hand = model.first.weight.grad.norm() / model.last.weight.grad.norm()
    assert backprop_ratio(model, x, y) == pytest.approx(float(by_hand), rel=1e-5)


# -- interrupted -------------------------------------------------------------------------------

ASKED = {"splits": 2, "trials": 2, "epochs": 2, "batch_size": 8, "seeds": 2}


def timeless(result):
    """Without what a clock decides."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result["methods"]]
    return {**result, "methods": rows, "seconds": 0}


def found(records):
    shapes = balance(noisy(), widths=[3], strengths=(0.0, 0.1), epochs=2, records=records)
    result = compare(noisy(), ["none", "auto"], **ASKED, records=records).to_dict()
    return timeless({**result, "notice": ""}), shapes.to_dict()


def test_a_comparison_stopped_at_every_training_ends_as_if_it_never_was(tmp_path):
    whole, path, stops = found(Records()), tmp_path / "journal.jsonl", 0
    while True:
        known = len(Records(Journal(path, {}, resume=path.exists()))) if path.exists() else 0
        records = Records(Journal(path, {}, resume=path.exists()))
        records.stop = lambda r=records, n=known: len(r) > n  # after one training more
        try:
            assert found(records) == whole
            break
        except Stopped:
            stops += 1
            assert len(records) == known + 1
    assert stops == 2 + 4 * 2 + 2 - 1  # nothing is left to stop after the last


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {}, resume=False)
    journal.append({"name": "split 1, none, point 1", "found": {"lr": 1}, "seconds": 0})
    records = Records(Journal(path, {}, resume=True))
    with pytest.raises(DataError, match="no journal of this kind"):
        compare(noisy(), ["none"], **ASKED, records=records)
    journal.append({"outcomes": []})
    with pytest.raises(DataError, match="no journal of this kind"):
        Records(Journal(path, {}, resume=True))


def drawn(kind: str, signal: bool) -> object:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(240, 4)).astype(np.float32)
    score = x[:, 0] + 0.1 * rng.normal(size=240) if signal else rng.normal(size=240)
    if kind == "rare":
        return from_arrays(x, score > 1.8, name="drawn")
    return from_arrays(x, score.astype(np.float32) if kind == "numbers" else score > 0.5,
                       name="drawn")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "signal", "splits"),
    [
        ("classes", False, 1),
        ("classes", True, 2),
        ("numbers", False, 2),
        ("numbers", True, 1),
        ("rare", False, 1),
    ],
)
def test_a_comparison_of_methods_that_learn_nothing_says_so(kind, signal, splits):
    data = drawn(kind, signal)
    found = compare(
        data, ["none", "l2"], splits=splits, trials=1, epochs=25, seeds=1, batch_size=16
    )
    constants = []
    for place in range(splits):
        parts = split(data, seed=place)
        answer = DummyRegressor() if kind == "numbers" else DummyClassifier()
        answer.fit(parts.train.x, parts.train.y)
        guess = answer.predict(parts.test.x)
        error = -np.sqrt(np.mean((guess - parts.test.y.numpy()) ** 2)) * parts.train.unit
        constants.append(error if kind == "numbers" else np.mean(guess == parts.test.y.numpy()))
    assert found.constant.test == pytest.approx(np.mean(constants), rel=1e-5)
    assert found.constant.beaten == signal
    nothing = found.verdict().startswith("No method is measurably better than always predicting")
    assert nothing != signal


@pytest.mark.parametrize(
    ("best", "constants", "rows", "beaten"),
    [
        ([0.9], [0.5], 80, True), ([0.9], [0.5], 4, False), ([0.98], [0.975], 5000, False),
        ([0.6, 0.62], [0.6, 0.6], 80, False), ([0.9, 0.6], [0.5, 0.5], 80, True),
        ([0.5, 0.5], [0.6, 0.6], 5000, False), ([1.0], [0.5], 2, False),
    ],
)  # fmt: skip
def test_one_answer_is_beaten_by_more_than_chance(best, constants, rows, beaten):
    assert _beats_constant(best, constants, 1 / 3, 1 / rows, rows) == beaten


def test_splits_of_a_time_column_end_at_other_times_and_test_the_latest_rows(tmp_path):
    days = np.arange(100)
    table = pd.DataFrame({"day": days, "a": days % 7, "y": days % 5 * 1.5})
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "t.csv", index=False)
    data = load(str(tmp_path / "t.csv"), table=TableOptions("y", time="day"))
    ends = []
    for place in range(4):
        parts = _draw_split(data, place, 4, 0)
        assert parts.test.table is None and len(parts.test.x) == round(0.2 * (100 - 12.5 * place))
        ends.append(len(parts.train.x) + len(parts.valid.x) + len(parts.test.x))
    assert ends == [100, 88, 75, 62]
    found = compare(data, ["none"], splits=2, trials=1, epochs=1, seeds=1)
    assert found.splits == 2 and found.notice is None


def test_one_split_is_one_split():
    data = from_arrays(torch.randn(60, 3), torch.arange(60) % 2)
    found = compare(data, ["none", "l2"], splits=1, trials=1, epochs=1, seeds=1)
    assert "of 1 split" in found.verdict() and "1 splits" not in found.verdict()
