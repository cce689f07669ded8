"""Run by torchrun: a hypergradient under DDP, each process validating on its half of the rows."""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tikhon as tk


def run(wrap, mine):
    """Strengths after 40 steps on the rows that `mine` picks."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=generator), torch.randn(48, 2, generator=generator)
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    valid = (x[24:][mine], y[24:][mine])
    strength = tk.Hypergradient(valid, nn.functional.mse_loss, steps=40, every=2)
    reg = tk.regularize(model, optimizer, tk.L2(strength), how="decoupled")
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[:24][mine]), y[:24][mine]).backward()
        optimizer.step()
    return reg.state_dict()["strengths"]


dist.init_process_group("gloo")
rank = dist.get_rank()
together = run(DistributedDataParallel, slice(rank, None, 2))
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    json.dump({"together": together, "alone": run(lambda model: model, slice(None))}, sys.stdout)
