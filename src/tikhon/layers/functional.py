"""The noises as pure functions of a tensor, a rate and a source of random numbers.

Every function takes `rate` as a number or as a 0-d tensor. A tensor may be a buffer that changes
between steps, or be batched by `torch.vmap`, so no code branches on its value. Without
`generator` and `uniforms` the noise comes from torch's global generator; `uniforms` are numbers
in [0, 1) of the mask's shape, which couples two rates: what the larger keeps, the smaller keeps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Rate = float | Tensor


def check_rate(rate: object, where: str, *, upper: float = 1.0) -> float:
    """`rate` as a float in [0, upper), or an error that begins with `where`."""
    if torch.is_tensor(rate) and rate.numel() == 1:
        rate = rate.item()
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{where}: the rate must be a number, received {rate!r}")
    if not (math.isfinite(rate) and 0 <= rate < upper):
        bound = "finite and >= 0" if upper == math.inf else f"in [0, {upper:g})"
        raise ValueError(f"{where}: the rate must be {bound}, received {rate!r}")
    return float(rate)


def readable(rate: Rate) -> float | None:
    """The rate as a float where reading it is free; None if batched, traced or on a device."""
    if not torch.is_tensor(rate):
        return float(rate)
    if torch.compiler.is_compiling() or rate.device.type != "cpu":
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(rate):
        return None
    return rate.item()


def draw(
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator | None,
    uniforms: Tensor | None,
) -> Tensor:
    """Uniform numbers in [0, 1), in float32: half precision would round the rate."""
    if uniforms is None:
        return torch.rand(shape, device=like.device, generator=generator)
    if uniforms.shape != shape:
        raise ValueError(
            f"uniforms must have the mask's shape {tuple(shape)}, received {tuple(uniforms.shape)}"
        )
    return uniforms


def inverse_keep(rate: Rate, dtype: torch.dtype) -> Rate:
    """1 / (1 - rate), and 0 at rate 1, where nothing is kept."""
    if not torch.is_tensor(rate):
        return 1 / (1 - rate) if rate < 1 else 0.0
    keep = 1 - rate
    return torch.where(keep > 0, 1 / keep, 0.0).to(dtype)


def drop(
    x: Tensor,
    rate: Rate,
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    uniforms: Tensor | None,
) -> Tensor:
    """Zero with probability `rate` what shares an entry of a mask of `shape`; scale the rest."""
    kept = draw(shape, x, generator, uniforms) >= rate
    return torch.where(kept, x * inverse_keep(rate, x.dtype), 0)


def dropout(
    x: Tensor,
    rate: Rate,
    *,
    training: bool = True,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Zero every entry with probability `rate` in [0, 1] and scale the rest by 1 / (1 - rate).

    `x` has any shape; `uniforms` have x's. Reference: Srivastava et al. 2014,
    https://jmlr.org/papers/v15/srivastava14a.html

    >>> dropout(torch.ones(4), 0.5, uniforms=torch.tensor([0.1, 0.5, 0.9, 0.4]))
    tensor([0., 2., 2., 0.])
    """
    if not training:
        return x
    if generator is None and uniforms is None and (value := readable(rate)) is not None:
        return F.dropout(x, value)
    return drop(x, rate, x.shape, generator, uniforms)
