"""Data in: named sources, files, splits and batches."""

from __future__ import annotations

from tikhon.data.batches import pair
from tikhon.data.dataset import Dataset
from tikhon.data.sources import NAMES, load
from tikhon.data.splits import Split, split

__all__ = ["NAMES", "Dataset", "Split", "load", "pair", "split"]
