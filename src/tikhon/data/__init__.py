"""Load data: named sources, files, splits and batches."""

from __future__ import annotations

from tikhon.data.batches import order, pair, slices
from tikhon.data.dataset import Dataset
from tikhon.data.source import Format
from tikhon.data.sources import NAMES, load
from tikhon.data.splits import Split, split
from tikhon.data.table import TableOptions

__all__ = [
    "NAMES",
    "Dataset",
    "Format",
    "Split",
    "TableOptions",
    "load",
    "order",
    "pair",
    "slices",
    "split",
]
