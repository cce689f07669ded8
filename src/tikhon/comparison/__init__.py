"""Methods of regularization side by side: the same care, the same budget, several splits."""

from tikhon.comparison.architecture import Shapes, balance
from tikhon.comparison.compare import Comparison, compare
from tikhon.comparison.methods import DEFAULT, NAMES, Method

__all__ = ["DEFAULT", "NAMES", "Comparison", "Method", "Shapes", "balance", "compare"]
