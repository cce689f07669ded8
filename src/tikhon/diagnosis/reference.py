"""Yardsticks from the data alone: what a constant reaches, what the head can reach, and what a

plain shallow model reaches on the same rows. They replace absolute thresholds on accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tikhon.data.rows import Batch, tensors

Loss = Callable[[Any, Any], Tensor]
MANY_CLASSES = 1000  # of a ridge on one-hot targets; more are numbers or a vocabulary


def constant_loss(output: Tensor, target: Any, loss: Loss, tail: Loss | None = None) -> float:
    """The smallest loss of a constant output: the trivial predictor, for any loss.

    With `tail` (the activations behind the last layer) the constant is what enters it.
    """
    return _minimise(output.detach().mean(0, keepdim=True), len(output), target, loss, tail)


def free_loss(output: Tensor, target: Any, loss: Loss, tail: Loss | None = None) -> float:
    """The smallest loss when each row has an output of its own: the floor of loss and head."""
    return _minimise(output.detach(), None, target, loss, tail)


def _minimise(
    start: Tensor, rows: int | None, target: Any, loss: Loss, tail: Any, iterations: int = 25
) -> float:
    def reach(free: Tensor) -> float:
        solver = torch.optim.LBFGS([free], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            output = free if rows is None else free.expand(rows, *free.shape[1:])
            value = loss(tail(output) if tail is not None else output, target)
            if value.requires_grad:
                value.backward()
            return value

        try:
            with torch.enable_grad():
                solver.step(closure)  # type: ignore[arg-type]
                return float(closure().detach())
        except (RuntimeError, ValueError, IndexError):
            return math.nan

    # from zero, and from above: a rectified head is flat at zero
    starts = (torch.zeros_like(start), start.clone() + 1.0)
    reached = [reach(s.requires_grad_()) for s in starts]
    return min((v for v in reached if math.isfinite(v)), default=math.nan)


def shallow_skill(batch: Batch, *, width: int = 256, seed: int = 0) -> dict[str, float]:
    """Held-out accuracy (classes) or R2 (numbers) of a ridge on the inputs and random features.

    Half of the rows are fitted, half judge; `constant` is the skill of the best constant.
    Empty where inputs are not one float tensor or the targets are neither classes nor numbers.
    """
    inputs, target = batch
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return {}
    if not inputs.is_floating_point() or target.ndim > 2 or len(inputs) < 24:
        return {}
    x = inputs.detach().double().flatten(1)
    if x.shape[1] > 4096 or not bool(torch.isfinite(x).all()):
        return {}
    x = x - x.mean(0)
    x = x / x.std(0).clamp_min(1e-9 + 1e-6 * float(x.abs().max()))
    classes = not target.is_floating_point() and target.ndim == 1
    if classes and not 0 <= int(target.min()) <= int(target.max()) < MANY_CLASSES:
        return {}
    y = torch.nn.functional.one_hot(target.long()).double() if classes else target.double()
    y = y.reshape(len(y), -1)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    projection = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64)
    shift = torch.randn(width, generator=generator, dtype=torch.float64)
    hidden = torch.relu(x.cpu() @ projection / math.sqrt(x.shape[1]) + shift)
    design = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x.cpu(), hidden], 1)
    order = torch.randperm(len(x), generator=generator)
    fit, judge = order[: len(x) // 2], order[len(x) // 2 :]
    y = y.cpu()
    best = -math.inf
    for ridge in (0.3, 10.0, 300.0):
        gram = design[fit].T @ design[fit] + ridge * torch.eye(design.shape[1]).double()
        weights = torch.linalg.solve(gram, design[fit].T @ y[fit])
        best = max(best, _held_out(design[judge] @ weights, y[judge], classes))
    constant = float(y.mean(0).max()) if classes else 0.0
    return {"shallow": best, "constant": constant}


def _held_out(output: Tensor, y: Tensor, classes: bool) -> float:
    if classes:
        return float((output.argmax(1) == y.argmax(1)).double().mean())
    spread = float((y - y.mean(0)).square().mean())
    return 1 - float((output - y).square().mean()) / spread if spread > 0 else 0.0


def shifts_out(output: Tensor, target: Any, loss: Loss) -> bool:
    """Whether adding a constant to every output leaves the loss alone: it has its own softmax."""
    try:
        with torch.no_grad():
            before, after = float(loss(output, target)), float(loss(output + 0.7, target))
    except (RuntimeError, ValueError, IndexError):
        return False
    return math.isfinite(before) and abs(after - before) <= 1e-4 * (abs(before) + 1e-6)


def grows_with_batch(output: Any, target: Any, loss: Loss) -> bool:
    """Whether the same rows twice give twice the loss: a sum where a mean is expected."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return False
    try:
        with torch.no_grad():
            once = float(loss(output, target))
            twice = float(loss(torch.cat([output] * 2), torch.cat([target] * 2)))
    except (RuntimeError, ValueError, IndexError):
        return False
    return once > 0 and math.isfinite(once) and abs(twice / once - 2) < 0.02


def scale(value: Any) -> dict[str, float]:
    """Size of float tensors: rms, mean, deviation and absolute maximum."""
    parts = [t.detach().double() for t in tensors(value) if t.is_floating_point()]
    if not parts:
        return {}
    flat = parts[0]
    finite = bool(all(bool(torch.isfinite(p).all()) for p in parts))
    if not finite:
        return {"finite": 0.0}
    return {
        "finite": 1.0,
        "rms": float(flat.square().mean().sqrt()),
        "mean": float(flat.mean()),
        "std": float(flat.std()) if flat.numel() > 1 else 0.0,
        "largest": float(flat.abs().max()),
    }
