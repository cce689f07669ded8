"""Run on gloo processes: trains with DDP or FSDP2, saves as it goes, and dies where it is told to.

    killed_rank.py KIND FOLDER STEPS DIES

`DIES` is the step at which the last rank kills itself; 0 for none. What a folder holds is taken up
on however many ranks there are. Rank 0 writes the final weights.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tikhon as tk

FULL = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
ROWS = 12  # of a batch: any number of ranks up to 4 shares them evenly


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
    if kind == "DDP":
        return DistributedDataParallel(model)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    kind, folder, steps, dies = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = network(kind)
    optimizer = optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    terms = {"*": tk.L2(0.05), "0.weight": tk.L1(tk.TargetSparsity(0.5, steps=15))}
    reg = tk.regularize(model, optimizer, terms)
    start = 0
    if (folder / "saved.pt").exists():
        saved = torch.load(folder / "saved.pt", weights_only=True)
        start = saved["step"]
        whole.set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=FULL,
        )
        reg.load_state_dict(saved["regularizer"])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, ROWS, 8, generator=generator)
    y = x.sum(2, keepdim=True).sin()
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    for step in range(start, steps):
        if dies and step == dies and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[step, mine]), y[step, mine]).backward()
        optimizer.step()
        if step % 4 == 3 or step == steps - 1:
            found, state = whole.get_state_dict(model, optimizer, options=FULL)
            if rank == 0:
                saved = {"step": step + 1, "model": found, "optimizer": state}
                torch.save({**saved, "regularizer": reg.state_dict()}, folder / "new.pt")
                os.replace(folder / "new.pt", folder / "saved.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
