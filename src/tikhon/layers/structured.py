"""Noise on channels, blocks, tokens, steps and whole branches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.arguments import check_flag, check_number, is_count, is_one_of
from tikhon.errors import describe
from tikhon.layers import functional
from tikhon.layers.masks import check_dims, check_rank
from tikhon.layers.noise import NoiseLayer, TorchDropout


class _SpatialDropout(TorchDropout):
    """Accept every shape that torch's class of the same name does, interpreted alike."""

    spatial: ClassVar[int]
    shape: ClassVar[str]
    alone: ClassVar[bool] = True  # a missing dimension is the batch
    strange: ClassVar[bool] = True  # other ranks are accepted with a warning

    _function = functional.spatial_dropout

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        if x.ndim == self.spatial + 2:
            return super().forward(x)
        if not (self.alone and x.ndim == self.spatial + 1):
            check_rank(
                x, range(1 if self.alone else 2, 65) if self.strange else (), self, self.shape
            )
            read = "(C, ...)" if self.alone else "(N, C, ...)"
            warnings.warn(
                f"{type(self).__name__} expects {self.shape}; it reads shape {tuple(x.shape)} as "
                f"{read}, as torch's does. Use Dropout1d, Dropout or the layer of its rank",
                stacklevel=2,
            )
        if not self.alone:
            return super().forward(x)
        return super().forward(x.unsqueeze(0)).squeeze(0)


class Dropout1d(_SpatialDropout):
    """`Dropout2d` for (N, C, L), or (C, L) without a batch; ValueError for another rank.

    >>> Dropout1d(0.5).eval()(torch.ones(1, 2, 3)).shape
    torch.Size([1, 2, 3])
    """

    spatial = 1
    shape = "(N, C, L) or (C, L)"
    strange = False


class Dropout2d(_SpatialDropout):
    """Zero whole channels with probability `rate`, scale the rest by 1 / (1 - rate).

    Shapes: (N, C, H, W); other ranks are read as (N, C, ...) with a warning, as in torch, so
    (C, H, W) needs a batch dimension. `rate` is in [0, 1]. Raises ValueError for
    another rate. Reference: Tompson et al. 2015, https://arxiv.org/abs/1411.4280

    >>> Dropout2d(0.5).eval()(torch.ones(1, 2, 3, 3)).shape
    torch.Size([1, 2, 3, 3])
    """

    spatial = 2
    shape = "(N, C, H, W)"
    alone = False


class Dropout3d(_SpatialDropout):
    """`Dropout2d` for (N, C, D, H, W), or (C, D, H, W) without a batch.

    Other ranks are read as (C, ...) with a warning, as in torch.

    >>> Dropout3d(0.5).eval()(torch.ones(1, 2, 3, 3, 3)).shape
    torch.Size([1, 2, 3, 3, 3])
    """

    spatial = 3
    shape = "(N, C, D, H, W) or (C, D, H, W)"


class _DropBlock(NoiseLayer):
    rowwise = False  # the mask is rescaled by its mean over the batch

    block_size: int
    shared: bool
    dims: ClassVar[int]

    def __init__(self, rate: float = 0.1, block_size: int = 7, *, shared: bool = False) -> None:
        super().__init__(rate)
        self.block_size = check_number(
            self.label,
            "block_size",
            block_size,
            "odd and positive",
            lambda n: is_count(n, 1) and n % 2 == 1,
            whole=True,
        )
        self.shared = check_flag(self.label, "shared", shared)

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        check_rank(x, [self.dims + 2], self, f"(N, C, ...) with {self.dims + 2} dimensions")
        return functional.drop_block(
            x, self.rate, self.block_size, shared=self.shared, where=self, **self.draws
        )

    def extra_repr(self) -> str:
        """Return the constructor arguments."""
        shared = ", shared=True" if self.shared else ""
        return f"{super().extra_repr()}, block_size={self.block_size}{shared}"


class DropBlock1d(_DropBlock):
    """`DropBlock2d` for (N, C, L): blocks are `block_size` steps of a channel; `shared` as there.

    >>> DropBlock1d(0.1, 3).eval()(torch.ones(1, 1, 5)).shape
    torch.Size([1, 1, 5])
    """

    dims = 1


class DropBlock2d(_DropBlock):
    """Zero squares of side `block_size` of a channel, keep the mean of the mask at 1.

    Shapes: (N, C, H, W) with H, W >= block_size. `rate` is in [0, 1], `block_size` is odd;
    `shared` gives all channels one mask. Raises ValueError otherwise.
    Reference: Ghiasi et al. 2018, https://arxiv.org/abs/1810.12890

    >>> DropBlock2d(0.1, 3).eval()(torch.ones(1, 1, 5, 5)).shape
    torch.Size([1, 1, 5, 5])
    """

    dims = 2


class DropBlock3d(_DropBlock):
    """`DropBlock2d` for (N, C, D, H, W): blocks are cubes of side `block_size`; `shared` as there.

    >>> DropBlock3d(0.1, 3).eval()(torch.ones(1, 1, 5, 5, 5)).shape
    torch.Size([1, 1, 5, 5, 5])
    """

    dims = 3


class _BranchNoise(NoiseLayer):
    _options = ("mode",)
    mode: str

    def __init__(self, rate: float, mode: str) -> None:
        super().__init__(rate)
        if not is_one_of(mode, ("row", "batch")):
            raise ValueError(
                f"{self.label}: mode must be 'row' or 'batch', received {describe(mode)}"
            )
        self.mode = mode
        self.rowwise: bool = mode == "row"


class DropPath(_BranchNoise):
    """Stochastic depth: zero a residual branch for a row or for the batch, scale the survivors.

    Shapes: (N, ...). `rate` is in [0, 1]; `mode` is "row" or "batch". Raises ValueError otherwise.
    Reference: Huang et al. 2016, https://arxiv.org/abs/1603.09382

    >>> DropPath(0.2).eval()(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    _function = functional.drop_path

    def __init__(self, rate: float = 0.1, *, mode: str = "row") -> None:
        super().__init__(rate, mode)

    @property
    def drop_prob(self) -> float:
        """The rate under timm's name; to set it is `set_rate`."""
        return self.p

    @drop_prob.setter
    def drop_prob(self, rate: float | Tensor) -> None:
        self.set_rate(rate)


class ShakeDrop(_BranchNoise):
    """Stochastic depth that perturbs a branch, forward and backward, where it would drop it.

    Shapes: (N, ...). `rate` is in [0, 1], the probability of perturbing; `mode` is "batch" (one
    decision per batch, as in the paper) or "row". Evaluation multiplies by the mean 1 - rate.
    Raises ValueError otherwise. Reference: Yamada et al. 2018, https://arxiv.org/abs/1802.02375

    >>> ShakeDrop(0.5).eval()(torch.ones(2, 1)).flatten()
    tensor([0.5000, 0.5000])
    """

    _function = functional.shake_drop

    def __init__(self, rate: float = 0.5, *, mode: str = "batch") -> None:
        super().__init__(rate, mode)


class TokenDropout(NoiseLayer):
    """Zero whole tokens with probability `rate`, scale the rest by 1 / (1 - rate).

    Shapes: (..., tokens, features). `rate` is in [0, 1]. Raises ValueError otherwise.

    >>> TokenDropout(0.2).eval()(torch.ones(1, 4, 2)).shape
    torch.Size([1, 4, 2])
    """

    _function = functional.token_dropout

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(rate)

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        check_rank(x, range(2, 9), self, "(..., tokens, features)")
        return super().forward(x)


class PatchDropout(NoiseLayer):
    """Keep a random share 1 - `rate` of the tokens after the first `prefix` ones, unscaled.

    Shapes: (N, L, D) to (N, prefix + max(1, int((L - prefix)(1 - rate))), D); `ordered` keeps the
    order of the tokens. As in timm the length depends on the rate: a compiled model is recompiled
    for a new rate, set by `set_rate`, and a population cannot have several. With `remove=False`
    the other tokens are set to zero instead: one shape, one compilation for all rates, one rate
    for each member; attention still sees the zeros, unless masked. `rate` is in [0, 1].
    Raises ValueError otherwise. Reference: Liu et al. 2022, https://arxiv.org/abs/2208.07220

    >>> PatchDropout(0.5)(torch.ones(1, 9, 2)).shape
    torch.Size([1, 5, 2])
    >>> PatchDropout(0.5, remove=False)(torch.ones(1, 9, 1)).sum()
    tensor(5.)
    """

    prefix: int
    ordered: bool
    remove: bool

    def __init__(
        self, rate: float = 0.5, *, prefix: int = 1, ordered: bool = False, remove: bool = True
    ) -> None:
        super().__init__(rate)
        self.prefix = check_number(
            self.label, "prefix", prefix, ">= 0", lambda n: is_count(n, 0), whole=True
        )
        self.ordered = check_flag(self.label, "ordered", ordered)
        self.remove = check_flag(self.label, "remove", remove)

    def _hold(self, rate: float) -> None:
        super()._hold(rate)
        self._static_rate = rate  # readable by the compiler

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the rate in the buffer, in place."""
        super().set_rate(rate)
        self._static_rate = self.check(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kept tokens in training mode, else `x`."""
        static = self.remove and torch.compiler.is_compiling()
        return functional.patch_dropout(
            x,
            self._static_rate if static else self.rate,
            prefix=self.prefix,
            ordered=self.ordered,
            remove=self.remove,
            where=self,
            **self.draws,
        )

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._static_rate = self.rate.item()


class LockedDropout(NoiseLayer):
    """Variational dropout: one mask for all steps along the dimension `time`.

    Shapes: any with a dimension `time` (1 for batch first, 0 for time first). `rate` is in [0, 1].
    Raises ValueError otherwise. Reference: Gal and Ghahramani 2016,
    https://arxiv.org/abs/1512.05287

    >>> LockedDropout(0.5).eval()(torch.ones(1, 4, 2)).shape
    torch.Size([1, 4, 2])
    """

    _function = functional.locked_dropout
    _options = ("time",)
    time: int

    def __init__(self, rate: float = 0.5, *, time: int = 1) -> None:
        super().__init__(rate)
        self.time = check_number(
            self.label, "time", time, "a dimension", math.isfinite, whole=True
        )
        self.rowwise: bool = self.time == 1

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        check_rank(x, range(2, 9), self, "at least two dimensions, one of them time")
        check_dims(x, [self.time], self)
        return super().forward(x)


class WordDropout(NoiseLayer):
    """Replace token ids by `unknown` with probability `rate`, except those in `protect`.

    Shapes: integer ids of any shape. `rate` is in [0, 1]. Raises ValueError otherwise.
    Reference: Bowman et al. 2016, https://arxiv.org/abs/1511.06349

    >>> WordDropout(0.3, unknown=1).eval()(torch.tensor([5, 6]))
    tensor([5, 6])
    """

    _function = functional.word_dropout
    _options = ("unknown", "protect")
    unknown: int
    protect: tuple[int, ...]

    def __init__(self, rate: float = 0.3, *, unknown: int, protect: Sequence[int] = ()) -> None:
        super().__init__(rate)
        self.unknown = _token(self.label, "unknown", unknown)
        self.protect = _tokens(self.label, protect)

    def forward(self, x: Tensor) -> Tensor:
        """Return ids with unknown words in training mode, else `x`."""
        if x.is_floating_point():
            raise TypeError(f"{self.label}: expected integer token ids, received {x.dtype}")
        return super().forward(x)


class InputDropout(NoiseLayer):
    """Cutout: zero one square of every image, of `rate` times its area, without rescaling.

    Shapes: (N, C, H, W). `rate` is in [0, 1]; the border may cut the square, as in the paper.
    Raises ValueError otherwise. Reference: DeVries and Taylor 2017,
    https://arxiv.org/abs/1708.04552

    >>> InputDropout(0.25).eval()(torch.ones(1, 1, 4, 4)).sum()
    tensor(16.)
    """

    def __init__(self, rate: float = 0.25) -> None:
        super().__init__(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return images with a hole in training mode, else `x`."""
        return functional.input_dropout(x, self.rate, where=self, **self.draws)


def _token(where: str, name: str, given: object) -> int:
    """Validate a token id."""
    allowed = "the id of a token, >= 0"
    return check_number(where, name, given, allowed, lambda n: 0 <= n < 2**31, whole=True)


def _tokens(where: str, given: Sequence[int]) -> tuple[int, ...]:
    several = hasattr(given, "__iter__") and getattr(given, "ndim", 1)
    if isinstance(given, str | bytes) or not several:
        raise TypeError(f"{where}: protect takes ids of tokens, received {describe(given)}")
    return tuple(_token(where, "an id in protect", one) for one in given)
