"""Group lasso, weight decay and a max-norm in a plain loop: python examples/plain_loop.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
reg = tk.regularize(
    model,
    optimizer,
    {
        "0.weight": tk.GroupLasso(3e-3),  # a row is a neuron: whole neurons become exact zeros
        "2.weight": [tk.Term(tk.L2(1e-2), how="decoupled"), tk.MaxNorm(2.0)],
    },
)
print(reg.audit())

for step in range(600):
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    scheduler.step()
    if step % 200 == 199:
        for row in reg.trace():
            print(f"step {step + 1}: {row.name} value {row.value:.4f} zeros {row.zeros:.1%}")

neurons = int((model[0].weight != 0).any(1).sum())
accuracy = (model(x).argmax(1) == y).float().mean()
print(f"{neurons} of 128 neurons left, accuracy {accuracy:.3f}")
