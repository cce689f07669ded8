"""One run to a sparse network: a share of weights, channels or heads to zero, then repair."""

from tikhon.sparsity.sparsify import Sparsifier, sparsify

__all__ = ["Sparsifier", "sparsify"]
