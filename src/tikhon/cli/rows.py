"""The rows of DATA that a search or a path may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tikhon.data import Split


def all_but_test(parts: Split) -> tuple[Tensor, Tensor]:
    """Training and validation rows together: what follows divides them itself."""
    import torch

    pieces = (parts.train, parts.valid)
    return torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces])
