"""Modules that only a compacted model needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tikhon.layers.attention import additive

torch.fx.wrap("additive")  # one call of a graph: it branches on the type of the mask


class AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm of inputs of any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: the channels are dimension 1."""


class SelectLinear(nn.Module):
    """A linear layer of some of its input's columns: `x[..., columns] @ weight.T + bias`."""

    columns: Tensor

    def __init__(self, linear: nn.Linear, columns: Tensor):
        super().__init__()
        self.linear = linear
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        """(..., all inputs) -> (..., out)."""
        return self.linear(x.index_select(-1, self.columns))

    @property
    def weight(self) -> Tensor:
        """That of the linear layer, for a forward that asks for its type or device."""
        return self.linear.weight

    def extra_repr(self) -> str:
        """What is read."""
        return f"columns={len(self.columns)}"


class InputsFirst(nn.Module):
    """A linear layer whose weight holds a row an input, as GPT-2's: `x @ weight + bias`."""

    transposed = True

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def matrix(module: nn.Linear | InputsFirst) -> Tensor:
    """The weight of a linear layer with a row an output."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, InputsFirst) else weight


class PartialLayerNorm(nn.Module):
    """LayerNorm of `total` entries of which only some are present and the others are constants.

    With k absent constants of sum s1 and sum of squares s2, over n = total entries:
    mean = (sum x + s1) / n, variance = (sum (x - mean)^2 + s2 - 2 mean s1 + k mean^2) / n.
    Unless `centred` it is RMSNorm, whose mean is 0.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: Tensor,
        *,
        eps: float,
        centred: bool = True,
    ):
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.absent = len(constants)
        self.total_of_absent = float(constants.sum()) if centred else 0.0
        self.squares_of_absent = float(constants.square().sum())
        self.eps, self.centred = eps, centred

    def forward(self, x: Tensor) -> Tensor:
        """(..., kept) -> (..., kept)."""
        total, mean = x.shape[-1] + self.absent, 0.0
        if self.centred:
            mean = (x.sum(-1, keepdim=True) + self.total_of_absent) / total
        out = x - mean
        squares = out.square().sum(-1, keepdim=True) + (
            self.squares_of_absent - 2 * mean * self.total_of_absent + self.absent * mean * mean
        )
        out = out * torch.rsqrt(squares / total + self.eps)
        if self.weight is not None:
            out = out * self.weight
        return out if self.bias is None else out + self.bias


class Attention(nn.Module):
    """Multi-head attention with any number of heads of one size, called as nn.MultiheadAttention.

    The attention weights are not returned (None in their place).
    """

    def __init__(
        self,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        out: nn.Module,
        *,
        heads: int,
        batch_first: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        self.heads, self.batch_first, self.dropout = heads, batch_first, dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(batch, length, embedding) -> the same, or (length, batch, embedding)."""
        inputs = (query, key, value)
        if not self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        projections = (self.query, self.key, self.value)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in zip(projections, inputs, strict=True)
        )
        mask = None if attn_mask is None else additive(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=rate, is_causal=is_causal and mask is None
        )
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None


class PartialGroupNorm(nn.Module):
    """GroupNorm over groups of which some channels are absent constants.

    The moments are those of PartialLayerNorm, where a channel counts once a position; `group`
    is the group of each channel present, `size` the channels of a whole group.
    """

    group: Tensor
    absent: Tensor

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: Tensor,
        *,
        missing: Tensor,
        groups: int,
        eps: float,
    ):
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.size, self.eps = len(missing) // groups, eps
        of = torch.arange(groups).repeat_interleave(self.size)
        self.register_buffer("group", of[~missing])
        absent = torch.zeros(3, groups, dtype=torch.float64)
        for row, values in enumerate((torch.ones_like(constants), constants, constants.square())):
            absent[row].index_add_(0, of[missing], values[missing])
        dtype = torch.float32 if weight is None else weight.dtype
        self.register_buffer("absent", absent.to(dtype))  # count, sum, sum of squares

    def forward(self, x: Tensor) -> Tensor:
        """(batch, kept, ...) -> the same."""
        flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
        places, (count, total, squares) = flat.shape[2], self.absent.to(x.dtype)
        mean = (self._sums(flat) / places + total) / self.size
        centred = flat - mean[:, self.group, None]
        variance = self._sums(centred.square()) / places
        variance = (variance + squares - 2 * mean * total + count * mean.square()) / self.size
        out = centred * torch.rsqrt(variance + self.eps)[:, self.group, None]
        if self.weight is not None:
            out = out * self.weight[:, None]
        if self.bias is not None:
            out = out + self.bias[:, None]
        return out.view(x.shape)

    def _sums(self, flat: Tensor) -> Tensor:
        sums = flat.new_zeros(len(flat), self.absent.shape[1])
        return sums.index_add(1, self.group, flat.sum(2))
