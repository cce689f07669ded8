"""Random masks: uniform and normal numbers, shapes, and checks of rates and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict, TypeGuard

import torch
from torch import Generator, Tensor, nn

from tikhon.arguments import MAX_FLOAT32, check_number

Rate = float | Tensor
Caller = str | nn.Module  # names the caller in errors: a name, or a layer with a `label`


def check_rate(rate: object, where: str, *, upper: float = 1.0, closed: bool = True) -> float:
    """Return `rate` as a float in [0, upper], excluding `upper` unless `closed`.

    Error messages begin with `where`.
    """
    given = rate.detach().reshape(()) if isinstance(rate, Tensor) and rate.numel() == 1 else rate
    bracket = "]" if closed else ")"
    bound = "finite and >= 0" if upper == math.inf else f"in [0, {upper:g}{bracket}"
    most = min(upper, MAX_FLOAT32)

    def fine(x: float) -> bool:
        return 0 <= x <= most and (closed or x < upper)

    return float(check_number(where, "the rate", given, bound, fine))


def error_prefix(where: Caller) -> str:
    """Return the start of a message; computed only on failure, as it may search."""
    return where if isinstance(where, str) else str(where.label)


def check_rank(x: Tensor, ranks: Sequence[int], where: Caller, shape: str) -> None:
    """Raise an error naming the expected `shape` unless x has one of the ranks."""
    if x.ndim not in ranks:
        raise ValueError(
            f"{error_prefix(where)}: expected {shape}, received shape {tuple(x.shape)}"
        )


def to_float(rate: Rate) -> Rate:
    """Return the rate as a float if reading it is free (not batched, traced or on a device)."""
    if not isinstance(rate, Tensor):
        return float(rate)
    if torch.compiler.is_compiling() or not rate.is_cpu:
        return rate
    return rate if is_batched(rate) else rate.item()


def is_batched(x: Tensor) -> bool:
    """Return whether x is inside `torch.vmap` or another transform of torch.func."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]


class NoiseDraws(TypedDict, total=False):
    """Keyword arguments of every function of noise: whether it draws, and from what."""

    training: bool  # True by default; else the function returns its input or mean
    generator: Generator | None  # in place of torch's global one
    uniforms: Tensor | None  # numbers in [0, 1) of the mask's shape, in place of drawn ones


def is_off(*, training: bool = True, generator: object = None, uniforms: object = None) -> bool:
    """Return whether these `NoiseDraws` ask for no noise; TypeError for another keyword."""
    return not training


def uses_torch(rate: Rate, draws: NoiseDraws) -> TypeGuard[float]:
    """Return whether torch's own dropout draws the same noise: a plain rate and generator."""
    own = draws.get("generator") is None and draws.get("uniforms") is None
    return type(rate) is float and own


def draw(shape: Sequence[int], like: Tensor, draws: NoiseDraws) -> Tensor:
    """Draw uniform numbers in [0, 1) in float32, as half precision would round the rate."""
    g, uniforms = draws.get("generator"), draws.get("uniforms")
    if uniforms is None:
        # torch.rand refuses symbolic sizes if a generator is passed, even None
        if g is None:
            return torch.rand(tuple(shape), device=like.device)
        return torch.rand(tuple(shape), device=like.device, generator=g)
    if uniforms.shape != torch.Size(shape):
        raise ValueError(
            f"uniforms must have the mask's shape {tuple(shape)}, received {tuple(uniforms.shape)}"
        )
    return uniforms


def draw_normal(like: Tensor, draws: NoiseDraws) -> Tensor:
    """Draw standard normal numbers of `like`'s shape and dtype, or map uniforms by quantiles."""
    if draws.get("uniforms") is None:
        g = draws.get("generator")
        if g is None:
            return torch.randn(like.shape, dtype=like.dtype, device=like.device)
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=g)
    tiny = torch.finfo(torch.float32).eps / 2
    return torch.special.ndtri(draw(like.shape, like, draws).clamp(tiny, 1 - tiny)).to(like)


def check_dims(x: Tensor, dims: Sequence[int], where: Caller) -> None:
    """Raise an error unless x has these dimensions."""
    if not all(-x.ndim <= d < x.ndim for d in dims):
        raise ValueError(
            f"{error_prefix(where)}: expected an input with dimension "
            f"{', '.join(map(str, dims))}, received shape {tuple(x.shape)}"
        )


def inverse_keep(rate: Rate, dtype: torch.dtype) -> Rate:
    """Return 1 / (1 - rate), or 0 at rate 1."""
    if not isinstance(rate, Tensor):
        return 1 / (1 - rate) if rate < 1 else 0.0
    keep = 1 - rate
    return torch.where(keep > 0, 1 / keep, 0.0).to(dtype)


def mask_shape(x: Tensor, tied: Sequence[int]) -> list[int]:
    """Return x's shape with 1 in the tied dimensions."""
    dims = {d % x.ndim for d in tied}
    return [1 if d in dims else n for d, n in enumerate(x.shape)]
