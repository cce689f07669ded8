"""Proxes and gradients in place, in about one pass over memory, for the penalties used most.

A kernel changes the weights where they lie. On a CPU it walks through them in blocks that stay in
the cache, with two small buffers in place of full-size temporaries. In the metric of an adaptive
optimizer, large tensors go to one kernel built by torch.compile (see `compile_from`).

The contract: a function returns True if it has done its work in place, and False, having changed
nothing, if it has no kernel for the case; then the caller uses `penalty.prox` or `penalty.grad`.
Both give the same numbers up to rounding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from tikhon.penalties.base import Penalty
from tikhon.penalties.elementwise import L1, L2, ElasticNet
from tikhon.penalties.group import GroupLasso, row_norms, shrink_rows

BLOCK = 98_304  # entries; smaller ones pay more for calls, and two buffers stay under 1 MB

# entries from which a tensor is worth a compilation (seconds, once a process), by device type
_compile_from: dict[str, float] = {"cpu": 2.0**24, "cuda": 2.0**20}
_compiled: dict[str, Callable[..., None] | None] = {}


def compile_from(entries: float, device: str = "cpu") -> float:
    """Set from how many entries on a device kernels are compiled; returns what it was.

    `math.inf` switches compilation off, as the environment variable `TIKHON_COMPILE=0` does. The
    choice depends on size alone, so that a resumed run takes the same kernels; where there is no
    working compiler the eager blocks are used, silently.

    >>> before = compile_from(float("inf"))
    >>> compile_from(before)
    inf
    """
    before = _compile_from.get(device, float("inf"))
    _compile_from[device] = entries
    return before


@torch.no_grad()
def prox_(
    penalty: Penalty,
    w: Tensor,
    step: float | Tensor,
    *,
    moment: Tensor | None = None,
    scale: float | Tensor = 1.0,
    eps: float = 0.0,
) -> bool:
    """Replace w by `penalty.prox(w, step)` in place; False if there is no kernel for the case.

    With `moment` the step of an entry is `step / (sqrt(moment)/scale + eps)`, the gain of an
    adaptive optimizer, which is never stored. There are kernels for L1, ElasticNet and GroupLasso
    without weights, for contiguous float32 and float64 tensors and numbers (not tensors) as
    strength, step and scale.

    >>> from tikhon.penalties import L1
    >>> w = torch.tensor([3.0, -1.5])
    >>> prox_(L1(1.0), w, 1.0), w
    (True, tensor([ 2.0000, -0.5000]))
    """
    if not (_fits(penalty, w, step, scale) and (moment is None or _alike(w, moment))):
        return False
    step, scale, strength = float(step), float(scale), float(penalty.strength)
    if moment is not None:
        step, eps = step * scale, eps * scale  # step / (sqrt(moment) + eps)
    if isinstance(penalty, GroupLasso):
        return _group_(penalty, w, step, moment, eps)
    ratio = penalty.l1_ratio if isinstance(penalty, ElasticNet) else 1.0
    l1, l2 = step * strength * ratio, step * strength * (1 - ratio)
    if isinstance(penalty, L2) or l1 == 0:
        return False
    if moment is None:
        _shrink_(w, l1, l2)
    elif not _shrink_compiled_(w, moment, l1, l2, eps):
        _shrink_in_metric_(w, moment, l1, l2, eps)
    return True


@torch.no_grad()
def add_gradient_(penalty: Penalty, gradient: Tensor, w: Tensor) -> bool:
    """Add `penalty.grad(w)` to `gradient` in place; False if there is no kernel for the case.

    There are kernels for L2, ElasticNet and L1 without weights and center, under the conditions
    of `prox_`.

    >>> from tikhon.penalties import L2
    >>> gradient = torch.ones(2)
    >>> add_gradient_(L2(0.5), gradient, torch.tensor([2.0, -2.0])), gradient
    (True, tensor([2., 0.]))
    """
    if isinstance(penalty, GroupLasso) or not (_fits(penalty, w) and _alike(w, gradient)):
        return False
    strength = float(penalty.strength)
    if type(penalty) is L2:
        gradient.add_(w, alpha=strength)
        return True
    ratio = penalty.l1_ratio if isinstance(penalty, ElasticNet) else 1.0
    for x, g, sign in _blocks(w, gradient, buffers=1):
        torch.sign(x, out=sign)
        g.add_(sign, alpha=strength * ratio)
        if ratio < 1:
            g.add_(x, alpha=strength * (1 - ratio))
    return True


def _fits(penalty: Penalty, w: Tensor, *numbers: Any) -> bool:
    """Whether there is a kernel for this penalty (exactly), these weights and these numbers."""
    plain = (
        type(penalty) in (L1, L2, ElasticNet, GroupLasso)
        and getattr(penalty, "weights", None) is None
        and getattr(penalty, "center", None) is None
    )
    return (
        plain
        and all(isinstance(x, (float, int)) for x in (penalty.strength, *numbers))
        and w.dtype in (torch.float32, torch.float64)
        and w.is_contiguous()
        and w.numel() > 0
        and not torch.compiler.is_compiling()
        and type(w) in (Tensor, torch.nn.Parameter)
        and not is_batchedtensor(w)
    )


def _alike(w: Tensor, other: Tensor) -> bool:
    return (other.shape, other.dtype, other.device, other.is_contiguous()) == (
        w.shape,
        w.dtype,
        w.device,
        True,
    )


def _block(w: Tensor) -> int:
    """Entries in a block: half a block for each thread, or enough to keep a GPU busy."""
    return BLOCK * max(1, torch.get_num_threads() // 2) if w.device.type == "cpu" else 64 * BLOCK


def _blocks(*tensors: Tensor, buffers: int) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding blocks of flat tensors, with buffers of the same length."""
    flat = [tensor.view(-1) for tensor in tensors]
    size = min(_block(flat[0]), len(flat[0]))
    spare = [flat[0].new_empty(size) for _ in range(buffers)]
    if size == len(flat[0]):
        yield (*flat, *spare)
        return
    for parts in zip(*(tensor.split(size) for tensor in flat)):
        length = len(parts[0])
        yield (*parts, *(spare if length == size else [buffer[:length] for buffer in spare]))


def _shrink_(w: Tensor, l1: float, l2: float) -> None:
    if l2 == 0:
        torch.ops.aten.softshrink.out(w, l1, out=w)
        return
    for (x,) in _blocks(w, buffers=0):
        torch.ops.aten.softshrink.out(x, l1, out=x)
        x.div_(1 + l2)


def _shrink_in_metric_(w: Tensor, moment: Tensor, l1: float, l2: float, eps: float) -> None:
    threshold = w.new_full((), l1)
    for x, v, t, clipped in _blocks(w, moment, buffers=2):
        torch.sqrt(v, out=t)
        t.add_(eps)
        torch.div(threshold, t, out=t)
        torch.neg(t, out=clipped)
        torch.clamp(x, clipped, t, out=clipped)
        x.sub_(clipped)
        if l2:
            x.div_(t.mul_(l2 / l1).add_(1))


def _group_(
    penalty: GroupLasso, w: Tensor, step: float, moment: Tensor | None, eps: float
) -> bool:
    if w.ndim < 2:
        return False
    rows, strength = w.view(w.shape[0], -1), float(penalty.strength)
    if penalty.scale_by_size:
        strength = strength * rows.shape[1] ** 0.5
    tiny = torch.finfo(w.dtype).tiny
    count = max(1, _block(w) // rows.shape[1])
    moments = [None] * len(rows) if moment is None else moment.view(rows.shape).split(count)
    for part, v in zip(rows.split(count), moments):
        if v is None:
            norms = row_norms(part).clamp_min_(tiny)
            part.mul_((1 - step * strength / norms).clamp_min_(0))
        else:
            part.copy_(shrink_rows(part, step / v.sqrt().add_(eps), strength))
    return True


def _shrink_compiled_(w: Tensor, moment: Tensor, l1: float, l2: float, eps: float) -> bool:
    """The same in one compiled pass, if the tensor is large and a compiler works."""
    if w.numel() < _compile_from.get(w.device.type, float("inf")):
        return False
    fused = _soft if l2 == 0 else _soft_and_scale
    key = f"{w.device.type} {fused.__name__}"
    if key not in _compiled:
        off = os.environ.get("TIKHON_COMPILE", "1") == "0"
        _compiled[key] = None if off else torch.compile(fused, dynamic=True, fullgraph=True)
    kernel = _compiled[key]
    if kernel is None:
        return False
    # numbers go in as 0-d tensors: no recompilation when strengths or rates move; .data hides the
    # base of the views, whose shape would be guarded
    numbers = (w.new_full((), x) for x in (l1, l2, eps))
    try:
        with warnings.catch_warnings(action="ignore"):  # of the compiler's own making
            kernel(w.view(-1).data, moment.view(-1).data, *numbers)
    except Exception:  # while compiling: nothing has been computed yet
        _compiled[key] = None
        return False
    return True


def _soft(w: Tensor, moment: Tensor, l1: Tensor, l2: Tensor, eps: Tensor) -> None:
    threshold = l1 / (moment.sqrt() + eps)
    w.copy_(w - w.clamp(-threshold, threshold))


def _soft_and_scale(w: Tensor, moment: Tensor, l1: Tensor, l2: Tensor, eps: Tensor) -> None:
    root = moment.sqrt() + eps
    threshold = l1 / root
    w.copy_((w - w.clamp(-threshold, threshold)) / (1 + l2 / root))
