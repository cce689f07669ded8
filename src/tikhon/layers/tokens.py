"""Noise on tokens as pure functions, also in `tikhon.layers.functional`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from tikhon.layers.masks import (
    Caller,
    NoiseDraws,
    Rate,
    check_rank,
    draw,
    error_prefix,
    is_batched,
    is_off,
)

PATCH_SLACK = 1e-6  # a float32 rate of 0.3 slightly exceeds 0.3


def patch_dropout(
    x: Tensor,
    rate: Rate,
    *,
    prefix: int = 1,
    ordered: bool = False,
    remove: bool = True,
    where: Caller = "patch_dropout",
    **draws: Unpack[NoiseDraws],
) -> Tensor:
    """Keep `prefix` tokens of `x` (N, L, D) and a random max(1, int((L - prefix)(1 - rate))).

    The others are removed, so the length of the output depends on the rate, which is read as a
    number; with `remove=False` they are set to zero instead and the rate may be any tensor.
    `uniforms` are (N, L - prefix), the same for both forms: the tokens with the smallest stay.
    Reference: Liu et al. 2022, https://arxiv.org/abs/2208.07220
    """
    check_rank(x, [3], where, "(batch, tokens, features)")
    if is_off(**draws):
        return x
    head, body = x[:, :prefix], x[:, prefix:]
    length = body.shape[1]
    order = draw(body.shape[:2], x, draws).argsort(dim=1)
    if not remove:
        count = (length * (1 - rate + PATCH_SLACK) // 1) + 0 * order[:1, :1]
        kept = order.argsort(dim=1) < count.clamp(min(1, length), length)
        return torch.cat([head, body * kept.unsqueeze(-1).to(x.dtype)], dim=1)
    if isinstance(rate, Tensor) and is_batched(rate):
        raise ValueError(
            f"{error_prefix(where)}: members of different rates keep different numbers of tokens, "
            "which do not stack: use remove=False, which zeroes them"
        )
    order = order[:, : min(max(1, int(length * (1 - float(rate) + PATCH_SLACK))), length)]
    order = order.sort(dim=1).values if ordered else order
    index = order.unsqueeze(-1).expand(-1, -1, body.shape[2])
    return torch.cat([head, body.gather(1, index)], dim=1)


def word_dropout(
    ids: Tensor,
    rate: Rate,
    *,
    unknown: int,
    protect: Sequence[int] = (),
    **draws: Unpack[NoiseDraws],
) -> Tensor:
    """Replace token ids by `unknown` with probability `rate`, except the ids in `protect`.

    Reference: Bowman et al. 2016, https://arxiv.org/abs/1511.06349
    """
    if is_off(**draws):
        return ids
    kept = draw(ids.shape, ids, draws) >= rate
    for special in protect:
        kept = kept | (ids == special)
    return torch.where(kept, ids, unknown)
