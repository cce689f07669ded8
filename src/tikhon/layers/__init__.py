"""The dropout family: noise layers whose rate is a buffer, put into a model and moved at will."""

from __future__ import annotations

from tikhon.layers.dropout import Dropout
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.rates import set_rate

__all__ = ["Dropout", "NoiseLayer", "set_rate"]
