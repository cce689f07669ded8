"""torch's transformer layers as modules that a tracer can enter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _Block(nn.Module):
    """Holds the parts of one of torch's layers under their names, and computes the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.train(layer.training)


class _Layer(_Block):
    """What an encoder's and a decoder's layer share."""

    self_attn: nn.MultiheadAttention
    linear1: nn.Linear
    linear2: nn.Linear
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    dropout: nn.Dropout
    dropout1: nn.Dropout
    dropout2: nn.Dropout

    def __init__(self, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
        super().__init__(layer)
        self.norm_first = layer.norm_first
        self.activation = layer.activation

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def _attend(
    attention: nn.MultiheadAttention,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """What the positions of `x` find in `memory`."""
    found = attention(
        x,
        memory,
        memory,
        attn_mask=mask,
        key_padding_mask=padding,
        need_weights=False,
        is_causal=is_causal,
    )
    return found[0]


class EncoderLayer(_Layer):
    """`nn.TransformerEncoderLayer` without its fused shortcut."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(batch, length, embedding) -> the same, or (length, batch, embedding)."""

        def self_attention(x: Tensor) -> Tensor:
            masks = (src_mask, src_key_padding_mask, is_causal)
            return self.dropout1(_attend(self.self_attn, x, x, *masks))

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout2(self._feed_forward(x))

        if self.norm_first:
            x = src + self_attention(self.norm1(src))
            return x + feed_forward(self.norm2(x))
        x = self.norm1(src + self_attention(src))
        return self.norm2(x + feed_forward(x))


class DecoderLayer(_Layer):
    """`nn.TransformerDecoderLayer`."""

    multihead_attn: nn.MultiheadAttention
    norm3: nn.LayerNorm
    dropout3: nn.Dropout

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Targets and what they attend to -> the targets' shape."""

        def self_attention(x: Tensor) -> Tensor:
            masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            return self.dropout1(_attend(self.self_attn, x, x, *masks))

        def cross_attention(x: Tensor) -> Tensor:
            masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
            return self.dropout2(_attend(self.multihead_attn, x, memory, *masks))

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout3(self._feed_forward(x))

        if self.norm_first:
            x = tgt + self_attention(self.norm1(tgt))
            x = x + cross_attention(self.norm2(x))
            return x + feed_forward(self.norm3(x))
        x = self.norm1(tgt + self_attention(tgt))
        x = self.norm2(x + cross_attention(x))
        return self.norm3(x + feed_forward(x))


class Encoder(_Block):
    """`nn.TransformerEncoder`: its layers one after the other."""

    layers: nn.ModuleList

    def __init__(self, stack: nn.TransformerEncoder) -> None:
        super().__init__(stack)
        self.norm = stack.norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As one layer; a causal mask is a mask like any other."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class Decoder(_Block):
    """`nn.TransformerDecoder`: its layers one after the other."""

    layers: nn.ModuleList

    def __init__(self, stack: nn.TransformerDecoder) -> None:
        super().__init__(stack)
        self.norm = stack.norm

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
        """As one layer; a causal mask is a mask like any other."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(_Block):
    """`nn.Transformer`: the encoder, then the decoder."""

    encoder: nn.Module
    decoder: nn.Module

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
        """Sources and targets -> the targets' shape; a causal mask is a mask like any other."""
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        return self.decoder(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        )


_KINDS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerDecoderLayer: DecoderLayer,
    nn.TransformerEncoder: Encoder,
    nn.TransformerDecoder: Decoder,
    nn.Transformer: Transformer,
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
    kind = _KINDS.get(type(module))
    found = module
    if kind is not None or any(c is not module._modules[n] for n, c in children.items()):
        found = copy.copy(module)
        found._modules = children
        found = found if kind is None else kind(found)
    done[module] = found
    return found
