"""`watch` on two processes, replicated and sharded, against one process with the whole batch."""

from __future__ import annotations

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tikhon as tk
from tikhon.monitoring import NonFiniteError

KEYS = ("gradient", "weight", "update", "signal_ratio", "loss")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def shard(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def run(wrap, batches, bad=None):
    model = wrap(network())
    engine = optim.SGD(model.parameters(), lr=0.1)
    with tk.watch(model, engine, every=2) as health:
        for step, (x, y) in enumerate(batches):
            engine.zero_grad()
            x = x * torch.nan if step == bad else x
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            health.loss(loss)
            engine.step()
    return [[row[key] for key in KEYS] for row in health.rows]


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(5)
    ]
    half = slice(8 * rank, 8 * rank + 8)
    mine = [(x[half], y[half]) for x, y in batches]
    results = {"DDP": run(DistributedDataParallel, mine), "FSDP2": run(shard, mine)}
    stops = {}
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", shard)):
        try:
            run(wrap, mine, bad=3 if rank == 0 else None)
        except NonFiniteError as error:
            stops[name] = str(error)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, stops)
    dist.destroy_process_group()
    if rank == 0:
        alone = run(copy.copy, batches)
        json.dump({"alone": alone, "results": results, "stops": everywhere}, sys.stdout)


if __name__ == "__main__":
    main()
