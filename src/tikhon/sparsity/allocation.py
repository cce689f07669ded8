"""How many units of each layer stay, and which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Per = Literal["model", "layer"]


def keeps(scores: Sequence[Tensor], share: float, *, per: Per, multiple: int = 1) -> list[Tensor]:
    """Flags of the units that stay, for each layer; the largest scores stay.

    `share` of all units go (`per="model"`), or of each layer's (`per="layer"`): exactly, to the
    unit. A layer keeps one unit at least. With `multiple` a layer of as many units or more keeps
    a multiple of that number, the nearest to what it would keep otherwise.

    >>> [k.tolist() for k in keeps([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.1])], 0.5,
    ...                            per="model")]
    [[True, False], [True, False]]
    """
    counts = [len(s) for s in scores]
    if per == "layer":
        stay = [max(1, n - round(share * n)) for n in counts]
    else:
        stay = _over_the_model(scores, sum(counts) - round(share * sum(counts)))
    stay = [_rounded(k, n, multiple) for k, n in zip(stay, counts)]
    return [_largest(s, k) for s, k in zip(scores, stay)]


def _over_the_model(scores: Sequence[Tensor], total: int) -> list[int]:
    """The `total` largest scores of all layers, after one of each layer."""
    total = max(total, len(scores))
    if not scores:
        return []
    flat = torch.cat([s.flatten().float() for s in scores])
    owner = torch.cat([torch.full((len(s),), i, device=s.device) for i, s in enumerate(scores)])
    firsts, start = [], 0
    for s in scores:
        firsts.append(start + int(s.argmax()))
        start += len(s)
    flat = flat.clone()
    flat[firsts] = torch.inf
    chosen = flat.topk(total).indices
    return torch.bincount(owner[chosen], minlength=len(scores)).tolist()


def _rounded(stay: int, units: int, multiple: int) -> int:
    if multiple <= 1 or units < multiple:
        return stay
    return min(units, max(multiple, multiple * round(stay / multiple)))


def _largest(scores: Tensor, count: int) -> Tensor:
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[scores.topk(count).indices] = True
    return keep
