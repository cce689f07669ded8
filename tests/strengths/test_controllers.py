"""TargetSparsity reaches its share, NormBound keeps its bound; both on short CPU runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from tikhon.regularizer.controller import Controller


def problem(make, term, steps=150, seed=0, how="objective"):
    """A classifier with noisy batches, its first layer under `term`."""
    torch.manual_seed(seed)
    x = torch.randn(256, 40)
    y = (x[:, :4] @ torch.randn(4, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 3))
    optimizer = make(model.parameters())
    reg = tk.regularize(model, optimizer, {"0.weight": term}, how=how)
    sizes = []
    for step in range(steps):
        batch = torch.arange(32 * step, 32 * step + 32) % 256
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        sizes.append(float(model[0].weight.detach().square().mean().sqrt()))
    accuracy = float((model(x).argmax(1) == y).float().mean())
    return reg, sizes, accuracy


def sgd(params):
    return optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params):
    return optim.AdamW(params, lr=0.01, weight_decay=0.0)


@pytest.mark.parametrize(
    ("make", "penalty", "target"),
    [
        (sgd, tk.L1(), 0.5),
        (adam, tk.L1(), 0.95),
        (adam, tk.MCP(), 0.8),
        (sgd, tk.Term(tk.GroupLasso(), rows="in"), 0.8),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                (adam, tk.ElasticNet(), 0.8),
                (adam, tk.GroupLasso(), 0.5),
                (sgd, tk.GroupLasso(), 0.95),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_target_sparsity_is_reached_within_one_percent(make, penalty, target):
    rows = penalty.rows if isinstance(penalty, tk.Term) else None
    penalty = penalty.penalty if isinstance(penalty, tk.Term) else penalty
    term = tk.Term(penalty, rows=rows, strength=tk.TargetSparsity(target, steps=80))
    reg, _, accuracy = problem(make, term)
    assert reg.sparsity()["0.weight"] == pytest.approx(target, abs=0.01)
    assert accuracy > 0.75 or target > 0.9


def test_target_sparsity_counts_rows_where_rows_go_as_a_whole():
    torch.manual_seed(0)
    model = nn.Linear(100, 40)
    with torch.no_grad():
        model.weight[:20] = 0  # dead units: half of every column
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    term = tk.Term(tk.GroupLasso(), rows="in", strength=tk.TargetSparsity(0.7, steps=1))
    tk.regularize(model, optimizer, {"weight": term})
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert int((model.weight == 0).all(0).sum()) == 70


@pytest.mark.parametrize("penalty", [tk.L1(), tk.GroupLasso()], ids=repr)
def test_target_sparsity_makes_zeros_of_weights_that_are_next_to_nothing(penalty):
    model = nn.Linear(6, 10, bias=False)
    with torch.no_grad():
        model.weight[:5] = 1e-16
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    term = tk.Term(penalty, strength=tk.TargetSparsity(0.5, steps=1))
    reg = tk.regularize(model, optimizer, term)
    model.weight.grad = torch.zeros_like(model.weight)
    for _ in range(2):  # the second time there is nothing left to do
        optimizer.step()
        assert reg.sparsity() == {"weight": 0.5}
    assert reg.strengths() == {f"weight/{type(penalty).__name__}": 0.0}


def test_target_sparsity_counts_all_parameters_of_a_term_or_each():
    for per in ("term", "layer"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 20))
        with torch.no_grad():
            model[0].weight.mul_(10)
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        strength = tk.TargetSparsity(0.5, steps=1, per=per)
        reg = tk.regularize(model, optimizer, tk.L1(strength))
        model(torch.randn(8, 50)).square().mean().backward()
        optimizer.step()
        zeros = reg.sparsity()
        together = (2000 * zeros["0.weight"] + 800 * zeros["1.weight"]) / 2800
        if per == "term":
            assert together == pytest.approx(0.5, abs=0.01)
            assert abs(zeros["0.weight"] - zeros["1.weight"]) > 0.1
            assert len(set(reg.strengths().values())) == 1
        else:
            assert zeros == pytest.approx({"0.weight": 0.5, "1.weight": 0.5}, abs=0.01)


def test_target_sparsity_counts_a_sample_of_large_weights():
    torch.manual_seed(0)
    model = nn.Linear(1000, 300, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for penalty in (tk.L1(), tk.GroupLasso()):
        nn.init.normal_(model.weight)
        strength = tk.TargetSparsity(0.8, steps=1)
        with tk.regularize(model, optimizer, tk.Term(penalty, strength=strength)) as reg:
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
            assert reg.sparsity()["weight"] == pytest.approx(0.8, abs=0.01)


def test_the_ramp_of_target_sparsity_is_cubic():
    reg, _, _ = problem(adam, tk.L1(tk.TargetSparsity(0.8, steps=100)), steps=50)
    assert reg.sparsity()["0.weight"] == pytest.approx(0.8 * (1 - 0.5**3), abs=0.01)


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("how", ["objective", "decoupled"])
def test_norm_bound_keeps_the_size_without_jumps(make, how):
    free = problem(make, tk.L2(0.0), steps=300, how=how)[1][-1]
    bound = 0.6 * free
    _, sizes, _ = problem(make, tk.L2(tk.NormBound(bound)), steps=300, how=how)
    assert sizes[-1] == pytest.approx(bound, rel=0.05)
    assert max(sizes[-100:]) < 1.06 * bound
    decays = [b / a for a, b in pairwise(sizes)]
    assert min(decays) > 0.5


@pytest.mark.parametrize("make", [sgd, adam])
def test_norm_bound_that_does_not_bind_leaves_the_plain_run(make):
    plain = problem(make, tk.L2(0.0), how="decoupled")[1]
    reg, sizes, _ = problem(make, tk.L2(tk.NormBound(100.0)), how="decoupled")
    assert sizes == plain
    assert reg.strengths() == {"0.weight/L2": 0.0}


def test_norm_bound_means_the_same_for_every_lr():
    """Its unit is the share removed by a step: ten times the lr, a tenth of the strength."""
    removed = []
    for lr in (0.01, 0.1):
        model = nn.Linear(4, 4, bias=False)
        nn.init.constant_(model.weight, 1.0)
        optimizer = optim.SGD(model.parameters(), lr=lr)
        reg = tk.regularize(model, optimizer, tk.L2(tk.NormBound(0.5)))
        model.weight.grad = torch.zeros_like(model.weight)
        for _ in range(5):
            optimizer.step()
        removed.append((lr * reg.strengths()["weight/L2"], model.weight.detach().clone()))
    assert removed[0][0] == pytest.approx(removed[1][0])
    torch.testing.assert_close(removed[0][1], removed[1][1])


@pytest.mark.parametrize(("at", "step"), [(0, 1), (25, 26), ("inflection", None)])
def test_norm_bound_takes_the_size_at_a_step(at, step):
    strength = tk.NormBound(at=at, factor=1.0, interval=5)
    reg, sizes, _ = problem(adam, tk.L2(strength), steps=200, how="decoupled")
    (memory,) = reg.state_dict()["memory"].values()
    assert memory["set_at"] == (step or memory["set_at"])
    assert memory["bound"] == pytest.approx(sizes[memory["set_at"] - 1])
    assert memory["set_at"] < 100
    assert sizes[-1] < 1.1 * memory["bound"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tk.TargetSparsity(1.0), r"target must be in \[0, 1\), received 1.0"),
        (lambda: tk.TargetSparsity(0.5, steps=0), "steps must be at least 1, received 0"),
        (lambda: tk.TargetSparsity(0.5, per="row"), "per must be 'term', 'layer' or 'group'"),
        (lambda: tk.NormBound(0.0), "bound must be > 0 or None, received 0.0"),
        (lambda: tk.NormBound(at=-1), "at must be a step >= 0"),
        (lambda: tk.NormBound(factor=0.0), "factor"),
        (lambda: tk.NormBound(interval=0), "interval"),
    ],
)
def test_refuses_with_name_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_norm_bound_of_an_l1_norm_points_to_the_constraint():
    with pytest.raises(TypeError, match=r"received L1; .*L1Ball"):
        problem(sgd, tk.L1(tk.NormBound(0.1)), steps=1)


class Recorder(Controller):
    """Keeps what it was shown."""

    start = 0.25
    per = "layer"
    needs_before = True

    def __init__(self):
        self.seen = []

    def next(self, strength, observation, step):
        self.seen.append((strength, observation.readings, step))
        observation.memory["calls"] = observation.memory.get("calls", 0) + 1
        return strength / 2


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.filterwarnings("ignore:.*decoupled from the metric")
def test_what_a_controller_sees(make):
    for how in ("objective", "decoupled"):
        recorder = Recorder()
        torch.manual_seed(0)
        model = nn.Linear(5, 3, bias=False)
        optimizer = make(model.parameters())
        reg = tk.regularize(model, optimizer, tk.GroupLasso(recorder), how=how)
        before = model.weight.detach().clone()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        ((strength, (reading,), step),) = recorder.seen
        assert (strength, step, reading.how, reading.name) == (0.25, 1, how, "weight")
        assert reading.penalty.strength == 0.25
        assert torch.equal(reading.before, before)
        assert torch.equal(reading.weights, model.weight.detach())
        lr = optimizer.param_groups[0]["lr"]
        expected = {"objective": 10 * lr if make is sgd else lr, "decoupled": lr}[how]
        assert reading.rate == pytest.approx(expected)
        if how == "objective" and make is adam:
            assert reading.gain.shape == reading.weights.shape
        assert reg.strengths() == {"weight/GroupLasso": 0.125}
        assert reg.state_dict()["memory"] == {"weight/GroupLasso": {"calls": 1}}
