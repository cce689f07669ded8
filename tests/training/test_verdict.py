"""What a run is said to have come to: no praise without a reason, no claim in the noise."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

import tikhon as tk
from tikhon.languages import strings
from tikhon.report.kinds.scores import baseline_rows as yardsticks_of
from tikhon.report.saved import SavedRun
from tikhon.training import fit
from tikhon.training.baselines import assess
from tikhon.training.fit import Run
from tikhon.training.losses import loss_of
from tikhon.training.measures import score_outputs
from tikhon.training.result import next_commands, result_document, statements
from tikhon.training.verdict import (
    GAP,
    Scores,
    Statement,
    gap_interval,
    has_risen,
    is_improving,
    judge_run,
)

PRAISE = {"even", "even_ratio"}


def accuracy(train, valid, rows=400):
    """Scores of a classifier as they are measured on so many rows."""
    shares = {"train": train, "valid": valid}
    errors = {f"{k}/accuracy": (max(v * (1 - v), 1e-4) / rows) ** 0.5 for k, v in shares.items()}
    metrics = {f"{k}/accuracy": v for k, v in shares.items()}
    return Scores(metrics, {"train": rows, "valid": rows}, errors)


def codes(found):
    return [statement.code for statement in found]


@pytest.mark.parametrize(
    ("train", "valid", "rows", "code"),
    [
        (1.0, 0.8, 400, "overfits"),
        (0.9, 0.89, 4000, "even"),
        (0.90, 0.95, 400, "even"),
        (0.90, 0.865, 160, "unsure"),
        (1.0, 0.5, 10, "overfits"),
    ],
)
def test_a_gap_counts_where_its_interval_says_so(train, valid, rows, code):
    assert codes(judge_run(accuracy(train, valid, rows))) == [code]


def test_the_same_gap_is_judged_by_the_rows_that_it_rests_on():
    """A fixed limit would call it the same on 20 rows and on 20,000."""
    found = [codes(judge_run(accuracy(0.95, 0.95 - 2 * GAP, n)))[0] for n in (20, 160, 20_000)]
    assert found[0] == "unsure" and found[-1] == "overfits"


def test_the_interval_covers_the_gap_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        shares = {"train": generator.binomial(300, 0.95) / 300,
                  "valid": generator.binomial(100, 0.85) / 100}  # fmt: skip
        scores = Scores(
            {f"{k}/accuracy": v for k, v in shares.items()}, {"train": 300, "valid": 100},
            {f"{k}/accuracy": (v * (1 - v) / n) ** 0.5
             for (k, v), n in zip(shares.items(), (300, 100))},
        )  # fmt: skip
        found = gap_interval(scores)
        assert found is not None
        covered.append(found[1] <= 0.1 <= found[2])
    assert 0.92 < np.mean(covered) < 0.98


def test_without_validation_rows_nothing_is_claimed():
    assert codes(judge_run(Scores({"train/accuracy": 0.9}, {"train": 9}, {}))) == ["unjudged"]


def noise(classes: bool, rows=400, seed=0):
    """Targets that no feature says anything about, as train, valid and test."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    y = torch.randn(rows, generator=generator)
    y = (y > 0.6).long() if classes else y
    return [(x[a:b], y[a:b]) for a, b in ((0, rows // 2), (rows // 2, 3 * rows // 4),
                                          (3 * rows // 4, rows))]  # fmt: skip


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("epochs", [1, 5])
def test_a_model_that_cannot_learn_is_never_praised(classes, seed, epochs):
    train, valid, test = noise(classes, seed=seed)
    torch.manual_seed(seed)
    model = nn.Linear(3, 2 if classes else 1)
    run = fit(model, train, valid=valid, test=test, epochs=epochs, linear=False)
    found = statements(run)
    assert found[0].code == ("no_better_class" if classes else "no_better_mean")
    assert not PRAISE & set(codes(found))
    assert "always predicting" in str(run)


def test_a_model_that_learned_is_not_called_ignorant():
    train, valid, _ = ((x, (x[:, 0] > 0).long()) for x, _ in noise(True))
    run = fit(nn.Linear(3, 2), train, valid=valid, epochs=60, lr=0.05)
    assert not {"no_better_class", "only_probabilities"} & set(codes(statements(run)))


def test_where_a_few_rows_decide_a_model_is_not_called_ignorant():
    """RMSE 46,040 against 91,619 of the mean was called 'not better': two rows were most of it."""
    y = torch.randn(80, generator=torch.Generator().manual_seed(3)).mul(1.6).exp()
    y[0] = 10 * y.max()
    x, only_one = torch.arange(80.0)[:, None], torch.full((80,), float(y.mean()))
    only_one[0] = 0.7 * y[0]

    def found(values):
        parts = {"train": (x, y), "valid": (x, y)}
        scores = assess(Lookup(values), parts, loss_of("mse", y), linear=False)
        return codes(judge_run(scores, [], "epochs"))

    assert found(only_one)[0] == "unsure_mean"
    assert found(torch.full((80,), float(y.median())))[0] == "no_better_mean"
    assert not any("mean" in code for code in found(0.9 * y))  # R2 0.99


class Lookup(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return self.values[x[:, 0].long()]


def test_probabilities_without_decisions_are_told_apart():
    """One class in ten that no row reaches one half for: the ranking is right all the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=generator)
    share = torch.sigmoid(x[:, 0] * 0.8 - 2.5)
    y = (torch.rand(4000, generator=generator) < share).long()
    run = fit(nn.Linear(1, 2), (x[:2000], y[:2000]), valid=(x[2000:], y[2000:]), epochs=40,
              lr=0.05)  # fmt: skip
    assert codes(statements(run))[0] == "only_probabilities"
    metrics = run.metrics or {}
    assert metrics["valid/balanced_accuracy"] < 0.55 < 5 * metrics["valid/average_precision"]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("rare", [0, 1])
def test_average_precision_is_that_of_the_rarer_of_two_classes(classes, rare):
    """The frequent one has 0.9 whatever the model does."""
    generator = torch.Generator().manual_seed(0)
    y = torch.full((300,), 1 - rare)
    y[:30] = rare
    y[30:60] = classes - 1 if classes > 2 else rare
    output = torch.randn(300, classes, generator=generator)
    shares = output.double().softmax(1)
    asked = [rare] if classes == 2 else range(3)
    expected = sum(average_precision_score(y == k, shares[:, k]) for k in asked) / len(asked)
    found = score_outputs(output, y, loss_of("cross_entropy"), imbalanced=True)
    assert found["average_precision"] == pytest.approx(expected)
    constant = score_outputs(
        torch.zeros(300, classes), y, loss_of("cross_entropy"), imbalanced=True
    )
    assert constant["average_precision"] == pytest.approx(0.2 if classes == 2 else 1 / 3)
    frequent = y == 1 - rare
    alone = score_outputs(output[frequent], y[frequent], loss_of("cross_entropy"), imbalanced=True)
    assert ("average_precision" in alone) is False


@pytest.mark.parametrize("epochs", [2, 5, 20])
def test_a_run_that_was_cut_short_is_never_praised(epochs):
    (x, y), (v, w), _ = noise(True)
    y, w = (x[:, 0] > 0).long(), (v[:, 0] > 0).long()
    run = fit(nn.Linear(3, 2), (x, y), valid=(v, w), epochs=epochs, lr=1e-3)
    found = codes(statements(run))
    assert "improving" in found and not PRAISE & set(found)


def test_what_counts_as_improving():
    falling = [{"epoch": e, "valid/loss": 1 / e} for e in range(1, 21)]
    flat = [{"epoch": e, "valid/loss": 0.5 + 0.5**e} for e in range(1, 21)]
    turned = [{"epoch": e, "valid/loss": abs(e - 15) / 15 + 0.1} for e in range(1, 21)]
    assert [is_improving(h) for h in (falling, flat, turned, falling[:1])] == [True] + 3 * [False]
    assert not is_improving([{"epoch": e} for e in range(9)])
    solved = [
        {"valid/loss": 0.7 * 0.99**e} for e in range(1000)
    ]  # falls by the same share for ever
    slow = [{"valid/loss": 2.3 - 1e-5 * e} for e in range(100)]  # a rate that is far too small
    assert is_improving(solved[:200]) and not is_improving(solved) and is_improving(slow)
    assert codes(judge_run(accuracy(0.9, 0.9), falling, "epochs"))[0] == "improving"
    assert "improving" not in codes(judge_run(accuracy(0.9, 0.9), falling, "early stopping"))
    assert codes(judge_run(accuracy(0.9, 0.9), falling[:1], "epochs"))[0] == "one_epoch"


def test_a_loss_that_has_turned_is_told():
    metrics = {"train/accuracy": 1.0, "valid/accuracy": 0.99, "valid/loss": 0.4}
    history = [{"epoch": 1, "valid/loss": 0.5}, {"epoch": 2, "valid/loss": 0.2}]
    errors = {"train/accuracy": 0.01, "valid/accuracy": 0.01}
    for last, told in ((0.4, True), (0.21, False)):
        scores = Scores(metrics | {"valid/loss": last}, {"train": 99, "valid": 99}, errors)
        assert ("rising" in codes(judge_run(scores, history, "epochs"))) == told


def test_a_loss_that_rose_while_weights_went_has_not_turned():
    losses, zeros = (0.5, 0.3, 0.5, 0.45, 0.4), (0.0, 0.0, 0.9, 0.9, 0.9)
    history = [
        {"epoch": i + 1, "valid/loss": loss, "sparsity/zeros": share}
        for i, (loss, share) in enumerate(zip(losses, zeros))
    ]
    assert not has_risen({"valid/loss": 0.4}, history)
    history += [{"epoch": 6, "valid/loss": 0.6, "sparsity/zeros": 0.9}]
    assert has_risen({"valid/loss": 0.6}, history)
    [found] = [s for s in judge_run(Scores({"valid/loss": 0.6}), history) if s.code == "rising"]
    assert found.values["epoch"] == "5"


@pytest.mark.parametrize(
    ("key", "own", "linear", "margin", "code"),
    [
        ("accuracy", 0.975, 0.964, (0.011, 0.008), "linear_equal"),
        ("accuracy", 0.93, 0.87, (0.06, 0.07), "linear_unsure"),
        ("accuracy", 0.85, 0.91, (-0.06, 0.01), "linear_better"),
        ("accuracy", 0.97, 0.87, (0.10, 0.01), None),
        ("rmse", 1.42, 2.42, (3.84, 2.5), "linear_unsure_rmse"),  # 40% lower, with a heavy tail
        ("rmse", 2.40, 2.42, (0.10, 0.2), "linear_equal"),
        ("rmse", 2.42, 1.42, (-3.84, 0.5), "linear_better"),
        ("rmse", 1.42, 2.42, (3.84, 0.5), None),
    ],
)
def test_as_good_as_a_linear_model_is_said_where_the_rows_show_it(key, own, linear, margin, code):
    """Too few rows to tell are no equality: a network with half the error was "no better"."""
    at = f"valid/{key}"
    scores = Scores(
        {at: own, f"train/{key}": own},
        {"train": 240, "valid": 80},
        {at: 0.01, f"train/{key}": 0.01},
        part="valid",
        baselines={"linear": {at: linear}},
        margins={"linear": {key: margin}},
    )
    said = [name for name in codes(judge_run(scores)) if name.startswith("linear")]
    assert said == ([] if code is None else [code])


@pytest.mark.parametrize("classes", [True, False])
def test_yardsticks_are_those_of_scikit_learn(classes):
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import log_loss, r2_score, root_mean_squared_error
    from sklearn.preprocessing import StandardScaler

    (x, y), (v, w), _ = noise(classes, seed=1)
    x, v = x * torch.tensor([1.0, 30.0, 1e-3]) + 2, v * torch.tensor([1.0, 30.0, 1e-3]) + 2
    if classes:
        y, w = y + (x[:, 0] > 2).long(), w + (v[:, 0] > 2).long()
    else:
        y, w = y + x[:, 0], w + v[:, 0]
    model = nn.Linear(3, 3 if classes else 1)
    loss = loss_of("cross_entropy" if classes else "mse")
    parts = {"train": (x, y), "valid": (v, w)}
    found = assess(model, parts, loss)
    if not classes:  # of a standardised target: scores and margins in one unit
        scaled = assess(model, parts, loss, unit=20.0)
        own, linear = scaled.metrics["valid/rmse"], scaled.baselines["linear"]["valid/rmse"]
        assert own == pytest.approx(20 * found.metrics["valid/rmse"])
        assert scaled.margins["linear"]["rmse"][0] == pytest.approx(linear**2 - own**2, rel=1e-4)
    scaler = StandardScaler().fit(x.double())
    peers = {
        "constant": DummyClassifier(strategy="prior") if classes else DummyRegressor(),
        "linear": LogisticRegression() if classes else Ridge(),
    }
    for name, peer in peers.items():
        peer.fit(scaler.transform(x.double()), y.numpy())
        given = scaler.transform(v.double())
        ours = found.baselines[name]
        if classes:
            assert ours["valid/accuracy"] == pytest.approx(peer.score(given, w.numpy()))
            wanted = log_loss(w, peer.predict_proba(given), labels=[0, 1, 2])
            assert ours["valid/loss"] == pytest.approx(wanted, rel=1e-4)
        else:
            guess = peer.predict(given)
            assert ours["valid/rmse"] == pytest.approx(root_mean_squared_error(w, guess), rel=1e-4)
            assert ours["valid/r2"] == pytest.approx(r2_score(w, guess), rel=1e-3, abs=1e-4)


def test_a_linear_model_of_some_rows_says_of_how_many(monkeypatch):
    """It stays cheap on a large table; and classes that it is sure of are no warning."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from tikhon.training import baselines

    monkeypatch.setattr(baselines, "_CELLS", 100)
    x = torch.linspace(-1, 1, 400)[:, None] ** 3
    y, far = (x[:, 0] > 0).long(), x * 1e6
    told = assess(nn.Linear(1, 2), {"train": (x, y), "valid": (far, y)}, loss_of("cross_entropy"))
    linear = told.baselines["linear"]
    assert linear["train/rows"] == 100
    scaler = StandardScaler().fit(x[::4].double())
    peer = LogisticRegression().fit(scaler.transform(x[::4].double()), y[::4])
    wanted = peer.score(scaler.transform(far.double()), y)
    assert linear["valid/accuracy"] == pytest.approx(wanted)
    run = SavedRun(Path(), {}, (), {"kind": "fit", "yardsticks": told.baselines})
    shown = [label.text("en") for label, *_ in yardsticks_of(run)]
    assert "Linear model of 100 rows, validation" in shown


def test_a_margin_needs_more_than_a_few_rows():
    """Four rows of 160 prove nothing; McNemar's exact test gives p = 0.125."""
    y = torch.zeros(160, dtype=torch.long)
    ours = torch.zeros(160, 2)
    ours[:, 0] = 1.0
    theirs = ours.clone()
    theirs[:4, 1] = 2.0

    class Answers(nn.Module):
        def forward(self, x):
            return ours[: len(x)]

    from tikhon.training import baselines

    mean, error = baselines._paired_margins("linear", theirs, ours, y, 1.0)["accuracy"]
    assert 0 < mean < 1.96 * error


def test_targets_without_one_answer_a_row_have_no_yardstick():
    """Segmentation, tokens, a loss of one's own: scored as before, compared with nothing."""
    x, y = torch.randn(30, 2, 4), torch.randint(0, 2, (30, 4))
    run = fit(nn.Conv1d(2, 2, 1), (x, y), epochs=2)
    assert run.assessment is not None and run.assessment.baselines == {}
    own = fit(nn.Linear(4, 2), (x[:, 0], y[:, 0]), epochs=2, loss=lambda o, t: o.square().mean())
    assert own.assessment is not None and own.assessment.baselines == {}
    tokens = fit(nn.Sequential(nn.Embedding(3, 2), nn.Flatten()),
                 (torch.randint(0, 3, (30, 1)), y[:, 0]), epochs=2)  # fmt: skip
    assert tokens.assessment is not None and set(tokens.assessment.baselines) == {"constant"}


def test_every_sentence_can_be_printed():
    values = {"answer": "'a'", "rows": "9", "part": "validation", "score": "1", "baseline": "2",
              "loss": "3", "baseline_loss": "4", "epochs": "5", "train": "6", "valid": "7",
              "gap": "8", "low": "0", "high": "1", "lowest": "2", "epoch": "3", "last": "4",
              "own": "5", "share": "6 %", "units": "weights", "asked": "7 %", "step": "8",
              "end": "9", "saved": "1 %", "cost": "flops"}  # fmt: skip
    codes = [k.removeprefix("verdict_") for k in strings("en") if k.startswith("verdict_")]
    texts = [str(Statement(code, values)) for code in codes]
    assert len(set(texts)) == len(texts) and all(t.endswith(".") for t in texts)


def test_what_to_run_next_answers_what_was_found():
    run = _run(("tikhon", "fit", "iris", "--output", "run", "--json", "--lr", "0.1"))
    again = "tikhon fit iris --lr 0.1"

    def after(*found, of=run):
        return next_commands(of, [Statement(code, {}) for code in found])

    decay = f"{again} --weight-decay auto"
    assert after("overfits") == after("overfits_ratio") == [decay]
    assert after("rising") == [f"{again} --early-stopping 5"]
    assert after("overfits", "rising") == [decay, f"{again} --early-stopping 5"]
    assert after("improving", "overfits") == [f"{again} --epochs 40"]
    exact = _run(("tikhon", "fit", "iris", "--epochs=8", "-o", "run", "--lr", "0.1"))
    assert after("improving", of=exact) == after("one_epoch", of=exact) == [again]
    spanned = _run(("tikhon", "fit", "iris", "--schedule", "cosine", "--epochs", "8"))
    assert after("improving", of=spanned) == ["tikhon fit iris --schedule cosine --epochs 40"]
    late = _run(("tikhon", "fit", "iris", "--lr", "0.1", "--budget", "10s"), "budget", 10.0)
    assert after("improving", of=late) == [f"{again} --budget 2m"]
    assert after("even") == ["tikhon compare iris"]
    table = _run(("tikhon", "fit", "flowers.csv", "--target", "kind"))
    assert after("even", of=table) == ["tikhon compare flowers.csv --target kind"]
    assert after("no_better_class", of=table) == ["tikhon tune flowers.csv --target kind"]


def _run(command, ended="epochs", seconds=1.0):
    history = tuple({"epoch": e} for e in range(1, 9))
    return Run(nn.Linear(1, 1), tk.Recipe(), history, ended, 1, seconds, "run", {}, {}, command)


def test_a_result_names_the_class_that_is_always_answered():
    train, valid, _ = noise(True)
    result = result_document(
        fit(nn.Linear(3, 2), train, valid=valid, epochs=2), classes=("no", "yes")
    )
    assert result["answer"] == "'no'" and "always predicting 'no'" in result["verdict"]
    assert list(itertools.islice(result, 3)) == ["kind", "verdict", "statements"]


@pytest.mark.parametrize(
    ("loss", "exploded"), [(0.5, False), (5.0, False), (60.0, False), (80.0, True), (1e19, True)]
)
def test_a_loss_beyond_that_of_one_answer_is_not_to_be_trained_longer(loss, exploded):
    falling = [{"epoch": e, "valid/loss": loss * (2 - e / 10)} for e in range(1, 11)]
    held = {"valid/accuracy": 0.5, "valid/loss": loss, "train/accuracy": 0.5}
    scores = Scores(held, {"train": 90, "valid": 90}, {}, "valid", "'a'",
                    {"constant": {"valid/accuracy": 0.6, "valid/loss": 0.7}},
                    {"constant": {"accuracy": (-0.1, 0.1), "loss": (-loss, 1.0)}})  # fmt: skip
    found = codes(judge_run(scores, falling, "epochs"))
    assert ("exploded" in found) == exploded and ("improving" in found) != exploded
    assert found[0] == "no_better_class"


def test_a_training_that_diverged_is_done_again_with_smaller_steps():
    said = [Statement("exploded", {})]
    run = _run(("tikhon", "fit", "iris", "--lr", "1e9"))
    assert next_commands(run, said) == ["tikhon fit iris"]
    assert next_commands(_run(("tikhon", "fit", "iris")), said) == ["tikhon fit iris --lr 1e-4"]
