"""Terms of the training objective that look at outputs: pure functions of logits."""

from __future__ import annotations

from torch import Tensor


def confidence_penalty(logits: Tensor) -> Tensor:
    """Negative entropy of the predictions in nats, a mean over rows: high where they are sure.

    `logits` (N, classes). Reference: Pereyra et al. 2017, https://arxiv.org/abs/1701.06548

    >>> round(confidence_penalty(torch.zeros(1, 2)).item(), 4)
    -0.6931
    """
    logarithm = logits.log_softmax(-1)
    return (logarithm.exp() * logarithm).sum(-1).mean()


def r_drop(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric divergence (KL(p|q) + KL(q|p)) / 2 of two noisy passes, a mean over rows.

    `first` and `second` are logits (N, classes) of the same rows under different noise. The whole
    objective is the mean of both data losses plus a weight (1 to 5 in the paper) times this.
    Reference: Liang et al. 2021, https://arxiv.org/abs/2106.14448

    >>> r_drop(torch.zeros(3, 2), torch.zeros(3, 2))
    tensor(0.)
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
