"""Gradients too small to square are still found to vanish."""

from __future__ import annotations

import torch
from torch import nn

import tikhon as tk


def test_a_signal_below_the_root_of_the_smallest_float_is_found():
    torch.manual_seed(0)
    x, y = torch.randn(128, 8), torch.arange(128) % 3
    layers = [m for _ in range(25) for m in (nn.Linear(8, 8), nn.Sigmoid())]
    found = tk.diagnose(nn.Sequential(*layers, nn.Linear(8, 3)), (x, y), nn.CrossEntropyLoss())
    assert found.record.probes[0].readings[0].signal < 1e-22
    assert "vanishing_gradient" in found.labels
