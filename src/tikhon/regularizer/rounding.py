"""Accumulate in float32 the updates that 16-bit weights would round away."""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.regularizer.targets import local

HALF_TYPES = (torch.float16, torch.bfloat16)


class RoundingErrors:
    """Rounding errors of float16 or bfloat16 weights, added back at the next read.

    In bfloat16, applying a soft threshold of 0.001 10,000 times leaves 1.0 at 1.0, as the spacing
    below 1 is 0.004. With compensated summation (Kahan 1965) about ten such moves change the
    weight. Weights of other types pass through.
    """

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}

    def read(self, name: str, param: Tensor) -> Tensor:
        """Return the weights, 16-bit ones in float32 with their rounding errors."""
        w = local(param)
        if w.dtype not in HALF_TYPES:
            return w
        error = self.errors.get(name)
        if error is None:
            return w.float()
        # such a zero was set externally, as by a mask
        return torch.where((w == 0) & (error.to(w.dtype) != 0), 0, w.float() + error)

    def write_(self, name: str, param: Tensor, exact: Tensor) -> None:
        """Set the weights and keep the rounding errors."""
        w = local(param)
        if exact.data_ptr() != w.data_ptr():
            w.copy_(exact)
        if w.dtype in HALF_TYPES:
            self.errors[name] = exact - w.float()
