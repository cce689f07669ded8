"""Inputs that are sparse tensors, as the graph of a graph network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tikhon as tk


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, x, near):
        hidden = torch.relu(self.first(torch.sparse.mm(near, x)))
        return self.second(torch.sparse.mm(near, hidden))


def graph():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 20, generator=generator) + F.one_hot(y, 20)
    near = torch.rand(90, 90, generator=generator) < 0.03 + 0.15 * (y[:, None] == y)
    near = (near | torch.eye(90, dtype=torch.bool)).float()
    return x, near / near.sum(1, keepdim=True), y


def known(model, batch):
    x, near, y = batch
    return F.cross_entropy(model(x, near)[:60], y[:60])


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_graph_may_be_a_sparse_tensor(layout):
    torch.manual_seed(0)
    x, near, y = graph()
    near, model = near.to_sparse(layout=layout), Graph()
    engine = torch.optim.Adam(model.parameters(), lr=0.01)
    found = tk.diagnose(model, [(x, near, y)], known, optimizer=engine, steps=60)
    assert found.ok, str(found)
    with tk.watch(model, engine, every=5) as seen:
        for _ in range(40):
            engine.zero_grad()
            known(model, (x, near, y)).backward()
            engine.step()
    assert not seen.alarms
    assert len(seen.rows) == 8


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
def test_what_is_not_finite_is_found_in_a_sparse_tensor(layout):
    x, near, y = graph()
    near[0, 0] = torch.nan
    found = tk.diagnose(Graph(), [(x, near.to_sparse(layout=layout), y)], known)
    assert found.findings[0].code == "non_finite_data"
