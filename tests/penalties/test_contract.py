"""What is refused, what a strength may be, and that the laws catch wrong penalties."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from examples_of import PENALTIES
from tikhon import penalties as tk
from tikhon.penalties.elementwise import soft_threshold
from tikhon.penalties.group import as_rows, row_norms
from tikhon.testing import check_penalty

# -- strengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), -0.001])
def test_a_strength_is_finite_and_not_negative(strength):
    with pytest.raises(ValueError, match=f"L1: strength must be finite and >= 0.*{strength!r}"):
        tk.L1(strength)
    with pytest.raises(ValueError, match="strength must be finite"):
        tk.L1(0.1).with_strength(strength)


STRENGTHS = sorted({type(p) for p in PENALTIES if not p.constraint}, key=str)


@pytest.mark.parametrize("kind", STRENGTHS, ids=lambda kind: kind.__name__)
def test_every_penalty_checks_its_strength_and_its_weights(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: strength must be finite and >= 0"):
        kind(-0.5)
    if "weights" in kind.__dataclass_fields__:
        with pytest.raises((TypeError, ValueError), match="weights"):
            kind(0.5, weights="heavy")


DEFAULTS = {
    "ElasticNet": {"l1_ratio": 0.5},
    "Huber": {"delta": 1.0},
    "MCP": {"gamma": 3.0},
    "SCAD": {"a": 3.7},
    "LogSum": {"epsilon": 0.1},
    "SLOPE": {"q": 0.1},
    "GroupLasso": {"scale_by_size": False},
    "SparseGroupLasso": {"l1_ratio": 0.5, "scale_by_size": False},
    "GroupMCP": {"gamma": 3.0},
    "Hierarchical": {"M": 10.0, "skip": 1},
    "L1Ball": {"radius": 1.0},
    "L2Ball": {"radius": 1.0},
    "SpectralBall": {"radius": 1.0},
    "MaxNorm": {"limit": 3.0},
    "MinMaxNorm": {"min_value": 0.0, "max_value": 1.0, "rate": 1.0},
    "Simplex": {"total": 1.0},
    "Box": {"low": -1.0, "high": 1.0},
    "TopK": {"k": 1},
}


@pytest.mark.parametrize(
    "kind", sorted({type(p) for p in PENALTIES}, key=str), ids=lambda kind: kind.__name__
)
def test_what_is_left_out_has_the_promised_value(kind):
    """A recipe leaves out what equals its default, so a default never moves."""
    usual = {
        item.name: item.default
        for item in fields(kind)
        if item.init and item.name not in ("strength", "weights", "center")
    }
    assert usual == DEFAULTS.get(kind.__name__, {})
    assert kind().strength == 1.0


@pytest.mark.parametrize("strength", ["0.1", None, True, [0.1]])
def test_a_strength_of_another_kind_is_refused(strength):
    with pytest.raises(TypeError, match=r"L2: strength must be a number >= 0.*received"):
        tk.L2(strength)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_strength_is_a_number_of_any_kind(number):
    w = torch.full((3,), 2.0)
    for kind in (tk.L1, tk.L2):
        for penalty in (kind(number), kind().with_strength(number)):
            assert type(penalty.strength) is not np.float32
            assert penalty.value(w) == kind(0.5).value(w)


def test_a_strength_tensor_has_no_dimensions():
    with pytest.raises(ValueError, match="weights="):
        tk.L1(torch.ones(3))
    assert tk.L1(torch.tensor(0.5)).value(torch.ones(2)) == 1.0


def test_a_scheduled_strength_has_no_value_yet():
    penalty = tk.L1(lambda step: 0.1 * step)
    for call in (lambda: penalty.value(torch.ones(2)), lambda: penalty.prox(torch.ones(2), 1.0)):
        with pytest.raises(TypeError, match=r"strength of L1 is a function.*tikhon\.regularize"):
            call()
    assert penalty.with_strength(2.0).value(torch.ones(2)) == 4.0


def test_with_strength_keeps_everything_else():
    penalty = tk.ElasticNet(0.1, l1_ratio=0.9, weights=torch.ones(3))
    changed = penalty.with_strength(0.2)
    assert changed.l1_ratio == 0.9 and changed.weights is penalty.weights
    assert (penalty.strength, changed.strength) == (0.1, 0.2)
    box = tk.Box(-1, 2)
    assert box.with_strength(0.2) is box


@dataclass(frozen=True, eq=False)
class Quartic(tk.Penalty):
    """A penalty of somebody's own, which tells its value alone."""

    def value(self, w: Tensor) -> Tensor:
        return self.lam * w.pow(4).sum()


def test_a_penalty_of_ones_own_needs_a_value_alone():
    w = torch.tensor([[1.0, -2.0]], requires_grad=True)
    with torch.no_grad():
        found = Quartic(0.5).grad(w)
    assert torch.equal(found, torch.tensor([[2.0, -16.0]])) and not found.requires_grad


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tk.ElasticNet(0.1, l1_ratio=1.5), r"l1_ratio must be in \[0, 1\], received 1.5"),
        (lambda: tk.SparseGroupLasso(0.1, l1_ratio=-1), "l1_ratio must be"),
        (lambda: tk.Huber(0.1, delta=0), "Huber: delta must be > 0, received 0"),
        (lambda: tk.MCP(0.1, gamma=-1.0), "MCP: gamma must be > 0, received -1.0"),
        (lambda: tk.GroupMCP(0.1, gamma=0.0), "GroupMCP: gamma"),
        (lambda: tk.SCAD(0.1, a=2.0), "SCAD: a must be > 2, received 2.0"),
        (lambda: tk.LogSum(0.1, epsilon=0.0), "LogSum: epsilon must be > 0"),
        (lambda: tk.SLOPE(0.1, q=1.0), "SLOPE: q must be in"),
        (
            lambda: tk.SLOPE(0.1, weights=torch.tensor([1.0, 2.0])),
            "must not increase.* 1 before 2",
        ),
        (lambda: tk.Hierarchical(0.1, M=0.0), "Hierarchical: M must be > 0"),
        (lambda: tk.Hierarchical(0.1, skip=0), "skip must be >= 1"),
        (lambda: tk.MaxNorm(0.0), "MaxNorm: limit must be > 0"),
        (lambda: tk.L1Ball(float("nan")), "L1Ball: radius must be > 0, received nan"),
        (lambda: tk.Simplex(-1.0), "Simplex: total must be > 0"),
        (lambda: tk.Box(2.0, 1.0), "Box: low must be <= high, received 2.0 and 1.0"),
        (lambda: tk.TopK(-1), "TopK: k must be >= 0"),
        (lambda: tk.L1(0.1, weights=torch.tensor([1.0, -2.0])), "weights must be.*received -2"),
        (
            lambda: tk.L1(0.1, weights={"fc": torch.tensor([torch.nan])}),
            "weights for 'fc' must be finite",
        ),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="weights must be a tensor or a mapping"):
        tk.L1(0.1, weights=2.0)
    with pytest.raises(TypeError, match="by parameter name"):
        tk.L1(0.1, weights={"fc": torch.ones(2)}).value(torch.ones(2))


@pytest.mark.parametrize("kind", sorted({type(p) for p in PENALTIES}, key=lambda c: c.__name__))
def test_every_penalty_takes_weights_or_says_why_it_does_not(kind):
    penalty = next(p for p in PENALTIES if type(p) is kind)
    if "weights" not in kind.__dataclass_fields__:
        reason = re.escape(kind.unweighted)
        assert kind.unweighted != tk.Penalty.unweighted
        with pytest.raises(TypeError, match=f"{kind.__name__} takes no weights: {reason}"):
            kind(weights=torch.ones(4))
        return
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w = penalty.prox(w, 1.0)  # a point that a Hierarchical allows
    shape = (4, 6) if penalty.elementwise else (6,) if kind is tk.SLOPE else (4,)
    ones = torch.ones(shape, dtype=torch.float64)
    once, twice, never = (replace(penalty, weights=factor * ones) for factor in (1, 2, 0))
    assert twice.value(w) == 2 * once.value(w) > 0
    assert torch.equal(twice.grad(w), 2 * once.grad(w))
    assert never.value(w) == 0 and not never.grad(w).any()
    torch.testing.assert_close(never.prox(w, 0.7), w)
    torch.testing.assert_close(twice.prox(w, 0.35), once.prox(w, 0.7))
    if kind is not tk.SLOPE:  # whose own sequence is not one
        plain = replace(penalty, weights=None)
        torch.testing.assert_close(plain.value(w), once.value(w))
        torch.testing.assert_close(plain.prox(w, 0.7), once.prox(w, 0.7))
    mixed = replace(penalty, weights=torch.linspace(2, 0, ones.numel()).double().reshape(shape))
    check_penalty(mixed, seeds=1)


def test_hierarchical_needs_features_as_rows():
    with pytest.raises(ValueError, match=r'received shape \(4,\).*rows="feature"'):
        tk.Hierarchical(0.1).prox(torch.ones(4), 1.0)


def test_slope_weights_must_fit_the_row():
    with pytest.raises(ValueError, match="each of the 3 entries of a row"):
        tk.SLOPE(0.1, weights=torch.ones(2)).value(torch.ones(3))


def test_a_diverged_matrix_is_named():
    w = torch.full((3, 3), torch.nan)
    with pytest.raises(ValueError, match=r"\(3, 3\) matrix with 9 NaN or infinite"):
        tk.NuclearNorm(0.1).prox(w, 1.0)


# -- names ----------------------------------------------------------------------------------------


def test_penalties_by_name():
    assert isinstance(tk.get("l1", 0.1), tk.L1)
    assert tk.get("l1_l2", 0.1).l1_ratio == 0.5
    assert type(tk.get("elastic_net", 0.1)) is type(tk.get("l1_l2", 0.1))
    with pytest.raises(ValueError, match=r"unknown penalty 'lasso'.*Valid: .*group_lasso.*l1"):
        tk.get("lasso", 0.1)


def test_every_penalty_with_a_strength_has_a_name():
    classes = {getattr(tk, name) for name in tk.__all__}
    penal = {c for c in classes if isinstance(c, type) and issubclass(c, tk.Penalty)}
    kinds = tk.penalty_names().items()
    named = {type(tk.get(name, 0.1)) for name, kind in kinds if not kind.constraint}
    abstract = {tk.Penalty, tk.Proximable}
    assert named == {c for c in penal - abstract if not c.constraint}


# -- fields by parameter name ---------------------------------------------------------------------


def test_a_center_is_chosen_and_read_like_the_parameter():
    state = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2)}
    bound = tk.L2(0.1, center=state).for_parameter("fc.weight", torch.Size((2, 3)), lambda t: t.T)
    assert torch.equal(bound.center, state["fc.weight"].T)
    with pytest.raises(ValueError, match=r"unknown center of L2 'fc.weigth'; did you mean"):
        tk.L2(0.1, center=state).for_parameter("fc.weigth")


def test_weights_broadcast_to_the_parameter_before_they_are_read():
    penalty = tk.L1(0.1, weights=torch.tensor([1.0, 2.0, 3.0]))
    bound = penalty.for_parameter("fc", torch.Size((2, 3)), lambda t: t.reshape(1, -1))
    assert bound.weights.tolist() == [[1.0, 2.0, 3.0, 1.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match=r"weights of L1 has shape \(3,\).*\(3, 2\)"):
        penalty.for_parameter("fc", torch.Size((3, 2)), lambda t: t)


def test_group_weights_are_one_a_row_whatever_the_view():
    rows = torch.tensor([1.0, 2.0])
    bound = tk.GroupLasso(0.1, weights={"fc": rows}).for_parameter("fc", torch.Size((2, 3)))
    assert torch.equal(bound.weights, rows)
    assert tk.L1(0.1).for_parameter("fc").strength == 0.1


# -- numbers that are easily lost -----------------------------------------------------------------


def test_sums_of_half_precision_do_not_overflow():
    w = torch.full((4, 1000), 20.0, dtype=torch.float16)
    assert tk.L2(2.0).value(w) == 4 * 1000 * 400
    assert tk.GroupLasso(1.0).value(w).item() == pytest.approx(4 * 20 * 1000**0.5)
    assert tk.GroupLasso(1.0).prox(w, 1.0).isfinite().all()


def test_zero_strength_and_zero_step_are_bit_exact():
    w = torch.randn(5, 7)
    metric = torch.rand(5, 7)
    for penalty in (tk.L1(0.0), tk.L2(0.0), tk.ElasticNet(0.0), tk.GroupLasso(0.0), tk.MCP(0.0)):
        assert torch.equal(penalty.prox(w, 0.5), w)
        assert torch.equal(penalty.prox(w, metric), w)


# -- the laws catch the classical mistakes --------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HalfRidge(tk.L2):
    """The factor that a well-known library has wrong."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w / (1 + 0.5 * step * self.lam)


@dataclass(frozen=True, eq=False)
class MeanStep(tk.GroupLasso):
    """A group prox by the mean of the metric."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return super().prox(w, step.mean() if isinstance(step, Tensor) else step)


@dataclass(frozen=True, eq=False)
class GroupFirst(tk.SparseGroupLasso):
    """The two proxes in the wrong order."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        single, group = self._parts(w)
        return single.prox(group.prox(w, step), step)


@dataclass(frozen=True, eq=False)
class NanAtZero(tk.GroupLasso):
    """The gradient 0/0 of a zero row."""

    def grad(self, w: Tensor) -> Tensor:
        rows = as_rows(w)
        return self.lam * rows / row_norms(rows)


@dataclass(frozen=True, eq=False)
class InPlace(tk.L1):
    """Changes its argument."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w.copy_(soft_threshold(w, self.lam * step))


@dataclass(frozen=True, eq=False)
class MeanValue(tk.L1):
    """A mean where a sum belongs."""

    def value(self, w: Tensor) -> Tensor:
        return self.lam * w.abs().mean()


@dataclass(frozen=True, eq=False)
class Branches(tk.L1):
    """Branches on the strength, which vmap batches."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return super().prox(w, step) if self.lam > 0 else w


@dataclass(frozen=True, eq=False)
class FloatSum(tk.L1):
    """Sums in the dtype of its argument."""

    def value(self, w: Tensor) -> Tensor:
        return self.lam * w.abs().sum()


WRONG = [HalfRidge, MeanStep, GroupFirst, NanAtZero, InPlace, MeanValue, Branches]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_the_laws_catch(wrong):
    with pytest.raises((AssertionError, RuntimeError)):
        check_penalty(wrong(0.4), seeds=2)


def test_the_exported_check_runs_every_law(monkeypatch):
    from tikhon import testing

    laws = {
        n for n, f in vars(testing).items() if getattr(f, "__module__", "") == testing.__name__
    }
    laws -= {"check_penalty", "objective", "prox_beats_grid"}  # the last one is of one entry
    run = set()
    for law in laws:
        monkeypatch.setattr(testing, law, lambda *given, law=law, **more: run.add(law))
    check_penalty(tk.L1(0.4), seeds=1)
    assert run == laws and len(laws) == 11


def test_the_laws_catch_a_narrow_sum():
    from tikhon import testing

    with pytest.raises(AssertionError, match="float16"):
        testing.value_is_a_number(FloatSum(0.4), torch.ones(3, dtype=torch.float16))
