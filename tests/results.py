"""Small results of every verb, as what shows them is tested on them."""

import torch
from torch import nn

import tikhon as tk


def data(rows=120):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


def run():
    return tk.fit(nn.Linear(4, 2), data(), valid=data(60), epochs=4)


def audit():
    return tk.audit(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), tk.L2(1e-3))


def regularizer(terms=None):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = tk.regularize(model, optimizer, terms or tk.L1(1e-2))
    model(data()[0]).sum().backward()
    optimizer.step()
    return handle


def path(**options):
    return tk.path(None, data(), tk.L1(), folds=3, **options)


def tune():
    return tk.tune(lambda: nn.Linear(4, 2), data(), budget="2runs", folds=0, epochs=4)
