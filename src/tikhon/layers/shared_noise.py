"""Common random numbers: the same noise for another rate or member."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tikhon.layers.rates import noise_layers
from tikhon.numbers import check_seed


@contextmanager
def common_noise(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, noise layer k of `model` draws from its own generator, seeded by `seed` and k.

    Two models, or two rates of one model, entered with the same seed see the same uniform
    numbers: what the larger rate keeps, the smaller keeps too, so the difference of their losses
    is not blurred by the randomness of the masks. Torch's own layers are not affected (use
    `replace_dropout` first). Under `torch.vmap(randomness="same")` all members share the numbers.
    Eager mode only. Raises ValueError if there is no noise layer.

    >>> from tikhon.layers import Dropout
    >>> model, x = nn.Sequential(Dropout(0.5)), torch.ones(8)
    >>> with common_noise(model, seed=0): first = model(x)
    >>> with common_noise(model, seed=0): second = model(x)
    >>> torch.equal(first, second)
    True
    """
    layers = list(noise_layers(model).values())
    before = [layer.generator for layer in layers]
    for k, layer in enumerate(layers):
        device = next((b.device for b in layer.buffers()), torch.device("cpu"))
        # 2**32 separates the streams of neighbouring seeds
        layer.generator = torch.Generator(device).manual_seed(check_seed(seed) + k * 2**32)
    try:
        yield
    finally:
        for layer, generator in zip(layers, before, strict=True):
            layer.generator = generator
