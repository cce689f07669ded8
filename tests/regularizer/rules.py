"""Optimizers without a known gain: torch's own, and rules as people write them."""

from __future__ import annotations

import torch
from torch import optim


class Rule(optim.Optimizer):
    """The loop that every hand-written optimizer has."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.direction(self.state[p], p.grad))
        return loss


class Sign(Rule):
    """signSGD."""

    def direction(self, state, grad):
        return grad.sign()


class Lion(Rule):
    """Chen et al. 2023."""

    def direction(self, state, grad):
        mean = state.setdefault("mean", torch.zeros_like(grad))
        ahead = (0.9 * mean + 0.1 * grad).sign()
        mean.lerp_(grad, 0.01)
        return ahead


class Heavy(Rule):
    """Momentum whose state pushes for long."""

    def direction(self, state, grad):
        speed = state.setdefault("speed", torch.zeros_like(grad))
        return speed.mul_(0.9).add_(grad)


class Whitened(Rule):
    """Shampoo from the left, without its roots' shortcuts."""

    def direction(self, state, grad):
        rows = grad.flatten(1)
        gram = state.setdefault("gram", 1e-6 * torch.eye(len(rows), dtype=rows.dtype))
        gram.add_(rows @ rows.T)
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(1e-12) ** -0.5
        return (root @ vectors.T @ rows).reshape(grad.shape)


class OwnAdam(optim.Adam):
    """A subclass of a known optimizer with an update of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                square = self.state[p].setdefault("square", torch.zeros_like(p))
                square.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                p.sub_(group["lr"] * p.grad / (square.sqrt() + 1e-3))


class OwnSGD(optim.SGD):
    """The same with a normalised gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm().clamp_min(1e-12))


# with the learning rate that suits a well-conditioned problem
WITHOUT_GAIN = {
    "Adafactor": (optim.Adafactor, {"lr": 0.05, "weight_decay": 0.0}),
    "Rprop": (optim.Rprop, {"lr": 0.01}),
    "Sign": (Sign, {"lr": 0.01}),
    "Lion": (Lion, {"lr": 0.01}),
    "Heavy": (Heavy, {"lr": 0.02}),
    "Whitened": (Whitened, {"lr": 0.5}),
    "OwnAdam": (OwnAdam, {"lr": 0.02}),
    "OwnSGD": (OwnSGD, {"lr": 0.05}),
}
MUON = [optim.Muon] if hasattr(optim, "Muon") else []  # of torch 2.9 and newer
WITHOUT_GAIN |= {muon.__name__: (muon, {"lr": 0.02, "weight_decay": 0.0}) for muon in MUON}
