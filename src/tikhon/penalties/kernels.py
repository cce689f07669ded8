"""Proxes and gradients in place, in about one pass over memory, for the penalties used most.

A kernel changes the weights where they lie. On a CPU it walks through them in blocks that stay in
the cache, with two small buffers in place of full-size temporaries. From some size on one compiled
pass takes over: C on a CPU (see `native`), torch.compile on a GPU. MCP, SCAD, LogSum, Box and
NonNegative have the pass in C alone. TIKHON_COMPILE=0 in the environment switches it off.

The contract: a function returns True if it has done its work in place, and False, having changed
nothing, if it has no kernel for the case; then the caller uses `penalty.prox` or `penalty.grad`.
Both give the same numbers up to rounding.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from tikhon.penalties import native
from tikhon.penalties.base import Penalty, Proximable
from tikhon.penalties.constraints import Box, MaxNorm, MinMaxNorm, NonNegative, UnitNorm
from tikhon.penalties.elementwise import L1, L2, MCP, SCAD, ElasticNet, Huber, LogSum
from tikhon.penalties.group import (
    GroupLasso,
    GroupMCP,
    LInf,
    SparseGroupLasso,
    row_norms,
    shrink_rows_by,
)
from tikhon.penalties.native import KernelJob, Kind

softshrink: Any = torch.nn.functional.softshrink  # its stub lacks `out`
_torch: Any = torch  # its _foreach functions are public in all but their names
BLOCK = 122_880  # entries; smaller ones pay more for calls, and two buffers stay under 1 MB
SMALL = 16_384  # entries up to which tensors go together through torch._foreach

# entries that are worth a compilation once a process; size alone decides, so that a resumed run
# takes the same kernels. In C it takes under a second, and saves a
# step of fewer entries 0.2 ms at most; torch.compile on a GPU takes several seconds
_compile_from: dict[str, float] = {"cpu": 2.0**16, "cuda": 2.0**20}
_compiled: dict[str, Callable[..., None] | None] = {}


def compile_from(entries: float, device: str = "cpu") -> float:
    """Set from how many entries on kernels are compiled; returns what it was, for measurements."""
    before = _compile_from.get(device, math.inf)
    _compile_from[device] = entries
    return before


def prox_(
    penalty: Penalty,
    w: Tensor,
    step: float | Tensor,
    *,
    moment: Tensor | None = None,
    scale: float | Tensor = 1.0,
    eps: float = 0.0,
    max_step: float | Tensor = math.inf,
) -> bool:
    """Replace w by `penalty.prox(w, step)` in place; False if there is no kernel for the case.

    With `moment` the step of an entry is `step / (sqrt(moment)/scale + eps)`, at most `max_step`:
    the gain of an adaptive optimizer, which is never stored. There are kernels for L1, ElasticNet
    and GroupLasso, and in C for MCP, SCAD, LogSum, Box and NonNegative, all without weights, for
    contiguous float32 and float64 tensors and numbers (not tensors) as strength, step and scale.

    >>> from tikhon.penalties import L1
    >>> w = torch.tensor([3.0, -1.5])
    >>> prox_(L1(1.0), w, 1.0), w
    (True, tensor([ 2.0000, -0.5000]))
    """
    if torch.compiler.is_compiling() or not (has_kernel(penalty) and is_supported(w)):
        return False
    form = kernel_form(penalty, w)
    if form is None or not (moment is None or has_same_layout(w, moment)):
        return False
    found = make_job(form, penalty.strength, w, step, moment, scale, eps, max_step=max_step)
    if found is None:
        return False
    run([found])
    return True


@torch.no_grad()
def prox_in_blocks_(penalty: Proximable, w: Tensor, step: float | Tensor) -> bool:
    """Replace w by `penalty.prox(w, step)`, some rows at a time; False where rows are not apart.

    For sums over entries or rows without weights, of which the temporaries then stay in the cache.

    >>> from tikhon.penalties import MaxNorm
    >>> w = torch.ones(2, 4)
    >>> prox_in_blocks_(MaxNorm(1.0), w, 1.0), w
    (True, tensor([[0.5000, 0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000, 0.5000]]))
    """
    apart = type(penalty) in _ROW_SEPARABLE and _is_unweighted(penalty) and w.ndim > 1
    if not (apart and w.is_cpu and is_supported(w)) or torch.compiler.is_compiling():
        return False
    count = max(1, _block_size(w) * len(w) // w.numel())
    steps = step.expand_as(w).split(count) if isinstance(step, Tensor) else repeat(step)
    for part, its in zip(w.split(count), steps):
        part.copy_(penalty.prox(part, its))
    return True


class KernelForm(NamedTuple):
    """A penalty as the kernels see it, apart from its strength: a kind and its numbers."""

    kind: Kind
    first: float = 0.0
    second: float = 0.0


def kernel_form(penalty: Penalty, w: Tensor) -> KernelForm | None:
    """How a kernel does the prox on weights of this shape; None if there is no kernel."""
    if not has_kernel(penalty):
        return None
    match penalty:
        case ElasticNet():
            return KernelForm(Kind.ENTRIES, penalty.l1_ratio, 1 - penalty.l1_ratio)
        case GroupLasso() | SparseGroupLasso():
            factor = (w.numel() // len(w)) ** 0.5 if penalty.scale_by_size and len(w) else 1.0
            single = penalty.l1_ratio if isinstance(penalty, SparseGroupLasso) else 0.0
            return KernelForm(Kind.ROWS, (1 - single) * factor, single) if w.ndim > 1 else None
        case L1():
            return KernelForm(Kind.ENTRIES, 1.0)
        case MCP():
            return KernelForm(Kind.FIRM, penalty.gamma)
        case SCAD():
            return KernelForm(Kind.CLIPPED, penalty.a)
        case LogSum():
            return KernelForm(Kind.LOG_SUM, penalty.epsilon)
        case Box():
            return KernelForm(Kind.CLAMP, penalty.low, penalty.high)
        case NonNegative():
            return KernelForm(Kind.CLAMP, 0.0, math.inf)
    return None


def make_job(
    form: KernelForm,
    strength: Any,
    w: Tensor,
    step: float | Tensor,
    moment: Tensor | None = None,
    scale: float | Tensor = 1.0,
    eps: float = 0.0,
    min_moment: float | Tensor = 0.0,
    max_step: float | Tensor = math.inf,
) -> KernelJob | None:
    """The work of `run` for one tensor; None if nothing would move or a number is a tensor.

    For weights that are supported, and a moment of the same layout, which C lifts to `min_moment`
    afterwards. No step is longer than `max_step`.
    """
    if form.kind is Kind.CLAMP:
        return (
            KernelJob(w, None, form.kind, 0.0, form.first, form.second)
            if _has_own_kernel(w)
            else None
        )
    if isinstance(strength, Tensor) or isinstance(step, Tensor) or isinstance(scale, Tensor):
        return None
    if isinstance(min_moment, Tensor) or isinstance(max_step, Tensor):
        return None
    size = strength * step
    if moment is not None:  # size / (sqrt(moment) / scale + eps)
        size, eps = size * scale, eps * scale
    if not size:
        return None
    if form.kind in (Kind.ENTRIES, Kind.ROWS):
        first, second = size * form.second, 0.0
        return KernelJob(
            w, moment, form.kind, size * form.first, first, second, eps, min_moment=min_moment
        )
    if not _has_own_kernel(w):
        return None
    numbers = _piecewise_numbers(form, strength, step if moment is None else max_step)
    if numbers is not None:
        return KernelJob(
            w, moment, form.kind, size, *numbers, eps, max_step * strength, min_moment
        )
    if form.kind is Kind.FIRM and moment is None:
        return KernelJob(w, None, Kind.HARD, strength * math.sqrt(step * form.first))
    return None


def _piecewise_numbers(
    form: KernelForm, strength: float, longest: float
) -> tuple[float, float] | None:
    """The numbers of a kernel that goes by pieces; None where a step makes these cross."""
    if form.kind is Kind.FIRM:
        return (form.first * strength, 0.0) if longest < form.first else None
    if form.kind is Kind.CLIPPED:
        return (strength, form.first) if longest < form.first - 1 else None
    return form.first, 0.0


def _has_own_kernel(w: Tensor) -> bool:
    """Whether these weights alone are worth a kernel in C, and there is one."""
    large = w.is_cpu and w.numel() >= _compile_from["cpu"]
    return large and native.library(w.dtype) is not None


def run(jobs: Sequence[KernelJob]) -> bool:
    """The proxes in place: in C where they are large enough in all and a compiler works.

    Returns whether it was C, which lifts moments.
    """
    entries = 0
    for job in jobs:
        entries += job.w.numel()
    if entries >= _compile_from["cpu"] and all(
        job.w.is_cpu and native.library(job.w.dtype) is not None for job in jobs
    ):
        native.run(jobs)
        return True
    _run_in_blocks(jobs)
    return False


@torch.no_grad()
def _run_in_blocks(jobs: Sequence[KernelJob]) -> None:
    together: dict[tuple[float, float, float], list[KernelJob]] = {}
    for job in jobs:
        w, moment, kind, size, other, _, eps, *_ = job
        if kind is Kind.ROWS:
            if other and moment is None:
                _soft_and_divide_(w, other, 0.0)
            elif other and moment is not None:
                _shrink_in_metric_(w, moment, other, 0.0, eps)
            _shrink_rows_(w, moment, size, eps)
        elif moment is None:
            _soft_and_divide_(w, size, other)
        elif w.numel() <= SMALL and len(jobs) > 1:
            together.setdefault((size, other, eps), []).append(job)
        elif w.is_cpu or not _shrink_compiled_(w, moment, size, other, eps):
            _shrink_in_metric_(w, moment, size, other, eps)
    at_once = max(1, BLOCK // SMALL)
    for numbers, small in together.items():
        for start in range(0, len(small), at_once):
            part = small[start : start + at_once]
            moments = [job.moment for job in part if job.moment is not None]
            _shrink_together_([job.w for job in part], moments, *numbers)


@torch.no_grad()
def add_gradient_(penalty: Penalty, gradient: Tensor, w: Tensor, factor: float) -> bool:
    """Add `factor * penalty.grad(w)` to `gradient` in place, in blocks; False if it cannot be.

    It can for L2 and Huber without weights and center, under the conditions of `prox_`.

    >>> from tikhon.penalties import L2
    >>> gradient = torch.ones(2)
    >>> add_gradient_(L2(0.5), gradient, torch.tensor([2.0, -2.0]), 1.0), gradient
    (True, tensor([2., 0.]))
    """
    plain = type(penalty) in (L2, Huber) and _is_unweighted(penalty)
    if torch.compiler.is_compiling() or not (
        plain and is_supported(w) and has_same_layout(w, gradient)
    ):
        return False
    for x, g in _blocks(w, gradient, buffers=0):
        g.add_(penalty.grad(x), alpha=factor)
    return True


_WITH_KERNEL = (L1, ElasticNet, GroupLasso, SparseGroupLasso, MCP, SCAD, LogSum, Box, NonNegative)
_ROW_SEPARABLE = (*_WITH_KERNEL, GroupMCP, LInf, MaxNorm, MinMaxNorm, UnitNorm)


def has_kernel(penalty: Penalty) -> bool:
    """Whether there is a kernel: for exactly these classes, without weights, with an L1 part."""
    return (
        type(penalty) in _WITH_KERNEL
        and getattr(penalty, "l1_ratio", 1.0) > 0
        and _is_unweighted(penalty)
    )


def _is_unweighted(penalty: Penalty) -> bool:
    """Whether it treats all entries alike."""
    return getattr(penalty, "weights", None) is None and getattr(penalty, "center", None) is None


def is_supported(w: Tensor) -> bool:
    """Whether the kernels can work in the memory of these weights."""
    return (
        type(w) in (Tensor, torch.nn.Parameter)
        and w.dtype in (torch.float32, torch.float64)
        and w.is_contiguous()
        and w.numel() > 0
        and not is_functorch_wrapped_tensor(w)
    )


def has_same_layout(w: Tensor, other: Tensor) -> bool:
    """Whether a moment or a gradient lies in memory as the weights do."""
    return (
        other.dtype is w.dtype
        and other.is_contiguous()
        and other.shape == w.shape
        and other.device == w.device
    )


def _block_size(w: Tensor) -> int:
    """Entries in a block: half a block for each thread, or enough to keep a GPU busy."""
    return BLOCK * max(1, torch.get_num_threads() // 2) if w.device.type == "cpu" else 64 * BLOCK


def _blocks(*tensors: Tensor, buffers: int) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding blocks of flat tensors, equal in length, with buffers of that length."""
    flat = [tensor.view(-1) for tensor in tensors]
    entries = len(flat[0])
    size = -(-entries // -(-entries // _block_size(flat[0])))
    spare = [flat[0].new_empty(size) for _ in range(buffers)]
    if size == entries:
        yield (*flat, *spare)
        return
    for parts in zip(*(tensor.split(size) for tensor in flat)):
        length = len(parts[0])
        yield (*parts, *(spare if length == size else [buffer[:length] for buffer in spare]))


def _soft_and_divide_(w: Tensor, l1: float, l2: float) -> None:
    if not l2:
        softshrink(w, l1, out=w)  # one pass as it is
        return
    for (x,) in _blocks(w, buffers=0):
        softshrink(x, l1, out=x)
        x.div_(1 + l2)


def _shrink_in_metric_(w: Tensor, moment: Tensor, l1: float, l2: float, eps: float) -> None:
    threshold = w.new_full((), l1)
    largest = torch.finfo(w.dtype).max ** 0.5  # the root of a moment that has overflowed
    for x, v, t, clipped in _blocks(w, moment, buffers=2):
        torch.sqrt(v, out=t)
        t.add_(eps)
        if l2:
            softshrink(x.mul_(t.clamp_max_(largest)), l1, out=x)
            x.div_(t.add_(l2))
            continue
        torch.div(threshold, t, out=t)
        torch.neg(t, out=clipped)
        torch.clamp(x, clipped, t, out=clipped)
        x.sub_(clipped)


def _shrink_together_(
    weights: list[Tensor], moments: list[Tensor], l1: float, l2: float, eps: float
) -> None:
    thresholds = _torch._foreach_sqrt(moments)
    _torch._foreach_add_(thresholds, eps)
    if l2:
        _torch._foreach_clamp_max_(thresholds, torch.finfo(weights[0].dtype).max ** 0.5)
        _torch._foreach_mul_(weights, thresholds)
        for w in weights:
            softshrink(w, l1, out=w)
        _torch._foreach_add_(thresholds, l2)
        _torch._foreach_div_(weights, thresholds)
        return
    _torch._foreach_reciprocal_(thresholds)
    _torch._foreach_mul_(thresholds, l1)
    clipped = _torch._foreach_minimum(weights, thresholds)
    _torch._foreach_maximum_(clipped, _torch._foreach_neg(thresholds))
    _torch._foreach_sub_(weights, clipped)


def _shrink_rows_(w: Tensor, moment: Tensor | None, size: float, eps: float) -> None:
    rows = w.view(w.shape[0], -1)
    count = max(1, _block_size(w) // rows.shape[1])
    if moment is None:
        tiny = torch.finfo(w.dtype).tiny
        for part in rows.split(count):
            norms = row_norms(part)
            left = softshrink(norms, size)
            part.mul_(left.div_(norms.clamp_min_(tiny)))
        return
    sizes = w.new_full((), size)
    for part, v in zip(rows.split(count), moment.view(rows.shape).split(count)):
        shift = torch.sqrt(v).add_(eps)
        _shrink_block_(part, torch.div(sizes, shift, out=shift))


def _shrink_block_(rows: Tensor, shift: Tensor) -> None:
    """Rows shrunk in their metric, `shift` being strength * step: by series where it is exact.

    With p_j = row_j^2/|row|^2 the root of `|row / (t + shift)| = 1` is, in powers of shift/|row|,
    t = |row| - mean + 3/2 variance/|row|, mean and variance of the shifts under p. What is cut off
    is at most of the size max(shift) * E[shift^2] / |row|^2, and moves the result by
    max(shift)/|row| times that. Rows for which it could be seen are solved by iteration.
    """
    if rows.device.type != "cpu":  # choosing rows would need a transfer
        rows.copy_(shrink_rows_by(rows, shift))
        return
    limits = torch.finfo(rows.dtype)
    norms, largest = row_norms(rows).clamp_min_(limits.tiny), shift.amax(1, keepdim=True)
    moved = rows * shift
    if (
        largest <= 0.5 * limits.eps**0.5 * norms
    ).all():  # then t + shift is |row| but for rounding
        rows.addcdiv_(moved, norms, value=-1)
        return
    squares = norms.square().clamp_min_(limits.tiny)
    spread = row_norms(moved).square_() / squares
    seen = largest.square() * spread > limits.eps / 8 * squares.square()
    far = (seen | (norms < limits.tiny**0.25)).nonzero()[:, 0]  # below that squares underflow
    solved = _solved(rows[far], shift[far]) if len(far) else None
    if solved is None or len(far) < len(rows):
        mean = torch.linalg.vecdot(rows, moved, dim=1)[:, None] / squares
        root = norms - mean + 1.5 * (spread - mean * mean) / norms
        rows.addcdiv_(moved, shift.add_(root), value=-1)
    if solved is not None:
        rows[far] = solved


def _solved(rows: Tensor, shift: Tensor) -> Tensor:
    """`shrink_rows_by`, iterating on the rows that do not become zero."""
    gone = row_norms(rows / shift) <= 1  # not for NaN: it must show
    alive = (~gone).nonzero()[:, 0]
    shrunk = torch.zeros_like(rows)
    if len(alive):
        shrunk[alive] = shrink_rows_by(rows[alive], shift[alive])
    return shrunk


def _shrink_compiled_(w: Tensor, moment: Tensor, l1: float, l2: float, eps: float) -> bool:
    """The same in one pass by torch.compile, if the tensor is large and a compiler works."""
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
