"""Every broken loop is named within twenty sampled steps at most, and no healthy one is blamed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import loops_beside
import loops_of_losses
import loops_of_reports
import loops_over_epochs
import loops_over_weights
import tikhon as tk
import training_loops
from tikhon.errors import InputError
from tikhon.languages import fill
from tikhon.monitoring.loss_graph import read_loss_graph
from training_loops import BROKEN, HEALTHY, STEPS, batches, net, sgd, step


def read(loop):
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        health = loop()
    ours = [w for w in said if str(w.message).split(":")[0] in {a.code for a in health.findings}]
    return health, ours


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_loop_is_named(name):
    loop, code = BROKEN[name]
    health, said = read(loop)
    assert set(health.alarms) == {code}, str(health)
    assert [str(w.message) for w in said if code in str(w.message)], "never said aloud"
    homes = (
        training_loops,
        loops_over_weights,
        loops_beside,
        loops_over_epochs,
        loops_of_losses,
        loops_of_reports,
    )
    files = tuple(f"{m.__name__}.py" for m in homes)
    assert all(w.filename.endswith(files) for w in said), "not at the line of the loop"
    alarm = next(a for a in health.findings if a.code == code)
    assert alarm.meaning
    assert alarm.change
    assert 0 <= alarm.step <= 150
    assert str(alarm) in str(health)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_loop_is_left_alone(name):
    health, said = read(HEALTHY[name])
    assert not health.alarms, str(health)
    assert not said
    assert health.step >= 20
    assert health.failure is None


def test_reasons_of_missing_gradients_are_told_apart():
    wanted = {
        "zero_grad_between_backward_and_step": "cleared between the backward pass and the step",
        "zeros_between_backward_and_step": "cleared between the backward pass and the step",
        "step_before_backward_and_cleared": "step comes before the backward pass",
        "loss_rebuilt_from_item": "not connected to the model",
        "loss_that_is_constant": "loss does not depend on them",
    }
    for name, words in wanted.items():
        health, _ = read(BROKEN[name][0])
        assert words in str(health), str(health)
    health, _ = read(BROKEN["loss_on_argmax"][0])
    assert f"{STEPS} steps, no parameter of this optimizer had a gradient" in str(health)


def test_tensors_and_first_steps_are_named():
    health, _ = read(BROKEN["unfrozen_after_the_optimizer"][0])
    alarm = health.findings[0]
    assert alarm.where == ("0.weight", "0.bias")
    assert alarm.step == 30
    health, _ = read(BROKEN["eval_mode_after_the_first_evaluation"][0])
    assert health.findings[0].step == 25
    health, _ = read(BROKEN["one_poisoned_batch"][0])
    assert [spike.step for spike in health.spikes] == [63]


@pytest.mark.parametrize("told", [True, False])
def test_a_spike_is_skipped_and_the_gradients_given_back(told):
    torch.manual_seed(0)
    model = net()
    engine = sgd(model)
    moved, left = [], []
    with tk.watch(model, engine, on_spike="skip") as health, pytest.warns(match="loss_spike"):
        for k, (x, y) in enumerate(batches(40)):
            before = model[0].weight.detach().clone()
            engine.zero_grad()
            loss = nn.functional.cross_entropy(model(x * 300 if k == 30 else x), y)
            loss.backward()
            if told:
                health.loss(loss)
            engine.step()
            moved.append(not torch.equal(before, model[0].weight))
            left.append(model[0].weight.grad is not None)
        health.remove()
    assert [k for k, m in enumerate(moved) if not m] == [30]
    assert all(left)


def test_a_callback_decides_about_a_spike():
    torch.manual_seed(0)
    model, seen = net(), []
    engine = sgd(model)
    with tk.watch(model, engine, on_spike=seen.append) as health, pytest.warns(match="loss_spike"):
        for k, (x, y) in enumerate(batches(40)):
            engine.zero_grad()
            health.loss(nn.functional.cross_entropy(model(x * 300 if k == 30 else x), y))
            nn.functional.cross_entropy(model(x * 300 if k == 30 else x), y).backward()
            engine.step()
        health.remove()
    assert seen[0].step == 30
    assert seen[0].loss > 5 * seen[0].median
    with pytest.raises(InputError, match="on_spike"):
        tk.watch(model, engine, on_spike="stop")


def test_nothing_at_all_is_said():
    model = net()
    with tk.watch(model, sgd(model)) as health:
        pass
    assert "neither the model was called nor the optimizer stepped" in str(health)


def test_a_verdict_says_what_was_found_or_what_was_looked_at():
    health, _ = read(HEALTHY["plain"])
    assert f"no problem found in {STEPS} steps, {STEPS // 5} of them measured" in health.verdict
    assert health.verdict.removeprefix("tikhon watch: ") in str(health)
    assert f"{STEPS} 步中未发现问题" in fill("zh", health.verdict.key, health.verdict.values)
    health, _ = read(BROKEN["adam_without_zero_grad"][0])
    assert f"gradients_not_cleared in {STEPS} steps" in health.verdict
    with tk.watch(net(), sgd(net())) as health:
        assert "none of them measured" in health.verdict
    model = net()
    engine = sgd(model)
    with tk.watch(model, engine, every=50) as health:
        for x, y in batches(1):
            step(model, engine, x, y)
    assert "1 of 1 steps measured, too few to judge (one in 50 steps" in str(health)


def test_a_loop_that_breaks_off_is_not_blamed_for_what_it_lacks():
    model = net()
    with pytest.raises(KeyError), tk.watch(model, sgd(model)) as health:
        model(torch.randn(3, 10))
        raise KeyError
    assert not health.alarms


def test_a_window_of_hooks_leaves_nothing_behind():
    model = net()
    engine = sgd(model)
    with tk.watch(model, engine, every=1):
        for x, y in batches(3):
            step(model, engine, x, y)
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_step_that_calls_its_parents_step_is_one():
    class Counting(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    torch.manual_seed(0)
    model = net()
    engine = Counting(model.parameters(), lr=1e-2)
    with tk.watch(model, engine, every=5) as health:
        for x, y in batches(40):
            step(model, engine, x, y)
    assert health.step == 40
    assert [row["step"] for row in health.rows] == list(range(0, 40, 5))
    assert not health.alarms, str(health)


def test_a_weight_that_is_learned_is_read_without_a_warning():
    scale = torch.tensor(2.0, requires_grad=True)
    outputs = torch.randn(4, 3, requires_grad=True)
    graph = read_loss_graph(nn.functional.mse_loss(outputs, torch.zeros(4, 3)) * scale / scale)
    assert graph.is_positive
