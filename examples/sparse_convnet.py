"""Half of the channels, then a smaller network: python examples/sparse_convnet.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
steps = 240
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
sparse = tk.sparsify(model, optimizer, 0.5, of="channels", steps=steps, example=x[:2], multiple=8)

for step in range(steps):
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    scheduler.step()
    if step % 60 == 59:
        print(f"step {step + 1}: {sparse.phase}, {sparse.audit().share:.1%} zero")

print(sparse.audit())
sparse.remove()
small = tk.compact(model.eval(), x[:2])
print(small.compaction)
print(f"accuracy {(small(x).argmax(1) == y).float().mean():.3f}")
