"""What a search averages, tries first and spends its time on, against brute force."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy
import pytest
import torch

from tikhon.models.mlp import MLP
from tikhon.tuning import plan
from tikhon.tuning.choice import blend
from tikhon.tuning.preparation import make_job
from tikhon.tuning.session import TOP, Session, without_default
from tikhon.tuning.space import Choice, Int, Log, Space, Uniform
from tikhon.tuning.trials import History, Outcome, Trial
from tikhon.tuning.tune import _group_by_population, _mean_trace, tune

Y = numpy.random.default_rng(0).normal(size=60)


def answers(count, seed=1):
    """Candidates that miss the truth each in its own way."""
    noise = numpy.random.default_rng(seed).normal(size=(count, len(Y), 1))
    return [torch.from_numpy(Y[:, None] + 0.5 * (1 + k / 3) * n) for k, n in enumerate(noise)]


def squares(out):
    return float(((out[:, 0].numpy() - Y) ** 2).mean())


@pytest.mark.parametrize("first", [0, 3])
def test_the_second_of_a_blend_is_the_best_of_all(first):
    outputs = answers(5)
    alone = [((outputs[first] + o)[:, 0].numpy() / 2 - Y) for o in outputs]
    best = int(numpy.argmin([(miss**2).mean() for miss in alone]))
    assert blend(outputs, squares, first, 2, probabilities=False) == [first, best]


def test_a_blend_ends_where_its_mean_is_best_and_begins_with_the_chosen():
    outputs = answers(4)
    picked = blend(outputs, squares, 2, 8, probabilities=False)
    means = [((sum(outputs[k] for k in picked[:n]) / n)[:, 0].numpy() - Y) for n in range(1, 9)][
        : len(picked)
    ]
    scores = [(miss**2).mean() for miss in means]
    assert picked[0] == 2
    assert len(picked) <= 8
    assert numpy.argmin(scores[1:]) == len(scores) - 2


def test_of_logits_the_probabilities_are_averaged():
    sure, unsure = torch.tensor([[8.0, 0.0]] * 4), torch.tensor([[0.0, 0.5]] * 4)
    seen = []
    blend([sure, unsure], lambda out: seen.append(out) or 1.0, 0, 2, probabilities=True)
    expected = (sure.double().softmax(1) + unsure.double().softmax(1)) / 2
    assert torch.allclose(seen[1].softmax(1), expected)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (
            Space(model=Choice(["a", "b"]), lr=Log(1e-4, 1e-1), weight_decay="auto"),
            [("a", 3e-3, "auto"), ("b", 3e-3, "auto")],
        ),
        (Space(lr=Log(1e-2, 1e-1), dropout=Uniform(0.3, 0.6)), [(1e-2, 0.3)]),
        (Space(lr=Choice([0.5, 0.1]), width=Int(4, 8)), [(0.5, 6), (0.1, 6)]),
    ],
)
def test_what_is_customary_is_tried_first_as_near_as_the_space_comes(space, expected):
    found = plan.configs_near_defaults(space, 4)
    assert len(found) == len(expected)
    for config, values in zip(found, expected):
        for name, value in zip(space, values):
            assert config[name] == pytest.approx(value), config


def test_what_is_customary_has_the_entries_whose_conditions_hold_alone():
    space = Space(depth=Choice([1, 2]), width=Choice([8, 16]).when(depth=2), rate=0.5)
    assert plan.configs_near_defaults(space, 4) == [
        {"depth": 1, "rate": 0.5},
        {"depth": 2, "width": 8, "rate": 0.5},
    ]


def test_the_first_trials_of_a_search_are_customary():
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    space = Space(lr=Log(1e-4, 1e-1))
    found = tune(
        lambda: MLP([4, 8, 2]), (x, (x[:, 0] > 0).long()), space=space, budget="8runs", epochs=2
    )
    first = next(o for o in found.history if o.trial.id == 0)
    assert first.trial.config["lr"] == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("seconds", "epochs", "members"),
    [(4, (10, 40), (8, 8)), (30, (60, 60), (8, 63)), (600, (60, 60), (64, 64))],
)
def test_seconds_buy_length_before_members(monkeypatch, seconds, epochs, members):
    monkeypatch.setattr(plan, "step_time", lambda job, configs, chunk: 100.0)
    x, y = torch.randn(16_000, 4), torch.zeros(16_000)
    how = (None, None, torch.optim.AdamW, "cpu", 0)
    job = make_job(lambda config: MLP([4, 8, 1]), x, y, None, "mse", 0, *how)
    assert job.epochs == 20
    found = plan.make_plan(job, Space(lr=Log(1e-4, 1e-1)), f"{seconds}s")
    assert epochs[0] <= found.epochs <= epochs[1]
    assert members[0] <= found.members <= members[1]
    fixed = plan.make_plan(job, Space(lr=Log(1e-4, 1e-1)), f"{seconds}s", fixed=True)
    assert fixed.epochs <= 20


def test_the_ends_of_a_history_were_not_continued():
    rows = [
        Outcome(Trial(0, {}, 2), 0.5),
        Outcome(Trial(1, {}, 2), 0.4),
        Outcome(Trial(2, {}, 4, parent=0), 0.45),
        Outcome(Trial(3, {}, 4), float("nan"), failure="no"),
    ]
    assert [o.trial.id for o in History(rows).ends()] == [1, 2]
    assert [o.trial.id for o in History(rows).ranked()] == [2]


def test_the_members_of_an_average_of_numbers_differ():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator)
    y = x[:, 0] * x[:, 1] + 0.3 * torch.randn(200, generator=generator)
    found = tune(lambda: MLP([4, 16, 1]), (x, y), budget="8runs", epochs=10, folds=0)
    assert 1 < len(found.average.members) <= TOP
    answers = [member(x).detach() for member in found.average.members]
    assert torch.allclose(torch.stack(answers).mean(0), found.average(x), atol=1e-6)
    assert all(not torch.equal(answers[0], other) for other in answers[1:])


@pytest.mark.parametrize("asked", [22, 25])
def test_what_time_cuts_short_is_compared_and_trained_again(monkeypatch, asked):
    count = itertools.count()

    def past(session, share, ahead=0.0):
        return share < 0.85 and next(count) > asked

    monkeypatch.setattr(Session, "is_spent", past)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    space = Space(lr=Log(1e-3, 1e-1), weight_decay="auto", width=[8, 12, 16])
    how = {"budget": "100s", "epochs": 16, "folds": 0, "space": space, "batch_size": 16}
    monkeypatch.setattr(plan, "step_time", lambda job, configs, chunk: 20_000.0)
    found = tune(lambda width: MLP([4, width, 2]), (x, (x[:, 0] > 0).long()), **how)
    assert found.stopped == "the time budget was used up"
    assert len({o.trial.budget for o in without_default(found.history).ends()}) > 1
    assert found.average(x).isfinite().all()
    best = min(o.score for o in without_default(found.history).ends())
    assert found.audit.best_score <= best + 0.05


def test_strengths_that_time_cut_short_go_on_with_the_last():
    found = torch.arange(40.0).view(1, 20, 2)
    session = SimpleNamespace(states={0: {"decay.trace": found}, 1: {}})
    whole = _mean_trace(session, Trial(0, {}, 30), 60)
    assert len(whole) == 40
    assert torch.equal(whole[:20], found[0])
    assert torch.equal(whole[20:], found[0, -1:].expand(20, 2))
    assert torch.equal(_mean_trace(session, Trial(0, {}, 60), 60), found[0])
    assert _mean_trace(session, Trial(1, {}, 60), 60) is None
    assert len(_group_by_population([{"lr": 0.1}] * 3, [(60, 40), (60, 39), (60, 40)])) == 2
