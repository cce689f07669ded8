"""Penalties act once a step, not once a backward: python examples/gradient_accumulation.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))


def train(micro_batches: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tk.regularize(model, optimizer, {"0.weight": tk.L1(1e-3), "2.weight": tk.L2(1e-2)})
    for step in range(100):
        batch = order[(64 * step) % 1024 :][:64]
        optimizer.zero_grad()
        for part in batch.chunk(micro_batches):
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            (loss / micro_batches).backward()
        optimizer.step()
    return model


whole, parts = train(1), train(4)
difference = max(
    (a - b).abs().max().item() for a, b in zip(whole.parameters(), parts.parameters())
)
print(f"largest difference between 1 and 4 micro-batches: {difference:.1e}")
assert difference < 1e-3
