"""16-bit weights: steps smaller than their spacing add up in float32 instead of vanishing."""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.regularizer.targets import local

SHORT = (torch.float16, torch.bfloat16)


class Rounding:
    """What writing to float16 or bfloat16 weights has lost, given back at the next read.

    In bfloat16 a soft threshold of 0.001 applied 10,000 times leaves 1.0 at 1.0, since the
    spacing below 1 is 0.004. Here the loss is carried (Kahan 1965), so ten such moves move the
    weight. Weights of other types pass through.
    """

    def __init__(self) -> None:
        self.lost: dict[str, Tensor] = {}

    def read(self, name: str, param: Tensor) -> Tensor:
        """The weights, in float32 with what they have lost if they are 16-bit."""
        w = local(param)
        if w.dtype not in SHORT:
            return w
        lost = self.lost.get(name)
        if lost is None:
            return w.float()
        # a zero that has lost so much was set by others, as by a mask
        return torch.where((w == 0) & (lost.to(w.dtype) != 0), 0, w.float() + lost)

    def write_(self, name: str, param: Tensor, exact: Tensor) -> None:
        """Set the weights and keep what rounding loses."""
        w = local(param)
        if exact.data_ptr() != w.data_ptr():
            w.copy_(exact)
        if w.dtype in SHORT:
            self.lost[name] = exact - w.float()
