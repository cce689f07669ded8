"""What is read of the tensors of a sampled step, stacked so that one synchronisation is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from tikhon.data.nested import stored_values, tensors
from tikhon.regularizer.rounding import HALF_TYPES
from tikhon.regularizer.targets import is_distributed, local

ENTRIES = 2**14  # of a tensor from which its update is read, about
PRINT = 2**11  # of a batch, about, that tell it from another


@dataclass(frozen=True)
class Kept:
    """The tensors of the optimizer just before its step, and copies of some of their rows."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    before: list[Tensor]

    def old(self, parameter: Tensor) -> Tensor:
        """What was kept of a parameter from before the step: a bad gradient makes it bad after."""
        for kept, current in zip(self.before, self.parameters):
            if current is parameter:
                return kept
        return parameter


@torch.no_grad()
def keep(optimizer: Optimizer) -> Kept:
    """What has a gradient; the gradients themselves stay reachable whoever clears them."""
    held = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return Kept(held, [_dense(p.grad) for p in held], [rows(p).clone() for p in held])


def _dense(gradient: Tensor | None) -> Tensor:
    """The local part; of a sparse one, the entries that are there."""
    assert gradient is not None
    own = local(gradient)
    return own.coalesce().values() if own.is_sparse else own


def rows(parameter: Tensor) -> Tensor:
    """The local part; of a large one, evenly spaced rows."""
    own = local(parameter)
    return own[:: own.numel() // ENTRIES + 1] if own.numel() > ENTRIES else own


@torch.no_grad()
def copies(optimizer: Optimizer) -> dict[int, Tensor]:
    """Rows of everything trainable, by identity."""
    held = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    return {id(p): rows(p).clone() for p in held}


def squares(kept: Kept, earlier: Mapping[int, Tensor]) -> Tensor:
    """Squared norms, one a tensor: of gradients, weights, moves, and changes since `earlier`."""
    now = [rows(p) for p in kept.parameters]
    then = [earlier.get(id(p), old) for p, old in zip(kept.parameters, kept.before)]
    then = [a if a.shape == b.shape else b for a, b in zip(then, kept.before)]
    subtract = torch._foreach_sub  # pyright: ignore[reportPrivateImportUsage]
    norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    parts = (kept.gradients, kept.before, subtract(now, kept.before), subtract(kept.before, then))
    # a norm in 16 bits has three digits
    found = [n for part in parts for n in norm(part, dtype=torch.float32)]
    if len({p.device for p in now}) > 1:
        found = [n.to(now[0].device) for n in found]
    return torch.stack(found).square()


def stuck(kept: Kept) -> dict[int, Tensor]:
    """By identity of 16-bit tensors: the share of entries with a gradient that did not move."""
    found = {}
    for p, gradient, before in zip(kept.parameters, kept.gradients, kept.before):
        if p.dtype not in HALF_TYPES or local(p).shape != gradient.shape:
            continue
        asked = rows(gradient) != 0
        still = (asked & (rows(p) == before)).sum()
        found[id(p)] = (still / asked.sum().clamp(min=1)).float()
    return found


def norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Norms of some rows of each tensor."""
    return lengths([rows(p) for p in parameters])


def lengths(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor."""
    if not tensors:
        return []
    norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    return [n.float() for n in norm(tensors)]


@torch.no_grad()
def fingerprint(arguments: object) -> Tensor:
    """Two numbers that tell one batch from another; NaN where there is nothing to tell."""
    given = [stored_values(local(t)) for t in tensors(arguments) if not t.is_complex()]
    found = [part.reshape(-1) for part in given if part.numel()]
    if not found:
        return torch.full((2,), torch.nan)
    total = torch.zeros(2, device=found[0].device)
    for part in found:
        part = part[:: part.numel() // PRINT + 1].float()
        both = torch.stack([part, part.square()]) * _ramp(part.numel(), part.device)
        total = total + both.sum(1).to(total.device)  # a product of matrices is cast by autocast
    return total


@lru_cache(32)
def _ramp(count: int, device: torch.device) -> Tensor:
    return torch.linspace(1.0, 2.0, count, device=device)


def elsewhere(own: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Trainable tensors of the model that have a gradient and are not in the optimizer."""
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    return {
        name: p
        for name, p in own.items()
        if id(p) not in held and p.requires_grad and p.grad is not None
    }


def named(own: Mapping[str, Tensor], optimizer: Optimizer) -> dict[int, str]:
    """Names of the optimizer's tensors: the model's, or their place in a group."""
    names = {
        id(p): f"group {g}, tensor {k}"
        for g, group in enumerate(optimizer.param_groups)
        for k, p in enumerate(group["params"])
    }
    return names | {id(p): name for name, p in own.items() if id(p) in names}


def reduced(flat: Tensor, count: int, sharded: bool) -> Tensor:
    """One all-reduce: squares of shards add up, copies and what batches read are averaged."""
    if not is_distributed() or torch.distributed.get_world_size() == 1:
        return flat
    flat = flat.clone()
    torch.distributed.all_reduce(flat)
    mean = flat / torch.distributed.get_world_size()
    return torch.cat([flat[:count], mean[count:]]) if sharded else mean
