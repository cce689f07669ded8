"""Muon for the matrices, AdamW for the rest, one call: python examples/muon_and_adamw.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
hidden = [model[0].weight, model[2].weight]
rest = [p for p in model.parameters() if not any(p is matrix for matrix in hidden)]
muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0)
adamw = torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)
schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(one, 300) for one in (muon, adamw)]

# Each term acts in the steps of the optimizer that holds its parameter.
reg = tk.regularize(
    model,
    [muon, adamw],
    {
        "0.weight": tk.GroupLasso(3e-3),  # Muon has no metric to prox in: by orthants, exact too
        "4.weight": [tk.L1(1e-3), tk.MaxNorm(2.0)],
    },
)
for row in reg.audit().assignments:
    print(row.parameter, row.terms, row.route)

for _ in range(300):
    batch = torch.randint(len(x), (64,))
    for optimizer in reg.optimizers:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    for optimizer, scheduler in zip(reg.optimizers, schedulers):
        optimizer.step()
        scheduler.step()

neurons = int((model[0].weight != 0).any(1).sum())
accuracy = (model(x).argmax(1) == y).float().mean()
print(f"{neurons} of 128 neurons left, accuracy {accuracy:.3f}")
