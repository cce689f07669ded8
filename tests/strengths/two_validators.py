"""Run by torchrun: hypergradients under DDP and FSDP2, each process with half of the rows."""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tikhon as tk


def run(wrap, mine, penalty, how):
    """Strengths after 60 steps on the rows that `mine` picks."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=generator), torch.randn(48, 2, generator=generator)
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    valid = (x[24:][mine], y[24:][mine])
    strength = tk.Hypergradient(valid, nn.functional.mse_loss, steps=60, every=2)
    reg = tk.regularize(model, optimizer, penalty(strength), how=how)
    kept = []
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[:24][mine]), y[:24][mine]).backward()
        optimizer.step()
        kept.append(reg.strengths())
    return kept[-1]


def sharded(model):
    """The model with its parameters cut along dimension 0 over all processes."""
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


CASES = {"L2": (tk.L2, "decoupled"), "GroupLasso": (tk.GroupLasso, "decoupled")}
dist.init_process_group("gloo")
rank = dist.get_rank()
half = slice(rank, None, 2)
found = {}
for name, case in CASES.items():
    found[f"{name} ddp"] = run(DistributedDataParallel, half, *case)
    found[f"{name} fsdp2"] = run(sharded, half, *case)
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    for name, case in CASES.items():
        found[f"{name} alone"] = run(lambda model: model, slice(None), *case)
    json.dump(found, sys.stdout)
