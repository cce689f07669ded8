"""Laws of `watch`: it reads what a loop does, changes nothing, stops at the first bad number."""

from __future__ import annotations

import copy
import json
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from faulty import CE, adam, classes, deep, fingerprint, he, same, sgd
from tikhon.diagnosis import diagnose
from tikhon.errors import InputError
from tikhon.monitoring import NonFiniteError, watch


def train(model, optimizer, steps, *, watched=None, accumulate=1, clip=None, spoil=None):
    x, y = classes()
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            rows = torch.arange(32) + 32 * (step * accumulate + part)
            rows = rows % len(x)
            if spoil is not None:
                spoil(step, model)
            loss = CE(model(x[rows]), y[rows]) / accumulate
            loss.backward()
        if watched is not None:
            watched.loss(loss)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def test_a_watched_run_is_the_same_run():
    torch.manual_seed(0)
    model = he(deep(3, nn.ReLU))
    twin = copy.deepcopy(model)
    engine = adam(0.01)(model.parameters())
    with watch(model, engine, every=3) as health:
        train(model, engine, 10, watched=health)
    train(twin, adam(0.01)(twin.parameters()), 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert [r["step"] for r in health.rows] == [0, 3, 6, 9]
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    assert not engine._optimizer_step_pre_hooks


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_readings_are_what_the_optimizer_saw(accumulate, clip):
    torch.manual_seed(0)
    model = he(deep(2, nn.ReLU))
    engine = sgd(0.1)(model.parameters())
    seen = []
    engine.register_step_pre_hook(
        lambda *a: seen.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    )
    with watch(model, engine, every=1) as health:
        train(model, engine, 3, accumulate=accumulate, clip=clip)
    for row, norm in zip(health.rows, seen):
        assert row["gradient"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(("width", "tolerance"), [(16, 1e-4), (512, 0.05)])
def test_sizes_of_weights_and_updates_are_read_from_rows_of_large_tensors(width, tolerance):
    torch.manual_seed(0)
    model = nn.Linear(width, width)
    engine = sgd(0.1)(model.parameters())
    before = copy.deepcopy(model).requires_grad_(False)
    with watch(model, engine, every=1) as health:
        model(torch.randn(32, width)).square().mean().backward()
        engine.step()
    pairs = list(zip(model.parameters(), before.parameters()))
    ratios = sorted(float((p.detach() - q).norm() / q.norm()) for p, q in pairs)
    size = float(nn.utils.get_total_norm(before.parameters()))
    assert health.rows[0]["update"] == pytest.approx(ratios[len(ratios) // 2], rel=tolerance)
    assert health.rows[0]["weight"] == pytest.approx(size, rel=tolerance)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_step_of_the_optimizer_is_watched_like_a_plain_one():
    rows = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = he(deep(1, nn.ReLU))
        engine = sgd(0.1)(model.parameters())
        step = torch.compile(engine.step, backend="eager") if compiled else engine.step
        with watch(model, engine, every=2) as health:
            for _ in range(5):
                engine.zero_grad()
                CE(model(classes()[0]), classes()[1]).backward()
                step()
        assert health.step == 5
        rows.append(list(health.rows))
    assert rows[0] == rows[1]


def test_vanishing_signals_raise_an_alarm_and_healthy_ones_do_not():
    torch.manual_seed(0)
    for model, codes in (
        (deep(20, nn.Tanh), {"vanishing_gradient"}),
        (he(deep(2, nn.ReLU)), set()),
    ):
        engine = sgd(0.05)(model.parameters())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with watch(model, engine, every=2) as health:
                train(model, engine, 7)
        assert set(health.alarms) == codes, str(health)
        assert [str(w.message).split(":")[0] for w in said] == list(codes)


def spoil_weight(step, model):
    if step == 4:
        with torch.no_grad():
            model[2].weight[0, 0] = torch.nan


class Log(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(16, 8), nn.Linear(8, 4), 1.0

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.shift


def spoil_gradient(step, model):
    if step == 4:
        model.second.weight.register_hook(lambda g: g * torch.inf)
        model.first.bias.register_hook(lambda g: g * torch.nan)


@pytest.mark.parametrize(
    ("build", "spoil", "what", "where"),
    [
        (lambda: he(deep(2, nn.ReLU)), spoil_weight, "weight", "2.weight"),
        (Log, spoil_gradient, "gradient", "second.weight"),
        (
            Log,
            lambda step, m: setattr(m, "shift", 1e39 if step == 4 else 1.0),
            "activation",
            "Log",
        ),
    ],
)
def test_it_stops_at_the_first_bad_tensor(build, spoil, what, where, tmp_path):
    torch.manual_seed(0)
    model = build()
    engine = sgd(0.01)(model.parameters())
    health = watch(model, engine, every=50, output=tmp_path / "run")
    np.random.normal()  # the second of a pair of draws is kept for later
    before = np.random.get_state()
    with health, pytest.raises(NonFiniteError, match="step 4"):
        train(model, engine, 20, spoil=spoil)
    assert same(before, np.random.get_state())
    assert (health.failure["what"], health.step) == (what, 4)
    assert health.failure["where"] == where
    saved = json.loads((tmp_path / "run" / "watch.json").read_text())
    assert saved["failure"]["step"] == 4
    if what == "gradient":
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_bad_input_is_named():
    model = he(deep(1, nn.ReLU))
    engine = sgd(0.01)(model.parameters())
    x, y = classes()
    with watch(model, engine, every=50) as health, pytest.raises(NonFiniteError, match="input"):
        health.check(CE(model(torch.full_like(x, torch.nan)), y))


def test_steps_that_a_grad_scaler_skips_are_not_failures():
    model = he(deep(1, nn.ReLU))
    engine = sgd(0.01)(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=100)
    x, y = classes()
    skipped = 0
    with watch(model, engine, every=1) as health:
        for _ in range(12):
            engine.zero_grad()
            scaler.scale(CE(100 * model(x), y)).backward()
            scaler.step(engine)
            before = scaler.get_scale()
            scaler.update()
            skipped += scaler.get_scale() < before
    assert health.failure is None
    assert len(health.rows) == health.step
    assert skipped > 0
    assert health.step + skipped == 12
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert health.rows[-1]["gradient"] == pytest.approx(norm, rel=1e-4)


def test_an_optimizer_that_unscales_inside_its_step_is_read_unscaled():
    torch.manual_seed(0)
    model = he(deep(1, nn.ReLU))
    engine = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=100)
    x, y = classes()
    with watch(model, engine, every=1) as health:
        for _ in range(40):
            engine.zero_grad()
            loss = CE(100 * model(x), y)
            sizes = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
            scaler.scale(loss).backward()
            scaler.step(engine)
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() == before:
                break
    assert health.failure is None
    assert health.step > 1  # steps that were left out before it
    assert len(health.rows) == 1
    assert health.rows[0]["gradient"] == pytest.approx(float(nn.utils.get_total_norm(sizes)), 1e-3)


def test_a_failure_with_stop_off_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[2].eval()
    engine = sgd(0.1)(model.parameters())
    x, y = classes()
    with watch(model, engine, every=50, stop=False) as health:
        loss = CE(model(x), y) * torch.nan
        before = fingerprint(model, engine)
        health.check(loss)
    assert health.failure["what"] == "loss"
    before["hooks"] = [(0, 0, 0)] * len(before["hooks"])  # those of the watch are off again
    assert same(before, fingerprint(model, engine))


def test_the_buffer_is_a_ring_and_bad_arguments_are_refused():
    model = he(deep(1, nn.ReLU))
    engine = sgd(0.01)(model.parameters())
    with watch(model, engine, every=1, keep=3) as health:
        train(model, engine, 8)
    assert [r["step"] for r in health.rows] == [5, 6, 7]
    assert "nothing read yet" in str(watch(model, engine))
    with pytest.raises(InputError, match="every"):
        watch(model, engine, every=0)
    with pytest.raises(InputError, match="optimizer"):
        watch(model, object())


@pytest.mark.parametrize(
    ("start", "growth", "factor", "words"),
    [(2.0**110, 10_000, 1e9, "overflow"), (1.0, 1, 1.0, "tiny"), (2.0, 10_000, 1.0, "")],
)
@pytest.mark.filterwarnings("ignore:unmoved_parameters", "ignore:unstable_loss_scale")
def test_a_loss_scale_that_runs_away_is_an_alarm(start, growth, factor, words):
    model = he(deep(1, nn.ReLU))
    engine = sgd(1e-35)(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=growth)
    x, y = classes()
    with watch(model, engine, every=1, scaler=scaler) as health:
        for step in range(30):
            engine.zero_grad()
            scaler.scale(CE(model(x), y) * (1.0 if step < 3 else factor)).backward()
            scaler.step(engine)
            scaler.update()
    assert health.failure is None
    assert health.rows[0]["scale"] == start
    assert health.rows[-1]["scale"] in (scaler.get_scale(), scaler.get_scale() / 2)
    assert words in health.alarms.get("unstable_loss_scale", "")
    assert bool(words) == ("unstable_loss_scale" in health.alarms)


def test_nothing_of_a_step_is_kept_alive_by_looking_around():
    model = nn.Linear(4, 1)
    engine, seen = sgd(0.1)(model.parameters()), []
    with watch(model, engine, every=3):
        for _ in range(20):
            x = torch.randn(8, 4)
            seen.append(weakref.ref(x))
            engine.zero_grad()
            loss = model(x).square().mean()
            seen.append(weakref.ref(loss))
            loss.backward()
            engine.step()
    del x, loss
    assert not [ref for ref in seen if ref() is not None]


def test_a_dictionary_of_variables_that_the_user_holds_stays():
    model = nn.Linear(4, 1)
    engine = sgd(0.1)(model.parameters())
    mine = locals()
    with watch(model, engine, every=1):
        model(torch.randn(8, 4)).square().mean().backward()
        engine.step()
    assert mine["model"] is model


class Own(nn.Module):
    """It gives its parameters itself, as networks of fast weights do, and takes no argument."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 16) / 4)])

    def parameters(self):
        return self.weights

    def forward(self, x):
        return x @ self.weights[0].T


def test_a_model_may_give_its_parameters_itself():
    torch.manual_seed(0)
    model = Own()
    engine = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    with watch(model, engine, every=2) as seen:
        for _ in range(10):
            engine.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            engine.step()
    assert not seen.alarms
    assert len(seen.rows) == 5
    found = diagnose(model, (x, y), nn.CrossEntropyLoss(), optimizer=engine, steps=6)
    assert found.record.trainable == 64
