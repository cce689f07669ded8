"""Laws of penalties, to test penalties implemented elsewhere.

`check_penalty(penalty)` runs all of them on random weights; the individual laws take weights, for
use in property-based tests. A violated law raises AssertionError.

Everywhere `penalty` is the tested instance, `w` (and `x`, `y`, a scalar `entry`) are weights,
`step` >= 0 is the step of a prox, `seed` and `seeds` control random numbers, and `attempts` or
`points` is the number of candidates compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.penalties import Penalty, Proximable, moreau_envelope


def check_penalty(penalty: Penalty, shape: tuple[int, ...] = (4, 6), seeds: int = 5) -> None:
    """Check all laws on random float64 weights of the given shape.

    >>> from tikhon.penalties import GroupLasso
    >>> check_penalty(GroupLasso(0.3))
    """
    for seed in range(seeds):
        source = torch.Generator().manual_seed(seed)
        w, other = torch.randn((2, *shape), generator=source, dtype=torch.float64)
        step = torch.rand(shape, generator=source, dtype=torch.float64) + 0.1
        value_is_a_number(penalty, w)
        gradient_is_autograd(penalty, w)
        finite_at_zero(penalty, torch.zeros_like(w))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            keeps_dtype_and_input(penalty, w.to(dtype))
        if isinstance(penalty, Proximable):
            steps = (0.5, step) if penalty.diagonal else (0.5,)
            for one in steps:
                prox_is_minimal(penalty, w, one, seed=seed)
                prox_is_firm(penalty, w, other, one)
                envelope_gradient(penalty, w, one)
                non_finite_stays_visible(penalty, w, one)
            zero_step_is_identity(penalty, w)
            constant_metric_is_a_number(penalty, w, 0.5)
            vmap_is_a_loop(penalty, torch.stack([w, other]))


def objective(penalty: Penalty, z: Tensor, w: Tensor, step: float | Tensor) -> Tensor:
    """Objective that the prox minimises over z."""
    return ((z - w).abs().square() / (2 * step)).sum() + penalty.value(z)


def value_is_a_number(penalty: Penalty, w: Tensor) -> None:
    """Check that the value is a 0-d tensor >= 0 of at least 32 bits, and 0 at strength 0."""
    value = penalty.value(w)
    assert value.ndim == 0 and value >= 0, f"value {value}"
    assert torch.finfo(value.dtype).bits >= 32, f"value accumulated in {value.dtype}"
    if not penalty.constraint and value.isfinite():
        assert penalty.with_strength(0.0).value(w) == 0


def gradient_is_autograd(penalty: Penalty, w: Tensor) -> None:
    """Check that `grad` equals autograd of `value`, where w has no zeros or ties."""
    if penalty.constraint:
        return
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(penalty.value(leaf), leaf)
    torch.testing.assert_close(penalty.grad(w), expected)


def finite_at_zero(penalty: Penalty, w: Tensor) -> None:
    """Check that nothing is NaN or infinite at a kink (`grad` at all-zero rows, ties)."""
    assert penalty.grad(w).isfinite().all()
    if isinstance(penalty, Proximable):
        for step in (0.0, 1e-30, 1.0, 1e10):
            assert penalty.prox(w, step).isfinite().all(), f"prox at step {step}"


def keeps_dtype_and_input(penalty: Penalty, w: Tensor) -> None:
    """Check that results keep w's shape, dtype and device, and that w is not modified."""
    before, results = w.clone(), [penalty.grad(w)]
    if isinstance(penalty, Proximable):
        results.append(penalty.prox(w, 0.5))
        kept = penalty.support(w)
        assert kept.dtype == torch.bool and kept.shape == w.shape
        if penalty.diagonal:
            results.append(penalty.prox(w, torch.full(w.shape, 0.5, device=w.device)))
    for result in results:
        assert (result.shape, result.dtype, result.device) == (w.shape, w.dtype, w.device)
        assert result.isfinite().all()
    assert torch.equal(w, before), "w was changed in place"


def prox_is_minimal(
    penalty: Proximable, w: Tensor, step: float | Tensor, *, seed: int = 0, attempts: int = 60
) -> None:
    """Check that no perturbation of the prox, at any scale, lowers the objective."""
    nearest = penalty.prox(w, step)
    best = objective(penalty, nearest, w, step)
    assert best.isfinite(), f"the prox left the domain: {nearest}"
    slack = 1e-10 * (1 + best.abs())
    source = torch.Generator().manual_seed(seed)
    for attempt in range(attempts):
        scale = 10.0 ** -(attempt % 6)
        noise = torch.randn(w.shape, generator=source, dtype=w.dtype).to(w.device)
        sparse = noise * (torch.rand(w.shape, generator=source).to(w.device) < 0.3)
        for moved in (nearest + scale * noise, nearest + scale * sparse, nearest * (1 + scale)):
            for candidate in (moved, penalty.prox(moved, step)):  # also feasible
                found = objective(penalty, candidate, w, step)
                assert found >= best - slack, f"{found} at {candidate} is below {best}"
    for candidate in (w, torch.zeros_like(w)):
        assert objective(penalty, candidate, w, step) >= best - slack


def prox_beats_grid(penalty: Proximable, entry: float, step: float, points: int = 4001) -> None:
    """Check in one dimension that the prox is as good as the best point of a dense grid."""
    w = torch.full((1, 1), entry, dtype=torch.float64)
    best = objective(penalty, penalty.prox(w, step), w, step)
    limit = 2 * abs(entry) + 2
    grid = torch.linspace(-limit, limit, points, dtype=torch.float64).reshape(-1, 1, 1)
    found = torch.vmap(lambda z: objective(penalty, z, w, step))(grid)
    assert found.min() >= best - 1e-10, f"{grid[found.argmin()]} is better than the prox"


def prox_is_firm(penalty: Proximable, x: Tensor, y: Tensor, step: float | Tensor) -> None:
    """Check that a convex prox is firmly non-expansive in its metric."""
    if not penalty.convex:
        return
    moved, given = penalty.prox(x, step) - penalty.prox(y, step), x - y
    left, right = (moved * moved / step).sum(), (moved * given / step).sum()
    assert left <= right + 1e-9 * (1 + right.abs()), f"{left} > {right}"


def envelope_gradient(penalty: Proximable, w: Tensor, step: float | Tensor) -> None:
    """Check that the gradient of a convex penalty's Moreau envelope is (w - prox) / step."""
    if not penalty.convex:
        return
    expected = (w - penalty.prox(w, step)) / step
    direction = torch.ones_like(w).cumsum(-1).sin()
    small = 1e-5
    ahead = moreau_envelope(penalty, w + small * direction, step)
    behind = moreau_envelope(penalty, w - small * direction, step)
    slope = (ahead - behind) / (2 * small)
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-4, atol=1e-4)


def non_finite_stays_visible(penalty: Proximable, w: Tensor, step: float | Tensor) -> None:
    """Check that non-finite weights, also with such steps, stay so or raise a ValueError."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        for entry in (0, -1):
            diverged, size = w.clone(), step
            diverged.view(-1)[entry] = bad
            if bad != bad and (size := torch.as_tensor(step).clone()).ndim:
                size.view(-1)[entry] = bad
            try:
                left = penalty.prox(diverged, size).reshape(-1)[entry]
            except ValueError as error:
                assert "NaN or infinite" in str(error), error
                continue
            assert not left.isfinite(), f"{bad} becomes {left}"


def zero_step_is_identity(penalty: Proximable, w: Tensor) -> None:
    """Check that step 0 and strength 0 leave w unchanged (a constraint ignores both)."""
    if penalty.constraint:
        allowed = penalty.prox(w, 1.0)
        torch.testing.assert_close(penalty.prox(allowed, 0.0), allowed)
        return
    w = penalty.prox(w, 0.5)  # in the domain
    torch.testing.assert_close(penalty.prox(w, 0.0), w)
    torch.testing.assert_close(penalty.with_strength(0.0).prox(w, 0.5), w)
    if penalty.diagonal:
        torch.testing.assert_close(penalty.prox(w, torch.zeros_like(w)), w)


def constant_metric_is_a_number(penalty: Proximable, w: Tensor, step: float) -> None:
    """Check that a tensor step with equal entries acts as a number, or is refused by name."""
    metric = torch.full_like(w, step)
    if penalty.diagonal:
        torch.testing.assert_close(penalty.prox(w, metric), penalty.prox(w, step))
        return
    try:
        penalty.prox(w, metric)
    except ValueError as error:
        assert type(penalty).__name__ in str(error)
    else:
        raise AssertionError("diagonal is False, but a tensor step was accepted")


def vmap_is_a_loop(penalty: Proximable, stack: Tensor) -> None:
    """Check that vmap over a stack of weights, strengths and steps equals a loop."""
    strengths = torch.linspace(0.1, 0.7, len(stack), dtype=stack.dtype, device=stack.device)
    steps = strengths.flip(0) + 0.2

    def all_of(w: Tensor, strength: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        member = penalty.with_strength(strength)
        results = (member.grad(w), member.prox(w, step), member.value(w))
        return (*results, member.prox(w, step * (1 + w * w))) if penalty.diagonal else results

    batched = torch.vmap(all_of)(stack, strengths, steps)
    looped = [all_of(*row) for row in zip(stack, strengths, steps)]
    for together, apart in zip(batched, zip(*looped)):
        torch.testing.assert_close(together, torch.stack(apart))
