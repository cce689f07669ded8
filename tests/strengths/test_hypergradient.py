"""Sensitivities against finite differences of whole runs; a strength that finds its way."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk
from ranks import together
from tikhon.errors import InputError
from tikhon.strengths.sensitivity import (
    descend_log_strength,
    initial_memory,
    rise_of_even,
    trusted_share,
)
from tikhon.strengths.validation import validate

CURVATURE = 1.5
PENALTIES = [tk.L2(), tk.L1(), tk.ElasticNet(l1_ratio=0.3), tk.GroupLasso()]
STRENGTH = {"L2": 0.3, "L1": 0.1, "ElasticNet": 0.15, "GroupLasso": 0.2}


def quadratic(strength, penalty, how, steps, options):
    """Weights and regularizer after `steps` on a loss whose curvature is CURVATURE everywhere."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        model.weight.mul_(3)
        goal = torch.randn(4, 6, dtype=torch.float64) * torch.tensor([2.0, 1, 0.5, 0.02])[:, None]
    optimizer = torch.optim.SGD(model.parameters(), **options)
    reg = tk.regularize(model, optimizer, tk.Term(penalty, strength=strength), how=how)
    for _ in range(steps):
        optimizer.zero_grad()
        (CURVATURE / 2 * (model.weight - goal).square().sum()).backward()
        optimizer.step()
    return model.weight.detach().clone(), reg


def watching(strength, steps):
    """A hypergradient that never moves: only its sensitivity is looked at."""
    valid = (torch.zeros(2, 6).double(), torch.zeros(2, 4).double())
    return tk.Hypergradient(
        valid,
        nn.functional.mse_loss,
        steps=steps,
        every=1,
        start=strength,
        damping=CURVATURE,
        range=(strength, strength * (1 + 1e-12)),
    )


def sensitivity(reg):
    (memory,) = reg.state_dict()["memory"].values()
    return memory["z weight"]


@pytest.mark.parametrize("how", ["objective", "decoupled"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_sensitivity_is_the_finite_difference_of_whole_runs(penalty, how):
    strength, steps, e = STRENGTH[type(penalty).__name__], 25, 1e-5
    options = {"lr": 0.05}
    _, reg = quadratic(watching(strength, steps), penalty, how, steps, options)

    ahead = isinstance(penalty, tk.L2)  # Z is of the step to come, without the first one

    def moved(log):
        return lambda step: strength * (1.0 if ahead and not step else math.exp(log))

    high, _ = quadratic(moved(e), penalty, how, steps + ahead, options)
    low, _ = quadratic(moved(-e), penalty, how, steps + ahead, options)
    expected = (high - low) / (2 * e)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(
        sensitivity(reg).double().reshape_as(expected), expected, rtol=1e-3, atol=1e-4
    )


def test_sensitivity_under_momentum_uses_the_effective_gain():
    strength, steps, e = 0.3, 200, 1e-5
    options = {"lr": 0.005, "momentum": 0.9}
    _, reg = quadratic(watching(strength, steps), tk.L2(), "objective", steps, options)
    high, _ = quadratic(strength * math.exp(e), tk.L2(), "objective", steps, options)
    low, _ = quadratic(strength * math.exp(-e), tk.L2(), "objective", steps, options)
    expected = (high - low) / (2 * e)
    torch.testing.assert_close(
        sensitivity(reg).double().reshape_as(expected), expected, rtol=0.05, atol=1e-3
    )


@functools.cache
def noisy_digits():
    """Train, valid and test rows of a problem that a network memorises: labels are wrong."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order].float() / 16, y[order]
    wrong = torch.rand(150, generator=generator) < 0.2
    y[:150][wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return (x[:150], y[:150]), (x[150:350], y[150:350]), (x[350:], y[350:])


def trained(penalty, *, how="decoupled", steps=600, stop=None, state=None, optimizer=None):
    """Model, optimizer and regularizer after `stop` of `steps`, from a state if there is one."""
    (x, y), _, _ = noisy_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = (optimizer or torch.optim.AdamW)(model.parameters(), lr=1e-2, weight_decay=0.0)
    reg = tk.regularize(model, opt, penalty, how=how)
    first = 0
    if state is not None:
        first = state["first"]
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        reg.load_state_dict(state["reg"])
    for i in range(first, stop or steps):
        rows = torch.arange(i * 16, i * 16 + 16) % len(x)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()
    return model, opt, reg


def adapting(steps=600, **options):
    _, valid, _ = noisy_digits()
    return tk.Hypergradient(valid, nn.functional.cross_entropy, steps=steps, **options)


def generalisation(model):
    x, y = noisy_digits()[2]
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


@functools.cache
def plainly():
    """What the same training gets without a penalty."""
    return generalisation(trained(tk.L2(0.0))[0])


@pytest.mark.parametrize(
    ("penalty", "how"),
    [
        (tk.L2, "decoupled"),
        (tk.L1, "objective"),
        (tk.GroupLasso, "objective"),
        pytest.param(tk.L2, "objective", marks=pytest.mark.slow),
        pytest.param(tk.ElasticNet, "objective", marks=pytest.mark.slow),
    ],
)
def test_one_run_finds_a_strength_that_generalises(penalty, how):
    adapted = generalisation(trained(penalty(adapting()), how=how)[0])
    assert adapted < 0.8 * plainly()


def test_strength_rises_where_the_model_overfits_and_falls_where_it_cannot():
    low = trained(tk.L2(adapting(start=0.01)))[2].state_dict()["strengths"]
    assert all(value > 0.1 for value in low.values())
    (x, y), _, _ = noisy_digits()
    same = tk.Hypergradient((x, y), nn.functional.cross_entropy, steps=600, start=1.0)
    fitted = trained(tk.L2(same))[2].state_dict()["strengths"]
    assert all(value < 0.3 for value in fitted.values())


def test_resume_is_exact():
    whole, _, reg = trained(tk.L2(adapting(100)), steps=100)
    model, opt, half = trained(tk.L2(adapting(100)), steps=100, stop=37)
    state = {
        "first": 37,
        "model": model.state_dict(),
        "optimizer": opt.state_dict(),
        "reg": half.state_dict(),
    }
    resumed, _, again = trained(tk.L2(adapting(100)), steps=100, state=state)
    assert again.state_dict()["strengths"] == reg.state_dict()["strengths"]
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("loss", "blind", "share"),
    [
        (2.3, 2.3, 0.0),  # a plateau, or collapsed to a constant
        (2.29, 2.3, 0.43),
        (1.5, 2.3, 1.0),
        (4.0, 2.3, 1.0),  # worse than a constant: overfitting, which decay is there for
        (math.nan, 2.3, 1.0),
        (1.5, math.nan, 1.0),  # unknown
    ],
)
def test_a_strength_acts_as_far_as_the_model_tells_the_rows_apart(loss, blind, share):
    alone, many = initial_memory(0.0), initial_memory(torch.zeros(2, 3))
    for _ in range(60):
        one = trusted_share(alone, loss, blind)
        both = trusted_share(many, torch.full((2, 1), loss), torch.full((2, 1), blind))
    assert one == pytest.approx(share, abs=0.01)
    assert torch.allclose(both, torch.full((2, 3), one), atol=1e-3)


@pytest.mark.parametrize("blind", [True, False])
def test_decay_rests_while_the_model_gives_one_answer_for_all_rows(blind):
    """On a plateau decay would only shrink what has to grow: the run is that without it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].requires_grad_(not blind)
    if blind:
        model[2].weight.data.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.0)
    strength = tk.Hypergradient((x, y), nn.functional.cross_entropy, steps=200, every=2)
    with tk.regularize(model, optimizer, {"0.weight": tk.L2(strength)}, how="decoupled") as reg:
        for step in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step == 3:
                early = model[0].weight.detach().clone()
    assert (reg.strengths()["0.weight/L2"] == 0) == blind
    assert torch.equal(model[0].weight, early) == blind


class Parts(nn.Module):
    """Outputs that are no tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return {"logits": self.layer(x)}


def test_outputs_whose_mean_nobody_knows_are_trusted():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    picky = lambda out, target: nn.functional.cross_entropy(out["logits"], target)  # noqa: E731
    model = Parts()
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.0)
    strength = tk.Hypergradient((x, y), picky, steps=60, every=2)
    with tk.regularize(model, optimizer, tk.L2(strength), how="decoupled") as reg:
        for _ in range(60):
            optimizer.zero_grad()
            picky(model(x), y).backward()
            optimizer.step()
    assert min(reg.strengths().values()) > 0


@pytest.mark.parametrize("many", [False, True])
def test_noise_moves_nothing_and_a_slope_does(many):
    """Slopes without a mean leave the strength where it is; half a deviation of mean does not."""
    generator = torch.Generator().manual_seed(0)
    ends, moves = [], 0
    for mean in (0.0, 0.5):
        memory = initial_memory(torch.zeros(1) if many else 0.0)
        for slope in torch.randn(400, generator=generator) + mean:
            before = float(memory["log"])
            descend_log_strength(
                memory, slope[None] if many else float(slope), 1.0, rate=0.05, caution=1.0,
                bounds=(-50.0, 50.0),
            )  # fmt: skip
            moves += not mean and float(memory["log"]) != before
        ends.append(float(memory["log"]))
    assert moves < 40 and abs(ends[0]) < 0.2 and ends[1] < -1.5


@pytest.mark.parametrize("many", [False, True])
def test_no_move_exceeds_its_rate_and_only_moves_below_the_first_are_shortened(many):
    """Slopes that grow a thousandfold make no leap; what was raised comes down as it went up."""
    memory, log = initial_memory(torch.zeros(1) if many else 0.0), [0.0]
    slopes = [*[-1e-3] * 100, *[-1.0] * 20, *[1e3] * 60]
    for slope in slopes:
        given = torch.tensor([slope]) if many else slope
        descend_log_strength(memory, given, 1.0, rate=0.1, caution=0.5, bounds=(-50.0, 50.0))
        log.append(float(memory["log"]))
    moves = [after - before for before, after in itertools.pairwise(log)]
    assert max(map(abs, moves)) <= 0.1 + 1e-6
    assert max(moves) == pytest.approx(0.1, rel=1e-4) and min(moves) == pytest.approx(
        -0.1, rel=1e-4
    )
    while memory["log"] > 0:  # back to the first strength
        descend_log_strength(memory, given, 1.0, rate=0.1, caution=0.5, bounds=(-50.0, 50.0))
    for _ in range(5):
        before = float(memory["log"])
        descend_log_strength(memory, given, 1.0, rate=0.1, caution=0.5, bounds=(-50.0, 50.0))
        assert -0.05 - 1e-6 <= float(memory["log"]) - before < 0


@pytest.mark.parametrize("many", [False, True])
def test_a_strength_that_fell_to_nothing_comes_back_as_fast_as_it_fell(many):
    """Zero is a finite number of moves away; in log s it would be infinitely far."""
    even = torch.zeros(1) if many else 0.0
    memory, lowest = initial_memory(even, even=even), 0.0
    for slope in [*[1.0] * 100, *[-1.0] * 40]:
        given = torch.tensor([slope]) if many else slope
        bounds = (-100.0, 50.0)
        descend_log_strength(memory, given, 0.0, rate=0.1, caution=1.0, bounds=bounds)
        lowest = min(float(memory["log"]), lowest)
    assert lowest < -10 and float(memory["log"]) > 0


def test_labels_that_are_memorised_raise_a_strength_that_early_training_lowered():
    """In a run so short that the first strength does not matter, beside fixed strengths."""
    (x, y), _, _ = noisy_digits()

    def end(strength):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        tk.regularize(model, optimizer, tk.L2(strength), how="decoupled")
        for step in range(240):
            rows = torch.arange(step * 50, step * 50 + 50) % len(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return generalisation(model)

    none, best = end(0.0), min(map(end, (0.3, 1.0)))
    assert best < 0.8 * none and end(adapting(240)) < (none + best) / 2


def test_strength_rests_in_the_last_tenth():
    before = trained(tk.L2(adapting(100)), steps=100, stop=90)[2].state_dict()["strengths"]
    after = trained(tk.L2(adapting(100)), steps=100)[2].state_dict()["strengths"]
    assert before == after


def test_decay_never_takes_more_than_half_of_a_weight():
    strength = adapting(start=1e4, range=(1e3, 1e6))
    found = trained(tk.L2(strength))[2].state_dict()["strengths"].values()
    assert all(1e-2 * value <= 0.5 for value in found)


def test_validation_gradient_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    batch = (torch.randn(5, 4), torch.randn(5, 2))
    state = torch.get_rng_state()
    found = validate(model, nn.functional.mse_loss, batch).gradients
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].bias.grad is None
    model[2].eval()  # no noise, and the statistics of the batch
    expected = torch.autograd.grad(
        nn.functional.mse_loss(model(batch[0]), batch[1]), model[3].weight
    )[0]
    assert torch.equal(found[model[3].weight], expected)


class Moving(nn.Module):
    """A normalisation of its own, with an average under another name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("moving_scale", torch.ones(4))

    def forward(self, x):
        if not self.training:
            return x / self.moving_scale
        scale = x.std(0)
        self.moving_scale.lerp_(scale.detach(), 0.1)
        return x / scale


NORMALISING = {
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "lazy BatchNorm": lambda: nn.LazyBatchNorm1d(),
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "of the user": Moving,
}


@pytest.mark.parametrize("make", NORMALISING.values(), ids=NORMALISING)
def test_the_slope_is_that_of_the_function_that_is_trained(make):
    """In eval mode, with averages from before the weights moved, it would be another's."""
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(4, 2))
    x, y = 5 + 3 * torch.randn(32, 4), torch.randn(32, 2)
    model(x)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    value, _, found = validate(model, nn.functional.mse_loss, (x, y))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    expected = nn.functional.mse_loss(model(x), y)
    assert torch.equal(value, expected.detach())
    gradient = torch.autograd.grad(expected, model[1].weight)[0]
    assert torch.equal(found[model[1].weight], gradient)
    model[0].eval()  # a user who fine-tunes on frozen statistics
    value, _, _ = validate(model, nn.functional.mse_loss, (x, y))
    assert torch.equal(value, nn.functional.mse_loss(model(x), y).detach())


def test_before_a_norm_a_strength_has_no_effect():
    """The next layer divides the scale away: no slope is worth a move."""
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    strength = tk.Hypergradient((x[192:], y[192:]), nn.functional.cross_entropy, steps=60, every=2)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L2(strength)}, how="decoupled")
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:192]), y[:192]).backward()
        optimizer.step()
    (found,) = reg.strengths().values()
    assert 60 * 3e-3 * found < 0.01  # of a weight, in the whole run


def test_the_end_of_the_range_and_of_the_run_is_said_once():
    strength = adapting(20, every=1, range=(1e-4, 1.5e-4), start=1.4e-4)
    with pytest.warns(UserWarning) as said:
        trained(tk.L2(strength, weights=None), steps=30)
    texts = [str(w.message) for w in said]
    assert sum("goes on past steps=20" in text for text in texts) == 2  # one a layer
    assert all(w.filename == __file__ for w in said)


def test_data_that_cannot_be_read_are_refused_before_any_step():
    rows = torch.randn(4, 2)
    for valid in ([], 3, (rows, rows[:3]), {"x": rows}):
        with pytest.raises((ValueError, TypeError)):
            tk.Hypergradient(valid, nn.functional.mse_loss, steps=100)


@pytest.mark.parametrize("way", ["term", "loss weight"])
@pytest.mark.parametrize("form", ["inputs", "names", "targets", "onwards", "batch"])
def test_data_that_a_model_does_not_take_are_refused_before_any_step(form, way):
    x, y = torch.randn(40, 3), torch.zeros(40).long()
    loss, valid = nn.functional.cross_entropy, {
        "inputs": (x[:, :2], y),
        "names": {"a": x, "b": x, "labels": y},
        "targets": (x, y.double()),
        "onwards": torch.utils.data.DataLoader([(x[:, :2], y)], batch_size=None),
        "batch": {"input": x, "labels": y},
    }[form]  # fmt: skip
    if form == "batch":
        loss = lambda own, rows: nn.functional.cross_entropy(own(rows["input"]), rows["labels"])  # noqa: E731
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    strength = tk.Hypergradient(valid, loss, steps=100, start=0.1)
    with pytest.raises(InputError, match="fails on the first validation batch"):
        if way == "term":
            tk.regularize(model, optimizer, tk.L2(strength), how="decoupled")
        else:
            tk.LossWeight(model, optimizer, strength)
    (model(x).sum()).backward()
    optimizer.step()  # nothing was left attached


def test_a_first_look_leaves_a_stream_that_is_read_onwards_where_it_was():
    x, y = torch.randn(40, 3), torch.zeros(40).long()
    loader = torch.utils.data.DataLoader([(x[:9], y[:9]), (x[9:], y[9:])], batch_size=None)
    strength = tk.Hypergradient(loader, nn.functional.cross_entropy, steps=100)
    model = nn.Linear(3, 2)
    tk.regularize(model, torch.optim.SGD(model.parameters(), 0.1), tk.L2(strength))
    assert [len(strength.stream.batch(k)[1]) for k in range(3)] == [9, 31, 9]


class Sum(nn.Module):
    """Two inputs, by place or by name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, a, b):
        return self.layer(a + b)


@pytest.mark.parametrize("form", ["pair", "names", "loader", "rows", "iterator"])
def test_validation_rows_of_any_form_give_the_same_strengths(form):
    """As those in memory; the models of several inputs are called with all of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    halves = x / 2, x / 2
    data = torch.utils.data.TensorDataset(*halves, y)
    forms = {
        "pair": (halves, y),
        "names": {"a": halves[0], "b": halves[1], "labels": y},
        "loader": torch.utils.data.DataLoader(data, 40),
        "rows": data,
        "iterator": iter([(*halves, y)]),
    }

    def found(valid, model):
        torch.manual_seed(0)
        model = model(nn.Linear(3, 2))
        optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.0)
        strength = tk.Hypergradient(
            valid, nn.functional.cross_entropy, steps=60, every=2, batch_size=40
        )
        inputs = (x,) if isinstance(model, nn.Sequential) else halves
        with tk.regularize(model, optimizer, tk.L2(strength), how="decoupled") as reg:
            for _ in range(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(*inputs), y).backward()
                optimizer.step()
            return list(reg.strengths().values())

    assert found(forms[form], Sum) == pytest.approx(found((x, y), nn.Sequential), rel=1e-3)


def test_one_strength_for_all_layers():
    per_term = trained(tk.L2(adapting(per="term")))[2].state_dict()["strengths"]
    assert len(per_term) == 1
    assert len(trained(tk.L2(adapting()))[2].state_dict()["strengths"]) == 2


def test_loader_and_tensors_give_the_same_strengths():
    """All rows in one batch: the order, which is the loader's own, says nothing."""
    _, valid, _ = noisy_digits()
    rows = len(valid[0])
    data = torch.utils.data.TensorDataset(*valid)
    loader = torch.utils.data.DataLoader(data, batch_size=rows)
    from_loader = tk.Hypergradient(loader, nn.functional.cross_entropy, steps=600)
    found = [
        trained(tk.L2(s))[2].state_dict()["strengths"]
        for s in (from_loader, adapting(batch_size=rows))
    ]
    for name, strength in found[0].items():
        assert strength == pytest.approx(found[1][name], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be the number of optimizer steps, at least 1, received 0"),
        ({"steps": 10, "every": 0}, "every must be at least 1, received 0"),
        ({"steps": 100.5}, "steps must be a whole number, the number of .*received 100.5"),
        ({"steps": "10"}, "steps must be .*received '10'"),
        (
            {"steps": 10, "batch_size": 2.5},
            "batch_size must be a whole number, at least 1, received 2.5",
        ),
        ({"steps": 10, "range": (0.0, 1.0)}, "range must be 0 < smallest < largest"),
        ({"steps": 10, "range": (1.0,)}, "range must be 0 < smallest < largest"),
        ({"steps": 10, "start": 31.0}, "start must be 0 or within range, .*received 31.0"),
        ({"steps": 10, "damping": -1.0}, "damping must be >= 0, received -1.0"),
        ({"steps": 10, "caution": 0.0}, "caution must be in"),
        ({"steps": 10, "per": "row"}, "per must be 'layer', 'group' or 'term', received 'row'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tk.Hypergradient(
            (torch.ones(2, 1), torch.ones(2, 1)), nn.functional.cross_entropy, **options
        )


def test_steps_are_needed():
    with pytest.raises(TypeError, match="steps"):
        tk.Hypergradient((torch.ones(2, 1), torch.ones(2, 1)), nn.functional.cross_entropy)


def test_a_run_too_short_to_move_says_so_and_stays_sane():
    with pytest.warns(UserWarning, match="24 steps with every=5 leave 4 moves.*take every=2"):
        strength = adapting(24)
    model, _, reg = trained(tk.L2(strength), steps=24)
    first = 1e-4  # the least, as a run of 24 steps can stand nothing
    assert all(first / 16 <= value <= first * 16 for value in reg.strengths().values())
    assert generalisation(model) < 2.4  # not destroyed: chance is log(10)


@pytest.mark.parametrize(("steps", "share"), [(500, 1.9e-4), (1000, 0.003), (100_000, 8e-5)])
def test_the_first_decay_takes_a_share_of_the_weights_that_long_runs_can_stand(steps, share):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.eye(2)
    valid = (rows, model(rows).detach())
    strength = tk.Hypergradient(valid, nn.functional.mse_loss, steps=steps)
    reg = tk.regularize(model, optimizer, tk.L2(strength), how="decoupled")
    for _ in range(5):  # the first strength and one move of at most a factor of 1.22
        optimizer.zero_grad()
        (0 * model(rows)).sum().backward()
        optimizer.step()
    assert all(share / 1.3 < 0.1 * s < share * 1.3 for s in reg.strengths().values())


def test_what_is_too_small_to_matter_is_larger_where_less_of_the_run_is_left():
    """A decay of lr * s per step over the steps left removes as much as it did over the run."""
    model, rows, steps = nn.Linear(2, 1, bias=False), torch.eye(2), 400
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    valid = (rows, model(rows).detach())
    strength = tk.Hypergradient(valid, nn.functional.mse_loss, steps=steps)
    reg = tk.regularize(model, optimizer, tk.L2(strength), how="decoupled")
    found = {}
    for step in range(1, 301):
        optimizer.param_groups[0]["lr"] = 0.1 if step <= 200 else 0.025
        optimizer.zero_grad()
        nn.functional.mse_loss(model(rows), valid[1]).backward()
        optimizer.step()
        if step in (5, 200, 205, 300):
            found[step] = reg.state_dict()["memory"]["weight/L2"]["even"]
    alone = {5: 1.0, 200: 2.0, 205: 4 * 400 / 195, 300: 10.0}  # at most tenfold
    for step, factor in alone.items():
        assert math.exp(found[step] - found[5]) == pytest.approx(factor, rel=0.02)
    rest = torch.tensor([2.0, 1.0, 0.5, 195 / 1600, 0.0])
    many = rise_of_even(rest).exp()
    assert torch.allclose(many, torch.tensor([1.0, 1.0, 2.0, 1600 / 195, 10.0]))


def test_one_strength_for_each_parameter_group():
    _, valid, _ = noisy_digits()
    (x, y), _, _ = noisy_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10))
    groups = [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": 3e-3}]
    opt = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    strength = tk.Hypergradient(valid, nn.functional.cross_entropy, steps=100, per="group")
    reg = tk.regularize(model, opt, tk.L2(strength), how="decoupled")
    for _ in range(100):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    found = reg.strengths()
    assert found["0.weight/L2"] == found["2.weight/L2"] != found["3.weight/L2"]
    assert set(reg.state_dict()["strengths"]) == {"*/L2 of group 0", "*/L2 of group 1"}


def test_a_replay_follows_the_strengths_that_were_found():
    _, _, reg = trained(tk.L2(adapting(100)), steps=100)
    (terms,) = reg.replay(200)["0.weight"]
    assert terms.how == "decoupled"
    assert terms.strength(199) == pytest.approx(reg.strengths()["0.weight/L2"], rel=1e-6)
    assert terms.strength(0) == pytest.approx(terms.strength(9)) != terms.strength(199)
    first, second = (trained(reg.replay(100), steps=100)[0] for _ in range(2))
    for a, b, c in zip(
        first.parameters(), second.parameters(), trained(tk.L2(0.0))[0].parameters()
    ):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: m])
def test_compiled_models_find_the_strengths_of_the_plain_one(wrap):
    def run(wrap):
        (x, y), _, _ = noisy_digits()
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        reg = tk.regularize(model, opt, tk.L2(adapting(60)), how="decoupled")
        for _ in range(60):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        return list(reg.strengths().values())

    assert run(wrap) == pytest.approx(run(lambda m: m), rel=1e-5)


def test_automatic_mixed_precision_finds_nearly_the_same_strengths():
    def run(mixed):
        (x, y), _, _ = noisy_digits()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        reg = tk.regularize(model, opt, tk.L2(adapting(200, start=1.0)), how="decoupled")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=mixed)
        for step in range(200):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = nn.functional.cross_entropy(model(x), y)
            if mixed and step == 50:
                loss = loss * math.inf  # an overflow: this step is skipped as a whole
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        return reg

    mixed, full = run(True), run(False)
    assert (mixed.steps, full.steps) == (199, 200)
    for name, value in full.strengths().items():
        assert 0.5 < mixed.strengths()[name] / value < 2
        assert abs(math.log(value)) > 0.5  # both have moved from 1


def test_a_penalty_without_rule_is_named():
    with pytest.raises(TypeError, match="no rule for MCP"):
        trained(tk.MCP(adapting()), how="objective")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_on_halves_of_the_rows_agree_with_one():
    found = json.loads(together(Path(__file__).with_name("two_validators.py")))
    for case in ("L2", "GroupLasso"):
        alone = found[f"{case} alone"]
        for halves in (found[f"{case} ddp"], found[f"{case} fsdp2"]):
            assert alone == pytest.approx(halves, rel=1e-3)
        assert len(alone) == 2 and len(set(alone.values())) == 2


def test_each_parameter_keeps_its_own_sensitivity_when_others_have_no_gradient_or_leave():
    torch.manual_seed(0)
    x, y = torch.randn(32, 5), torch.randn(32, 5)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    second = model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strength = tk.Hypergradient((x, y), nn.functional.mse_loss, steps=90, every=2, per="term")
    reg = tk.regularize(model, optimizer, tk.Term(tk.L2(), strength=strength))

    def known():
        (memory,) = reg.state_dict()["memory"].values()
        return memory["z 0.weight"], memory["z 1.weight"]

    def train(part):
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.mse_loss(part(x), y).backward()
            optimizer.step()

    train(model)
    resting, before = known()
    train(second)  # of the same shape, so a mix-up would not be heard of
    after = known()
    assert torch.equal(after[0], resting) and not torch.equal(after[1], before)
    optimizer.param_groups[0]["params"] = list(second.parameters())
    train(second)
    assert torch.equal(known()[0], resting) and not torch.equal(known()[1], after[1])


def test_states_of_old_runs_lack_parts_of_the_memory():
    _, _, reg = trained(tk.L2(adapting(100)), steps=100, stop=37)
    state = reg.state_dict()
    strengths = dict(state["strengths"])
    for memory in state["memory"].values():
        for name in ("first", "even", "size", "growth", "removed", "ratio"):
            del memory[name]
    again = trained(tk.L2(adapting(100)), steps=100, stop=1)[2]
    again.load_state_dict(state)
    assert again.strengths() == strengths


def test_a_loss_that_calls_the_model_is_looked_at_as_one_of_its_outputs():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    batch = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    whole = validate(
        model, lambda model, rows: nn.functional.cross_entropy(model(rows[0]), rows[1]), batch
    )
    usual = validate(model, nn.functional.cross_entropy, batch)
    assert torch.equal(whole.loss, usual.loss) and whole.constant_loss.isnan()
    assert all(torch.equal(whole.gradients[p], usual.gradients[p]) for p in model.parameters())
