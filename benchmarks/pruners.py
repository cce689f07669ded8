"""Pruning as others publish it, each as three calls on a plain loop; for `sparsity.py`.

`start` before the first step, `gradients` between the backward pass and the step, `after` the
step. All act on the weights that `tikhon.select` finds: no biases, norms or embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import tikhon as tk


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights that may go."""
    return [target.params[0] for target in tk.select(model)]


class Pruner:
    """Does nothing: the dense network."""

    def __init__(self, model, optimizer, share: float, steps: int, **settings) -> None:
        self.model, self.optimizer, self.share, self.steps = model, optimizer, share, steps
        self.settings = settings
        self.masks: list[Tensor] = []
        self.start()

    def start(self) -> None:
        """Before the first step."""

    @torch.no_grad()
    def gradients(self, step: int) -> None:
        """After the backward pass of step 1, 2, ...: what is masked gets no gradient."""
        for p, mask in zip(self.weights(), self.masks):
            p.grad.mul_(mask)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """After step 1, 2, ...: what is masked is zero."""
        for p, mask in zip(self.weights(), self.masks):
            p.mul_(mask)

    def step(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def weights(self) -> list[nn.Parameter]:
        return matrices(self.model)


class OneShot(Pruner):
    """Global magnitude at half of the run, then fine-tuning (Han et al. 2015)."""

    def after(self, step: int) -> None:
        if step == self.steps // 2:
            self.masks = largest(self.weights(), self.share)
        super().after(step)


class Gradual(Pruner):
    """Global magnitude by the cubic schedule (Zhu and Gupta 2017), from 10 to 65 % of the run."""

    def after(self, step: int) -> None:
        progress = (step / self.steps - 0.1) / 0.55
        if progress > 0 and step % 10 == 0 and (progress <= 1 or not self.done):
            share = self.share * (1 - (1 - min(progress, 1.0)) ** 3)
            self.masks = largest(self.weights(), share)
            self.done = progress >= 1
        super().after(step)

    def start(self) -> None:
        self.done = False


class TorchPrune(Pruner):
    """`torch.nn.utils.prune.global_unstructured` in ten rounds, evenly from 10 % to 65 %."""

    def start(self) -> None:
        wanted = {id(p) for p in matrices(self.model)}
        self.places = [
            (module, "weight" if name == "weight" else name)
            for module in self.model.modules()
            for name, p in module.named_parameters(recurse=False)
            if id(p) in wanted
        ]
        self.rounds = {round(self.steps * (0.1 + 0.55 * i / 9)): i for i in range(10)}

    def gradients(self, step: int) -> None:
        """The masks are part of the graph."""

    def after(self, step: int) -> None:
        if step in self.rounds:
            i = self.rounds[step]
            left = [(1 - self.share) ** (k / 10) for k in (i, i + 1)]
            prune.global_unstructured(
                self.places, pruning_method=prune.L1Unstructured, amount=1 - left[1] / left[0]
            )
        if step == self.steps:
            for module, name in self.places:
                prune.remove(module, name)


class RigL(Pruner):
    """Sparse from the start; the smallest go, the largest gradients come (Evci et al. 2020)."""

    def start(self) -> None:
        self.masks = erdos_renyi(self.weights(), self.share)
        self.scales = [float(p.detach().std()) for p in self.weights()]
        with torch.no_grad():
            for p, mask in zip(self.weights(), self.masks):
                p.mul_(mask)

    def gradients(self, step: int) -> None:
        if step % self.settings["every"] == 0 and step < 0.75 * self.steps:
            part = 0.15 * (1 + math.cos(math.pi * step / (0.75 * self.steps)))
            for i, p in enumerate(self.weights()):
                self.masks[i] = self.moved(p, self.masks[i], part, self.scales[i])
        super().gradients(step)

    @torch.no_grad()
    def moved(self, p: nn.Parameter, mask: Tensor, part: float, scale: float) -> Tensor:
        """The mask with a part of its entries exchanged."""
        count = int(part * mask.sum())
        if not count:
            return mask
        size = torch.where(mask > 0, p.abs(), torch.inf).flatten()
        after = mask.flatten().clone()
        after[size.topk(count, largest=False).indices] = 0
        wish = torch.where(after > 0, -torch.inf, self.wishes(p).flatten())
        new = wish.topk(min(count, int((after == 0).sum()))).indices
        fresh = new[mask.flatten()[new] == 0]
        p.view(-1)[fresh] = self.first(fresh, scale)
        for value in self.optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                value.view(-1)[fresh] = 0
        after[new] = 1
        return after.view_as(mask)

    def wishes(self, p: nn.Parameter) -> Tensor:
        return p.grad.abs()

    def first(self, fresh: Tensor, scale: float) -> Tensor:
        return torch.zeros(len(fresh))


class Set(RigL):
    """As RigL, but what comes is drawn at random, with values as at the start (Mocanu 2018)."""

    def wishes(self, p: nn.Parameter) -> Tensor:
        return torch.rand_like(p)

    def first(self, fresh: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(len(fresh))

    def gradients(self, step: int) -> None:
        if step % self.settings["every"] == 0:
            for i, p in enumerate(self.weights()):
                self.masks[i] = self.moved(p, self.masks[i], 0.3, self.scales[i])
        Pruner.gradients(self, step)


class PAT(Pruner):
    """torchao's: the largest over the model, by the cubic schedule from 10 to 65 % of the run.

    The optimizer moves dense weights beside, of which the model's are the projection; from 65 % on
    the zeros are frozen.
    """

    def start(self) -> None:
        from torchao.prototype.pat.optim import build_prune_optimizer

        chosen = {id(p): p for p in matrices(self.model)}
        everything = self.optimizer.param_groups[0]["params"]
        self.optimizer.param_groups[0]["params"] = [p for p in everything if id(p) not in chosen]
        self.optimizer.add_param_group(
            {
                "params": list(chosen.values()),
                "prox_type": "GlobalMinSparsityConstraint",
                "group_type": "KElementGrouper",
                "k": 1,
                "min_sparsity": self.share,
                "min_sparsity_schedule": True,
            }
        )
        self.outer = build_prune_optimizer(
            self.optimizer, 0.0, int(0.1 * self.steps), int(0.65 * self.steps)
        )

    def step(self) -> None:
        self.outer.step()


class Filters(Pruner):
    """In each layer the filters of the smallest norm, at half of the run (Li et al. 2017)."""

    def start(self) -> None:
        self.blocks = blocks(self.model)

    def gradients(self, step: int) -> None:
        """What goes is zeroed after the step."""

    @torch.no_grad()
    def after(self, step: int) -> None:
        if step == self.steps // 2:
            self.masks = self.chosen()
        for (layer, norm), keep in zip(self.blocks, self.masks):
            layer.weight.mul_(keep.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.mul_(keep)
            if norm is not None:
                norm.weight.mul_(keep)
                norm.bias.mul_(keep)

    def chosen(self) -> list[Tensor]:
        sizes = [layer.weight.flatten(1).norm(dim=1) for layer, _ in self.blocks]
        return [flags(size, len(size) - round(self.share * len(size))) for size in sizes]


class Slimming(Filters):
    """L1 on the norms' scales, then the smallest of all layers go (Liu et al. 2017)."""

    def gradients(self, step: int) -> None:
        if step <= self.steps // 2:
            for _, norm in self.blocks:
                norm.weight.grad.add_(self.settings["strength"] * norm.weight.detach().sign())

    def chosen(self) -> list[Tensor]:
        sizes = [norm.weight.detach().abs() for _, norm in self.blocks]
        everything = torch.cat(sizes)
        edge = everything.kthvalue(max(1, round(self.share * len(everything)))).values
        kept = [(size > edge).to(size) for size in sizes]
        return [k if k.any() else flags(size, 1) for k, size in zip(kept, sizes)]


class DepGraph(Pruner):
    """Torch-Pruning's, in each layer the groups of the smallest norm, at half of the run."""

    def after(self, step: int) -> None:
        if step == self.steps // 2:
            import torch_pruning

            last = [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]
            torch_pruning.pruner.BasePruner(
                self.model,
                self.settings["example"],
                torch_pruning.importance.GroupMagnitudeImportance(),
                pruning_ratio=self.share,
                ignored_layers=[last],
            ).step()
            self.optimizer.param_groups[0]["params"] = list(self.model.parameters())
            self.optimizer.state.clear()


class Sparsify(Pruner):
    """This library's, as it comes."""

    def start(self) -> None:
        self.handle = tk.sparsify(
            self.model, self.optimizer, self.share, steps=self.steps, **self.settings
        )

    def after(self, step: int) -> None:
        """The optimizer's hooks have done it."""


def largest(params: Sequence[nn.Parameter], share: float) -> list[Tensor]:
    """Masks of the largest weights over the whole model."""
    flat = torch.cat([p.detach().abs().flatten() for p in params])
    kept = flags(flat, len(flat) - round(share * len(flat)))
    return [part.view_as(p) for part, p in zip(kept.split([p.numel() for p in params]), params)]


def flags(size: Tensor, count: int) -> Tensor:
    keep = torch.zeros_like(size)
    keep[size.topk(max(1, count)).indices] = 1
    return keep


def erdos_renyi(params: Sequence[nn.Parameter], share: float) -> list[Tensor]:
    """Random masks; a layer's density goes by the sum of its sides over their product."""
    sizes = [p.numel() for p in params]
    raw = [sum(p.shape) / p.numel() for p in params]
    whole: set[int] = set()
    while True:
        free = [i for i in range(len(params)) if i not in whole]
        budget = (1 - share) * sum(sizes) - sum(sizes[i] for i in whole)
        scale = budget / sum(raw[i] * sizes[i] for i in free)
        over = {i for i in free if raw[i] * scale > 1}
        if not over:
            break
        whole |= over
    counts = [n if i in whole else round(raw[i] * scale * n) for i, n in enumerate(sizes)]
    return [flags(torch.rand(p.shape).flatten(), n).view_as(p) for p, n in zip(params, counts)]


def blocks(model: nn.Sequential) -> list[tuple[nn.Module, nn.Module | None]]:
    """The hidden layers of a chain, each with the norm that follows."""
    modules = list(model)
    at = [i for i, m in enumerate(modules) if isinstance(m, nn.Linear | nn.Conv2d)]
    found = []
    for i in at[:-1]:
        norm = modules[i + 1]
        found.append((modules[i], norm if isinstance(norm, nn.BatchNorm2d) else None))
    return found


PRUNERS = {
    "dense": Pruner,
    "small from scratch": Pruner,
    "one shot": OneShot,
    "gradual": Gradual,
    "torch prune": TorchPrune,
    "RigL": RigL,
    "SET": Set,
    "PAT": PAT,
    "filter norm": Filters,
    "slimming": Slimming,
    "DepGraph": DepGraph,
    "sparsify": Sparsify,
}
