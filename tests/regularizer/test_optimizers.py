"""The table: every optimizer of torch, every implementation, every mode - or a named refusal."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import regression, train

LOSS = regression(dtype=torch.float32)
LOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
OK, LINE_SEARCH, SPARSE = "", "line search", "sparse"

# optimizer -> its implementations on this machine, and what each kind of term does:
# smooth objective, smooth decoupled, prox objective, prox decoupled
TABLE = {
    "SGD": ([LOOP, FOREACH, FUSED], [OK, OK, OK, OK]),
    "Adam": ([LOOP, FOREACH, FUSED], [OK, OK, OK, OK]),
    "AdamW": ([LOOP, FOREACH, FUSED], [OK, OK, OK, OK]),
    "NAdam": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "RAdam": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "Adamax": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "RMSprop": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "Adagrad": ([LOOP, FOREACH, FUSED], [OK, OK, OK, OK]),
    "Adadelta": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "ASGD": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "Rprop": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "Adafactor": ([LOOP, FOREACH], [OK, OK, OK, OK]),
    "Muon": ([{}], [OK, OK, OK, OK]),
    "LBFGS": ([{}], [OK, LINE_SEARCH, LINE_SEARCH, LINE_SEARCH]),
    "SparseAdam": ([{}], [SPARSE, OK, SPARSE, OK]),
}
TERMS = [
    tk.Term(tk.L2(5.0)),
    tk.Term(tk.L2(0.1), how="decoupled"),
    tk.Term(tk.L1(0.1)),
    tk.Term(tk.L1(0.1), how="decoupled"),
]
CASES = [
    (name, implementation, term, verdict)
    for name, (implementations, verdicts) in TABLE.items()
    for implementation in implementations
    for term, verdict in zip(TERMS, verdicts)
]


def build(name, implementation):
    torch.manual_seed(0)
    sparse = name == "SparseAdam"
    model = nn.Embedding(6, 2, sparse=True) if sparse else nn.Linear(6, 2, bias=False)
    options = {"lr": 0.01} | implementation
    if name in ("AdamW", "Adafactor", "Muon"):
        options["weight_decay"] = 0.0
    return model, getattr(optim, name)(model.parameters(), **options)


def one_step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        if isinstance(model, nn.Embedding):
            loss = model(torch.tensor([0, 3])).square().sum()
        else:
            loss = LOSS(model)
        loss.backward()
        return loss

    if isinstance(optimizer, optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize(("name", "implementation", "term", "verdict"), CASES, ids=str)
def test_every_cell_acts_or_refuses_by_name(name, implementation, term, verdict):
    model, optimizer = build(name, implementation)
    plain, alone = build(name, implementation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*decoupled from the metric")
        if verdict:
            with pytest.raises(TypeError, match=verdict):
                tk.regularize(model, optimizer, {"weight": term})
                one_step(model, optimizer)
            return
        tk.regularize(model, optimizer, {"weight": term})
    for _ in range(3):
        one_step(model, optimizer)
        one_step(plain, alone)
    assert torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, plain.weight)
    assert model.weight.detach().norm() < plain.weight.detach().norm() * 1.001


def test_the_table_holds_every_optimizer_of_torch():
    exported = {
        name
        for name, item in vars(optim).items()
        if isinstance(item, type) and issubclass(item, optim.Optimizer) and item != optim.Optimizer
    }
    assert set(TABLE) == exported


def test_implementations_agree():
    for name, (implementations, verdicts) in TABLE.items():
        if verdicts[2] or len(implementations) < 2:
            continue
        results = []
        for implementation in implementations:
            model, optimizer = build(name, implementation)
            tk.regularize(model, optimizer, {"weight": [tk.L1(0.05), tk.L2(0.1)]})
            results.append(train(model, optimizer, 15, LOSS).weight.detach())
        for other in results[1:]:
            torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-6)


def test_capturable_is_refused_by_torch_itself_on_this_device():
    model = nn.Linear(6, 2)
    optimizer = optim.Adam(model.parameters(), capturable=True)
    tk.regularize(model, optimizer, tk.L1(0.1))
    LOSS(model).backward()
    with pytest.raises(AssertionError, match="capturable"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop"])
def test_capturable_on_a_device(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    results = []
    for options in ({}, {"capturable": True}):
        torch.manual_seed(0)
        model = nn.Linear(6, 2, bias=False).cuda()
        optimizer = getattr(optim, name)(model.parameters(), lr=0.01, weight_decay=0.0, **options)
        tk.regularize(model, optimizer, {"weight": [tk.L1(0.05), tk.L2(0.1)]})
        x = torch.randn(32, 6, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        results.append(train(model, optimizer, 15, lambda m, x=x: m(x).square().mean()).weight)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
