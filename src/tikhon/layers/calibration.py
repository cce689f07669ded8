"""How far predicted probabilities can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, in [0, 1].

    sum over bins of n_b / n * |accuracy_b - confidence_b|; `probabilities` (N, classes), `labels`
    (N,) of class numbers. Raises ValueError for lengths that differ or no rows. Reference: Guo et
    al. 2017, https://arxiv.org/abs/1706.04599

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    >>> round(expected_calibration_error(probabilities, torch.tensor([0, 1])), 3)
    0.4
    """
    if len(probabilities) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"expected as many labels as rows and at least one, received {len(labels)} labels for "
            f"{len(probabilities)} rows"
        )
    confidence, predicted = probabilities.double().max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    bin_of = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)  # (lower, upper]
    gap = (predicted == labels).double() - confidence
    total = gap.new_zeros(bins).index_add(0, bin_of, gap).abs().sum()
    return (total / len(labels)).item()


def accuracy_rejection(
    uncertainty: Tensor, correct: Tensor, rejected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Accuracy on the rows that remain when the most uncertain share is rejected.

    `uncertainty` and `correct` are (N,); `rejected` are shares in [0, 1), by default 0 to 0.9 in
    steps of 0.1. Returns (rejected, accuracy). Reference: Nadeem et al. 2009,
    https://proceedings.mlr.press/v8/nadeem10a.html

    >>> accuracy_rejection(torch.tensor([0.1, 0.9]), torch.tensor([1, 0]), torch.tensor([0, 0.5]))
    (tensor([0.0000, 0.5000]), tensor([0.5000, 1.0000]))
    """
    rejected = torch.arange(10) / 10 if rejected is None else rejected
    order = uncertainty.argsort(stable=True)
    running = correct[order].float().cumsum(0) / torch.arange(1, len(order) + 1)
    kept = ((1 - rejected) * len(order)).round().long().clamp(1, len(order))
    return rejected, running[kept - 1]
