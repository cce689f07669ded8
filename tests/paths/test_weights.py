"""Paths of all weights of a network against separate trainings, and the laws of their choice."""

from __future__ import annotations

import copy
import itertools
from functools import cache

import pytest
import torch
from torch import nn

from tikhon.compaction import compact
from tikhon.errors import InputError
from tikhon.models.mlp import MLP
from tikhon.paths import networks
from tikhon.paths.path import path
from tikhon.penalties import L1, MCP, SCAD, GroupLasso, Hierarchical, LogSum, NuclearNorm
from tikhon.regularizer.regularizer import regularize
from tikhon.runs.interrupt import Stopped
from tikhon.training.fit import fit

EPOCHS, LR = 40, 3e-3


@cache
def circles():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 6, generator=generator)
    return x, (x[:, 0] ** 2 + x[:, 1] ** 2 > 1.4).long()


def parts():
    x, y = circles()
    return (x[:200], y[:200]), (x[200:], y[200:])


def build():
    return MLP([6, 24, 2])


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


@cache
def followed(penalty, debias=False):
    train, valid = parts()
    options = {"epochs": EPOCHS, "lr": LR, "debias": debias}
    return path(build, train, penalty, of="weights", valid=valid, **options)


L1_PATH, ROWS = L1(), GroupLasso()


def objective(model, penalty):
    x, y = parts()[0]
    with torch.no_grad():
        value = nn.functional.cross_entropy(model.eval()(x), y)
        return float(value + sum(penalty.value(w) for w in matrices(model)))


def trained_apart(penalty):
    torch.manual_seed(0)
    model, (x, y) = build(), parts()[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    regularize(model, optimizer, penalty)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize(("penalty", "index"), [(L1_PATH, 60), (ROWS, 80)])
def test_objectives_are_at_most_one_percent_above_those_of_separate_trainings(penalty, index):
    result = followed(penalty)
    at = penalty.with_strength(result.strengths[index])
    assert objective(result.model(index), at) <= 1.01 * objective(trained_apart(at), at)


def test_no_network_of_the_path_has_a_lower_objective_at_the_strength_of_another():
    result = path(build, parts()[0], L1(), of="weights", epochs=20, lr=LR, strengths=30)
    losses, sums = (
        torch.tensor([objective(result.model(k), L1(strength)) for k in range(30)])
        for strength in (0.0, 1.0)
    )
    for index in range(1, 29):
        objectives = losses + result.strengths[index] * (sums - losses)
        assert objectives[index] <= 1.001 * objectives.min()


def test_strength_0_is_the_network_that_fit_trains():
    torch.manual_seed(0)
    model = build()
    fit(model, parts()[0], epochs=EPOCHS, lr=LR)
    assert all(map(torch.equal, followed(L1_PATH).states[0].values(), model.state_dict().values()))


def test_a_network_in_float64_is_followed_in_float64():
    def build_double():
        return build().double()

    (x, y), options = parts()[0], {"epochs": 2, "lr": LR}
    result = path(build_double, (x, y), L1(), of="weights", strengths=[0.1], **options)
    torch.manual_seed(0)
    model = build_double()
    fit(model, (x.double(), y), **options)
    assert all(map(torch.equal, result.states[0].values(), model.state_dict().values()))


def test_a_skip_connection_has_the_type_of_its_network():
    x = parts()[0][0].double()
    with_skip, _ = networks._with_skip(lambda: build().double(), Hierarchical(), x)
    assert with_skip()(x).dtype == torch.float64


def test_zeros_are_exact_and_counted_from_dense_to_empty():
    result = followed(L1_PATH)
    assert len(result.strengths) == 100 and list(result.strengths) == sorted(result.strengths)
    for index in (0, 50, 99):
        weights = matrices(result.model(index))
        assert result.counts[index] == sum(int(w.count_nonzero()) for w in weights)
        left = [float((w != 0).double().mean()) for w in weights]
        assert result.importances[index].tolist() == left
    assert result.counts[0] == 6 * 24 + 24 * 2 and result.counts[-1] == 0
    assert len(set(result.counts)) > 4


def test_the_penalty_never_grows_with_a_strength_above_0():
    result = followed(L1_PATH)
    models = [result.model(k) for k in range(1, 100)]
    values = [sum(float(w.detach().abs().sum()) for w in matrices(model)) for model in models]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(values))


def test_the_empty_network_at_the_end_predicts_the_shares_of_the_classes():
    x, y = parts()[0]
    shares = followed(L1_PATH).model(99)(x[:1]).softmax(1)[0]
    assert torch.allclose(shares, torch.bincount(y) / len(y), atol=1e-3)


def test_under_a_group_penalty_whole_rows_are_zero_and_compact_removes_them():
    result = followed(ROWS)
    index = next(k for k, count in enumerate(result.counts) if 0 < count < 120)
    model, x = result.model(index), circles()[0]
    first = matrices(model)[0]
    dead = (first == 0).all(1)
    assert dead.any() and torch.equal(dead[:, None].expand_as(first), first == 0)
    small = compact(model, x[:2])
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_scores_are_validation_losses_and_accuracies_with_their_errors():
    result, (x, y) = followed(L1_PATH), parts()[1]
    k = result.chosen
    output = result.model(k)(x).detach()
    right = (output.argmax(1) == y).double()
    losses = nn.functional.cross_entropy(output, y, reduction="none")
    assert result.scores[k] == pytest.approx(float(losses.mean()))
    assert result.accuracies[k] == pytest.approx((float(right.mean()), float(right.std() / 10)))
    assert result.counts[k] <= result.counts[result.best] and result.accuracies[k][0] > 0.85


def test_refits_keep_the_zeros_and_learn_on():
    result, refitted = followed(L1_PATH), followed(L1_PATH, debias=True)
    assert torch.equal(result.supports, refitted.supports)
    for index in (0, 60, 80):
        zero = [w == 0 for w in matrices(result.model(index))]
        later = [w == 0 for w in matrices(refitted.model(index))]
        assert all(bool(b[a].all()) for a, b in zip(zero, later))
    sparse = [k for k, count in enumerate(result.counts) if 0 < count < 60]
    assert min(refitted.scores[k] for k in sparse) < min(result.scores[k] for k in sparse)


def test_numbers_and_a_penalty_that_is_not_convex():
    x, _ = circles()
    y = x[:, 0] * x[:, 1] + 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    options = {"epochs": 20, "lr": LR, "strengths": [1e-3, 0.01, 10.0]}
    result = path(lambda: MLP([6, 24, 1]), (x, y[:, None]), LogSum(), of="weights", **options)
    assert result.strengths == (0.0, 1e-3, 0.01, 10.0) and result.accuracies == ()
    assert result.counts[0] > result.counts[1] > result.counts[3] == 0
    assert result.model(3)(x[:1]).item() == pytest.approx(float(y.mean()), abs=1e-3)


def test_the_knee_is_the_corner_of_a_curve_that_has_one():
    from dataclasses import replace

    supports = torch.tril(torch.ones(100, 100)).bool()  # 1 to 100 weights
    losses = tuple(1.0 if count < 10 else 0.1 - count / 1e4 for count in range(1, 101))
    result = replace(followed(L1_PATH), supports=supports, scores=losses, errors=(0.0,) * 100)
    assert result.counts[result.knee] == 10


def test_a_plot_marks_the_choices():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    above, below = followed(L1_PATH).plot().axes_
    labels = {text.get_text() for text in above.get_legend().get_texts()}
    assert {"dense", "best", "one SE", "knee", "one standard error"} <= labels
    assert "accuracy" in above.get_ylabel() and len(below.lines) == 2
    assert "weights" in followed(L1_PATH)._repr_html_()
    matplotlib.pyplot.close("all")


class Constant(nn.Module):
    """A network whose weights cannot change its outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 2), nn.Linear(2, 2)

    def forward(self, x):
        return 0 * self.last(self.first(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": MCP()}, "proportional to its strength"),
        ({"penalty": SCAD()}, "proportional to its strength"),
        ({"penalty": Hierarchical()}, "single weights or rows"),
        ({"penalty": NuclearNorm()}, "single weights or rows"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"epochs": 1, "batch_size": 10**6}, "the epochs give 1 steps"),
        ({"of": "features", "epochs": 3}, "epochs, lr and batch_size are for of='weights'"),
        ({"strengths": 1}, "needs 2 or more"),
        ({"lr": 1e30}, "lower lr"),
        ({"folds": 3}, "are for linear models"),
        ({"of": "layers"}, "did you mean|features"),
        ({"build_model": None}, "of='weights' is for networks"),
        ({"build_model": build()}, "build a fresh model each time"),
        ({"build_model": int}, "must return a torch module, it returned 0"),
        ({"build_model": Constant}, "learned nothing|no penalised weight"),
        ({"build_model": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6))}, "match"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(arguments, message):
    given = {"build_model": build, "penalty": L1(), "of": "weights", "epochs": 20, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        path(given.pop("build_model"), parts()[0], given.pop("penalty"), **given)


def test_a_builder_of_one_model_and_one_of_lazy_layers_are_followed_as_fresh_ones_are():
    def lazy():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))

    torch.manual_seed(0)
    shared, (x, y) = MLP([6, 8, 2]), parts()[0]
    before = copy.deepcopy(shared)
    options = {"of": "weights", "epochs": 2, "lr": LR, "strengths": 4}
    one, fresh = (
        path(build, (x, y), L1(), **options)
        for build in (lambda: shared, lambda: copy.deepcopy(before))
    )
    for index in range(4):
        pairs = zip(one.model(index).parameters(), fresh.model(index).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert one.model(0) is not one.model(1)
    assert path(lazy, (x, y), L1(), **options).counts[0] == 6 * 8 + 8 * 2


def test_a_sweep_of_few_steps_gives_fewer_strengths_and_says_so():
    options = {"of": "weights", "epochs": 20, "lr": LR}
    with pytest.warns(UserWarning, match="104 strengths instead of 500: its sweep has no more"):
        found = path(build, parts()[0], L1(), strengths=500, **options)
    assert len(found.strengths) == 104


@pytest.mark.parametrize("debias", [False, True])
def test_a_path_stopped_again_and_again_ends_as_if_it_never_was(tmp_path, debias):
    train, valid = parts()
    options = {"of": "weights", "valid": valid, "epochs": 12, "lr": LR, "strengths": 9}
    options["debias"] = debias
    whole, stops, done = path(build, train, L1(), **options), 0, []
    while True:
        calls = itertools.count(1)
        try:
            result = path(
                build, train, L1(), **options, output=tmp_path / "run", resume=stops > 0,
                stop=lambda calls=calls: next(calls) > 43, on_progress=done.append,
            )  # fmt: skip
            break
        except Stopped:
            stops += 1
    assert stops >= 2 and done == sorted(done) and done[-1] == 1.0
    assert {**result.to_dict(), "seconds": 0} == {**whole.to_dict(), "seconds": 0}
    for a, b in zip(result.states, whole.states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    with pytest.raises(InputError, match="different epochs"):
        path(build, train, L1(), **options | {"epochs": 13}, output=tmp_path / "run", resume=True)


def test_a_path_resumed_in_its_refit_sweeps_no_further(tmp_path):
    options = {"of": "weights", "epochs": 100, "batch_size": 200, "lr": 0.05, "strengths": 3}
    options |= {"debias": True, "output": tmp_path}
    train, steps, shares = parts()[0], [], []

    def step(stop):
        steps.append(stop)
        return stop

    def follow(stop, **more):
        steps.clear()
        path(lambda: MLP([6, 3, 2]), train, ROWS, **options, **more, stop=lambda: step(stop()))

    with pytest.raises(Stopped):
        follow(lambda: 1.0 in shares, on_progress=shares.append)
    assert len(steps) < 1 + 230  # the sweep emptied the network before its last step
    follow(lambda: False, resume=True)
    assert len(steps) == networks.REFIT_STEPS
