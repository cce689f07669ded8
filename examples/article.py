"""A network with an L1 penalty as a plain loop: python examples/article.py [DATA [FOLDER]]."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tikhon as tk
from tikhon.data import load, split

parts = split(load(*sys.argv[1:2] or ["mnist"], data_dir=sys.argv[2] if sys.argv[2:] else None))
train, test = parts.train, parts.test
loader = DataLoader(TensorDataset(train.x, train.y), batch_size=64, shuffle=True)

torch.manual_seed(0)
model = nn.Sequential()
model.add_module("flatten", nn.Flatten())
model.add_module("fc1", nn.Linear(train.x[0].numel(), 128))
model.add_module("relu", nn.ReLU())
model.add_module("fc2", nn.Linear(128, train.outputs))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
reg = tk.regularize(model, optimizer, {"fc1.weight": tk.L1(1e-4)})  # the one line of tikhon

for epoch in range(10):
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(test.x).argmax(1) == test.y).float().mean()
    term = reg.trace()[0]
    print(
        f"epoch {epoch + 1:2}  loss {loss.item():.4f}  penalty {term.value:.4f}  "
        f"exact zeros {term.zeros:.1%}  test accuracy {accuracy:.4f}"
    )
