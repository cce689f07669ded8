"""Rows of DATA available to a search or a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tikhon.cli import tables

if TYPE_CHECKING:
    from torch import Tensor

    from tikhon.cli.terminal import Terminal
    from tikhon.data import Dataset, Split
    from tikhon.data.table import TableOptions

VALID = 0.2  # share of rows that scores a network's path


def read(
    terminal: Terminal,
    data: str,
    table: tables.TableArguments,
    data_dir: Path | None,
    *,
    test: float,
    seed: int,
) -> tuple[TableOptions | None, Dataset, Split]:
    """Announce, load and split DATA, and print notices."""
    from tikhon.data import load, split

    options = table.read()
    tables.announce(terminal, data, options, data_dir)
    source = load(data, data_dir=data_dir, table=options)
    parts = split(source, valid=VALID, test=test, seed=seed)
    tables.introduce(terminal, parts.train)
    return options, source, parts


def all_but_test(parts: Split) -> tuple[Tensor, Tensor]:
    """Join training and validation rows, for callers that split themselves."""
    import torch

    pieces = (parts.train, parts.valid)
    return torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces])
