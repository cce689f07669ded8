"""Optimizers, penalties and small problems that the tests of `regularize` share."""

from __future__ import annotations

import torch
from torch import nn, optim

import tikhon as tk

# every optimizer with a stationary gain; `steps` until the state is steady under one gradient
WITH_GAIN = {
    "SGD": (optim.SGD, {"lr": 0.05}, 1),
    "SGD momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.4}, 30),
    "SGD nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.4, "nesterov": True}, 30),
    "SGD dampening": (optim.SGD, {"lr": 0.05, "momentum": 0.4, "dampening": 0.3}, 30),
    "ASGD": (optim.ASGD, {"lr": 0.05, "lambd": 0.0}, 5),
    "Adam": (optim.Adam, {"lr": 0.01}, 8),
    "Adam amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True}, 8),
    "AdamW": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}, 8),
    "NAdam": (optim.NAdam, {"lr": 0.01}, 8),
    "RAdam": (optim.RAdam, {"lr": 0.01}, 8),
    "Adamax": (optim.Adamax, {"lr": 0.01}, 8),
    "RMSprop": (optim.RMSprop, {"lr": 0.01}, 8),
    "RMSprop momentum": (optim.RMSprop, {"lr": 0.01, "momentum": 0.4, "alpha": 0.4}, 30),
    # a constant gradient has no variance left in the limit, so its steady state has no momentum
    "RMSprop centered": (optim.RMSprop, {"lr": 0.01, "centered": True}, 8),
    "Adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}, 8),
    "Adadelta": (optim.Adadelta, {"lr": 0.5, "rho": 0.4}, 40),
}
UNIFORM = {name for name in WITH_GAIN if "SGD" in name}

PENALTIES = [
    tk.L1(0.3),
    tk.L1(0.3, weights=torch.linspace(0, 2, 12, dtype=torch.float64).reshape(4, 3)),
    tk.L2(0.3),
    tk.L2(0.3, center=torch.ones(4, 3, dtype=torch.float64)),
    tk.ElasticNet(0.3, l1_ratio=0.7),
    tk.Huber(0.3, delta=0.5),
    tk.MCP(0.3),
    tk.MCP(0.3, weights=torch.linspace(0, 2, 12, dtype=torch.float64).reshape(4, 3)),
    tk.SCAD(0.3),
    tk.LogSum(0.1),
    tk.GroupLasso(0.5),
    tk.GroupLasso(0.5, weights=torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)),
    tk.SparseGroupLasso(0.5, l1_ratio=0.4),
    tk.GroupMCP(0.5),
    tk.LInf(0.5),
    tk.NuclearNorm(0.5),
    tk.SpectralNorm(0.5),
    tk.Orthogonal(0.1),
    tk.SLOPE(0.3),
    tk.TotalVariation(0.3),
    tk.MaxNorm(0.8),
    tk.UnitNorm(),
    tk.MinMaxNorm(0.4, 0.8),
    tk.L1Ball(2.0),
    tk.L2Ball(1.0),
    tk.SpectralBall(1.0),
    tk.NonNegative(),
    tk.Box(-0.5, 0.5),
    tk.Simplex(),
    tk.TopK(5),
]


def linear(rows=4, columns=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=False).to(dtype)


def train(model, optimizer, steps, loss, *, zero=True):
    """Plain training on `loss(model)`; the loop of every user."""
    for _ in range(steps):
        if zero:
            optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def regression(seed=0, rows=32, columns=6, outputs=2, dtype=torch.float64):
    """A least-squares loss of a model with `columns` inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=dtype)
    y = x[:, :outputs] * 2 + 0.1 * torch.randn(rows, outputs, generator=generator, dtype=dtype)
    return lambda model: nn.functional.mse_loss(model(x), y)


def equal(first, second):
    """Whether two models have the same parameters, bit for bit."""
    pairs = zip(first.parameters(), second.parameters())
    return all(torch.equal(a, b) for a, b in pairs)
