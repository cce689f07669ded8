"""The in-place kernels against the proxes and gradients that they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from tikhon import penalties as tk
from tikhon.penalties import kernels, native

PENALTIES = [
    tk.L1(0.3),
    tk.ElasticNet(0.3, l1_ratio=0.4),
    tk.GroupLasso(3.5),  # takes some rows whole
    tk.GroupLasso(0.1, scale_by_size=True),
    tk.SparseGroupLasso(0.8, l1_ratio=0.2),
    tk.SparseGroupLasso(0.1, scale_by_size=True),
]
IN_C = [  # by no blocks
    tk.MCP(0.3),
    tk.MCP(0.3, gamma=1.2),
    tk.SCAD(0.3),
    tk.LogSum(0.01, epsilon=0.5),  # convex at steps up to 25
    tk.LogSum(0.05, epsilon=0.1),  # at some steps
    tk.LogSum(0.3, epsilon=0.1),
    tk.Box(-0.3, 0.4),
    tk.NonNegative(),
]


@pytest.fixture(autouse=True, params=["blocks", "C", "C in threads"])
def route(request, monkeypatch):
    """The three ways a kernel works on a CPU."""
    monkeypatch.setattr(kernels, "BLOCK", 64)  # several blocks and a remainder
    before = kernels.compile_from(math.inf if request.param == "blocks" else 1)
    if request.param != "blocks" and native.library(torch.float32) is None:
        pytest.skip("no C compiler here")
    if request.param == "C in threads":
        monkeypatch.setattr(native, "THREADED_FROM", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    yield request.param
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
    w[5] = 0
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", [0.01, 0.9, 2.5])
@pytest.mark.parametrize("penalty", IN_C, ids=repr)
def test_prox_in_c_is_the_prox(penalty, step, dtype, route):
    w, _, _ = weights(dtype)
    w[5], w[6, :3] = 0, torch.tensor([math.nan, math.inf, -math.inf])
    expected, before = penalty.prox(w, step), w.clone()
    if route == "blocks":
        assert not kernels.prox_(penalty, w, step) and _equal(w, before)
        return
    assert kernels.prox_(penalty, w, step)
    torch.testing.assert_close(w, expected, equal_nan=True)
    assert torch.equal(w == 0, expected == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", [0.003, 0.3, 3.0])
@pytest.mark.parametrize("penalty", IN_C, ids=repr)
def test_prox_in_c_in_a_metric_is_the_prox_of_bounded_steps(penalty, step, dtype, route):
    w, moment, _ = weights(dtype)
    w[5], w[6, :3] = 0, torch.tensor([math.nan, math.inf, -math.inf])
    moment.square_()
    most = _longest(penalty)
    expected = penalty.prox(w, (step / (moment.sqrt() / 0.7 + 0.1)).clamp_max(most))
    done = kernels.prox_(penalty, w, step, moment=moment, scale=0.7, eps=0.1, max_step=most)
    assert done == (route != "blocks")
    if done:
        torch.testing.assert_close(w, expected, equal_nan=True)
        assert torch.equal(w == 0, expected == 0)


@pytest.mark.parametrize("penalty", [tk.MCP(0.3), tk.SCAD(0.3)], ids=repr)
def test_crossing_pieces_in_a_metric_have_no_kernel(penalty):
    w, moment, _ = weights()
    assert not kernels.prox_(penalty, w, 0.3, moment=moment.square(), eps=0.1)


def test_steps_beyond_the_pieces_of_scad_have_no_kernel():
    assert not kernels.prox_(tk.SCAD(0.3, a=3.0), weights()[0], 2.0)


class Derived(tk.L1):
    """A subclass may change the prox, so it has no kernel."""


BY_ROWS = [
    tk.SparseGroupLasso(0.8),
    tk.GroupMCP(0.8),
    tk.LInf(0.8),
    tk.MaxNorm(2.0),
    tk.MinMaxNorm(2.0, 3.0),
    tk.UnitNorm(),
    tk.MCP(0.3),
    tk.SCAD(0.3, a=2.2),
]


@pytest.mark.parametrize("shape", [(37, 11), (5, 4, 3, 3), (1, 300)], ids=str)
@pytest.mark.parametrize("penalty", BY_ROWS, ids=repr)
def test_prox_of_some_rows_at_a_time_is_the_prox(penalty, shape):
    w, moment, _ = weights(shape=shape)
    steps = [0.9] if isinstance(penalty, tk.GroupMCP) else [0.9, 0.1 + moment.abs()]
    for step in steps:
        found, expected = w.clone(), penalty.prox(w, step)
        assert kernels.prox_in_blocks_(penalty, found, step)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize(
    "penalty",
    [
        tk.L2Ball(1.0),
        tk.TopK(5),
        tk.SLOPE(0.1),
        tk.LInf(0.1, weights=torch.ones(37)),
        Derived(1.0),
    ],
    ids=lambda penalty: type(penalty).__name__,
)
def test_what_joins_rows_is_not_split(penalty):
    w, _, _ = weights()
    before = w.clone()
    assert not kernels.prox_in_blocks_(penalty, w, 0.9)
    assert not kernels.prox_in_blocks_(tk.MaxNorm(1.0), w[0], 0.9)  # one row
    assert torch.equal(w, before)


def _longest(penalty):
    """Half of the step up to which the prox has one minimum."""
    if isinstance(penalty, tk.MCP):
        return penalty.gamma / 2
    return (penalty.a - 1) / 2 if isinstance(penalty, tk.SCAD) else math.inf


def _equal(a, b):
    return torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


@pytest.mark.parametrize("factor", [1.0, -1.0])
@pytest.mark.parametrize("penalty", [tk.L2(0.3), tk.Huber(0.3, delta=0.5)], ids=repr)
def test_gradient_in_place_is_the_gradient(penalty, factor):
    w, gradient, _ = weights()
    expected = gradient + factor * penalty.grad(w)
    assert kernels.add_gradient_(penalty, gradient, w, factor)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "penalty",
    [tk.L1(0.3), tk.L2(0.3, center=torch.ones(11)), tk.Huber(0.3, weights=torch.ones(11))],
    ids=lambda penalty: type(penalty).__name__,
)
def test_gradients_of_other_penalties_are_not_added(penalty):
    w, gradient, _ = weights()
    before = gradient.clone()
    assert not kernels.add_gradient_(penalty, gradient, w, 1.0)
    assert torch.equal(gradient, before)


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


@pytest.mark.parametrize(
    ("penalty", "change"),
    [
        (tk.MCP(0.3, weights=torch.ones(11)), lambda w: w),
        (tk.TopK(3), lambda w: w),
        (tk.L2(0.3), lambda w: w),
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


ONCE = pytest.mark.parametrize("route", ["C"], indirect=True)  # it does not depend on the route


@ONCE
def test_a_compiler_that_fails_is_replaced_silently(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", f"{tmp_path}/none -with 'an option'")
    native.library.cache_clear()
    kernels.compile_from(1)
    w, moment, _ = weights()
    moment.square_()
    for penalty in (tk.L1(0.3), tk.GroupLasso(0.3)):
        found, expected = w.clone(), penalty.prox(w, 0.9 / (moment.sqrt() + 0.1))
        assert kernels.prox_(penalty, found, 0.9, moment=moment, eps=0.1)
        torch.testing.assert_close(found, expected)
    assert native.library(torch.float32) is None
    native.library.cache_clear()


@ONCE
def test_the_switch_in_the_environment(monkeypatch):
    native.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("TIKHON_COMPILE", "0")
        patch.setattr(native.subprocess, "run", lambda *a, **k: pytest.fail("built all the same"))
        kernels.compile_from(1)
        w, moment, _ = weights()
        assert kernels.prox_(tk.L1(0.3), w, 0.9, moment=moment.square(), eps=0.1)
    native.library.cache_clear()


@ONCE
def test_the_library_is_built_once_and_from_the_size_set(monkeypatch):
    built = []
    monkeypatch.setattr(native, "library", lambda dtype: built.append(dtype))
    w, moment, _ = weights()
    for size, expected in ((w.numel() + 1, 0), (w.numel(), 1)):
        kernels.compile_from(size)
        kernels.prox_(tk.L1(0.3), w, 0.9, moment=moment.square(), eps=0.1)
        assert len(built) == expected
    monkeypatch.undo()
    native.library.cache_clear()
    kernels.compile_from(1)
    for strength in (0.1, 0.2, 0.3):
        kernels.prox_(tk.L1(strength), w, strength, moment=moment.square(), eps=0.1)
    assert native.library.cache_info().misses == 1


def test_writes_are_counted_as_changes_in_place(route):
    w, moment, _ = weights()
    for penalty, metric in (
        (tk.L1(0.1), True),
        (tk.GroupLasso(0.1), True),
        (tk.GroupLasso(0.1), False),
    ):
        before = w._version
        chosen = {"moment": moment.square()} if metric else {}
        assert kernels.prox_(penalty, w, 0.5, eps=0.1, **chosen)
        assert w._version > before


@pytest.mark.slow
def test_torch_compile_builds_its_kernel_once(monkeypatch, route):
    if route != "blocks":
        pytest.skip("has no threads of its own")
    counters = pytest.importorskip("torch._dynamo.utils").counters
    counters.clear()
    monkeypatch.setattr(kernels, "_compiled", {})
    kernels.compile_from(1)
    for penalty in (tk.L1(0.3), tk.L1(0.4), tk.ElasticNet(0.3)):
        for shape in ((37, 11), (5, 200), (1000,)):
            w, moment, _ = weights(shape=shape)
            moment.square_()
            expected = penalty.prox(w, 0.3 / (moment.sqrt() / 0.7 + 0.1))
            form = kernels.kernel_form(penalty, w)
            job = kernels.make_job(form, penalty.strength, w, 0.3, moment, 0.7, 0.1)
            assert kernels._shrink_compiled_(w, moment, job.size, job.ridge, job.eps)
            torch.testing.assert_close(w, expected)
    assert None not in kernels._compiled.values(), "this machine has no working compiler"
    assert counters["stats"]["unique_graphs"] == len(kernels._compiled) == 2


def test_torch_compile_failing_is_replaced_silently(monkeypatch):
    def broken(*args, **kwargs):
        def kernel(*tensors):
            raise RuntimeError("no C++ compiler")

        return kernel

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(kernels, "_compiled", {})
    kernels.compile_from(1)
    w, moment, _ = weights()
    before = w.clone()
    for _ in range(2):  # the second time it is known
        assert not kernels._shrink_compiled_(w, moment.square(), 0.1, 0.0, 0.1)
    assert torch.equal(w, before)
    assert list(kernels._compiled.values()) == [None]


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_small_tensors_go_together_and_large_ones_alone(dtype, ratio, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL", 30)
    ws = [weights(dtype, (rows, 7))[0] for rows in (1, 2, 3, 4, 9, 20)]
    moments = [w.square().flip(0) for w in ws]
    penalties = [tk.ElasticNet(0.3 if i % 2 else 0.2, l1_ratio=ratio) for i in range(6)]
    expected = [p.prox(w, 0.3 / (m.sqrt() / 0.7 + 0.1)) for p, w, m in zip(penalties, ws, moments)]
    jobs = [
        kernels.make_job(kernels.kernel_form(p, w), p.strength, w, 0.3, m, 0.7, 0.1)
        for p, w, m in zip(penalties, ws, moments)
    ]
    kernels.run(jobs)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_longer_than_what_is_summed_at_once(dtype):
    w, moment, _ = weights(dtype, (4, 1003))
    moment.square_()
    penalty, in_metric = tk.GroupLasso(9.0), w.clone()
    expected = penalty.prox(w.double(), 0.9), penalty.prox(w.double(), 0.3 / (moment.sqrt() + 0.1))
    assert kernels.prox_(penalty, w, 0.9)
    assert kernels.prox_(penalty, in_metric, 0.3, moment=moment, eps=0.1)
    torch.testing.assert_close((w, in_metric), tuple(one.to(dtype) for one in expected))


def test_a_nan_row_stays_visible_in_a_metric():
    w, moment, _ = weights()
    w[4, 2] = math.nan
    assert kernels.prox_(tk.GroupLasso(0.3), w, 0.5, moment=moment.square(), eps=1e-3)
    assert w[4].isnan().any() and not w[:4].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.ElasticNet(0.3)], ids=repr)
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_kernel_in_c_gives_the_bits_of_the_blocks(adaptive, penalty, dtype):
    """A run may go on on a machine without a compiler."""
    found = []
    for size in (1, math.inf):
        kernels.compile_from(size)
        w, moment, _ = weights(dtype, (50, 41))
        moment.square_()[3] = 0
        known = moment if adaptive else None
        assert kernels.prox_(penalty, w, 0.3, moment=known, scale=0.7, eps=1e-8)
        found.append(w)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.ElasticNet(0.3)], ids=repr)
def test_a_moment_that_has_overflowed_holds_the_weight_still(penalty, dtype):
    w, moment, _ = weights(dtype)
    w[3], before = 0.0, w.clone()
    moment.fill_(math.inf)
    assert kernels.prox_(penalty, w, 0.3, moment=moment, eps=1e-8)
    torch.testing.assert_close(w[4:], before[4:])
    assert not w[3].any()


@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.ElasticNet(0.3)], ids=repr)
def test_a_nan_moment_stays_visible(penalty):
    w, moment, _ = weights()
    moment.square_()[4, 2] = math.nan
    assert kernels.prox_(penalty, w, 0.3, moment=moment, eps=1e-8)
    assert w[4, 2].isnan() and w.isnan().sum() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.ElasticNet(0.3), tk.GroupLasso(0.3)], ids=repr)
@pytest.mark.parametrize("adaptive", [False, True])
def test_what_is_not_finite_stays_visible(penalty, bad, adaptive, route):
    w, moment, _ = weights()
    w[4, 2] = bad
    known = moment.square() if adaptive else None
    assert kernels.prox_(penalty, w, 0.5, moment=known, eps=1e-3)
    assert not w[4, 2].isfinite() and w[:4].isfinite().all()


@pytest.mark.parametrize("strength", [1e-6, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_rows_with_dead_moments_and_extreme_sizes(strength, eps, route):
    """A weight without any gradient has no bound on its step: it goes, and takes no row along."""
    if route == "blocks":
        pytest.skip("the general solver needs eps > 0")
    w, moment, _ = weights(torch.float32, (6, 40))
    moment.square_()[:, ::2] = 0
    moment[2] = 0
    w *= torch.tensor([1e-30, 1e-8, 1.0, 1e8, 1e18, 0.0])[:, None]
    before = w.double()
    steps = 0.01 / (moment.double().sqrt() + eps)
    exact = tk.GroupLasso(strength).prox(before, steps.clamp_max(1e300))
    assert kernels.prox_(tk.GroupLasso(strength), w, 0.01, moment=moment, eps=eps)
    assert ((w.double() - exact).abs() <= 1e-5 * exact.abs() + 1e-6 * before.abs()).all()


@pytest.mark.parametrize("size", [1e-12, 1e-10, 1e-8])
def test_small_rows_are_as_exact_as_others(size):
    w, moment, _ = weights(torch.float32, (6, 40))
    w, moment = w * size, moment.square_()
    penalty, before = tk.GroupLasso(size / 9), w.double()
    exact = penalty.prox(before, 0.3 / (moment.double().sqrt() + 0.1))
    assert exact.any(1).all()
    assert kernels.prox_(penalty, w, 0.3, moment=moment, eps=0.1)
    assert ((w.double() - exact).abs() <= 1e-5 * exact.abs() + 1e-6 * before.abs()).all()


def test_a_tensor_just_large_enough_for_threads_is_changed_once(route, monkeypatch):
    ws = [weights(shape=(rows, 11))[0] for rows in (37, 38)]
    monkeypatch.setattr(native, "THREADED_FROM", ws[0].numel())
    penalty = tk.L1(0.3)
    expected = [penalty.prox(w, 0.9) for w in ws]
    kernels.run(
        [
            kernels.make_job(kernels.kernel_form(penalty, w), 0.3, w, 0.9, None, 1.0, 0.0)
            for w in ws
        ]
    )
    for w, one in zip(ws, expected):
        torch.testing.assert_close(w, one)


@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.GroupLasso(0.3)], ids=repr)
def test_c_lifts_moments_for_the_next_step_after_it_has_read_them(route, penalty):
    w, moment, _ = weights()
    moment.square_()
    moment[3, 4] = math.nan
    expected, lifted = penalty.prox(w, 0.3 / (moment.sqrt() + 0.1)), moment.clamp_min(0.5)
    form = kernels.kernel_form(penalty, w)
    job = kernels.make_job(form, penalty.strength, w, 0.3, moment, 1.0, 0.1, 0.5)
    before = moment.clone()
    in_c = kernels.run([job])
    assert in_c == (route != "blocks")
    seen = expected.isfinite()
    torch.testing.assert_close(w[seen], expected[seen])
    assert torch.equal(moment.nan_to_num(), (lifted if in_c else before).nan_to_num())
    assert moment[3, 4].isnan()
