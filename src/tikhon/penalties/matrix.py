"""Penalties of the singular values of w, seen as a matrix (all dimensions but the first: columns).

A w with fewer than two dimensions is a matrix of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.penalties.base import Penalty, Proximable, refuse_metric, upcast
from tikhon.penalties.elementwise import soft_threshold
from tikhon.penalties.group import as_rows, clip_rows

_WHOLE = "singular values belong to the matrix as a whole, not to its entries or rows"


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, once more in float64 if it does not converge; ValueError if not finite."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        bad = int((~matrix.isfinite()).sum())
        if bad:
            raise ValueError(
                f"the singular values of a {tuple(matrix.shape)} matrix with {bad} NaN or "
                f"infinite entries do not exist; training has diverged before this step"
            ) from None
    factors = torch.linalg.svd(matrix.double(), full_matrices=False)
    return tuple(factor.to(matrix.dtype) for factor in factors)


def with_singular_values(w: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """w as a matrix whose singular values are `change` of its own, in w's shape and dtype."""
    if not w.numel():
        return w.clone()
    u, sigma, vh = svd(as_rows(upcast(w)))
    return ((u * change(sigma)) @ vh).reshape(w.shape).to(w.dtype)


@dataclass(frozen=True, eq=False)
class NuclearNorm(Proximable):
    """Sum of the singular values: low rank.

    `strength * sum(sigma(w))`. The prox is exact for a single step; a per-weight step is refused.

    Reference: Fazel (2002), https://faculty.washington.edu/mfazel/thesis-final.pdf; prox: Cai,
    Candes and Shen (2010), https://doi.org/10.1137/080738970.

    >>> w = torch.diag(torch.tensor([3.0, 0.5]))
    >>> torch.linalg.matrix_rank(NuclearNorm(1.0).prox(w, step=1.0)).item()
    1
    """

    diagonal: ClassVar[bool] = False
    rows: ClassVar[str] = "out"
    unweighted: ClassVar[str] = _WHOLE

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of singular values."""
        return self.lam * torch.linalg.svdvals(as_rows(upcast(w))).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * U V' over the non-zero singular values."""
        noise = max(as_rows(w).shape) * torch.finfo(upcast(w).dtype).eps
        return with_singular_values(w, lambda s: self.lam * (s > noise * s.amax()))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Soft threshold of the singular values."""
        refuse_metric(self, step)
        return with_singular_values(w, lambda s: soft_threshold(s, self.lam * step))


@dataclass(frozen=True, eq=False)
class SpectralNorm(Proximable):
    """Largest singular value: bounds how much a layer can amplify its input.

    `strength * max(sigma(w))`. The prox is exact for a single step; a per-weight step is refused.

    Reference: Yoshida and Miyato (2017), https://arxiv.org/abs/1705.10941.

    >>> SpectralNorm(1.0).prox(torch.diag(torch.tensor([3.0, 0.5])), step=1.0).diag()
    tensor([2.0000, 0.5000])
    """

    diagonal: ClassVar[bool] = False
    rows: ClassVar[str] = "out"
    unweighted: ClassVar[str] = _WHOLE

    def value(self, w: Tensor) -> Tensor:
        """strength * largest singular value."""
        sigma = torch.linalg.svdvals(as_rows(upcast(w)))
        return self.lam * (sigma[0] if sigma.numel() else sigma.sum())

    def grad(self, w: Tensor) -> Tensor:
        """strength * u v', the first pair of singular vectors; 0 at 0."""

        def first(sigma: Tensor) -> Tensor:
            return self.lam * (sigma > 0) * (torch.arange(len(sigma), device=w.device) == 0)

        return with_singular_values(w, first)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Singular values clipped at one level."""
        refuse_metric(self, step)
        return with_singular_values(w, lambda s: clip_rows(s[None], step, self.lam)[0])


@dataclass(frozen=True, eq=False)
class Orthogonal(Penalty):
    """Distance of the rows (of the columns, where there are fewer) from being orthonormal.

    `strength * |G - I|_F^2`, G = W W' or W' W, whichever is smaller; no factor 1/2. It is smooth:
    it adds a gradient and needs no prox.

    Reference: Bansal, Chen and Wang (2018), https://arxiv.org/abs/1810.09102.

    >>> Orthogonal(0.1).value(2 * torch.eye(3))
    tensor(2.7000)
    """

    smooth: ClassVar[bool] = True
    convex: ClassVar[bool] = False
    rows: ClassVar[str] = "out"
    unweighted: ClassVar[str] = "it compares rows with each other"

    def value(self, w: Tensor) -> Tensor:
        """strength * squared Frobenius norm of the Gram matrix minus the identity."""
        return self.lam * self._excess(self._short(w)).abs().square().sum()

    def grad(self, w: Tensor) -> Tensor:
        """4 * strength * (W W' - I) W."""
        matrix = self._short(w)
        gradient = 4 * self.lam * self._excess(matrix) @ matrix
        if matrix.shape != as_rows(w).shape:
            gradient = gradient.T
        return gradient.reshape(w.shape).to(w.dtype)

    def _short(self, w: Tensor) -> Tensor:
        matrix = as_rows(upcast(w))
        return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T

    def _excess(self, matrix: Tensor) -> Tensor:
        return matrix @ matrix.mH - torch.eye(
            matrix.shape[0], dtype=matrix.dtype, device=matrix.device
        )
