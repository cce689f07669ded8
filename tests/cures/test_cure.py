"""Laws of `cure`: paired, confirmed only where every seed agrees, nothing of the user touched."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wired
from faulty import CE, FAULTY, adam, classes, deep, he, numbers, sgd
from miswired import attention
from tikhon.budget import Deadline
from tikhon.cures import cure, surgery, treatments as cures
from tikhon.cures.baseline import Baseline, measure_baseline, predicts_targets
from tikhon.cures.cure import Cure
from tikhon.cures.patch import execute, script
from tikhon.cures.scoring import RowByRow, WithoutFuture, scoring_batches
from tikhon.cures.treatments import SCALED_INPUTS, UNTREATED, candidates, rate
from tikhon.cures.trials import (
    DoesNotApplyError,
    TreatmentResult,
    Trials,
    score_by_intended_loss,
)
from tikhon.diagnosis import diagnose
from tikhon.diagnosis.findings import Finding
from tikhon.diagnosis.record import Point
from tikhon.diagnosis.replica import Replica, replicate
from tikhon.diagnosis.samples import samples
from tikhon.errors import InputError
from wired import Fn


def program_named(name):
    return next(c for c in FAULTY if c.name == name)


def treat(case, **options):
    torch.manual_seed(0)
    model = case.build()
    return cure(
        model, case.data(), case.loss, optimizer=case.optimizer(model.parameters()),
        **{"steps": 40, "budget": "60s", **case.options, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "too small a step",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tanh default", "penalised")),
    ],
)
def test_a_cure_is_found_and_holds_in_a_full_run(name):
    found = treat(program_named(name))
    assert found.confirmed, str(found)
    assert min(found.best.effects) > 0
    assert found.best.effect > found.best.spread
    model, end = found.train(60)
    assert end.metric > 0.8, str(found)
    assert found.patch
    assert all(line in str(found) for line in found.patch.splitlines())
    x, _ = classes()
    assert found.model(x).shape == model(x).shape
    json.loads(found.to_json(), parse_constant=lambda c: pytest.fail(c))


def test_the_user_program_is_untouched():
    model = deep(3, nn.Tanh)
    engine = sgd(1e-6, momentum=0.9)(model.parameters())
    before = copy.deepcopy((model.state_dict(), engine.state_dict()))
    state = torch.get_rng_state()
    cure(model, classes(), CE, optimizer=engine, steps=5, budget="1s", seeds=2)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values()))
    assert before[1] == engine.state_dict()
    assert torch.equal(state, torch.get_rng_state())


def test_arms_are_paired_and_doing_nothing_has_no_effect():
    found = treat(program_named("too small a step"), steps=8, budget="1s")
    nothing = found.treatments[0]
    assert nothing.name == UNTREATED.name
    assert nothing.effects == (0.0, 0.0, 0.0)
    for treatment in found.treatments[1:]:
        if treatment.steps == nothing.steps:
            pairs = zip(treatment.effects, nothing.scores, treatment.scores)
            assert all(e == pytest.approx(b - s) for e, b, s in pairs)


def test_a_healthy_program_gets_no_made_up_cure():
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    noise = torch.randint(2, (200,))  # nothing to learn: no treatment can be right
    model = nn.Linear(4, 2)
    unseen = torch.randn(400, 4), torch.randint(2, (400,))
    engine = adam(0.01)(model.parameters())
    found = cure(model, (x, noise), CE, valid=unseen, optimizer=engine, steps=60, budget="1s")
    assert not found.confirmed or found.best.effect < 0.1
    assert found.confirmed or "no cure found" in str(found)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((1.0, 1.1, 0.9), "confirmed"),
        ((1.0, 1.1, 2.1), "not confirmed"),  # one seed disagrees
        ((1.9, 1.9, 0.1), "not confirmed"),  # the spread is larger than the effect
        ((1.99, 1.985, 1.98), "not confirmed"),  # sure, and of no use
        ((2.0, 2.5, 2.2), "worse"),
    ],
)
def test_confirmed_means_with_every_seed_beyond_the_spread_and_of_use(scores, verdict):
    model = deep(1, nn.ReLU)
    trials = Trials(
        model=model, loss=CE, optimizer=sgd(0.1)(model.parameters()), penalty=None, clip=None,
        source=samples(classes()), valid_batch=None, batch_size=8, seeds=[0, 1, 2], codes=set(),
    )  # fmt: skip
    for seed, score in enumerate(scores):
        trials.scores[UNTREATED.name, seed, 300] = (2.0, None)
        trials.scores["lr x10", seed, 300] = (score, None)
    treatments, chosen = trials._verdicts({"lr x10": 300}, [rate(10.0)], 300)
    assert treatments[1].verdict == verdict
    assert (chosen is not None) == (verdict == "confirmed")


def test_learning_rates_are_always_tried():
    for codes in ({"vanishing_gradient"}, {"underfitting"}, set()):
        assert any(t.kind == "lr" for t in candidates(codes))


EDITS = [
    (surgery.reinit, True), (surgery.lsuv, True),
    (surgery.to_relu, True), (surgery.normalise, True), (surgery.residual, True),
    (surgery.widen, True), (surgery.narrow, False), (surgery.add_dropout, True),
    (surgery.to_gru, False), (surgery.remove_head_activation, False),
    (cures.LESS_DROPOUT.edit, False),
    (surgery.recurrent_init, False), (surgery.norm_blocks, False), (surgery.to_leaky, False),
    (surgery.chrono_init, False),
]  # fmt: skip


def operate(edit, model, batch):
    return execute(script(edit(model, batch)), model=model, x=batch[0])["model"]


@pytest.mark.parametrize(("edit", "applies"), EDITS, ids=[e[0].__name__ for e in EDITS])
def test_edits_keep_the_model_a_model(edit, applies):
    torch.manual_seed(0)
    model = deep(6, nn.Tanh)
    x, y = classes()
    assert bool(edit(model, (x, y))) is applies
    out = operate(edit, model, (x, y))(x)
    assert out.shape == (len(x), 4)
    CE(out, y).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_forget_gates_open_for_the_whole_sequence():
    torch.manual_seed(0)
    model = nn.LSTM(3, 50, batch_first=True)
    x = torch.randn(4, 100, 3)
    half = operate(partial(surgery.chrono_init, closed=False), model, (x, x)).bias_ih_l0.detach()
    assert 0 <= half[50:100].min() < 2 < half[50:100].max() <= math.log(99)
    assert not half[:50].any()
    closed = operate(surgery.chrono_init, model, (x, x)).bias_ih_l0.detach()
    assert torch.equal(closed[:50], -closed[50:100])
    assert not surgery.chrono_init(nn.GRU(3, 5), (x, x), closed=False)


def test_undecided_arms_keep_the_order_of_the_findings():
    model = deep(1, nn.ReLU)
    trials = Trials(
        model=model, loss=CE, optimizer=sgd(0.1)(model.parameters()), penalty=None, clip=None,
        source=samples(classes()), valid_batch=None, batch_size=8, seeds=[0], codes=set(),
    )  # fmt: skip
    treatments = [rate(f) for f in (1.0, 2.0, 3.0, 4.0)]
    for treatment, score in zip((UNTREATED, *treatments), (2.0, 2.01, 1.99, 1.0, 3.0)):
        trials.scores[treatment.name, 0, 20] = (score, None)
    kept = trials._promoted(treatments, 20, [0], 3)
    assert [a.name for a in kept] == ["lr x3", "lr x1", "lr x2"]


def test_a_residual_stack_lets_the_signal_through():
    torch.manual_seed(0)
    model = deep(25, nn.Tanh)
    x, y = classes()
    CE(operate(surgery.residual, model, (x, y))(x), y).backward()
    grads = [p.grad.norm() for n, p in model.named_parameters() if n.endswith("weight")]
    assert min(grads) > 1e-3 * max(grads)


def test_frozen_layers_keep_their_weights():
    model = deep(3, nn.ReLU)
    model[0].requires_grad_(False)
    kept = model[0].weight.clone()
    operate(surgery.reinit, model, classes())
    assert torch.equal(kept, model[0].weight)


def test_treatments_keep_groups_and_settings():
    model = deep(2, nn.ReLU)
    groups = [
        {"params": [*model[0].parameters()], "lr": 0.5},
        {"params": [*model[2:].parameters()]},
    ]
    engine = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    source = samples(classes())
    treated = replicate(model, CE, engine)
    assert rate(0.1).apply(treated, source)
    assert [g["lr"] for g in treated.optimizer.param_groups] == pytest.approx([0.05, 0.01])
    assert [g["lr"] for g in engine.param_groups] == [0.5, 0.1]
    assert treated.optimizer.param_groups[0]["momentum"] == 0.9
    scaled = replicate(model, CE, engine)
    assert SCALED_INPUTS.apply(scaled, samples(classes(scale=50.0)))
    assert scaled.model[0](classes(scale=50.0)[0]).std() == pytest.approx(1.0, abs=0.1)


def test_bad_arguments():
    model = he(deep(1, nn.ReLU))
    engine = sgd(0.1)(model.parameters())
    for change in ({"budget": "soon"}, {"seeds": 1}, {"optimizer": None}):
        with pytest.raises(InputError):
            cure(model, numbers(), CE, **{"optimizer": engine, **change})


def test_what_no_treatment_can_change_is_said():
    x, y = classes()
    with pytest.raises(InputError, match="requires_grad_"):
        cure(deep(1, nn.ReLU).requires_grad_(False), (x, y), CE, optimizer=sgd(0.1))
    with pytest.raises(InputError, match="received str"):
        cure("resnet", (x, y), CE, optimizer=sgd(0.1))
    x = torch.zeros_like(x)
    found = cure(deep(1, nn.ReLU), (x, y), CE, optimizer=sgd(0.1), steps=3, budget="1s", seeds=2)
    assert "constant_inputs is yours to change: print(x[:2]) where" in str(found)


def test_validation_rows_of_another_kind_are_cured_by_no_treatment():
    x, y = classes()
    model, other = deep(1, nn.ReLU), (100 * x[:100], y[:100])
    told = replace(diagnose(model, (x, y), CE), findings=(Finding("valid_differs", "warning"),))
    found = cure(
        model, (x, y), CE, optimizer=adam(1e-2)(model.parameters()), diagnosis=told, valid=other,
        steps=5, budget="5s", seeds=2,
    )  # fmt: skip
    assert not found.confirmed and not found.treatments
    assert "the fault is in the validation rows" in str(found)


def test_embeddings_in_one_point_are_spread_over_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    nn.init.normal_(model[0].weight, 0.0, 1e-2)
    x = torch.randn(64, 5)
    spread = operate(cures.SPREAD_EMBEDDINGS.edit, model, (x, None))(x)
    assert torch.allclose(spread.std(0, correction=0), torch.ones(3), atol=0.1)


def test_an_edit_that_does_not_fit_the_shapes_is_left_out(monkeypatch):
    monkeypatch.setattr(Trials, "search_longer", lambda trials: (trials.search(5)[0], None))
    torch.manual_seed(0)
    x = torch.randn(60, 5, 4)
    model = deep(2, nn.Tanh, 4)[2:]  # works on the last axis; BatchNorm1d would not
    engine = sgd(1e-6)(model.parameters())
    diagnosis = diagnose(deep(25, nn.Tanh), classes(), CE)
    assert "vanishing_gradient" in diagnosis.labels
    found = cure(
        model, (x, (x[..., 0] > 0).long()), lambda o, y: CE(o.transpose(1, 2), y),
        optimizer=engine, diagnosis=diagnosis, steps=5, budget="60s", seeds=2,
    )  # fmt: skip
    assert len(found.treatments) > 3
    assert not any("BatchNorm" in treatment.name for treatment in found.treatments)


def test_what_the_best_treatment_leaves_is_yours_to_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    engine = torch.optim.SGD(model.parameters(), lr=1e-4)
    left = Finding("ignored_rows", "warning", advice=("drop the class",))
    told = diagnose(model, classes(), CE, optimizer=engine, steps=20)
    both = replace(told, findings=(*told.findings, left))
    found = cure(
        model, classes(), CE, optimizer=engine, steps=30, seeds=2, budget="60s", diagnosis=both
    )
    assert found.best is not None, str(found)
    for diagnosis, said in ((told, False), (both, True)):
        found = replace(found, diagnosis=diagnosis)
        text = "yours to change: drop the class"
        assert text not in str(found)  # the treated program was looked at again
        blind = str(replace(found, remaining=None))
        assert (f"ignored_rows may stay and is then {text}" in blind) == said, blind
        known = str(replace(found, remaining=found.diagnosis))
        assert (f"ignored_rows stays and is {text}" in known) == said, known


def pairs(output, label):
    """A loss of embeddings: how far apart rows of a class are, less how near other rows."""
    apart = torch.cdist(output, output)
    same = label[:, None] == label
    return (apart * same).max(1).values.mean() - apart[~same].mean()


def test_embeddings_are_no_scores_of_classes():
    x, y = classes()
    for width in (3, 4, 9):
        model = nn.Linear(16, width)
        assert not predicts_targets(Replica(model, pairs), (x, y))
        if width > 3:
            assert predicts_targets(Replica(model, CE), (x, y))
            assert predicts_targets(
                Replica(nn.Sequential(model, nn.LogSoftmax(1)), F.nll_loss), (x, y)
            )


def test_scores_of_shares_are_no_numbers_to_compare():
    x, _ = classes()
    y = x[:, :4].softmax(1)
    replica = Replica(
        nn.Linear(16, 4), lambda o, y: F.kl_div(o.log_softmax(1), y, reduction="sum")
    )
    assert not predicts_targets(replica, (x, y))
    for loss in (F.mse_loss, F.l1_loss, F.huber_loss):
        assert predicts_targets(Replica(nn.Linear(16, 4), loss), (x, y))
    counts = (3 * y).round()
    assert not predicts_targets(Replica(nn.Linear(16, 4), F.poisson_nll_loss), (x, counts))


def test_distances_have_a_constant_that_is_not_below_0():
    x, y = classes()
    model = Fn(lambda m, x: m.head(x).square().sum(1), head=nn.Linear(16, 3))
    replica = Replica(model, lambda o, y: (y * o + (1 - y) * (1 - o).clamp_min(0)).mean())
    found = measure_baseline(replica, (x, (y > 1).float()), None, held_out=False)
    assert 0 < found.loss < 1  # of free numbers it has no end


def test_rows_in_order_are_judged_on_rows_of_all_of_it():
    x, y = classes()
    order = y.argsort(stable=True)
    loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=16)
    source = samples(loader, rows=32)
    assert len(source.probe[1].unique()) < 4
    told = replace(
        diagnose(deep(1, nn.ReLU), (x, y), CE), findings=(Finding("sorted_batches", "warning"),)
    )
    judged, _ = scoring_batches(source, None, told, nn.Linear(1, 1))
    assert judged.source is loader
    assert len(judged.probe[1].unique()) == 4


def test_what_a_sure_cause_asks_for_runs_to_the_end_first():
    loader = DataLoader(TensorDataset(*classes()), batch_size=32)
    told = []
    trials = bare(
        faults=["sorted_batches", "dying_relu"], codes={"sorted_batches"}, source=samples(loader),
        on_progress=told.append,
    )  # fmt: skip
    trials.search(30)
    own = next(text for text in told if text != "nothing, 20 steps")
    assert own == "shuffle=True, 30 steps"


def test_a_short_budget_goes_to_what_the_cause_asks_for():
    """Before a look at every treatment; other treatments may cure this fault, given the time."""
    for seconds, first in ((math.inf, 20), (64.0, 75)):
        report = []
        trials = bare(
            model=lambda: nn.Sequential(nn.Dropout(0.9), nn.Linear(16, 4)), optimizer=sgd(0.1),
            faults=["excessive_dropout"], codes={"excessive_dropout"}, seconds_per_step=0.1,
            deadline=Deadline(seconds), on_progress=report.append,
        )  # fmt: skip
        trials.search(100)
        assert next(text for text in report if "dropout" in text) == f"dropout 0.2, {first} steps"


def bare(**options):
    model = deep(1, nn.ReLU)
    return Trials(
        **{
            "model": model, "loss": CE, "optimizer": sgd(0.1)(model.parameters()), "penalty": None,
            "clip": None, "source": samples(classes()), "valid_batch": None, "batch_size": 32,
            "seeds": [0, 1], "codes": set(), **options,
        }
    )  # fmt: skip


def test_what_a_finding_names_first_is_never_dropped(monkeypatch):
    trials = bare(codes={"unscaled_inputs", "dying_relu"})
    found, _ = trials.search(30)
    reached = {a.name: a.steps for a in found}
    assert reached["scaled inputs"] == 30
    assert len([name for name, steps in reached.items() if steps == 20]) > 5
    monkeypatch.setattr(Trials, "_affordable", lambda self, rung, count: 1)
    reached = {a.name: a.steps for a in trials.search(30)[0]}
    assert [name for name, steps in reached.items() if steps == 30] == ["nothing", "scaled inputs"]


def test_the_rest_of_the_budget_goes_into_longer_rungs(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # other work takes none of it
    torch.manual_seed(0)
    noise = torch.randint(2, (60,))
    model = nn.Linear(4, 2)
    trials = bare(
        model=model, optimizer=adam(0.01)(model.parameters()),
        source=samples((torch.randn(60, 4), noise)), valid_batch=(torch.randn(60, 4),
        noise.flip(0)),
        deadline=Deadline(2.0),
    )  # fmt: skip
    trials.search(5)
    found, chosen = trials.search_longer()
    assert chosen is None
    assert found[0].steps >= 15
    assert found[0].steps % 3 == 0


@pytest.mark.parametrize(
    ("treatment", "options"),
    [
        (cures.adam(1e-3), {"optimizer": adam(1e-3)}),
        (cures.BATCHES_OF_32, {}),
        (cures.decay(0.1), {"optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)}),
    ],
)
def test_the_own_program_under_another_name_is_no_treatment(treatment, options):
    with pytest.raises(DoesNotApplyError):
        bare(**options).build(treatment, 0)
    bare(batch_size=8).build(treatment, 0)
    if treatment is cures.BATCHES_OF_32:  # a loader brings its own batches
        loader = DataLoader(TensorDataset(*classes()), batch_size=8)
        with pytest.raises(DoesNotApplyError):
            bare(batch_size=8, source=samples(loader)).build(treatment, 0)


def test_equal_is_judged_among_the_treated():
    trials = bare()
    values = {UNTREATED.name: 4e10, "lr x10": 9e8, cures.WARMUP.name: 5e8}
    for name, value in values.items():
        for seed in (0, 1):
            trials.scores[name, seed, 300] = (value, None)
    trials.baseline = Baseline()
    reached = dict.fromkeys(list(values)[1:], 300)
    trials.codes = {"exploding_gradient"}
    _, chosen = trials._verdicts(reached, [rate(10.0), cures.WARMUP], 300)
    assert chosen is cures.WARMUP


def test_what_treats_another_fault_is_a_cure_where_nothing_treats_the_first():
    trials = bare(faults=("ignored_rows", "poor_init"), codes={"ignored_rows", "poor_init"})
    scores = {
        UNTREATED.name: 2.0,
        "lr x10": 0.1,
        cures.INIT.name: 0.5,
        cures.NO_IGNORED_CLASSES.name: 2.0,
    }
    for heard in (2.0, 0.4):
        scores[cures.NO_IGNORED_CLASSES.name] = heard
        for arm, score in scores.items():
            for seed in (0, 1):
                trials.scores[arm, seed, 300] = (score, None)
        trials.baseline = Baseline()
        arms = [rate(10.0), cures.INIT, cures.NO_IGNORED_CLASSES]
        _, chosen = trials._verdicts(dict.fromkeys([*scores][1:], 300), arms, 300)
        assert chosen is (cures.INIT if heard == 2.0 else cures.NO_IGNORED_CLASSES)


@pytest.mark.parametrize(
    ("fault", "own", "name", "verdict"),
    [
        ("ignored_rows", 2.0, None, "leaves the fault"),
        ("ignored_rows", 0.5, cures.NO_IGNORED_CLASSES.name, "leaves the fault"),
        ("slow_convergence", 2.0, "lr x10", "confirmed"),  # a symptom: any treatment may be right
        ("unscaled_inputs", 2.0, "lr x10", "confirmed"),  # smaller steps are an answer to it
        ("unscaled_inputs", 0.5, SCALED_INPUTS.name, "leaves the fault"),
    ],
)
def test_what_leaves_the_cause_is_no_cure(fault, own, name, verdict):
    trials = bare(faults=(fault,), codes={fault})
    treatment = cures.NO_IGNORED_CLASSES if fault == "ignored_rows" else SCALED_INPUTS
    scores = {UNTREATED.name: 2.0, "lr x10": 0.1, treatment.name: own}
    for arm, score in scores.items():
        for seed in (0, 1):
            trials.scores[arm, seed, 300] = (score, None)
    trials.baseline = Baseline()
    reached = dict.fromkeys([*scores][1:], 300)
    found, chosen = trials._verdicts(reached, [rate(10.0), treatment], 300)
    assert (chosen and chosen.name) == name
    assert next(a.verdict for a in found if a.name == "lr x10") == verdict


@pytest.mark.parametrize(
    ("skill", "faults", "confirmed"),
    [
        (0.8, (), True),
        (0.698, (), True),
        (0.66, (), False),  # a lower loss, and more wrong answers
        (0.66, ("class_imbalance",), True),
        (None, (), True),
    ],
)
def test_a_lower_loss_with_more_wrong_answers_is_no_cure(skill, faults, confirmed):
    trials = bare(faults=faults, codes={"overfitting"})
    for seed in (0, 1):
        trials.scores[UNTREATED.name, seed, 300] = (2.0, None if skill is None else 0.7)
        trials.scores[cures.BALANCED_CLASSES.name if faults else "early stopping", seed, 300] = (
            0.5,
            skill,
        )
    trials.baseline = Baseline(skilled=not faults)
    treatment = cures.BALANCED_CLASSES if faults else cures.EARLY_STOPPING
    trials.codes = {"overfitting", *faults}
    _, chosen = trials._verdicts({treatment.name: 300}, [treatment], 300)
    assert (chosen is not None) == confirmed


def test_rows_that_are_mixed_are_judged_one_by_one():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4)
    for axis, same in ((1, True), (0, False)):
        model = wired.Fn(
            lambda m, x, axis=axis: (m.rate(x).softmax(axis) * x).sum(1), rate=nn.Linear(4, 1)
        )
        alone = RowByRow(model)(x)
        assert torch.equal(alone, torch.cat([model(row[None]) for row in x]))
        assert torch.allclose(alone, model(x), atol=1e-6) == same


def test_positions_are_judged_without_what_comes_later():
    torch.manual_seed(0)
    x = torch.randint(6, (8, 7))
    for kept, same in ((False, False), (True, True)):
        model = attention("by hand", kept)()
        assert torch.allclose(WithoutFuture(model)(x), model(x), atol=1e-6) == same


@pytest.mark.parametrize(
    ("score", "skill", "worth"),
    [
        (0.3, 0.9, True),
        (0.3, None, True),
        (0.69, 0.9, False),  # no better than a constant
        (0.3, 0.505, False),  # accuracy at chance
        (0.3, 0.65, False),  # far below what a plain reference does
    ],
)
def test_a_cure_is_worth_something_in_itself(score, skill, worth):
    assert Baseline(loss=0.693, chance=0.5, reference=0.95).is_beaten_by(score, skill) is worth
    assert Baseline().is_beaten_by(score, skill)


def test_a_baseline_is_read_from_the_data():
    measured = bare()._measure_baseline()
    assert measured.loss == pytest.approx(math.log(4), rel=0.05)
    assert measured.chance < 0.5 < measured.reference
    assert measured.skilled
    for fault in ("class_imbalance", "angle_wraps"):  # accuracy, and R2, say nothing of these
        assert not bare(faults=[fault])._measure_baseline().skilled


def test_parts_of_a_triple_are_no_constant_to_beat():
    """Three constant parts that differ lose nothing, and tell no two rows apart."""

    def loss(output, target):
        anchor, near, far = output.unbind(1)
        gap = (anchor - near).square().sum(-1) - (anchor - far).square().sum(-1)
        return (1 + gap).clamp_min(0).mean()

    model, x = nn.Linear(6, 4), torch.randn(80, 3, 6)
    constant = torch.eye(4)[[0, 0, 1]].expand(80, 3, 4)
    assert loss(constant, None) == 0
    found = measure_baseline(Replica(model, loss), (x, torch.zeros(80)), None, held_out=False)
    assert math.isnan(found.loss)
    assert found.is_beaten_by(0.9, None)
    squares = measure_baseline(Replica(model, F.mse_loss), (x, x[..., :4]), None, held_out=False)
    assert squares.loss == pytest.approx(float(x[..., :4].var(0, correction=0).mean()), rel=0.01)


def test_repeated_rows_without_validation_rows_are_no_crash():
    torch.manual_seed(0)
    x, y = classes(40)
    model = nn.Linear(16, 4)
    told = diagnose(model, (x, y), CE, steps=5, optimizer=sgd(0.1)(model.parameters()))
    told = replace(told, findings=(Finding("rows_in_both", "warning", ("data",)),))
    found = cure(model, (x, y), CE, optimizer=sgd(0.1)(model.parameters()), diagnosis=told,
                 steps=5, seeds=2, budget="1s")  # fmt: skip
    assert not found.patch or "x_valid" not in found.patch


def test_scales_are_tried_where_nothing_was_found():
    tried = {treatment.name for treatment in candidates([])}
    assert {cures.SCALED_INPUTS.name, cures.LOG_INPUTS.name} <= tried
    assert cures.LOG_INPUTS not in candidates(["overfitting"])


def test_gradients_are_freed_of_hooks():
    torch.manual_seed(0)
    x, y = classes()
    hooked, plain = nn.Linear(16, 4), nn.Linear(16, 4)
    plain.load_state_dict(hooked.state_dict())
    for p in hooked.parameters():
        p.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    for model in (hooked, plain):
        CE(operate(cures.NO_GRADIENT_HOOKS.edit, model, (x, y))(x), y).backward()
    assert torch.equal(hooked.weight.grad, plain.weight.grad)
    assert not cures.NO_GRADIENT_HOOKS.edit(plain, (x, y))


def test_a_constant_of_probabilities_adds_up_to_one():
    """The logarithm of free numbers has no lower end: nothing would be better than that."""
    x, y = classes()
    loss = execute(cures.LOG_OF_PROBABILITIES.setup, loss=nn.NLLLoss())["loss"]
    model = nn.Sequential(nn.Linear(x.shape[1], 4), nn.Softmax(1))
    found = measure_baseline(Replica(model, loss), (x, y), None, held_out=False)
    assert found.loss == pytest.approx(math.log(4), rel=0.05)


@pytest.mark.parametrize("name", ["reshaped", "straight", "two softmax"])
def test_causes_in_the_wiring_have_treatments(name):
    """Of treatments that are as good the one that edits least is chosen."""
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    if name == "two softmax":
        data, loss, code = (x, x[:, :3].argmax(1)), CE, "head_mismatch"
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3), nn.Softmax(1))
    elif name == "reshaped":
        data, loss, code = (x, x @ torch.randn(6)), nn.functional.mse_loss, "broadcast_loss"
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    else:
        data, loss, code = (x, (x[:, :2].prod(1) > 0).long()), CE, "no_nonlinearity"
        model = nn.Sequential(nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        told = replace(diagnose(model, data, loss), findings=(Finding(code, "critical"),))
        found = cure(
            model, data, loss, optimizer=adam(1e-2)(model.parameters()), diagnosis=told,
            steps=60, budget="60s", seeds=2,
        )  # fmt: skip
    kinds = {a.name for a in found.treatments if a.verdict == "confirmed"}
    wanted = {
        "reshaped": cures.RESHAPED_TARGETS,
        "straight": cures.NONLINEAR,
        "two softmax": cures.MATCHING_HEAD,
    }
    wanted = wanted[name]
    assert any(wanted.name in n for n in kinds), str(found)
    assert wanted.name in found.best.name, str(found)


def masks():
    x, y = classes()
    return x, 255 * (y > 1).float()[:, None]


def labels():
    x, _ = classes()
    return x, (x[:, :3] > 0).float()


@pytest.mark.parametrize(
    ("build", "data", "loss", "treatment"),
    [
        (lambda: wired.listed(list), classes, CE, cures.REGISTERED_LAYERS),
        (lambda: nn.Linear(16, 1), masks, nn.BCEWithLogitsLoss(), cures.TARGETS_TO_UNIT_RANGE),
        (lambda: nn.Linear(16, 4), classes, nn.NLLLoss(), cures.LOG_SOFTMAX),
        (lambda: nn.Linear(16, 3), labels, CE, cures.SIGMOID_PER_CLASS),
    ],
    ids=["registered", "to one", "logarithm", "sigmoids"],
)
def test_the_loss_that_fits_and_layers_that_are_known_are_treatments(build, data, loss, treatment):
    torch.manual_seed(0)
    model = build()
    engine = torch.optim.SGD(model.parameters(), lr=0.05)
    told = diagnose(model, data(), loss, optimizer=engine, steps=20)
    assert treatment in cures.TREATMENTS_BY_CODE[told.findings[0].code], str(told)
    found = cure(
        model, data(), loss, optimizer=engine, diagnosis=told, steps=40, seeds=2, budget="60s"
    )
    helped = {a.name for a in found.treatments if a.verdict == "confirmed"}
    assert any(treatment.name in name for name in helped), str(found)


@pytest.mark.parametrize("climbs", [False, True])
def test_a_loss_that_is_turned_round_is_cured_by_its_sign(climbs):
    torch.manual_seed(0)
    x, y = classes()

    def loss(output, target):
        value = nn.functional.cross_entropy(output, target)
        return value if climbs else -value

    model = nn.Sequential(nn.Linear(16, 4))
    engine = torch.optim.SGD(model.parameters(), lr=0.01, maximize=climbs)
    found = cure(model, (x, y), loss, optimizer=engine, steps=30, seeds=2, budget="60s")
    assert found.confirmed, str(found)
    own = {
        t.name for t in cures.TREATMENTS_BY_CODE["loss_upside_down"]
    }  # what is confirmed ends the search
    assert {t.name for t in found.treatments} <= {UNTREATED.name, *own}
    wanted = cures.NO_MAXIMIZE if climbs else cures.NEGATED_LOSS
    helped = {t.name for t in found.treatments if t.verdict == "confirmed"}
    assert any(wanted.name in name for name in helped), str(found)
    trained, _ = found.train(60)
    assert float((trained(x).argmax(1) == y).float().mean()) > 0.8


@pytest.mark.parametrize(
    ("wiring", "start", "is_whole"),
    [
        ({"pulls_away": 1.0}, 1.0, True),
        ({"whole": True}, -1.0, True),
        ({"whole": True}, 1.0, False),
        ({"whole": True, "entropy_pulled": 0.5}, -1.0, False),
        ({"whole": True, "entropy_pulled": -0.5}, -1.0, True),
        ({"determinant_pulled": 0.5}, -1.0, False),
        ({"answer_without_end": {"place": 1}}, 1.0, False),
    ],
)
def test_a_part_that_is_turned_round_does_not_turn_the_loss_that_judges(wiring, start, is_whole):
    x, y = classes()
    trials = bare(
        model=lambda: nn.Linear(16, 4), loss=lambda output, y: -CE(output, y),
        source=samples((x, y)), optimizer=sgd(0.1), faults=["loss_upside_down"],
    )  # fmt: skip
    record = SimpleNamespace(wiring=wiring, static={}, points=[Point(0, start)])
    score_by_intended_loss(trials, SimpleNamespace(record=record))
    assert (trials.intended_loss is not None) == is_whole


def rare(rows=900, column=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    y = (x[:, 0] + torch.randn(rows, generator=generator) > 2.5).long()
    return x, y[:, None].float() if column else y


@pytest.mark.parametrize(
    ("outputs", "loss"), [(2, CE), (1, nn.BCEWithLogitsLoss())], ids=["classes", "yes or no"]
)
def test_rare_classes_are_cured_by_a_loss_that_counts_each_class_alike(outputs, loss):
    """Accuracy is highest where one class is always answered: the loss by class judges."""
    torch.manual_seed(0)
    x, y = rare(column=outputs == 1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))
    found = cure(
        model, (x, y), loss, optimizer=torch.optim.Adam(model.parameters(), 5e-3), steps=60,
        budget="60s", seeds=2,
    )  # fmt: skip
    assert "class_imbalance" in found.diagnosis.labels, str(found.diagnosis)
    assert "every class counts alike" in found.treatment.name, str(found)
    answers = found.train(100)[0](x).detach()
    said = answers.argmax(1) if outputs == 2 else (answers[:, 0] > 0).long()
    recall = [float((said[y.flatten() == k] == k).float().mean()) for k in (0, 1)]
    assert sum(recall) / 2 > 0.7


def test_a_loss_that_broadcasts_inside_of_itself_is_no_crash():
    """Values of the actions that were taken: no reshape of the record fits the answers."""
    torch.manual_seed(0)
    x, taken = torch.randn(200, 4), torch.randint(3, (200,))
    record = torch.stack([taken.float(), x[torch.arange(200), taken]], 1)

    def loss(values, record):
        chosen = values.gather(1, record[:, :1].long())
        return nn.functional.smooth_l1_loss(chosen, record[:, 1])

    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = cure(model, (x, record), loss, optimizer=optimizer, steps=20, budget="2s", seeds=2)
    assert "broadcast_loss" in found.diagnosis.labels


def test_a_second_fault_is_found_in_the_treated_program_and_treated_too():
    """With gaps no wiring is tested, and without them the head alone cannot learn enough."""
    torch.manual_seed(0)
    x, y = classes()
    x[::40, 3] = math.nan
    model = wired.listed(list)
    engine = torch.optim.SGD(model.parameters(), lr=0.05)
    found = cure(model, (x, y), CE, optimizer=engine, steps=150, seeds=2, budget="60s")
    assert found.diagnosis.labels == {"non_finite_data"}
    first = {cures.FINITE_ROWS.name, cures.FILLED_GAPS.name} & found.treatment.names
    assert first, str(found)
    assert cures.REGISTERED_LAYERS.name in found.treatment.names, str(found)
    assert found.remaining.ok
    known = ~x.isnan().any(1)
    answers = found.train(150)[0](x[known]).argmax(1)
    assert float((answers == y[known]).float().mean()) > 0.9


def test_rows_in_both_parts_are_taken_apart_before_anything_is_judged():
    torch.manual_seed(0)
    x, y = classes()
    valid = x[:100], y[:100]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    engine = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = cure(model, (x, y), CE, valid=valid, optimizer=engine, steps=30, seeds=2, budget="60s")
    assert "rows_in_both" in found.diagnosis.labels, str(found.diagnosis)
    assert found.confirmed, str(found)
    names = dict(zip(("x_train", "y_train", "x_valid", "y_valid"), (x, y, *valid)))
    space = execute(found.patch, model=model, optimizer=engine, loss=CE, **names)
    kept = {tuple(row) for row in space["x_train"].tolist()}
    assert kept
    assert not kept & {tuple(row) for row in valid[0].tolist()}
    assert found.train(60)[1].valid_metric > 0.8


def test_a_loss_that_the_model_computes_is_mended_to_judge():
    """Padding is most of it: what leaves it out must not be judged with it."""
    torch.manual_seed(0)
    x = torch.randint(1, 6, (200, 12))
    x[:, 4:] = 0
    model = Fn(
        lambda m, x: m.head(m.rnn(m.embed(x))[0]), embed=nn.Embedding(6, 8),
        rnn=nn.GRU(8, 8, batch_first=True), head=nn.Linear(8, 6),
    )  # fmt: skip
    trials = bare(
        model=lambda: Owner(model), loss=lambda model, batch: model(batch[0]),
        source=samples((x, x)), optimizer=sgd(0.1), faults=["padding_in_loss"],
    )  # fmt: skip
    score_by_intended_loss(trials, diagnose(deep(1, nn.ReLU), classes(), CE))
    plain = Owner(model)
    wanted = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), ignore_index=0)
    assert torch.allclose(trials.wrapper(plain)(x), wanted)
    assert not torch.allclose(plain(x), wanted)


class Owner(nn.Module):
    """A network that gives its own loss."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, x):
        return F.cross_entropy(self.core(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def test_targets_of_the_row_beside_are_moved_back():
    y = torch.arange(5)
    for way, shift in ((cures.TARGET_OF_ROW_AFTER, 1), (cures.TARGET_OF_ROW_BEFORE, -1)):
        assert torch.equal(execute(way.rows, y_train=y.roll(shift, 0))["y_train"], y)
    torch.manual_seed(0)
    x = torch.randn(600, 5)
    y = torch.tanh(x[:, :1] - x[:, 1:2])
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 1))
    engine = adam(1e-2)(model.parameters())
    found = cure(
        model, (x, y.roll(1, 0)), nn.MSELoss(), optimizer=engine, steps=60, seeds=2,
        budget="60s",
    )  # fmt: skip
    assert found.treatment is not None, str(found)
    assert cures.TARGET_OF_ROW_AFTER.name in found.treatment.name
    answers = found.train(60)[0](x).detach()
    assert float((answers - y).square().mean() / y.var()) < 0.1


def result(name, scores, effects, verdict, steps=300):
    return TreatmentResult(name, 1, steps, scores, effects, verdict)


def letter(*results, treatment=None, patch=""):
    told = diagnose(deep(1, nn.ReLU), classes(), CE)
    treated = SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.5))
    return str(
        Cure(told, results, treatment, lambda seed: treated, 32, samples(classes()), None, CE,
             patch=patch)
    )  # fmt: skip


def test_a_letter_says_what_ended_it_what_failed_and_what_to_do_next():
    nothing = result(UNTREATED.name, (2.0, 2.0), (0.0, 0.0), "not confirmed")
    tried = [
        result("lr x10", (0.5, 0.5), (1.5, 1.5), "confirmed"),
        result("scaled inputs", (1.0, 1.8), (1.0, 0.2), "not confirmed"),
        result("lr x0.1", (2.5, 2.5), (-0.5, -0.5), "worse"),
    ]
    text = letter(nothing, *tried, treatment=rate(10.0), patch="a = 1")
    assert text.splitlines()[1].startswith(" lr x10: loss 2.000 -> 0.500, lower by 1.500")
    assert "did not help: lr x0.1\n" in text  # what is only not sure did not fail
    assert text.endswith(
        "next: paste it, or say --optimizer sgd:0.5 on the command line, train in full, diagnose "
        "again"
    )
    diverged = replace(nothing, scores=(math.nan, math.inf))
    text = letter(diverged, *tried[:1], treatment=rate(10.0))
    assert " lr x10: loss not finite -> 0.500, with each of 2 seeds\n" in text
    assert "1.500" not in text  # what is below no number is not measured
    short = letter(*(replace(a, scores=a.scores[:1], effects=a.effects[:1], steps=20)
                     for a in (nothing, tried[1])))  # fmt: skip
    assert "1 seed x 20 steps" in short
    assert "the budget ended" in short
    assert "next:" not in short
