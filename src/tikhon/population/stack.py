"""Parameters of K models of one architecture in one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tikhon.errors import InputError


class Stack:
    """Blocks (members, *shape) of each parameter, as views of `flat`; buffers likewise."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.members = len(models)
        named = [dict(m.named_parameters()) for m in models]
        shapes = {name: p.shape for name, p in named[0].items()}
        for other in named[1:]:
            if {name: p.shape for name, p in other.items()} != shapes:
                raise InputError("the members of a population must have one architecture")
        first = next(iter(named[0].values()))
        sizes = [p.numel() * self.members for p in named[0].values()]
        self.edges = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        self.names, self.shapes = list(shapes), list(shapes.values())
        self.flat = torch.empty(self.edges[-1], dtype=first.dtype, device=first.device)
        self.blocks: dict[str, Tensor] = {}
        for name, view in self.named(self.flat).items():
            view.copy_(torch.stack([p[name].detach() for p in named]))
            self.blocks[name] = view.detach().requires_grad_(named[0][name].requires_grad)
        stacks = [dict(m.named_buffers()) for m in models]
        names_by_id = {id(t): name for name, t in [*named[0].items(), *stacks[0].items()]}
        saved = models[0].state_dict(keep_vars=True)  # no noise rates, tied weights twice
        self.saved = {
            name: names_by_id[id(t)] for name, t in saved.items() if id(t) in names_by_id
        }
        if not any(p.requires_grad for p in named[0].values()):
            raise InputError(f"{type(models[0]).__name__} has no trainable parameter")
        self.buffers = {n: torch.stack([b[n] for b in stacks]) for n in stacks[0]}

    def views(self, flat: Tensor) -> list[Tensor]:
        """Split a flat tensor into (members, *shape) blocks, one for each parameter."""
        cuts = pairwise(self.edges)
        return [flat[a:b].view(self.members, *s) for (a, b), s in zip(cuts, self.shapes)]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the views by parameter name."""
        return dict(zip(self.names, self.views(flat)))

    def fill_(self, flat: Tensor, rows: Tensor) -> Tensor:
        """Write joined rows, one for each member, into a flat tensor."""
        parts = rows.split([math.prod(shape) for shape in self.shapes], dim=1)
        for view, part in zip(self.views(flat), parts):
            view.copy_(part.view_as(view))
        return flat

    def adopt_parameters(self, model: nn.Module) -> None:
        """Make the only member's blocks the module's parameters, and its buffers ours."""
        for name, parameter in model.named_parameters():
            parameter.data = self.blocks[name].detach()[0]
            parameter.grad = None
        for name, buffer in model.named_buffers():
            buffer.copy_(self.buffers[name][0])
            self.buffers[name] = buffer.unsqueeze(0)

    def state_dict_of(self, member: int) -> dict[str, Tensor]:
        """Return one member as the state dict of its module."""
        tensors = {**self.blocks, **self.buffers}
        return {n: tensors[own].detach()[member].clone() for n, own in self.saved.items()}


def column(values: Tensor, block: Tensor) -> Tensor:
    """Reshape values (members,) to broadcast over a block (members, ...)."""
    return values.to(block).view(-1, *[1] * (block.ndim - 1))
