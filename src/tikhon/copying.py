"""Copies of models, also of those that keep tensors of a forward pass."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from tikhon.data.rows import tensors

T = TypeVar("T")


def copied(model: nn.Module, value: T) -> T:
    """`copy.deepcopy` of `value`, which holds `model`.

    Tensors of a graph that modules keep as attributes (the weights that `torch.nn.utils.prune`
    computes, attention maps, the last hidden state) are copied by value, without their graph;
    `copy.deepcopy` alone refuses them.

    >>> import torch
    >>> from torch.nn.utils import prune
    >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=2)
    >>> torch.equal(copied(layer, layer).weight, layer.weight)
    True
    """
    kept = (t for m in model.modules() for t in tensors(list(vars(m).values())))
    memo: dict[int, object] = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
    return copy.deepcopy(value, memo)
