"""Sharded parameters with fully_shard: torchrun --nproc-per-node=2 examples/fsdp2.py."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard

import tikhon as tk

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank)
digits = load_digits()
x = torch.tensor(digits.data[rank::world], dtype=torch.float32, device=device) / 16
y = torch.tensor(digits.target[rank::world], device=device)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
for layer in (model[0], model[2]):
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
# entries and whole neurons are exact on shards; what is not is refused by name
reg = tk.regularize(model, optimizer, {"0.weight": tk.GroupLasso(3e-3), "2.weight": tk.L1(1e-4)})

for step in range(150):
    batch = slice((32 * step) % 800, (32 * step) % 800 + 32)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

zeros, penalty = reg.sparsity(), reg.value()  # all-reduced: the same on every process
if rank == 0:
    print(f"{world} processes, exact zeros {zeros['0.weight']:.1%}, penalty {penalty:.4f}")
try:
    tk.regularize(model, optimizer, {"0.weight": tk.NuclearNorm(1e-3)})
except TypeError as error:
    if rank == 0:
        print(f"refused: {error}")
dist.destroy_process_group()
