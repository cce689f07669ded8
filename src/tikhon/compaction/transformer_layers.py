"""torch's transformer layers as modules that a tracer can enter.

A tracer stops at modules of torch and enters these subclasses, whose forwards have no branch on
values. A causal mask is a mask like any other.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn


class EncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` without its fused shortcut."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(batch, length, embedding) -> the same, or (length, batch, embedding)."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(x + self._ff_block(x))


class DecoderLayer(nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer`."""


class Encoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder`: its layers one after the other."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As one layer."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.TransformerDecoder):
    """`nn.TransformerDecoder`: its layers one after the other."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As one layer."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks)
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    """`nn.Transformer`: the encoder, then the decoder."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Sources and targets -> the targets' shape."""
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        return self.decoder(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        )


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    kind.__mro__[1]: kind for kind in (EncoderLayer, DecoderLayer, Encoder, Decoder, Transformer)
}


def with_traceable_layers(model: nn.Module) -> nn.Module:
    """The model with torch's own transformer layers, known by their exact types, replaced.

    All other modules that hold none are the model's own, under the same names; those that hold
    one are shallow copies, so the model itself stays as it is.
    """
    return _replace_layers(model, {})


def _replace_layers(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    children = {n: c and _replace_layers(c, done) for n, c in module._modules.items()}
    kind, replaced = _KINDS.get(type(module)), module
    if kind is not None or any(c is not module._modules[n] for n, c in children.items()):
        replaced = copy.copy(module)
        replaced._modules = children
        replaced.__class__ = kind or type(module)
    done[module] = replaced
    return replaced
