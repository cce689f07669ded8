"""Multi-head attention whose dropout is a layer; torch's own stores its rate as a float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.layers.noise import NoiseLayer


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with the child `attention_dropout` on the attention weights.

    `replace_dropout` turns a module into this class in place; parameters keep their names.
    Evaluation is torch's own code; training computes the same outputs as torch's path with
    `need_weights=True`. Shapes and arguments as in torch.
    """

    attention_dropout: NoiseLayer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention outputs and, if requested, the weights after dropout."""
        if not self.attention_dropout.training:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        batched = query.ndim == 3
        batch = 0 if self.batch_first else 1
        q, k, v = (
            (x if batched else x.unsqueeze(batch)).movedim(batch, 0) for x in (query, key, value)
        )
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v, extra = self._project(q, k, v)
        mask = self._mask(q, attn_mask, key_padding_mask, extra)
        weights = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = (weights if mask is None else weights + mask).softmax(-1)
        weights = self.attention_dropout(weights)
        # contiguous as (L, N, E) like torch's, so that a seeded dropout after it draws the same
        # mask
        output = self.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2)).movedim(1, batch)
        if average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output, weights = output.squeeze(batch), weights.squeeze(0)
        return output, weights if need_weights else None

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return heads (N, heads, length, size) of the inputs, and the number of added keys."""
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip((q, k, v), weights, biases, strict=True)
        q, k, v = (F.linear(x, w, b) for x, w, b in inputs)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v, extra

    def _mask(
        self, q: Tensor, mask: Tensor | None, padding: Tensor | None, extra: int
    ) -> Tensor | None:
        """Combine the masks into an additive one (N or 1, heads or 1, L or 1, S + extra)."""
        parts = []
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))
            parts.append(mask)
        if padding is not None:
            parts.append(padding[:, None, None, :])
        if not parts:
            return None
        return sum(F.pad(additive(part, q.dtype), (0, extra)) for part in parts)  # type: ignore


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to an additive one; True means "not allowed" in nn.MultiheadAttention."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
