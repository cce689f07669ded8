"""Every law over every penalty; a public penalty without an instance fails."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from examples_of import PENALTIES
from tikhon import penalties, testing as laws
from tikhon.penalties import Penalty, Proximable

SIZE = (4, 6)
PROXIMABLE = [p for p in PENALTIES if isinstance(p, Proximable)]
FREE = [p for p in PENALTIES if not any(isinstance(v, torch.Tensor) for v in vars(p).values())]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
quick = settings(max_examples=6, deadline=None)


def named(penalty: Penalty) -> str:
    own = {k: v for k, v in vars(penalty).items() if isinstance(v, (int, float))}
    return type(penalty).__name__ + "".join(f"-{k}{v}" for k, v in own.items())


def every(instances):
    return pytest.mark.parametrize("penalty", instances, ids=named)


# multiples of 1/8: ties, zeros and entries exactly at a threshold are likely
weights = st.lists(st.integers(-24, 24), min_size=24, max_size=24).map(
    lambda entries: torch.tensor(entries, dtype=torch.float64).reshape(SIZE) / 8
)
numbers = st.floats(0.05, 4.0)
metrics = st.lists(st.floats(-7.0, 3.0), min_size=24, max_size=24).map(
    lambda logs: torch.tensor(logs, dtype=torch.float64).reshape(SIZE).exp()
)


def steps_of(penalty: Proximable):
    return st.one_of(numbers, metrics) if penalty.diagonal else numbers


def test_every_public_penalty_has_an_instance():
    public = {getattr(penalties, name) for name in penalties.__all__}
    classes = {c for c in public if inspect.isclass(c) and not inspect.isabstract(c)}
    assert classes == {type(p) for p in PENALTIES}


@every(PENALTIES)
@quick
@given(w=weights)
def test_value_is_a_number(penalty, w):
    laws.value_is_a_number(penalty, w)


@every(PENALTIES)
@quick
@given(w=weights)
def test_gradient_is_autograd(penalty, w):
    off_the_kinks = torch.rand(SIZE, generator=torch.Generator().manual_seed(2), dtype=w.dtype)
    laws.gradient_is_autograd(penalty, w + 0.1 * off_the_kinks)


@every(PENALTIES)
def test_finite_at_zero(penalty):
    laws.finite_at_zero(penalty, torch.zeros(SIZE, dtype=torch.float64))
    laws.finite_at_zero(penalty, torch.zeros(SIZE, dtype=torch.float32))


@every(PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_input_are_kept(penalty, dtype):
    w = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    laws.keeps_dtype_and_input(penalty, w)
    laws.keeps_dtype_and_input(penalty, w.T.contiguous().T)  # the same numbers, other strides


@every([p for p in FREE if not isinstance(p, penalties.Hierarchical)])
@pytest.mark.parametrize("shape", [(), (5,), (0,), (0, 3), (3, 0), (2, 3, 2, 2)], ids=str)
def test_shapes(penalty, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    laws.keeps_dtype_and_input(penalty, w)
    if len(shape) == 4:
        laws.keeps_dtype_and_input(penalty, w.to(memory_format=torch.channels_last))
    if w.numel():
        laws.value_is_a_number(penalty, w)


@every(PROXIMABLE)
@quick
@given(w=weights, data=st.data())
def test_prox_is_minimal(penalty, w, data):
    if isinstance(penalty, penalties.UnitNorm | penalties.MinMaxNorm):
        w = w + 0.01  # its docstring excludes zeros where the steps are largest
    laws.prox_is_minimal(penalty, w, data.draw(steps_of(penalty)), attempts=12)


@every([p for p in FREE if isinstance(p, Proximable) and getattr(p, "skip", 1) == 1])
@quick
@given(entry=st.floats(-4.0, 4.0), step=numbers)
def test_prox_beats_grid(penalty, entry, step):
    laws.prox_beats_grid(penalty, entry, step)


@every([p for p in PROXIMABLE if p.convex])
@quick
@given(x=weights, y=weights, data=st.data())
def test_convex_prox_is_firm(penalty, x, y, data):
    laws.prox_is_firm(penalty, x, y, data.draw(steps_of(penalty)))


@every([p for p in PROXIMABLE if p.convex])
@quick
@given(w=weights, step=numbers)
def test_envelope_gradient(penalty, w, step):
    laws.envelope_gradient(penalty, w, step)


@every([p for p in PENALTIES if not p.real])
@quick
@given(w=weights, turn=weights)
def test_complex_weights_keep_the_laws(penalty, w, turn):
    w = torch.polar(w.abs() + 0.01, turn)
    laws.value_is_a_number(penalty, w)
    laws.keeps_dtype_and_input(penalty, w)
    off_the_kinks = torch.rand(SIZE, generator=torch.Generator().manual_seed(2), dtype=turn.dtype)
    laws.gradient_is_autograd(penalty, w + 0.1 * off_the_kinks)
    if isinstance(penalty, Proximable):
        laws.prox_is_minimal(penalty, w, 0.7, attempts=6)


@every(PROXIMABLE)
@quick
@given(w=weights, data=st.data())
def test_non_finite_stays_visible(penalty, w, data):
    laws.non_finite_stays_visible(penalty, w, data.draw(steps_of(penalty)))
    laws.non_finite_stays_visible(penalty, w, 100.0)


@every(PROXIMABLE)
@quick
@given(w=weights)
def test_zero_step_is_identity(penalty, w):
    laws.zero_step_is_identity(penalty, w)


@every(PROXIMABLE)
@quick
@given(w=weights, step=numbers)
def test_constant_metric_is_a_number(penalty, w, step):
    laws.constant_metric_is_a_number(penalty, w, step)


@every(PROXIMABLE)
@quick
@given(w=weights, other=weights)
def test_vmap_is_a_loop(penalty, w, other):
    laws.vmap_is_a_loop(penalty, torch.stack([w, other]))


@every([p for p in PROXIMABLE if p.slopes(torch.ones(SIZE)) is not None])
def test_slopes_are_the_gradient_next_to_zero(penalty):
    """Of entries or of rows; of a penalty that has both, together at most."""
    w = 1e-7 * torch.randn(SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slopes, gradient = penalty.slopes(w), penalty.grad(w)
    entries, rows = (
        torch.as_tensor(0.0 if s is None else s) for s in (slopes.entries, slopes.rows)
    )
    if slopes.rows is None:
        wanted = entries.expand(SIZE)
        torch.testing.assert_close(gradient.abs(), wanted.to(gradient), rtol=1e-5, atol=1e-7)
    elif slopes.entries is None:
        wanted = torch.broadcast_to(rows.reshape(-1, 1) if rows.ndim else rows, (len(w), 1))
        size = gradient.norm(dim=1, keepdim=True)
        torch.testing.assert_close(size, wanted.to(size), rtol=1e-5, atol=1e-7)
    else:
        most = (entries.expand(SIZE).norm(dim=1) + rows.expand(len(w), 1).flatten()).to(gradient)
        assert (gradient.norm(dim=1) <= most * (1 + 1e-6)).all()


ROWWISE = (penalties.GroupLasso, penalties.GroupMCP, penalties.LInf)


@every([p for p in PROXIMABLE if isinstance(p, ROWWISE)])
def test_steepness_is_the_size_of_a_rows_gradient_next_to_zero(penalty):
    w = 1e-7 * torch.randn(SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.as_tensor(penalty.steepness(w)).to(w).reshape(-1, 1)
    wanted = penalty.grad(w).square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=1e-5, atol=1e-7)


@every(PROXIMABLE)
def test_elementwise_is_what_no_other_entry_has_a_part_in(penalty):
    alone = True
    for size, place in itertools.product((0.1, 1.0), ((0, 0), (3, 5), (1, 2))):
        w = size * torch.linspace(-2.3, 1.9, 24, dtype=torch.float64).reshape(SIZE)
        other = w.clone()
        other[place] += 0.7
        moved = penalty.prox(other, 0.6) != penalty.prox(w, 0.6)
        moved[place] = False
        alone &= not moved.any()
    assert alone == penalty.elementwise


@every(
    [
        penalties.L1(0.4),
        penalties.L2(0.4),
        penalties.MCP(0.4),
        penalties.GroupLasso(0.4),
        penalties.SLOPE(0.4),
        penalties.MaxNorm(0.5),
        penalties.Orthogonal(0.4),
    ]
)
def test_all_laws_as_exported(penalty):
    """One of each kind: the laws above are the same ones, over every penalty."""
    laws.check_penalty(penalty, seeds=1)


# by ranks, thresholds and neighbours: a move of one entry may well leave the others' gradients
RANKED = (
    penalties.TopK
    | penalties.LInf
    | penalties.SLOPE
    | penalties.Simplex
    | penalties.GroupMCP
    | penalties.Hierarchical
)


@every(PENALTIES)
def test_elementwise_says_whether_it_is_a_sum_over_entries(penalty):
    """Moving one entry changes the gradient (or the projection) of no other."""
    source = torch.Generator().manual_seed(4)
    w = torch.randn(SIZE, generator=source, dtype=torch.float64)
    touched = torch.zeros(SIZE, dtype=torch.bool)
    for entry in itertools.product(*map(range, SIZE)):
        moved = w.clone()
        moved[entry] += 0.7
        act = (lambda x: penalty.prox(x, 1.0)) if penalty.constraint else penalty.grad
        differs = (act(moved) - act(w)).abs() > 1e-12
        differs[entry] = False
        touched |= differs
    apart = not touched.any()
    if isinstance(penalty, RANKED):
        assert not penalty.elementwise  # ties and ranks may leave the others alone
    elif isinstance(penalty, penalties.TotalVariation):
        assert not penalty.elementwise  # its gradient knows neighbours by their order alone
    else:
        assert penalty.elementwise == apart


@every([p for p in PENALTIES if not p.constraint])
def test_convex_is_told_by_chords(penalty):
    source = torch.Generator().manual_seed(5)
    x, y = 2 * torch.randn((2, 40, *SIZE), generator=source, dtype=torch.float64)
    above = [
        float(penalty.value((a + b) / 2) - (penalty.value(a) + penalty.value(b)) / 2)
        for a, b in [*zip(x, y), *zip(0.05 * x, y), *zip(0.05 * x, -0.05 * x)]
    ]
    assert (max(above) <= 1e-9) == penalty.convex


SLOPED = [p for p in PROXIMABLE if not p.constraint and p.slopes(torch.zeros(SIZE)) is not None]


@every([p for p in SLOPED if getattr(p, "weights", None) is None])
def test_steepness_is_the_gradient_at_a_tiny_constant_row(penalty):
    size = 1.0 if isinstance(penalty, penalties.ElasticNet) else 1e-9  # "up to a size of 1"
    w = torch.full(SIZE, size, dtype=torch.float64)
    expected = torch.as_tensor(penalty.steepness(w), dtype=w.dtype).expand(SIZE)
    torch.testing.assert_close(penalty.grad(w), expected, rtol=1e-5, atol=0)
    twice = penalty.with_strength(2 * penalty.strength)
    if not isinstance(penalty, penalties.LogSum):
        torch.testing.assert_close(twice.grad(w), 2 * expected, rtol=1e-5, atol=0)


def test_a_steepness_that_no_slope_tells_is_the_strength():
    assert penalties.NuclearNorm(0.4).steepness(torch.ones(2, 2)) == 0.4
