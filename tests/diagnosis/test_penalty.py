"""Penalties and clipping in a diagnosis are those of the user's own program."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import tikhon as tk
from faulty import CE, adam, classes, deep, he, sgd
from tikhon.data.batches import order


def run(penalty=None, optimizer=None, **options):
    torch.manual_seed(0)
    model = he(deep(2, nn.ReLU, 32))
    engine = (optimizer or adam(0.01))(model.parameters())
    return tk.diagnose(
        model, classes(), CE, optimizer=engine, steps=40, penalty=penalty, **options
    )


def trained(model, engine, loss, steps, penalty=lambda parameters: 0.0):
    """The losses of the user's own loop, without the penalty that it adds to them."""
    x, y = classes()
    batches = (
        rows
        for epoch in itertools.count()
        for rows in order(len(x), seed=0, epoch=epoch).split(64)
    )
    losses = []
    for rows in itertools.islice(batches, steps):
        engine.zero_grad()
        value = loss(model(x[rows]), y[rows])
        (value + penalty(model.parameters())).backward()
        engine.step()
        losses.append(float(value.detach()))
    return losses


TERMS = [
    tk.L2(20.0),
    tk.L1(1.0),
    tk.Term(tk.L2(30.0), how="decoupled"),
    {"*.weight": tk.GroupLasso(3)},
]


@pytest.mark.parametrize("term", TERMS, ids=["L2", "L1", "decoupled L2", "GroupLasso"])
def test_terms_that_outweigh_the_data_are_named(term):
    found = run(term)
    finding = next(f for f in found.findings if f.code == "underfitting")
    assert "penalty" in finding.why
    assert finding.evidence["penalty_share"] > 0.6


def test_small_terms_are_measured_and_left_alone():
    found = run(tk.L2(1e-3))
    shares = [r.penalty for r in found.record.probes[1].readings if r.penalty is not None]
    assert shares
    assert max(shares) < 0.1
    assert found.ok, str(found)


def test_a_callable_gives_the_share_of_its_gradient():
    found = run(lambda m: 1e-3 * sum(p.square().sum() for p in m.parameters()))
    first = found.record.probes[0].readings
    shares = [r.penalty for r in first if r.penalty is not None]
    assert len(shares) == 3
    assert 0 < max(shares) < 0.2


def test_terms_train_as_regularize_does():
    found = run({"*.weight": tk.L1(1e-2)}, sgd(0.1))
    torch.manual_seed(0)
    model = he(deep(2, nn.ReLU, 32))
    engine = sgd(0.1)(model.parameters())
    tk.regularize(model, engine, {"*.weight": tk.L1(1e-2)})
    losses = trained(model, engine, CE, 40)
    assert found.record.losses == pytest.approx(losses, rel=1e-5)


def test_clipping_is_the_users_and_its_share_of_slowness_is_seen():
    free, clipped = run(optimizer=sgd(0.1)), run(optimizer=sgd(0.1), clip=1e-4)
    assert free.ok, str(free)
    assert clipped.record.optimizer["clip"] == 1e-4
    assert "slow_convergence" in clipped.labels
    moved = [p.readings[0].update for p in clipped.record.probes if p.readings[0].update]
    assert max(moved) < 1e-4


NORMS = {
    "L1": lambda parameters: sum(p.abs().sum() for p in parameters),
    "L2": lambda parameters: sum(p.square().sum() for p in parameters),
    "group": lambda parameters: sum(p.norm() for p in parameters),
    "elastic net": lambda parameters: sum((p.abs() + p * p).sum() for p in parameters),
}


class Criterion(nn.Module):
    def __init__(self, model, penalty):
        super().__init__()
        self.model, self.penalty, self.ce = [model], penalty, nn.CrossEntropyLoss()

    def forward(self, output, target):
        return self.ce(output, target) + self.penalty(self.model[0].parameters())


class Owning(nn.Module):
    """A model whose training step adds the penalty."""

    def __init__(self, model, penalty):
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        return CE(self(batch[0]), batch[1]) + self.penalty(self.parameters())


def by_hand(model, batch):
    log = model(batch[0]).log_softmax(1)
    return -log.gather(1, batch[1][:, None]).mean()


# how people write it: model and penalty of parameters -> loss
WRITTEN = {
    "output and target": lambda m, f: lambda o, t: CE(o, t) + f(m.parameters()),
    "a list of parameters": lambda m, f: (
        lambda o, t, own=list(m.parameters()): CE(o, t) + f(own)  # noqa: B008
    ),
    "a criterion": Criterion,
    "model and batch": lambda m, f: (
        lambda model, batch: CE(model(batch[0]), batch[1]) + f(model.parameters())
    ),
    "by hand": lambda m, f: lambda model, batch: by_hand(model, batch) + f(model.parameters()),
    "two parts": lambda m, f: (
        lambda model, batch: (
            0.5 * CE(model(batch[0]), batch[1])
            + 0.5 * by_hand(model, batch)
            + f(model.parameters())
        )
    ),
    "the model's own": None,
}


def written(name, penalty):
    """The model, and the loss that a diagnosis is given."""
    torch.manual_seed(0)
    model = he(deep(1, nn.ReLU, 32))
    return (
        (Owning(model, penalty), None)
        if WRITTEN[name] is None
        else (model, WRITTEN[name](model, penalty))
    )


# what is added is found in every way of writing, whatever its norm: each way with one norm, one
# way with each
CELLS = [(name, "L1") for name in WRITTEN] + [("a criterion", norm) for norm in NORMS]


@pytest.mark.parametrize(("name", "norm"), dict.fromkeys(CELLS))
def test_a_penalty_in_the_loss_trains_the_copy_and_is_no_part_of_its_losses(name, norm):
    penalty = lambda parameters: 3e-3 * NORMS[norm](list(parameters))  # noqa: E731
    model, loss = written(name, penalty)
    before = [(p.detach().clone(), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    engine = sgd(0.1)(model.parameters())
    found = tk.diagnose(model, classes(), loss, optimizer=engine, steps=8)
    for parameter, (value, address, required) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None and parameter.requires_grad == required
        assert parameter.data_ptr() == address and torch.equal(parameter, value)
    losses = trained(model, engine, CE, 8, penalty)
    assert found.record.losses == pytest.approx(losses, rel=1e-4)
    assert any(r.penalty for r in found.record.probes[0].readings)


@pytest.mark.parametrize("name", ["output and target", "model and batch", "by hand"])
def test_a_penalty_in_the_loss_that_outweighs_the_data_is_named(name):
    model, loss = written(name, lambda parameters: NORMS["L1"](list(parameters)))
    engine = adam(0.01)(model.parameters())
    found = tk.diagnose(model, classes(), loss, optimizer=engine, steps=30)
    finding = next(f for f in found.findings if f.code == "underfitting")
    assert finding.severity == "critical" and "penalty" in finding.why
    assert finding.evidence["penalty_share"] > 0.6
    if name == "by hand":  # no torch loss to compare with a constant
        assert "ends with a loss of" in finding.why
    else:
        assert finding.evidence["undecayed"] > finding.evidence["learned"] + 0.3


def anchored(model):
    start = [p.detach().clone() for p in model.parameters()]
    return lambda o, t: (
        CE(o, t)
        + sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))
    )


def test_a_loss_that_reads_the_weights_otherwise_reads_those_of_the_copy():
    torch.manual_seed(0)
    model = he(deep(1, nn.ReLU, 32))
    engine, loss = sgd(0.05)(model.parameters()), anchored(model)
    found = tk.diagnose(model, classes(), loss, optimizer=engine, steps=6)
    losses = trained(model, engine, loss, 6)
    assert found.record.losses == pytest.approx(losses, rel=1e-4)


def test_what_depends_on_the_rows_stays_in_the_loss():
    torch.manual_seed(0)
    model = he(deep(1, nn.ReLU, 32))

    def loss(model, batch):
        hidden = model[1](model[0](batch[0]))
        return CE(model[2](hidden), batch[1]) + 1e-3 * hidden.abs().sum(1).mean()

    x, y = classes()
    rows = order(len(x), seed=0, epoch=0)[:64]
    expected = float(loss(model, (x[rows], y[rows])).detach())
    engine = sgd(0.1)(model.parameters())
    found = tk.diagnose(model, (x, y), loss, optimizer=engine, steps=3)
    assert found.record.losses[0] == pytest.approx(expected, rel=1e-5)
    assert all(r.penalty is None for r in found.record.probes[0].readings)
