"""Compare methods of regularization with equal budgets over several splits."""

from tikhon.comparison.architecture import Shapes, balance
from tikhon.comparison.compare import Comparison, compare
from tikhon.comparison.methods import DEFAULT, NAMES, Method
from tikhon.comparison.trainings import Records

__all__ = ["DEFAULT", "NAMES", "Comparison", "Method", "Records", "Shapes", "balance", "compare"]
