"""Mixed precision with a GradScaler and a fused optimizer: python examples/amp.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk

device = "cuda" if torch.cuda.is_available() else "cpu"
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
y = torch.tensor(digits.target, device=device)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
scaler = torch.amp.GradScaler(device)
reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(3e-4), "2.weight": tk.L2(1e-3)})

for step in range(400):
    batch = torch.randint(len(x), (64,), device=device)
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    if step == 200:
        loss = loss * float("inf")  # an overflow: the scaler skips the step, and so does tikhon
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()

print(f"{reg.steps} of 400 steps taken, exact zeros {reg.sparsity()['0.weight']:.1%}")
