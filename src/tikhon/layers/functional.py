"""Noise as pure functions of a tensor, a rate and a source of random numbers.

Every function takes `rate` as a number or as a 0-d tensor. A tensor may be a buffer that changes
between steps, or be batched by `torch.vmap`, so no code branches on its value. `draws` are
`training` (True), `generator` and `uniforms` (None). Without the latter two the noise comes from
torch's global generator; `uniforms` are numbers in [0, 1) of the mask's shape, which couples two
rates: what the larger keeps, the smaller keeps.
`where` opens the message of an error: a name, or the layer that calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from tikhon.layers.masks import (
    Caller,
    NoiseDraws,
    Rate,
    check_rank,
    draw,
    draw_normal,
    error_prefix,
    inverse_keep,
    is_off,
    mask_shape,
    to_float,
    uses_torch,
)
from tikhon.layers.tokens import patch_dropout as patch_dropout, word_dropout as word_dropout


def dropout(
    x: Tensor, rate: Rate, *, tied: Sequence[int] = (), **draws: Unpack[NoiseDraws]
) -> Tensor:
    """Zero every entry with probability `rate` in [0, 1] and scale the rest by 1 / (1 - rate).

    `x` has any shape; the mask is constant along the `tied` dimensions, where `uniforms` have
    size 1. Reference: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html

    >>> dropout(torch.ones(4), 0.5, uniforms=torch.tensor([0.1, 0.5, 0.9, 0.4]))
    tensor([0., 2., 2., 0.])
    """
    if is_off(**draws):
        return x
    rate = to_float(rate)
    if uses_torch(rate, draws):
        if not tied:
            return torch.dropout(x, rate, True)
        mask = torch.empty(mask_shape(x, tied), dtype=x.dtype, device=x.device)
        return x * torch.bernoulli(mask, 1 - rate).mul_(inverse_keep(rate, x.dtype))
    kept = draw(mask_shape(x, tied), x, draws) >= rate
    return x * (kept.to(x.dtype) * inverse_keep(rate, x.dtype))


def spatial_dropout(x: Tensor, rate: Rate, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Zero whole channels of `x` (N, C, ...) with probability `rate`; `uniforms` (N, C, 1, ...).

    Reference: Tompson et al. 2015, https://arxiv.org/abs/1411.4280
    """
    rate = to_float(rate)
    if not is_off(**draws) and uses_torch(rate, draws):
        return torch.feature_dropout(x, rate, True)
    return dropout(x, rate, tied=range(2, x.ndim), **draws)


def locked_dropout(x: Tensor, rate: Rate, *, time: int = 1, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Dropout with one mask for all steps along the dimension `time` (variational dropout).

    Reference: Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287
    """
    return dropout(x, rate, tied=(time,), **draws)


def token_dropout(x: Tensor, rate: Rate, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Zero whole tokens of `x` (..., tokens, features) with probability `rate`, scale the rest."""
    return dropout(x, rate, tied=(-1,), **draws)


def drop_path(x: Tensor, rate: Rate, *, mode: str = "row", **draws: Unpack[NoiseDraws]) -> Tensor:
    """Zero a residual branch for a row, or for the whole batch, with probability `rate`.

    `x` is (N, ...); `mode` is "row" or "batch". Reference: Huang et al. 2016 (stochastic depth),
    https://arxiv.org/abs/1603.09382
    """
    if mode not in ("row", "batch"):
        raise ValueError(f"drop_path: mode must be 'row' or 'batch', received {mode!r}")
    tied = range(1 if mode == "row" else 0, x.ndim)
    return dropout(x, rate, tied=tied, **draws)


SELU_FLOOR = -1.7580993408473766  # -scale * alpha of SELU, its output when saturated


def alpha_dropout(
    x: Tensor, rate: Rate, *, tied: Sequence[int] = (), **draws: Unpack[NoiseDraws]
) -> Tensor:
    """Set entries to SELU's floor with probability `rate`, then restore mean 0 and variance 1.

    Zeros at rate 1. Reference: Klambauer et al. 2017, https://arxiv.org/abs/1706.02515
    """
    if is_off(**draws):
        return x
    rate = to_float(rate)
    if not tied and uses_torch(rate, draws):
        return torch.alpha_dropout(x, rate, True)
    kept = draw(mask_shape(x, tied), x, draws) >= rate
    p = torch.as_tensor(rate, dtype=torch.float32, device=x.device)
    keep = (1 - p) * (1 + p * SELU_FLOOR**2)
    scale = torch.where(keep > 0, keep.rsqrt(), 0.0)
    noise = torch.where(kept, scale, 0.0).to(x.dtype)
    shift = torch.where(kept, 0.0, scale * SELU_FLOOR) - scale * SELU_FLOOR * p
    return (x * noise).add_(shift.to(x.dtype))


def feature_alpha_dropout(x: Tensor, rate: Rate, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Alpha dropout of whole channels of `x` (N, C, ...); `uniforms` are (N, C, 1, ...).

    Reference: Klambauer et al. 2017, https://arxiv.org/abs/1706.02515
    """
    rate = to_float(rate)
    if not is_off(**draws) and uses_torch(rate, draws):
        return torch.feature_alpha_dropout(x, rate, True)
    return alpha_dropout(x, rate, tied=range(2, x.ndim), **draws)


def gaussian_dropout(x: Tensor, rate: Rate, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Multiply every entry by normal noise of mean 1 and of dropout's variance rate / (1 - rate).

    Zeros at rate 1, where the variance is undefined.
    Reference: Srivastava et al. 2014, section 10, https://jmlr.org/papers/v15/srivastava14a.html
    """
    if is_off(**draws):
        return x
    inverse = inverse_keep(rate, torch.float32)
    scale, mean = (rate * inverse) ** 0.5, (1 - rate) * inverse  # mean 1, and 0 at rate 1
    return x * draw_normal(x, draws).mul(scale).add_(mean).to(x.dtype)


def gaussian_noise(x: Tensor, rate: Rate, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Add normal noise of standard deviation `rate` >= 0.

    Reference: Bishop 1995, https://doi.org/10.1162/neco.1995.7.1.108
    """
    if is_off(**draws):
        return x
    return x + draw_normal(x, draws).mul(rate).to(x.dtype)


def drop_block(
    x: Tensor,
    rate: Rate,
    block_size: int = 7,
    *,
    shared: bool = False,
    where: Caller = "drop_block",
    **draws: Unpack[NoiseDraws],
) -> Tensor:
    """Zero blocks of `block_size` in every spatial dimension of `x` (N, C, ...), rescale the rest.

    Block centres are drawn where a whole block fits, with the paper's probability
    rate / block_size^d * size / fitting; overlapping blocks drop less than `rate`. The rescaling
    keeps the mean of the mask over the batch at 1. `shared` gives all channels one mask.
    `uniforms` are (N, C or 1, *fitting). Reference: Ghiasi et al. 2018,
    https://arxiv.org/abs/1810.12890
    """
    size, pool = x.shape[2:], {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
    if len(size) not in pool:
        raise ValueError(
            f"{error_prefix(where)}: expected (N, C, ...) with 1 to 3 spatial dimensions, "
            f"received shape {tuple(x.shape)}"
        )
    if block_size % 2 == 0 or not 1 <= block_size <= min(size):
        raise ValueError(
            f"{error_prefix(where)}: block_size must be odd and fit in the map of {tuple(size)}, "
            f"received {block_size}"
        )
    if is_off(**draws):
        return x
    half, dims = block_size // 2, len(size)
    fitting = [n - block_size + 1 for n in size]
    seed_rate = rate * (math.prod(size) / math.prod(fitting) / block_size**dims)
    channels = 1 if shared else x.shape[1]
    seeds = draw([x.shape[0], channels, *fitting], x, draws) < seed_rate
    blocks = F.pad(seeds.to(x.dtype), [half] * (2 * dims))
    for d in range(dims):  # pooling over a cube is pooling over each dimension
        kernel = [block_size if i == d else 1 for i in range(dims)]
        blocks = pool[dims](blocks, kernel, 1, [k // 2 for k in kernel])
    kept = 1 - blocks
    mean = kept.mean(dtype=torch.float32)
    return x * (kept * torch.where(mean > 0, 1 / mean, 0.0).to(x.dtype))


def shake_drop(
    x: Tensor, rate: Rate, *, mode: str = "batch", **draws: Unpack[NoiseDraws]
) -> Tensor:
    """Multiply a residual branch by b + a - ba forward and b + c - bc backward.

    b is 0 with probability `rate`, for the batch or a row; a in [-1, 1) and c in [0, 1) are
    uniform, one of each per row. Evaluation multiplies by the mean, 1 - rate. `uniforms` are
    (3, N, 1, ...) for b, a, c. Reference: Yamada et al. 2018, https://arxiv.org/abs/1802.02375
    """
    if is_off(**draws):
        return x * (1 - rate)
    shape = [3, x.shape[0], *[1] * (x.ndim - 1)]
    gate, a, c = draw(shape, x, draws).unbind()
    b = ((gate[:1] if mode == "batch" else gate) >= rate).to(x.dtype)
    forward = b + (1 - b) * (2 * a - 1).to(x.dtype)
    backward = b + (1 - b) * c.to(x.dtype)
    return x * backward + (x * (forward - backward)).detach()


def input_dropout(
    x: Tensor, rate: Rate, *, where: Caller = "input_dropout", **draws: Unpack[NoiseDraws]
) -> Tensor:
    """Zero one square of `x` (N, C, H, W) whose area is `rate` of the image (Cutout).

    The centre is uniform over the image, so the border may cut the square; nothing is rescaled,
    as in the paper. `uniforms` are (N, 2). Reference: DeVries and Taylor 2017,
    https://arxiv.org/abs/1708.04552
    """
    check_rank(x, [4], where, "(N, C, H, W)")
    if is_off(**draws):
        return x
    height, width = x.shape[2:]
    centre = draw([x.shape[0], 2], x, draws)
    half = (rate * (height * width)) ** 0.5 / 2
    rows = torch.arange(height, device=x.device) + 0.5
    columns = torch.arange(width, device=x.device) + 0.5
    inside_rows = (rows - centre[:, :1] * height).abs() < half
    inside_columns = (columns - centre[:, 1:] * width).abs() < half
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return x * (~inside).to(x.dtype)


def mixout(weight: Tensor, target: Tensor, rate: Rate, **draws: Unpack[NoiseDraws]) -> Tensor:
    """Dropout of `weight - target`: entries fall back to the target with probability `rate`.

    Reference: Lee et al. 2020, https://arxiv.org/abs/1909.11299
    """
    if is_off(**draws):
        return weight
    return target + dropout(weight - target, rate, **draws)


def concrete_dropout(
    x: Tensor, rate: Tensor, *, temperature: float = 0.1, **draws: Unpack[NoiseDraws]
) -> Tensor:
    """Dropout whose mask is differentiable in `rate`: a sigmoid, not a step.

    Reference: Gal et al. 2017, https://arxiv.org/abs/1705.07832
    """
    if is_off(**draws):
        return x
    u = draw(x.shape, x, draws)
    dropped = torch.sigmoid((torch.logit(rate) + torch.logit(u, eps=1e-7)) / temperature)
    return x * ((1 - dropped) / (1 - rate).clamp_min(1e-6)).to(x.dtype)
