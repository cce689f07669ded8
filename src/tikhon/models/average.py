"""Average several trained networks in one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """The mean prediction of its members, as one module.

    With `probabilities` the members' softmax outputs are averaged and their logarithm returned,
    for use like the logits of one classifier; otherwise outputs are averaged.

    >>> members = [nn.Linear(3, 2) for _ in range(4)]
    >>> average = Average(members, probabilities=True)
    >>> average(torch.zeros(5, 3)).exp().sum(1).detach()
    tensor([1., 1., 1., 1., 1.])
    """

    def __init__(self, members: Sequence[nn.Module], *, probabilities: bool) -> None:
        super().__init__()
        self.members: nn.ModuleList = nn.ModuleList(members)
        self.probabilities = probabilities

    def forward(self, *inputs: object, **named: object) -> Tensor:
        """(rows, ...) -> (rows, outputs); inputs as for the members."""
        outputs = torch.stack([member(*inputs, **named) for member in self.members])
        if not self.probabilities:
            return outputs.mean(0)
        log = outputs.log_softmax(-1)
        mean = log.logsumexp(0) - torch.tensor(float(len(self.members))).log()
        return mean - mean.logsumexp(-1, keepdim=True)
