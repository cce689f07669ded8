"""Ratios of time are measured, in the way that is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tikhon.compaction import speedup


def networks():
    wide = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 8))
    narrow = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    return wide, narrow


def test_a_smaller_network_is_faster_and_the_modes_stay():
    wide, narrow = networks()
    narrow.eval()
    wide[1].eval()  # such as a frozen norm
    assert speedup(wide, narrow, torch.randn(64, 64), rounds=3, seconds=0.01) > 2
    assert wide.training and not wide[1].training and not narrow.training


def test_onnx_runtime_is_measured_or_named():
    wide, narrow = networks()
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install .tikhon\[export\]"):
            speedup(wide, narrow, torch.randn(64, 64), way="onnx")
        return
    ratio = speedup(wide, narrow, torch.randn(64, 64), way="onnx", rounds=3, seconds=0.01)
    assert ratio > 2


def test_another_way_is_refused():
    with pytest.raises(ValueError, match="did you mean 'compile'"):
        speedup(*networks(), torch.randn(2, 64), way="compiled")  # type: ignore[arg-type]
