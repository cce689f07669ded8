"""The in-place kernels against the proxes and gradients that they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from tikhon import penalties as tk
from tikhon.penalties import kernels

PENALTIES = [
    tk.L1(0.3),
    tk.ElasticNet(0.3, l1_ratio=0.4),
    tk.GroupLasso(2.0),
    tk.GroupLasso(0.1, scale_by_size=True),
]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)  # several blocks and a remainder
    before = kernels.compile_from(math.inf)
    yield
    kernels.compile_from(before)


def weights(dtype=torch.float32, shape=(37, 11)):
    source = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for _ in range(3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_prox_in_place_is_the_prox(penalty, dtype):
    w, _, _ = weights(dtype)
    expected = penalty.prox(w, 0.9)
    assert kernels.prox_(penalty, w, 0.9)
    torch.testing.assert_close(w, expected)
    assert torch.equal(w == 0, expected == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_prox_in_place_in_a_metric_is_the_prox(penalty, dtype):
    w, moment, _ = weights(dtype)
    moment.square_()
    expected = penalty.prox(w, 0.3 / (moment.sqrt() / 0.7 + 0.1))
    assert kernels.prox_(penalty, w, 0.3, moment=moment, scale=0.7, eps=0.1)
    torch.testing.assert_close(w, expected)
    assert torch.equal(w == 0, expected == 0)


@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.L2(0.3), tk.ElasticNet(0.3)], ids=repr)
def test_gradient_in_place_is_the_gradient(penalty):
    w, gradient, _ = weights()
    expected = gradient + penalty.grad(w)
    assert kernels.add_gradient_(penalty, gradient, w)
    torch.testing.assert_close(gradient, expected)


def test_parameters_are_changed_without_a_graph():
    w = torch.nn.Parameter(torch.tensor([3.0, -0.5]))
    assert kernels.prox_(tk.L1(1.0), w, 1.0)
    assert w.tolist() == [2.0, 0.0] and w.is_leaf


def test_strength_zero_leaves_every_bit():
    w, moment, _ = weights()
    before = w.clone()
    for penalty in (tk.L1(0.0), tk.ElasticNet(0.0), tk.GroupLasso(0.0)):
        kernels.prox_(penalty, w, 0.5)
        kernels.prox_(penalty, w, 0.5, moment=moment.square(), eps=1e-8)
    assert torch.equal(w, before)


class Derived(tk.L1):
    """A subclass may change the prox, so it has no kernel."""


@pytest.mark.parametrize(
    ("penalty", "change"),
    [
        (tk.MCP(0.3), lambda w: w),
        (Derived(0.3), lambda w: w),
        (tk.L1(0.3, weights=torch.ones(11)), lambda w: w),
        (tk.L1(torch.tensor(0.3)), lambda w: w),
        (tk.L1(0.3), lambda w: w.T),
        (tk.L1(0.3), lambda w: w.bfloat16()),
        (tk.L1(0.3), lambda w: w[:0]),
        (tk.GroupLasso(0.3), lambda w: w[0]),
        (tk.ElasticNet(0.3, l1_ratio=0.0), lambda w: w),
    ],
    ids=lambda value: None if callable(value) else repr(value),
)
def test_without_a_kernel_nothing_is_changed(penalty, change):
    w = change(weights()[0])
    before = w.clone()
    assert not kernels.prox_(penalty, w, 0.9)
    assert torch.equal(w, before)


def test_moments_of_another_layout_have_no_kernel():
    w, moment, _ = weights()
    assert not kernels.prox_(tk.L1(0.3), w, 0.9, moment=moment.square().T)
    assert not kernels.prox_(tk.L1(0.3), w, torch.tensor(0.9))


def test_vmap_takes_the_general_prox():
    w = weights()[0]
    assert torch.vmap(lambda row: torch.tensor(kernels.prox_(tk.L1(0.3), row, 1.0)))(w).sum() == 0


def test_a_compiler_that_fails_is_replaced_silently(monkeypatch):
    def broken(*args, **kwargs):
        def kernel(*tensors):
            raise RuntimeError("no C++ compiler")

        return kernel

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(kernels, "_compiled", {})
    kernels.compile_from(1)
    w, moment, _ = weights()
    moment.square_()
    expected = tk.L1(0.3).prox(w, 0.9 / (moment.sqrt() + 0.1))
    assert kernels.prox_(tk.L1(0.3), w, 0.9, moment=moment, eps=0.1)
    torch.testing.assert_close(w, expected)
    assert list(kernels._compiled.values()) == [None]


def test_the_switch_in_the_environment(monkeypatch):
    monkeypatch.setenv("TIKHON_COMPILE", "0")
    monkeypatch.setattr(kernels, "_compiled", {})
    kernels.compile_from(1)
    w, moment, _ = weights()
    assert kernels.prox_(tk.L1(0.3), w, 0.9, moment=moment.square(), eps=0.1)
    assert list(kernels._compiled.values()) == [None]


@pytest.mark.slow
def test_the_compiled_kernel_is_built_once(monkeypatch):
    counters = pytest.importorskip("torch._dynamo.utils").counters
    counters.clear()
    monkeypatch.setattr(kernels, "_compiled", {})
    kernels.compile_from(1)
    for penalty in (tk.L1(0.3), tk.L1(0.4), tk.ElasticNet(0.3)):
        for shape in ((37, 11), (5, 200), (1000,)):
            w, moment, _ = weights(shape=shape)
            moment.square_()
            expected = penalty.prox(w, 0.3 / (moment.sqrt() / 0.7 + 0.1))
            assert kernels.prox_(penalty, w, 0.3, moment=moment, scale=0.7, eps=0.1)
            torch.testing.assert_close(w, expected)
    assert None not in kernels._compiled.values(), "this machine has no working compiler"
    assert counters["stats"]["unique_graphs"] == len(kernels._compiled) == 2


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_small_tensors_go_together_and_large_ones_alone(dtype, ratio, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL", 30)
    penalty = tk.ElasticNet(0.3, l1_ratio=ratio)
    ws = [weights(dtype, (rows, 7))[0] for rows in (1, 2, 3, 4, 9, 20)]
    moments = [w.square().flip(0) for w in ws]
    expected = [penalty.prox(w, 0.3 / (m.sqrt() / 0.7 + 0.1)) for w, m in zip(ws, moments)]
    kernels.shrink_(ws, moments, (*kernels.thresholds(penalty, 0.3), 0.7, 0.1))
    for w, one in zip(ws, expected):
        torch.testing.assert_close(w, one)
        assert torch.equal(w == 0, one == 0)


@pytest.mark.parametrize("strength", [1e-9, 1e-5, 1e-3, 1e-2, 0.1, 0.5, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_as_exact_by_series_as_by_iteration(dtype, strength):
    """Steps over six orders of magnitude in a row, dead entries, a zero row, rows of all sizes."""
    w, moment, noise = weights(torch.float64, (64, 50))
    w *= torch.logspace(-3, 1, 64, dtype=torch.float64)[:, None]
    moment = moment.square() * torch.logspace(-6, 0, 50, dtype=torch.float64)
    moment[:, 3] = 0
    w[:, 3] *= noise[:, 3] > 0
    w[5] = 0
    w, moment = w.to(dtype), moment.to(dtype)
    before, penalty = w.double().clone(), tk.GroupLasso(strength)
    exact = penalty.prox(before, 0.01 / (moment.double().sqrt() + 1e-3))
    assert kernels.prox_(penalty, w, 0.01, moment=moment, eps=1e-3)
    eps = torch.finfo(dtype).eps
    assert ((w.double() - exact).abs() <= eps * (20 * exact.abs() + 4 * before.abs())).all()
    edge = (exact == 0).all(1) != (w == 0).all(1)
    assert not edge.any()


def test_a_nan_row_stays_visible_in_a_metric():
    w, moment, _ = weights()
    w[4, 2] = math.nan
    assert kernels.prox_(tk.GroupLasso(0.3), w, 0.5, moment=moment.square(), eps=1e-3)
    assert w[4].isnan().any() and not w[:4].isnan().any()
