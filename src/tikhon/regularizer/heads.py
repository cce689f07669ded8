"""Find the part of an attention matrix that belongs to each head."""

from __future__ import annotations

import re
from math import prod

import torch
from torch import nn

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
# queries, keys and values one after another
_JOINT_QKV = {"in_proj", "in_proj_weight", "qkv", "qkv_proj", "c_attn", "Wqkv"}
_INTERLEAVED_QKV = {"query_key_value"}  # queries, keys and values of one head, then of the next
_QUERIES = {"q", "query", "queries", "wq"}
_KEYS_VALUES = {"k", "v", "key", "value", "keys", "values", "wk", "wv"}  # possibly fewer heads
_OUTPUTS = {"o", "out", "output", "wo", "dense", "proj"}
_OTHER_MATRICES = {"mlp", "ffn", "fc", "fc1", "fc2", "ff"}  # other matrices of an attention block
Split = tuple[int, tuple[int, ...]]


def head_rows(
    model: nn.Module, name: str, shape: torch.Size, *, inputs_first: bool
) -> tuple[int, Split]:
    """Return the dimension of the heads after a split, and the split as (dimension, sizes).

    Matrices are recognised by name, as in torch, Hugging Face and timm. Raises ValueError for a
    matrix not in an attention, with another name, or not divisible by the heads.
    """
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        heads = _first_count(module, _COUNTS) or (
            _first_count(getattr(module, "config", None), _COUNTS) if _head_size(module) else None
        )
        if heads is not None and len(shape) == 2:
            return _split(module, heads, name, path[depth:], shape, inputs_first=inputs_first)
    raise ValueError(
        f'rows="head" needs a matrix inside a module with num_heads, {name!r} has none; '
        f'use rows="out"'
    )


def _split(
    module: nn.Module,
    heads: int,
    name: str,
    inner: list[str],
    shape: torch.Size,
    *,
    inputs_first: bool,
) -> tuple[int, Split]:
    words = {word for part in inner for word in re.split(r"[_\d]+", part)} - {""}
    parts = set(inner)
    size = _head_size(module) or _head_size_from_siblings(module, heads, inputs_first=inputs_first)
    dim, split = 0, (heads, size or -1)
    if parts & _OTHER_MATRICES:
        split = ()
    elif parts & _JOINT_QKV:
        split = (3, heads, size or -1)
    elif parts & _INTERLEAVED_QKV:
        split = (heads, 3 * size if size else -1)
    elif words & _KEYS_VALUES:
        # a key head may serve several query heads
        config = getattr(module, "config", None)
        own = _first_count(module, _KEYS) or _first_count(config, _KEYS)
        if own is None and size is None and shape[0] == shape[1]:
            own = heads  # square, hence none is shared
        if own is None and size is None:
            raise ValueError(
                f'rows="head": nothing tells how many heads {name!r} has, which several of the '
                f"{heads} heads of the queries may share: give its {type(module).__name__} an "
                f'attribute head_dim or num_key_value_heads, or use rows="out"'
            )
        split = (own or shape[inputs_first] // (size or 1), size or -1)
    elif words & _OUTPUTS and not words & _QUERIES:
        dim = 1
    elif not words & _QUERIES:
        split = ()
    if not split:
        raise ValueError(
            f'rows="head" goes by the name of a matrix (as q_proj, key, in_proj, qkv, o_proj, '
            f'dense), and {name!r} has none of those known; use rows="out" or rows="in"'
        )
    stored = 1 - dim if inputs_first else dim
    least = prod(part for part in split if part > 0)
    if shape[stored] % least or (split[-1] > 0 and shape[stored] != least):
        raise ValueError(
            f'rows="head": {shape[stored]} entries of {name!r} along dimension {stored} do not '
            f"divide into {' x '.join(str(part) for part in split if part > 0)} of its "
            f"{type(module).__name__} with {heads} heads; where keys are shared by several heads "
            f'a joint matrix has no rows of heads: use rows="out"'
        )
    return stored + len(split) - 2, (stored, split)


def _head_size_from_siblings(module: nn.Module, heads: int, *, inputs_first: bool) -> int | None:
    """Return the head size from a sibling matrix of queries, or else of outputs."""
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for name, param in module.named_parameters():
        path = name.split(".")
        words = {word for part in path for word in re.split(r"[_\d]+", part)}
        others = words & _KEYS_VALUES or set(path) & (
            _OTHER_MATRICES | _JOINT_QKV | _INTERLEAVED_QKV
        )
        if param.ndim != 2 or others:
            continue
        queries = bool(words & _QUERIES)
        if queries or words & _OUTPUTS:
            along = param.shape[inputs_first == queries]  # heads are outputs of queries
            if along % heads == 0:
                found[queries].add(along // heads)
    for queries in (True, False):
        if len(found[queries]) == 1:
            return found[queries].pop()
    return None


def _first_count(owner: object, names: tuple[str, ...]) -> int | None:
    found = (getattr(owner, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _head_size(module: nn.Module) -> int | None:
    """Return the head size, if the module declares it."""
    return _first_count(module, ("head_dim", "attention_head_size"))
