"""One run to a sparse network: a share of weights, channels, heads ... to zero, then repair."""

from tikhon.sparsity.audit import Sparsity
from tikhon.sparsity.sparsify import Sparsifier, sparsify
from tikhon.sparsity.thinning import Thinning

__all__ = ["Sparsifier", "Sparsity", "Thinning", "sparsify"]
