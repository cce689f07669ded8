"""What is read of the tensors of a sampled step, stacked so that one synchronisation is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer

from tikhon.data.nested import stored_values, tensors
from tikhon.regularizer.rounding import HALF_TYPES
from tikhon.regularizer.targets import is_distributed, local

MAX_ENTRIES = 2**14  # of a tensor from which its update is read, about
FINGERPRINT_ENTRIES = 2**11  # of a batch, about, that tell it from another


@dataclass(frozen=True)
class StepTensors:
    """The tensors of the optimizer just before its step, and copies of some of their rows."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    before: list[Tensor]

    def value_before(self, parameter: Tensor) -> Tensor:
        """The copy of a parameter from before the step: a bad gradient makes it bad after."""
        for copy, current in zip(self.before, self.parameters):
            if current is parameter:
                return copy
        return parameter


@torch.no_grad()
def copy_step_tensors(optimizer: Optimizer) -> StepTensors:
    """What has a gradient; the gradients themselves stay reachable whoever clears them."""
    moving = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return StepTensors(moving, [_dense(p.grad) for p in moving], [rows(p).clone() for p in moving])


def _dense(gradient: Tensor | None) -> Tensor:
    """The local part; of a sparse one, the entries that are there."""
    assert gradient is not None
    part = local(gradient)
    return part.coalesce().values() if part.is_sparse else part


def rows(parameter: Tensor) -> Tensor:
    """The local part; of a large one, evenly spaced rows."""
    part = local(parameter)
    return part[:: part.numel() // MAX_ENTRIES + 1] if part.numel() > MAX_ENTRIES else part


def squared_norms(tensors: StepTensors, earlier: Mapping[int, Tensor]) -> Tensor:
    """Squared norms (4, tensors): of gradients, weights, updates, changes since `earlier`."""
    if not tensors.parameters:
        return torch.zeros(4, 0)
    now = [rows(p) for p in tensors.parameters]
    pairs = zip(tensors.parameters, tensors.before)
    known = [(earlier.get(id(p), before), before) for p, before in pairs]
    then = [old if old.shape == before.shape else before for old, before in known]
    subtract = torch._foreach_sub  # pyright: ignore[reportPrivateImportUsage]
    norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    updates, changes = subtract(now, tensors.before), subtract(tensors.before, then)
    parts = (tensors.gradients, tensors.before, updates, changes)
    # a norm in 16 bits has three digits
    norms = [n for part in parts for n in norm(part, dtype=torch.float32)]
    if len({p.device for p in now}) > 1:
        norms = [n.to(now[0].device) for n in norms]
    return torch.stack(norms).square().reshape(4, -1)


def unmoved_shares(tensors: StepTensors) -> dict[int, Tensor]:
    """By identity of 16-bit tensors: the share of entries with a gradient that did not move."""
    shares = {}
    for p, gradient, before in zip(tensors.parameters, tensors.gradients, tensors.before):
        if p.dtype in HALF_TYPES and local(p).shape == gradient.shape:
            has_gradient = rows(gradient) != 0
            unmoved = (has_gradient & (rows(p) == before)).sum()
            shares[id(p)] = (unmoved / has_gradient.sum().clamp(min=1)).float()
    return shares


def row_norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Norms of some rows of each tensor."""
    return tensor_norms([rows(p) for p in parameters])


def tensor_norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor."""
    if not tensors:
        return []
    norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    return [n.float() for n in norm(tensors)]


@torch.no_grad()
def fingerprint(arguments: object) -> Tensor:
    """Two numbers that tell one batch from another; NaN where there is nothing to tell."""
    values = [stored_values(local(t)) for t in tensors(arguments) if not t.is_complex()]
    flat = [part.reshape(-1) for part in values if part.numel()]
    if not flat:
        return torch.full((2,), torch.nan)
    total = torch.zeros(2, device=flat[0].device)
    for part in flat:
        part = part[:: part.numel() // FINGERPRINT_ENTRIES + 1].float()
        both = torch.stack([part, part.square()]) * _ramp(part.numel(), part.device)
        total = total + both.sum(1).to(total.device)  # a product of matrices is cast by autocast
    return total


@lru_cache(32)
def _ramp(count: int, device: torch.device) -> Tensor:
    return torch.linspace(1.0, 2.0, count, device=device)


def unoptimized_parameters(own: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Trainable tensors of the model that have a gradient and are not in the optimizer."""
    optimized = {id(p) for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in own.items() if p.requires_grad and p.grad is not None}
    return {name: p for name, p in trained.items() if id(p) not in optimized}


def parameter_names(own: Mapping[str, Tensor], optimizer: Optimizer) -> dict[int, str]:
    """Names of the optimizer's tensors: the model's, or their place in a group."""
    names = {
        id(p): f"group {g}, tensor {k}"
        for g, group in enumerate(optimizer.param_groups)
        for k, p in enumerate(group["params"])
    }
    return names | {id(p): name for name, p in own.items() if id(p) in names}


def all_reduce(flat: Tensor, count: int, sharded: bool) -> Tensor:
    """One all-reduce: `count` squares of shards add up, copies and the rest are averaged."""
    if not is_distributed() or torch.distributed.get_world_size() == 1:
        return flat
    flat = flat.clone()
    torch.distributed.all_reduce(flat)
    mean = flat / torch.distributed.get_world_size()
    return torch.cat([flat[:count], mean[count:]]) if sharded else mean


def flatten(parts: Mapping[str, Sequence[Tensor]], device: torch.device) -> Tensor:
    """All entries in one row, as float32."""
    values = [t.float().reshape(-1).to(device) for part in parts.values() for t in part]
    return torch.cat([torch.empty(0, device=device), *values])


def split(
    values: Sequence[float], parts: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[float]]:
    """The entries of each part, in the order in which they were flattened."""
    rest = iter(values)
    counts = {name: sum(t.numel() for t in part) for name, part in parts.items()}
    return {name: list(islice(rest, count)) for name, count in counts.items()}
