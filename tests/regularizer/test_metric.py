"""Whose gain is known, and that none grows without bound where gradients vanish."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import WITH_GAIN, linear, regression, train

ADAPTIVE = [name for name in WITH_GAIN if "SGD" not in name]
# of the gain, over lr; Adadelta's eps bounds it as that of SGD is, in proportion to the slope
NUMERATOR = {"RMSprop momentum": 1 / (1 - 0.4), "Adadelta": 3.0}
STRENGTH = 0.3
FACTORS = torch.linspace(0, 2, 12, dtype=torch.float64).reshape(4, 3)
PENALTIES = [
    tk.L1(STRENGTH),
    tk.L1(STRENGTH, weights=FACTORS),
    tk.ElasticNet(STRENGTH),
    tk.GroupLasso(STRENGTH),
    tk.GroupLasso(STRENGTH, weights=FACTORS[:, 0], scale_by_size=True),
    tk.SparseGroupLasso(STRENGTH),
    tk.LInf(STRENGTH),
    tk.MCP(STRENGTH),
    tk.SCAD(STRENGTH),
    tk.LogSum(STRENGTH),
]


def attached(name, term, dtype=torch.float64):
    kind, options, _ = WITH_GAIN[name]
    model = linear(dtype=dtype)
    nn.init.uniform_(model.weight, 0.5, 1.0)
    optimizer = kind(model.parameters(), **options)
    tk.regularize(model, optimizer, {"weight": term})
    return model, optimizer


def moves(model, optimizer, gradients):
    """How far each weight goes in each step."""
    for gradient in gradients:
        before = model.weight.detach().clone()
        model.weight.grad = gradient.to(before)
        optimizer.step()
        yield (model.weight.detach() - before).abs()


# every penalty by rows and by columns with Adam, the other rules with two in turn
CELLS = [
    (name, penalty, rows)
    for first, name in enumerate(ADAPTIVE)
    for index, penalty in enumerate(PENALTIES)
    for rows in ("out", "in")
    if name == "Adam" or (first + index) % 5 == 0
    if rows == "out" or getattr(penalty, "weights", None) is None
]


@pytest.mark.parametrize(("name", "penalty", "rows"), CELLS, ids=str)
def test_no_weight_shrinks_by_much_more_than_lr_a_step(name, penalty, rows):
    model, optimizer = attached(name, tk.Term(penalty, rows=rows))
    quiet, seen = torch.zeros(4, 3), torch.zeros(4, 3)
    across = 1 if rows == "out" else 0
    seen.movedim(1 - across, 0)[0] = 1.0
    lr = optimizer.param_groups[0]["lr"] * NUMERATOR.get(name, 1.0)
    for moved in moves(model, optimizer, [seen, seen, quiet, seen, quiet, quiet, seen]):
        if penalty.rows == "out":  # of a row, the root mean square
            moved = moved.square().mean(across, keepdim=True).sqrt()
        never = moved.movedim(1 - across, 0)[1:]
        assert never.max() <= 1.2 * lr
        assert never.max() > 0 or (model.weight.movedim(1 - across, 0)[1:] == 0).all()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_bound_holds_while_a_strength_rises(name):
    model, optimizer = attached(name, tk.Term(tk.L1(), strength=tk.schedules.WarmUp(1.0, steps=5)))
    lr = optimizer.param_groups[0]["lr"] * NUMERATOR.get(name, 1.0)
    for moved in moves(model, optimizer, [torch.zeros(4, 3)] * 8):
        assert moved.max() <= 2.1 * lr


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "RMSprop", "NAdam", "Adamax"])
@pytest.mark.parametrize("term", [tk.L1(1e-5), tk.GroupLasso(1e-4)], ids=str)
def test_rows_of_an_embedding_that_no_batch_held_are_not_erased(name, term):
    torch.manual_seed(0)
    model = nn.Embedding(300, 8)
    options = {"weight_decay": 0.0} if name == "AdamW" else {}
    optimizer = getattr(optim, name)(model.parameters(), lr=1e-3, **options)
    tk.regularize(model, optimizer, {"weight": term})
    before = model.weight[200:].norm().item()
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randint(0, 200, (16,))).square().mean().backward()
        optimizer.step()
    assert 0.97 * before < model.weight[200:].norm().item() < before


BY_WEIGHT, BY_ROW = tk.ElasticNet(0.4, l1_ratio=0.6), tk.GroupLasso(0.4)


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        *(("Adam", BY_WEIGHT), ("RMSprop", BY_ROW)),
        *(("Adagrad", BY_WEIGHT), ("RMSprop centered", BY_ROW)),
    ],
    ids=str,
)
def test_the_bound_leaves_the_minimum_where_it_is(name, penalty):
    """Against SGD: at zeros, and where the net is steep, gradients are below the strength."""
    torch.testing.assert_close(minimum(name, penalty), minimum("SGD", penalty), rtol=0, atol=1e-6)


@cache
def minimum(kind, penalty):
    loss = regression()
    make, options, _ = WITH_GAIN[kind]
    faster = {"SGD": 1, "Adagrad": 40}.get(kind, 5)
    model = nn.Linear(6, 2, bias=False).double()
    optimizer = make(model.parameters(), **options | {"lr": options["lr"] * faster})
    tk.regularize(model, optimizer, {"weight": tk.Term(penalty, rows=penalty.rows)})
    train(model, optimizer, 250, loss)
    for _ in range(250):
        train(model, optimizer, 1, loss)
        optimizer.param_groups[0]["lr"] *= 1.0 if kind == "SGD" else 0.96
    return model.weight.detach()


def test_where_gradients_are_larger_the_optimizer_is_what_it_was():
    results = []
    for strength in (0.0, 1e-12):
        model, optimizer = attached("Adam", tk.L1(strength))
        gradients = torch.Generator().manual_seed(1)
        for _ in moves(model, optimizer, [torch.randn(4, 3, generator=gradients)] * 5):
            pass
        results.append(optimizer.state[model.weight]["exp_avg_sq"])
    assert torch.equal(*results)


class Doubling(optim.Optimizer):
    """Twice the step of SGD."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=2 * group["lr"])


def test_an_optimizer_of_ones_own_registers_its_gain():
    model = nn.Linear(6, 2, bias=False).double()
    with pytest.raises(TypeError, match=r"NuclearNorm.*Doubling has no.*register_gain"):
        tk.regularize(model, Doubling(model.parameters()), tk.NuclearNorm(0.1))
    tk.register_gain(Doubling, lambda optimizer, group, state: 2 * group["lr"], uniform=True)
    for penalty in (tk.L1(0.1), tk.NuclearNorm(0.1)):
        results = []
        for make in (Doubling, lambda params: optim.SGD(params, lr=0.2)):
            torch.manual_seed(0)
            model = nn.Linear(6, 2, bias=False).double()
            optimizer = make(model.parameters())
            reg = tk.regularize(model, optimizer, penalty)
            assert reg.audit()["weight"].route == ("prox",)
            results.append(train(model, optimizer, 100, regression()).weight.detach())
        torch.testing.assert_close(*results)


def test_a_registered_gain_may_be_a_tensor():
    class Scaled(Doubling):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad * self.scale(p))

        def scale(self, p):
            return torch.linspace(0.1, 0.3, p.numel()).to(p).reshape(p.shape)

    tk.register_gain(Scaled, lambda optimizer, group, state: optimizer.scale(model.weight))
    results = []
    for make in (Scaled, lambda params: optim.SGD(params, lr=0.2)):
        model = nn.Linear(6, 2, bias=False).double()
        optimizer = make(model.parameters())
        term = tk.Term(tk.GroupLasso(0.5), rows="in")
        tk.regularize(model, optimizer, {"weight": term})
        results.append(train(model, optimizer, 500, regression()).weight.detach())
    torch.testing.assert_close(*results)


def test_register_gain_takes_classes_of_optimizers():
    with pytest.raises(TypeError, match=r"class of optimizers, received 3"):
        tk.register_gain(3, lambda optimizer, group, state: 1.0)


def test_objective_l2_moves_bfloat16_weights_by_the_exact_factor():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    before = model.weight.detach().float().norm()
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    tk.regularize(model, optimizer, tk.L2(0.1))
    for _ in range(1500):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    assert abs(model.weight.detach().float().norm() / before - (1 - 2e-4) ** 1500) < 3e-3


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {"betas": (0.9, 0.0)}) for kind in (torch.optim.Adam, torch.optim.Adamax)]
    + [(torch.optim.RMSprop, {"alpha": 0.0})],
)
def test_a_metric_without_memory_is_refused(kind, options):
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    with pytest.raises(
        TypeError, match=f"in the metric of {kind.__name__}, which with a decay of"
    ):
        tk.regularize(model, optimizer, tk.L1(0.1))
    reg = tk.regularize(model, optimizer, tk.L2(0.1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert reg.steps == 1
