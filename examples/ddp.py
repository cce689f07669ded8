"""Two processes with DistributedDataParallel: torchrun --nproc-per-node=2 examples/ddp.py."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tikhon as tk

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
digits = load_digits()
x = torch.tensor(digits.data[rank::world], dtype=torch.float32) / 16  # this process's share
y = torch.tensor(digits.target[rank::world])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
reg = tk.regularize(model, optimizer, {"0.weight": tk.GroupLasso(3e-3), "2.weight": tk.L2(1e-3)})

for step in range(150):
    batch = slice((32 * step) % 800, (32 * step) % 800 + 32)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

zeros = reg.sparsity()["0.weight"]
everywhere = [torch.zeros(1) for _ in range(world)]
dist.all_gather(everywhere, torch.tensor([zeros]))
assert len({part.item() for part in everywhere}) == 1, "the processes have drifted apart"
if rank == 0:
    print(f"{world} processes, exact zeros {zeros:.1%}, penalty {reg.value():.4f}")
dist.destroy_process_group()
