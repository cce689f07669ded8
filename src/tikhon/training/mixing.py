"""Mix batches with themselves: mixup and cutmix, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor


class Mixed(NamedTuple):
    """Mixed inputs, of which `share` belongs to the targets `y` and the rest to `other`."""

    x: Tensor
    y: Tensor
    other: Tensor
    share: float

    def loss(self, loss: Callable[[Tensor, Tensor], Tensor], output: Tensor) -> Tensor:
        """share * loss(output, y) + (1 - share) * loss(output, other)."""
        return self.share * loss(output, self.y) + (1 - self.share) * loss(output, self.other)


def mixup(x: Tensor, y: Tensor, alpha: float, *, generator: Generator | None = None) -> Mixed:
    """Mix every row with another: share * x + (1 - share) * x[order], share ~ Beta(alpha, alpha).

    `x` (N, ...) and `y` (N, ...) of any dtype; one share for the batch. `alpha` > 0: 0.2 mixes
    little, 1 uniformly. Raises ValueError for alpha out of range or unequal lengths.
    Reference: Zhang et al. 2018, https://arxiv.org/abs/1710.09412

    >>> mixed = mixup(torch.eye(2), torch.tensor([0, 1]), 1.0)
    >>> torch.allclose(mixed.x.sum(1), torch.ones(2))
    True
    """
    share, order = _share(x, y, alpha, "mixup", generator)
    return Mixed(share * x + (1 - share) * x[order], y, y[order], share)


def cutmix(x: Tensor, y: Tensor, alpha: float, *, generator: Generator | None = None) -> Mixed:
    """Paste a box of another image into every image; targets are weighted by area.

    `x` is (N, C, H, W), `y` (N, ...) of any dtype; one box for the batch, of area 1 - Beta(alpha,
    alpha) around a uniform centre, clipped at the border. `alpha` > 0. Raises ValueError for alpha
    or rank out of range, or unequal lengths. Reference: Yun et al. 2019,
    https://arxiv.org/abs/1905.04899

    >>> cutmix(torch.ones(2, 1, 4, 4), torch.tensor([0, 1]), 1.0).x.sum()
    tensor(32.)
    """
    if x.ndim != 4:
        raise ValueError(f"cutmix: expected images (N, C, H, W), received shape {tuple(x.shape)}")
    share, order = _share(x, y, alpha, "cutmix", generator)
    size = np.array(x.shape[2:])
    centre = torch.rand(2, generator=generator, device=_device(generator)).cpu().numpy() * size
    half = size * (1 - share) ** 0.5 / 2
    (top, left), (bottom, right) = (
        np.clip(np.round(centre + sign * half).astype(int), 0, size) for sign in (-1, 1)
    )
    pasted = x.clone()
    pasted[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
    left_over = 1 - (bottom - top) * (right - left) / size.prod()
    return Mixed(pasted, y, y[order], float(left_over))


def _share(
    x: Tensor, y: Tensor, alpha: float, name: str, generator: Generator | None
) -> tuple[float, Tensor]:
    """Draw a share from Beta(alpha, alpha) and a permutation of the rows."""
    if not 0 < alpha < float("inf"):
        raise ValueError(f"{name}: alpha must be finite and > 0, received {alpha!r}")
    if len(x) != len(y):
        raise ValueError(f"{name}: {len(x)} rows of x, {len(y)} of y")
    device = _device(generator)
    order = torch.randperm(len(x), generator=generator, device=device).to(x.device)
    # torch's Beta takes no generator
    seed = torch.randint(2**62, (), generator=generator, device=device).item()
    return float(np.random.default_rng(int(seed)).beta(alpha, alpha)), order


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
