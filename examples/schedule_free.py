"""Exact zeros under a schedule-free optimizer (pip install schedulefree)."""

import schedulefree
import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=3e-3)
reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(3e-4), "2.weight": tk.L2(1e-3)})

optimizer.train()
for _ in range(600):
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

optimizer.eval()  # puts the averaged weights in place: they have the zeros, too
accuracy = (model(x).argmax(1) == y).float().mean()
print(f"exact zeros {reg.sparsity()['0.weight']:.1%}, accuracy {accuracy:.3f}")

# What would move the parameters beside the optimizer's own average is refused by name.
reg.remove()
try:
    tk.regularize(model, optimizer, tk.Term(tk.L2(0.1), how="decoupled"))
except TypeError as error:
    print(f"refused: {error}")
