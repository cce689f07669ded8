"""Train a sparse network in one run: zero a share of weights, channels or heads, then repair."""

from tikhon.sparsity.audit import Sparsity
from tikhon.sparsity.sparsify import Sparsifier, sparsify
from tikhon.sparsity.thinning import Thinning

__all__ = ["Sparsifier", "Sparsity", "Thinning", "sparsify"]
