"""Copies of models, also of those that keep tensors of a forward pass."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from tikhon.data.rows import tensors

_NODES = 200_000  # of a graph that is walked
T = TypeVar("T")


def copied(model: nn.Module, value: T) -> T:
    """`copy.deepcopy` of `value`, which holds `model`.

    Tensors of a graph that modules keep as attributes (the weights that `torch.nn.utils.prune`
    computes, attention maps, the last hidden state) are copied by value, without their graph;
    `copy.deepcopy` alone refuses them. One that comes from a parameter which the model does not
    have (`self.w = nn.Parameter(...) * 0.1`) stays one that a gradient reaches.

    >>> import torch
    >>> from torch.nn.utils import prune
    >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=2)
    >>> torch.equal(copied(layer, layer).weight, layer.weight)
    True
    """
    kept = (t for m in model.modules() for t in tensors(list(vars(m).values())))
    own = {id(p) for p in model.parameters()}
    memo: dict[int, object] = {
        id(t): t.detach().clone().requires_grad_(_of_a_stranger(t, own))
        for t in kept
        if not t.is_leaf
    }
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted one has no copy that trains: give the module it was made from")
    return copy.deepcopy(value, memo)


def leaves(value: Tensor) -> list[Tensor]:
    """The tensors at which a backward pass would leave a gradient."""
    found: list[Tensor] = []
    seen: set[object] = set()
    todo = [value.grad_fn] if value.grad_fn is not None else []
    while todo and len(seen) < _NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        todo += [following for following, _ in node.next_functions]
    return found


def _of_a_stranger(value: Tensor, own: set[int]) -> bool:
    """Whether a tensor is computed from parameters of which none is the model's."""
    found = leaves(value)
    strange = any(isinstance(t, nn.Parameter) for t in found)
    return strange and not any(id(t) in own for t in found)
