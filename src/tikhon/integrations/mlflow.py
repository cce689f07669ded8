"""Log the penalties of a Regularizer as metrics of the active MLflow run.

Needs `pip install tikhon[mlflow]`.
"""

# named like the package it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from tikhon.integrations.readings import readings
from tikhon.regularizer.regularizer import Regularizer

try:
    import mlflow
except ImportError as error:
    raise ImportError("logging to MLflow needs it: pip install tikhon[mlflow]") from error


def log(regularizer: Regularizer, step: int | None = None, *, per_parameter: bool = False) -> None:
    """Log the `readings` at `step` (default: the Regularizer's own)."""
    at = regularizer.steps if step is None else step
    mlflow.log_metrics(readings(regularizer, per_parameter=per_parameter), step=at)
