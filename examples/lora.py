"""Decay of what LoRA adds, as the product of its factors: python examples/lora.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk


class LoRA(nn.Module):
    """A frozen layer and a change of low rank: x (W + BA)' + b."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.layer(x) + self.lora_B(self.lora_A(x))


def accuracy(model, rows):
    return (model(x[rows]).argmax(1) == y[rows]).float().mean().item()


def train(model, rows, terms, steps=300, **options):
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.0)
    reg = tk.regularize(model, optimizer, terms)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (64,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return reg


digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
first, last = (y < 5).nonzero()[:, 0], (y >= 5).nonzero()[:, 0]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
train(model, torch.arange(len(x)), {"*.weight": tk.L2(1e-3)})  # the model that is adapted
model[0], model[2] = LoRA(model[0], rank=4), LoRA(model[2], rank=4)

for strength in (0.0, 3e-2):
    torch.manual_seed(1)
    for layer in (model[0], model[2]):
        layer.lora_A.reset_parameters()
        nn.init.zeros_(layer.lora_B.weight)
    train(model, last, {"*lora*": tk.Term(tk.L2(strength), rows="product")}).remove()
    change = torch.stack(
        [(m.lora_B.weight @ m.lora_A.weight).norm() for m in (model[0], model[2])]
    )
    print(
        f"strength {strength}: |BA| {change.norm():.2f}, "
        f"accuracy {accuracy(model, last):.3f} on new digits, {accuracy(model, first):.3f} on old"
    )
