"""A backbone that is set free later, drawn to where it started: python examples/unfreezing.py."""

import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
model[0].requires_grad_(False)
start = {name: p.detach().clone() for name, p in model.named_parameters()}

optimizer = torch.optim.AdamW(model[2].parameters(), lr=3e-3, weight_decay=0.0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that the terms on layer 0 act on nothing yet
    reg = tk.regularize(
        model,
        optimizer,
        {"0.weight": tk.L2(1e-2, center=start), "2.weight": tk.L1(1e-3)},
    )
print(reg.audit()["0.weight"].note)

for step in range(400):
    if step == 200:  # from here on the term on it acts as well
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-3})
        print(reg.audit()["0.weight"].note or "joined in")
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

moved = (model[0].weight - start["0.weight"]).norm() / start["0.weight"].norm()
accuracy = (model(x).argmax(1) == y).float().mean()
print(f"the backbone moved by {moved:.1%}, accuracy {accuracy:.3f}")
