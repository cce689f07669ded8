"""Exactness on shards of a parameter (DTensor, FSDP2), and sums over shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tikhon.regularizer.controller import Controller
from tikhon.regularizer.targets import all_reduce_sum, local
from tikhon.regularizer.terms import Binding
from tikhon.wrappers import wrapped_name


def is_sharded(param: Tensor) -> bool:
    """Return whether this process holds only part of the parameter."""
    return any(not p.is_replicate() for p in getattr(param, "placements", ()))


def refuse_flattened(model: nn.Module) -> None:
    """Raise TypeError for FullyShardedDataParallel, whose parameters are pieces of flat ones."""
    for module in model.modules():
        flat = wrapped_name(module) == "_fsdp_wrapped_module"
        if flat and module.sharding_strategy.name != "NO_SHARD":  # type: ignore[union-attr]
            raise TypeError(
                "FullyShardedDataParallel (FSDP1) cuts flattened weights, whose pieces have no "
                "rows and no norm of their own; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def refuse_inexact(binding: Binding) -> None:
    """Raise TypeError for a term that cannot be computed shard by shard.

    Exact are sums over entries, and penalties of whole rows of dimension 0 if that is the sharded
    one (as in FSDP2).
    """
    for param, view in zip(binding.target.params, binding.target.views):
        if not is_sharded(param):
            continue
        by_rows = all(p.is_replicate() or p.is_shard(0) for p in param.placements)  # type: ignore[attr-defined]
        source = binding.live.source
        controlled = isinstance(source, Controller) and not source.reads_shards
        fields = [n for n in ("weights", "center") if getattr(binding.base, n, None) is not None]
        if controlled:
            reason = f"{type(source).__name__} reads whole weights"
        elif fields:
            reason = f"its {fields[0]} are whole tensors"
        elif binding.base.elementwise and binding.sees_own_shape:
            continue
        elif view.lead != (0,) or view.split or not by_rows:
            reason = f'its rows (rows="{binding.target.rows}") are cut'
        elif not _separates_rows(binding):
            reason = "it couples rows that other processes hold"
        else:
            continue
        raise TypeError(
            f"{binding.name} is not exact on the shards of {binding.target.name!r} "
            f"({param.placements}): {reason}; "  # type: ignore[attr-defined]
            f'use a sum over entries or rows="out", or leave this parameter unsharded'
        )


def _separates_rows(binding: Binding) -> bool:
    """Test numerically whether the prox (or gradient) treats rows separately."""
    penalty = binding.base.with_strength(0.5) if not binding.base.constraint else binding.base
    rows = torch.tensor([[1.0, -2.0, 0.5], [0.3, 4.0, -1.5]])

    def move(w: Tensor) -> Tensor:
        return penalty.prox(w, 1.0) if hasattr(penalty, "prox") else penalty.grad(w)  # type: ignore[attr-defined]

    return torch.allclose(move(rows), torch.cat([move(rows[:1]), move(rows[1:])]))


def count_zeros(param: Tensor) -> tuple[int, int]:
    """Return exact zeros and entries of the full parameter."""
    part = local(param)
    counts = torch.tensor([part.numel() - int(part.count_nonzero()), part.numel()])
    zeros, entries = all_reduce_sum(counts.to(part.device), param).tolist()
    return zeros, entries
