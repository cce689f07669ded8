"""tune from end to end: the choice, the audit, resuming, and requests that cannot be met."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import partial

import pytest
import scipy.stats
import torch
from torch import nn

from tikhon.errors import InputError
from tikhon.layers import Dropout
from tikhon.models import Average
from tikhon.models.convnet import ConvNet
from tikhon.models.mlp import MLP
from tikhon.runs.interrupt import Stopped
from tikhon.training import fit
from tikhon.tuning.choice import at_edges, choose, selection_noise
from tikhon.tuning.preparation import make_job
from tikhon.tuning.runners import PopulationRunner, choose_chunk, step_time
from tikhon.tuning.searches import PopulationBased, Random
from tikhon.tuning.space import Choice, Log, Space, Uniform
from tikhon.tuning.trials import DEFAULT, Trial
from tikhon.tuning.tune import tune

SPACE = Space(dropout=Uniform(0, 0.6), lr=Log(1e-3, 3e-2), weight_decay="auto")


def data(rows=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return x, ((x[:, 0] * x[:, 1] + 0.3 * x[:, 2]) > 0).long()


def network():
    return MLP([6, 16, 2])


def search(**given):
    return tune(network, data(), **{"space": SPACE, "budget": "6runs", "epochs": 16, **given})


def test_a_search_returns_a_model_an_average_a_table_and_an_audit():
    result = search(folds=3)
    x, y = data(400, seed=1)
    accuracy = (result.average(x).argmax(1) == y).float().mean()
    assert accuracy > 0.75
    assert set(result.config) == set(SPACE)
    assert len(result.average.members) >= 2
    assert {row["budget"] for row in result.trials} >= {result.plan.epochs}
    lines = "\n".join(result.audit.lines())
    assert "selection noise" in lines and "default" in lines
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["kind"] == "tune"


def test_the_same_seed_gives_the_same_search():
    a, b = search(), search()
    assert [o.score for o in a.history] == [o.score for o in b.history]
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values())
    assert all(torch.equal(x, y) for x, y in pairs)


def twice_dropped():
    hidden = [nn.Linear(6, 16), nn.ReLU(), Dropout(0.3)]
    return nn.Sequential(*hidden, nn.Linear(16, 8), Dropout(0.3), nn.Linear(8, 2))


SOMETIMES = {"2": Choice([0.0, 0.5]), "4": 0.5}  # in some members one of two layers is silent


@pytest.mark.parametrize(
    ("build", "folds", "rate"),
    [(0, 0, 0.5), (0, 2, 0.0), (0, 3, 0.5), (1, 0, SOMETIMES), (1, 3, SOMETIMES)],
)
def test_a_runner_gives_the_same_outcomes_whatever_the_chunk(build, folds, rate):
    given = (None, "auto", folds, 8, 32, torch.optim.AdamW, "cpu", 0)
    job = make_job(lambda c: (network, twice_dropped)[build](), *data(), *given)
    space = Space(dropout=rate, lr=Log(1e-3, 3e-2), weight_decay=Log(1e-3, 1.0))
    trials = [Trial(i, c, 2) for i, c in enumerate(Random(space, count=5).configs())]
    later = [Trial(10 + t.id, t.config, 4, parent=t.id) for t in trials]
    scores = []
    for chunk in (1, 4):
        runner = PopulationRunner(job, chunk)
        scores.append([o.score for o in runner.run(trials) + runner.run(later)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_trial_continued_equals_one_trained_at_once():
    job = make_job(
        lambda c: network(), *data(), None, "auto", 0, 8, 32, torch.optim.AdamW, "cpu", 0
    )
    config = {"dropout": 0.3, "lr": 0.01, "weight_decay": "auto"}
    runner = PopulationRunner(job, 1)
    runner.run([Trial(0, config, 3)])
    (halves,) = runner.run([Trial(1, config, 8, parent=0)])
    (whole,) = PopulationRunner(job, 1).run([Trial(0, config, 8)])
    assert halves.curve[-1] == whole.curve[-1]


def test_population_based_training_copies_states():
    space = Space(lr=Log(1e-3, 3e-2), dropout=Uniform(0, 0.5))
    result = tune(
        network, data(), space=space, epochs=6, budget="4runs", folds=0,
        search=lambda s, plan: PopulationBased(s, Random(s, count=4), full=6, interval=2),
    )  # fmt: skip
    parents = [o.trial.parent for o in result.history if o.trial.parent is not None]
    assert len(parents) > len(set(parents))


def test_regression_and_free_architectures_are_served():
    x, _ = data()
    y = x[:, 0] * x[:, 1]

    def build(config):
        return MLP([6, config["width"], 1])

    space = Space(width=Choice([4, 16]), lr=Log(1e-2, 3e-2))
    result = tune(build, (x, y), space=space, epochs=20, budget="4runs", folds=0)
    assert result.config["width"] in (4, 16)
    assert result.average(x).shape == (160, 1)


def test_models_of_equal_shapes_that_differ_are_not_trained_as_one():
    def build(config):
        bend = nn.Tanh() if config["bend"] == "tanh" else nn.ReLU()
        return nn.Sequential(nn.Linear(6, 8), bend, nn.Linear(8, 2))

    job = make_job(build, *data(), None, "auto", 0, 8, 32, torch.optim.AdamW, "cpu", 0)
    trials = [Trial(k, {"lr": 0.01, "bend": bend}, 8) for k, bend in enumerate(("tanh", "relu"))]
    together = PopulationRunner(job, 4).run(trials)
    apart = [PopulationRunner(job, 1).run([trial])[0] for trial in trials]
    assert [o.score for o in together] == pytest.approx([o.score for o in apart], abs=1e-5)
    assert together[0].score != pytest.approx(together[1].score, abs=1e-4)


KINDS = {
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
    "lstm": lambda: nn.Sequential(nn.LSTM(6, 2), Hidden()),
}


class Hidden(nn.Module):
    def forward(self, x):
        return x[0]


@pytest.mark.parametrize("kind", ["norm", "lstm"])
def test_a_model_that_trains_alone_does_so_beside_others_that_do_not(kind):
    given = (*data(), None, "auto", 2, 8, 32, torch.optim.AdamW, "cpu", 0)
    job = make_job(lambda c: KINDS[c["kind"]](), *given)
    configs = [{"lr": lr, "kind": k} for k in ("plain", kind) for lr in (0.01, 0.02)]
    assert choose_chunk(job, configs)[0] == choose_chunk(job, configs[::-1])[0] == 4
    assert step_time(job, configs, 4) > 0
    trials = [Trial(k, config, 4) for k, config in enumerate(configs)]
    together = PopulationRunner(job, 4).run(trials)
    apart = [PopulationRunner(job, 1).run([trial])[0] for trial in trials]
    assert [o.score for o in together] == pytest.approx([o.score for o in apart], abs=1e-5)


def test_lazy_layers_take_their_sizes_from_the_rows():
    def build(width, lazy=True):
        first, last = nn.LazyLinear(width), nn.LazyLinear(2)
        if not lazy:
            first, last = nn.Linear(6, width), nn.Linear(width, 2)
        return nn.Sequential(first, nn.ReLU(), last)

    given = {"space": Space(width=Choice([4, 8])), "epochs": 4, "budget": "2runs", "folds": 0}
    found = [tune(partial(build, lazy=lazy), data(), **given) for lazy in (True, False)]
    assert found[0].audit == found[1].audit


def test_an_error_of_a_builder_tells_its_configuration():
    def build(width):
        return nn.Linear(6, 2) if width == 4 else [][width]

    with pytest.raises(IndexError) as caught:
        tune(build, data(), space=Space(width=Choice([4, 8])), epochs=4, budget="4runs")
    assert "{'width': 8}" in caught.value.__notes__[0]


KILLED = """
    import os, sys, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_tune import network, data, SPACE
    from tikhon.tuning.tune import tune
    def die(event):
        if event["event"] == "epoch" and event["budget"] > 4 and {kill}:
            os.kill(os.getpid(), 9)
    result = tune(network, data(), space=SPACE, budget="6runs", epochs=16, folds=2,
                  output={output!r}, resume={resume}, on_event=die)
    import json
    rows = [{{**row, "seconds": 0}} for row in result.trials]
    weights = [float(p.double().sum()) for p in result.model.parameters()]
    print(json.dumps([rows, weights, result.plan.chunk]))
"""


class Crash(Exception):
    pass


def test_a_search_that_crashes_in_a_rung_resumes_to_the_same_history(tmp_path):
    def die(event):
        if event["event"] == "epoch" and event["budget"] > 4:
            raise Crash

    def rows(result):
        return [{**row, "seconds": 0} for row in result.trials]

    with pytest.raises(Crash):
        search(output=tmp_path / "a", on_event=die)
    journal = tmp_path / "a" / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"outcomes": [{"id": 4')
    resumed = search(output=tmp_path / "a", resume=True)
    whole = search(output=tmp_path / "b")
    assert rows(resumed) == rows(whole)
    pairs = zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_search_killed_and_resumed_has_the_history_of_an_uninterrupted_one(tmp_path):
    tests = os.path.dirname(__file__)

    def run(output, *, kill, resume):
        code = textwrap.dedent(KILLED).format(
            tests=tests, kill=kill, output=str(output), resume=resume
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    killed = run(tmp_path / "a", kill=True, resume=False)
    assert killed.returncode == -signal.SIGKILL
    journal = tmp_path / "a" / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"outcomes": [{"id": 4')
    resumed = run(tmp_path / "a", kill=False, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    whole = run(tmp_path / "b", kill=False, resume=False)
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)


def test_a_resume_with_another_space_or_other_data_is_refused(tmp_path):
    search(output=tmp_path)
    with pytest.raises(InputError, match="different space"):
        search(output=tmp_path, resume=True, space=Space(lr=Log(1e-4, 1e-2)))
    with pytest.raises(InputError, match="different data"):
        tune(network, data(seed=5), space=SPACE, budget="6runs", epochs=16,
             output=tmp_path, resume=True)  # fmt: skip
    with pytest.raises(InputError, match="resume needs output"):
        search(resume=True)


def test_a_stop_keeps_what_was_found(tmp_path):
    seen = []

    def stop():
        return any(e["event"] == "outcomes" for e in seen)

    result = search(output=tmp_path, stop=stop, on_event=seen.append)
    assert result.stopped == "stopped by request"
    whole = search(output=tmp_path, resume=True)
    assert not whole.stopped and len(whole.history) > len(result.history)


def test_a_stop_at_any_moment_leaves_a_part_that_says_so_or_the_whole():
    given = {"space": Space(lr=Log(1e-3, 1e-1)), "budget": "2runs", "epochs": 1, "folds": 0}
    whole = search(**given)
    wanted = whole.average.state_dict()
    for moment in itertools.count(1):
        asked = itertools.count(1)
        try:
            result = search(**given, stop=lambda asked=asked, at=moment: next(asked) >= at)
        except Stopped:
            continue
        if result.stopped:
            assert result.stopped == "stopped by request"
            continue
        found = result.average.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        if next(asked) <= moment:
            break  # nothing asks as late as that
    assert moment > 5


def test_all_members_diverged_is_a_report_not_a_traceback():
    def broken(output, target):
        return (output * math.nan).mean()

    with pytest.raises(InputError, match=r"all \d+ trials failed \(diverged in epoch 1\): lower"):
        search(space=Space(lr=Log(1e-3, 1e-2)), loss=broken, folds=0)


def test_when_only_the_default_survives_it_is_chosen():
    result = search(space=Space(lr=Log(1e25, 1e30)), folds=0)
    assert result.config["lr"] == 3e-3 and not result.audit.worth_it
    assert "trials of the space diverged; only the default" in result.audit.lines()[0]


LONG = 24  # epochs, behind the best one on random labels


def random_labels():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator)
    return x, (torch.rand(60, generator=generator) > 0.5).long()


def overfitted(folds, rates):
    given = {"folds": folds, "budget": "2runs", "epochs": LONG, "batch_size": 4}
    return tune(network, random_labels(), space=Space(lr=rates), **given)


@pytest.mark.parametrize("folds", [0, 3])
def test_the_default_is_judged_at_its_best_epoch(folds):
    found = overfitted(folds, Log(2e-2, 3e-2))
    default = found.history.of(-1)
    given = (None, "auto", folds, LONG, 4, torch.optim.AdamW, "cpu", 0)
    job = make_job(lambda c: network(), *random_labels(), *given)
    (whole,) = PopulationRunner(job, 1).run([Trial(0, default.trial.config, LONG)])
    best = min(whole.curve, key=lambda point: point[1])[0]
    shorter = PopulationRunner(replace(job, epochs=best), 1)
    ((_, loss),) = shorter.run([Trial(0, default.trial.config, best)])[0].curve[-1:]
    assert found.audit.default_epoch == default.trial.budget == best < LONG
    assert found.audit.default_score == pytest.approx(loss, rel=1e-4)
    assert not found.audit.worth_it


@pytest.mark.parametrize("stopped", [3, 7, 20])
def test_a_default_that_time_cut_short_while_it_improved_is_not_compared_with(
    stopped, monkeypatch
):
    run, now = PopulationRunner.run, itertools.count(1)

    def run_for(runner, trials):
        if trials[0].id == -1 and trials[0].budget == LONG:
            runner.expired = lambda ahead: next(now) >= stopped
        return run(runner, trials)

    monkeypatch.setattr(PopulationRunner, "run", run_for)
    found = overfitted(0, Log(2e-2, 3e-2)).audit
    is_fair = stopped > 10  # its best epoch is long past by then
    assert math.isfinite(found.default_score) == math.isfinite(found.gain) == is_fair
    assert found.default_epoch == stopped or is_fair
    told = f"the default, which had time for {stopped} epochs only"
    assert (told in " ".join(found.lines())) != is_fair


def test_a_default_that_is_chosen_is_repeated_by_its_settings():
    """With its score on the validation rows, and refitted on all rows."""
    rows, unseen = random_labels(), data(200, seed=5)
    given = {"space": Space(lr=Log(1e25, 1e30)), "budget": "2runs"}
    given |= {"epochs": LONG, "batch_size": 4}
    judged = tune(network, rows, valid=unseen, refit=False, **given)
    refitted = tune(network, rows, folds=3, **given)
    for found, valid in ((judged, unseen), (refitted, None)):
        assert found.config["lr"] == 3e-3 and found.settings["epochs"] < LONG
        assert found.settings["epochs"] == found.audit.default_epoch
        torch.manual_seed(found.settings["seed"])
        run = fit(network(), rows, found.recipe, valid=valid, **found.settings)
        for a, b in zip(run.model.parameters(), found.model.parameters()):
            assert torch.allclose(a, b, atol=1e-5)
        if valid is not None:
            assert run.metrics["valid/loss"] == pytest.approx(found.audit.chosen_score, rel=1e-3)


def test_a_sick_member_is_reported_and_the_rest_is_used():
    result = search(space=Space(lr=Choice([1e-2, 3e-2, 1e30])), folds=0)
    assert result.audit.failed > 0 and result.config["lr"] < 1


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(x) if self.fc.weight.sum() > -100 else self.fc(-x)


def test_a_model_that_cannot_be_vectorised_is_trained_one_after_another_and_told_why():
    seen = []
    tune(Branching, data(), space=Space(lr=Log(1e-3, 1e-2)), epochs=4, budget="2runs", folds=0,
         on_event=seen.append)  # fmt: skip
    plan = next(e for e in seen if e["event"] == "plan")
    assert plan["chunk"] == 1 and "traced" in plan["reason"]


def test_without_a_refit_every_fold_is_in_the_average():
    result = search(folds=3, refit=False, budget="1runs")
    x, _ = data(20, seed=1)
    answers = torch.stack([member(x) for member in result.average.members])
    assert len(answers) % 3 == 0 and result.members[0] == result.config
    for one, other in itertools.combinations(answers[:3], 2):
        assert not torch.allclose(one, other)


def test_the_pace_of_a_plan_is_that_of_the_costliest_model(monkeypatch):
    def sized(job, population, fold_mask=None, repeats=8):
        return float(sum(p.numel() for p in population.model.parameters()))

    monkeypatch.setattr("tikhon.tuning.runners.microseconds", sized)
    for widths in itertools.permutations((4, 16, 8)):
        job = make_job(lambda config: MLP([6, config["width"], 2]), *data(), None,
                       "cross_entropy", 0, 8, 32, torch.optim.AdamW, "cpu", 0)  # fmt: skip
        configs = [{"lr": 0.01, "width": width} for width in widths]
        assert step_time(job, configs, 1) == 16 * 7 + 2 * 17


def test_a_kind_of_model_is_tried_in_a_population_once_per_search():
    built = []

    def build(config):
        built.append(config["width"])
        return MLP([6, config["width"], 2])

    job = make_job(build, *data(), None, "cross_entropy", 0, 8, 32, torch.optim.AdamW, "cpu", 0)
    configs = [{"lr": lr, "width": width} for width in (4, 8) for lr in (0.01, 0.02, 0.05, 0.1)]
    chunk, _ = choose_chunk(job, configs)
    assert chunk > 1 and set(built) == {4, 8}
    built.clear()
    runner = PopulationRunner(replace(job, epochs=2), chunk)
    assert [runner.group_size(config) for config in configs] == [chunk] * 8 and built == []


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("folds", [0, 3])
def test_a_trial_has_folds_of_one_length_when_the_time_is_up(folds, chunk):
    job = make_job(
        lambda c: MLP([6, 8, 2]), *data(), None, "auto", folds, 8, 32, torch.optim.AdamW, "cpu", 0
    )
    trials = [Trial(0, {"lr": 0.01}, 8), Trial(1, {"lr": 0.02}, 8)]
    outcomes = PopulationRunner(job, chunk, expired=lambda ahead: True).run(trials)
    assert outcomes and {outcome.trial.budget for outcome in outcomes} == {1}
    short = replace(trials[0], budget=1)
    (whole,) = PopulationRunner(job, chunk).run([short])
    assert outcomes[0].score == pytest.approx(whole.score)


def test_batch_norm_with_folds_is_trained_one_after_another_and_told_why():
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    job = make_job(lambda c: build(), *data(), None, "auto", 3, 8, 32, torch.optim.AdamW, "cpu", 0)
    chunk, reason = choose_chunk(job, [{"lr": 0.01}] * 4)
    assert chunk == 1 and "held-out fold" in reason
    apart = replace(job, fold_mask=None, valid=data(30))
    assert choose_chunk(apart, [{"lr": 0.01}] * 4)[1] != reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "0.001s"}, "too small: one trial"),
        ({"budget": "ten"}, "60s, 5m or 1h .* 200runs"),
        ({"budget": 20}, "budget must be a time such as"),
        ({"folds": 1}, "at least 2"),
        ({"folds": 200}, "need at least 200 rows"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"folds": 2.5}, "whole number of at least 2, received 2.5"),
        ({"valid": (data(20)[0], torch.arange(20))}, "that train lacks"),
        ({"valid": data(3), "metric": "accuracy"}, "on rows: 3, and.*needs 4"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more, received 0"),
        ({"epochs": 2.5}, "epochs must be .*received 2.5"),
        ({"batch_size": 0}, "batch_size must be .*received 0"),
        ({"space": {"batch_size": Log(8, 64)}}, "'batch_size' holds Log.*whole numbers of rows"),
        ({"space": {"batch_size": [0, 8]}}, "'batch_size' holds Choice.*whole numbers of rows"),
        (
            {"space": {"optimizer": ["adamw", "sdg"]}},
            "unknown optimizer 'sdg'; did you",
        ),
        ({"space": {"optimizer": ["adamw", "nadam"]}}, "NAdam does not act entry by entry"),
        ({"seed": -1}, "seed must be a whole number, 0 or more"),
        ({"device": "gpuu"}, "unknown device 'gpuu'"),
        ({"search": "random"}, "received 'random'.*create_study"),
    ],
)
def test_requests_that_cannot_be_met_say_why(given, message):
    with pytest.raises(InputError, match=message):
        search(**given)


def test_trials_are_not_compared_on_one_row():
    x, _ = data()
    with pytest.raises(InputError, match=r"on rows: 1, and.*needs 2"):
        tune(lambda: nn.Linear(6, 1), (x, x[:, 0]), valid=(x[:1], x[:1, 0]), epochs=1)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Muon, lambda params: None])
def test_an_optimizer_that_no_trial_can_build_is_named(kind):
    with pytest.raises(InputError, match=r"by optimizer\(params, lr=.*give SGD, Adam"):
        search(optimizer=kind, epochs=1, budget="1runs")


def test_a_model_that_cannot_be_trained_on_the_rows_is_refused_in_a_sentence():
    x, y = data(40)
    given = {"space": Space(lr=0.01), "epochs": 1, "folds": 0}
    with pytest.raises(InputError, match="Linear has no trainable parameter"):
        tune(lambda: nn.Linear(6, 2).requires_grad_(False), (x, y), **given)
    with pytest.raises(InputError, match="inputs are float64 and the model's weights float32"):
        tune(lambda: nn.Linear(6, 2), (x.double(), y), **given)


@pytest.mark.parametrize("runs", ["1runs", "3runs"])
def test_weights_that_a_model_uses_twice_stay_one(runs):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(6, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.second(torch.tanh(self.first(x))))

    space = Space(lr=Log(1e-3, 3e-2))
    result = tune(Twice, data(40), space=space, budget=runs, epochs=2, folds=0)
    model = result.model
    assert model.first.weight is model.second.weight
    state = model.state_dict()
    assert torch.equal(state["first.weight"], state["second.weight"])
    assert not torch.equal(state["first.weight"], Twice().state_dict()["first.weight"])


def test_a_space_may_be_a_plain_mapping():
    given = {"budget": "2runs", "epochs": 2, "folds": 0}
    entries = {"lr": Log(1e-3, 1e-2), "l1[*]": 1e-4}
    assert search(space=entries, **given).space.to_dict() == Space(**entries).to_dict()


def test_a_search_is_asked_without_the_untuned_trial(tmp_path):
    """Whose values may lie outside the space, and which no search has proposed."""
    seen = []

    @dataclass(frozen=True)
    class Noting(Random):
        def next(self, history):
            seen.append(history.ids)
            return super().next(history)

    given = {"search": lambda s, plan: Noting(s, count=2), "output": tmp_path, "folds": 0}
    given |= {"space": Space(lr=Log(0.02, 0.1)), "budget": "2runs", "epochs": 2}
    first = search(**given)
    assert -1 in first.history.ids
    search(resume=True, **given)
    assert seen[-1] == {0, 1} and not any(-1 in ids for ids in seen)


def test_strengths_are_told_as_they_acted(monkeypatch):
    """Decay that rests where a model gives one answer for all rows is told as resting."""
    monkeypatch.setattr(
        "tikhon.population.decay.trusted_share",
        lambda memory, *_: torch.full_like(memory["log"], 0.25),
    )
    job = make_job(
        lambda c: network(), *data(), None, "auto", 0, 8, 32, torch.optim.AdamW, "cpu", 0
    )
    runner = PopulationRunner(job)
    (outcome,) = runner.run([Trial(0, {"lr": 0.01, "weight_decay": "auto"}, 8)])
    state = runner.states[0]
    acted = state["decay.log"][0].exp() * 0.25
    assert list(outcome.strengths.values()) == pytest.approx(acted.tolist())


def test_dropout_without_a_dropout_layer_says_what_to_add():
    with pytest.raises(InputError, match="no dropout layer"):
        tune(lambda: nn.Linear(6, 2), data(), space=SPACE, epochs=4)


def test_a_budget_of_runs_is_the_number_of_configurations():
    found = search(budget="70runs", epochs=1, folds=0)
    assert found.plan.members == 70
    assert len({str(o.trial.config) for o in found.history}) == 71  # the default too


def test_the_choice_prefers_regularization_within_one_standard_error():
    base = torch.rand(200, generator=torch.Generator().manual_seed(0))
    wobble = torch.tensor([0.02, -0.02]).repeat(100)
    near, far = base + wobble + 0.001, base + wobble + 0.01
    rows = torch.stack([base, near, far, base + 0.5])
    assert choose(rows, [0.0, 0.5, 0.8, 1.0]) == 1  # the error of the difference is 0.0014
    assert choose(rows, [0.5, 0.0, 0.8, 1.0]) == 0
    assert choose(rows, [0.0, 0.5, 0.8, 1.0], ["a", "b", "b", "a"]) == 0  # of the best's model


def test_selection_noise_is_zero_for_one_candidate_and_grows_with_noise():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(6, 50, generator=generator)
    assert selection_noise(rows[:1]) == 0
    clear = torch.arange(6.0)[:, None] + 0.01 * rows
    assert selection_noise(clear) < 1e-6 < selection_noise(rows)


def test_edges_are_named_unless_they_are_natural_limits():
    space = Space(dropout=Uniform(0, 0.8), lr=Log(1e-4, 1e-1))
    assert at_edges(space, {"dropout": 0.0, "lr": 0.0999}, 16) == ["lr"]
    assert at_edges(space, {"dropout": 0.79, "lr": 0.01}, 16) == ["dropout"]
    assert at_edges(space, {"dropout": 0.3, "lr": 0.01}, 16) == []


def test_an_average_of_probabilities_is_their_mean():
    models = [nn.Linear(6, 3) for _ in range(3)]
    x = data(10)[0]
    expected = torch.stack([m(x).softmax(1) for m in models]).mean(0)
    assert torch.allclose(Average(models, probabilities=True)(x).softmax(1), expected, atol=1e-6)
    plain = Average(models, probabilities=False)(x)
    assert torch.allclose(plain, torch.stack([m(x) for m in models]).mean(0), atol=1e-6)


def test_the_same_seed_gives_the_same_trials_whatever_the_clock_says(monkeypatch):
    """The size of a chunk decides the last bits, so no stopwatch may choose it."""
    found = []
    for slow in (1, 7):
        paces = iter(range(1, 10**6))
        monkeypatch.setattr(
            "tikhon.tuning.runners.time.perf_counter_ns",
            lambda paces=paces, slow=slow: next(paces) ** 2 * 1000 % (977 * slow),
        )
        result = tune(lambda: network(), data(), space=SPACE, epochs=8, budget="6runs", seed=0)
        fold_mask = ("id", "config", "budget", "score", "curve", "strengths")
        found.append([{name: row[name] for name in fold_mask} for row in result.trials])
    assert found[0] == found[1]
    assert result.plan.chunk > 1


@pytest.mark.parametrize("chunk", [1, 32])
def test_a_chunk_is_part_of_the_plan_and_repeats_every_bit(chunk, tmp_path, monkeypatch):
    """How many members train at once decides the last bits: recorded, and replayed."""

    def forced(size):
        monkeypatch.setattr("tikhon.tuning.plan.choose_chunk", lambda job, configs: (size, ""))

    def bits(result):
        fold_mask = ("id", "config", "budget", "score", "curve", "strengths")
        trials = [{name: row[name] for name in fold_mask} for row in result.trials]
        return trials, [v.tolist() for v in result.model.state_dict().values()]

    given = {"epochs": 4, "budget": "3runs", "folds": 2}
    forced(chunk)
    whole = search(output=tmp_path, **given)
    assert whole.plan.chunk == chunk
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b"outcomes" not in line))
    forced(8)  # what another version, or a machine with other limits, would choose
    assert bits(search(output=tmp_path, resume=True, **given)) == bits(whole)


def test_a_resume_with_other_threads_says_what_it_cannot_repeat(tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        search(output=tmp_path, budget="2runs", epochs=2)
        torch.set_num_threads(2)
        with pytest.warns(UserWarning, match=r"set_num_threads\(1\) repeats it"):
            search(output=tmp_path, budget="2runs", epochs=2, resume=True)
    finally:
        torch.set_num_threads(threads)


SIZES = [(4, 32, 64), (64, 32, 32), (128, 32, 8), (256, 128, 1)]


@pytest.mark.parametrize(("width", "rows", "chunk"), SIZES)
def test_smaller_models_and_batches_train_more_members_at_once(width, rows, chunk):
    x = torch.randn(400, 30)
    job = make_job(
        lambda c: MLP([30, width, width, 2]), x, torch.arange(400) % 2, None, "auto", 0, 8, rows,
        torch.optim.AdamW, "cpu", 0,
    )  # fmt: skip
    assert choose_chunk(job, [{"lr": 0.01}] * 64)[0] == chunk
    assert choose_chunk(job, [{"lr": 0.01}])[0] == 1  # one member is plain PyTorch


@pytest.mark.parametrize(("side", "rows", "chunk"), [(8, 32, 16), (8, 128, 8), (28, 32, 1)])
def test_larger_images_train_fewer_members_at_once(side, rows, chunk):
    x = torch.randn(200, 1, side, side)
    job = make_job(
        lambda c: ConvNet(1, 2), x, torch.arange(200) % 2, None, "auto", 0, 8, rows,
        torch.optim.AdamW, "cpu", 0,
    )  # fmt: skip
    assert choose_chunk(job, [{"lr": 0.01}] * 16)[0] == chunk


def test_models_with_fixed_dropout_keep_it():
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Dropout(0.25), nn.Linear(8, 2))

    result = tune(
        build, data(), space=Space(lr=Log(1e-3, 1e-2)), epochs=4, budget="2runs", folds=0
    )
    assert float(result.model[2].rate) == 0.25
    assert result.model[2].generator is None


def test_a_choice_of_an_optimizer_without_a_name_is_repeated_by_it():
    def build():
        return nn.Linear(6, 2)

    def make(params, **options):
        return torch.optim.Adam(params, betas=(0.5, 0.9), **options)

    x, y = data()
    space = Space(lr=0.02)
    found = tune(build, (x, y), space=space, epochs=3, budget="1runs", folds=0, optimizer=make)
    torch.manual_seed(found.settings["seed"])
    run = fit(build(), (x, y), found.recipe, **found.settings)
    for a, b in zip(run.model.parameters(), found.model.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic_net", "group_lasso", "mcp"])
def test_the_choice_makes_a_recipe_that_fit_repeats(penalty):
    def build():
        return nn.Linear(6, 2)

    x, y = data()
    space = Space(lr=0.02, weight_decay=0.5, **{penalty: 0.01})
    found = tune(build, (x, y), space=space, epochs=3, budget="1runs", folds=0)
    torch.manual_seed(found.settings["seed"])
    run = fit(build(), (x, y), found.recipe, **found.settings)
    chosen = found.to_dict()
    assert chosen["settings"]["schedule"] == "cosine"
    assert [p["how"] for p in chosen["recipe"]["penalties"]] == ["decoupled", "objective"]
    for a, b in zip(run.model.parameters(), found.model.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


SHARED = Space(lr=0.02, optimizer=["sgd", "rmsprop"], batch_size=[8, 40], l2=1e-3)


def test_a_batch_size_and_an_optimizer_of_a_space_train_as_those_of_a_search():
    given = {"folds": 2, "epochs": 2, "refit": False}
    given |= {"search": lambda space, plan: Random(space, count=6)}
    found = search(space=SHARED, **given)
    assert found.plan.chunk > 1
    trials = [o for o in found.history if o.trial.id != DEFAULT]
    kinds = {tuple(o.trial.config[n] for n in ("optimizer", "batch_size")): o for o in trials}
    assert len(kinds) > 2
    for (optimizer, batch_size), outcome in kinds.items():
        alone = {"optimizer": optimizer, "batch_size": batch_size, "search": None}
        first = search(space=Space(lr=0.02, l2=1e-3), **(given | alone)).history[0]
        assert (first.score, first.trial.budget) == pytest.approx(
            (outcome.score, outcome.trial.budget), rel=1e-5
        )


def test_a_chosen_batch_size_and_optimizer_reach_the_refit_and_the_settings():
    x, y = data()
    space = Space(lr=0.02, weight_decay=0.5, optimizer=["rmsprop", "sgd"], batch_size=[24, 40])
    found = tune(partial(nn.Linear, 6, 2), (x, y), space=space, epochs=3, budget="4runs", folds=0)
    chosen = {name: found.config[name] for name in ("optimizer", "batch_size")}
    assert {name: found.settings[name] for name in chosen} == chosen
    torch.manual_seed(found.settings["seed"])
    run = fit(nn.Linear(6, 2), (x, y), found.recipe, **found.settings)
    for a, b in zip(run.model.parameters(), found.model.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


PARTS = {
    "strengths": Space(lr=0.02, l2={"0.*": Log(0.1, 0.2), "1.weight": 0.01}, l1={"1.*": 1e-3}),
    "decay": Space(lr=0.02, weight_decay={"*": 0.1, "1.weight": Log(1.0, 2.0)}),
    "limits": Space(lr=0.02, max_norm={"0.*": Uniform(0.3, 0.4)}, clip_norm=1.0),
    "learning rates": Space(lr={"*": 0.02, "1.*": Log(1e-3, 0.2)}, weight_decay=1.0, l1=1e-3),
    "one learning rate": Space(lr={"0.weight": Log(1e-3, 0.2)}, weight_decay=1.0),
    "rates": Space(lr=0.02, dropout={"1": Uniform(0.2, 0.6), "3": 0.1}),
}


@pytest.mark.parametrize(("kind", "chunk"), [*((kind, 4) for kind in PARTS), ("rates", 1)])
def test_parts_of_a_model_have_strengths_and_rates_of_their_own(kind, chunk):
    """Each as `fit` has it by patterns, in a population too."""

    def build():
        first, second = nn.Linear(6, 5), nn.Linear(5, 2)
        if kind == "rates":
            return nn.Sequential(first, Dropout(0.0), nn.Linear(5, 5), Dropout(0.0), second)
        return nn.Sequential(first, second)

    x, y = data()
    space = Space.from_dict(PARTS[kind].to_dict())
    found = tune(
        build, (x, y), space=space, epochs=3, budget="3runs", folds=0,
        runner=lambda job, _: PopulationRunner(job, chunk),
    )  # fmt: skip
    config = dict(found.config)
    if kind == "rates":
        assert float(found.model[1].rate) == pytest.approx(config["dropout[1]"])
        assert float(found.model[3].rate) == pytest.approx(0.1)
        assert found.recipe.dropout == {"1": config["dropout[1]"], "3": 0.1}
        return
    torch.manual_seed(found.settings["seed"])
    run = fit(build(), (x, y), found.recipe, **found.settings)
    for a, b in zip(run.model.parameters(), found.model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"lr": {"9.*": 0.1}}, "unknown pattern '9.\\*'"),
        ({"clip_norm[0.*]": 0.1}, "clip_norm is one number for all of it"),
        ({"l2": {"9.*": 0.1}}, "unknown pattern '9.\\*'"),
        ({"weight_decay": {"9.*": 0.1}}, "unknown pattern '9.\\*'"),
        ({"weight_decay": {"0.*": "auto"}}, "adapts, for all of a model"),
        ({"dropout": {"9": 0.1}}, "unknown layer '9'"),
        ({"l1": 0.1, "group_lasso": {"0.weight": 0.1}}, "a prox of a sum is not a sum of proxes"),
        ({"width": {"0": 3}}, "give Uniform"),
        ({"lr": scipy.stats.loguniform(0.1, 1.0)}, "'lr' is <scipy.*give Uniform"),
        ({"act": nn.ReLU}, "'act' is <class.*give Uniform"),
    ],
)
def test_parts_that_cannot_be_are_refused(entries, message):
    def build():
        return nn.Sequential(nn.Linear(6, 4), Dropout(0.1), nn.Linear(4, 2))

    with pytest.raises(InputError, match=message):
        tune(build, data(), space=Space(**entries), epochs=2, budget="2runs", folds=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("valid", [False, True])
def test_whole_numbers_under_a_loss_of_numbers_are_no_classes(valid):
    x, _ = data()
    y = torch.arange(len(x)) // 2
    unseen = (x[:20], torch.arange(20) + 1000) if valid else None
    found = tune(
        lambda: nn.Linear(6, 1), (x, y), valid=unseen, loss="mse", space=Space(lr=Log(1e-3, 1e-2)),
        budget="2runs", epochs=2,
    )  # fmt: skip
    again = fit(found.model, (x, y), found.recipe, valid=unseen, **found.settings)
    assert "train/rmse" in again.metrics
