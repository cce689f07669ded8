"""Diagnosis of a live training loop at low cost."""

from tikhon.monitoring.watch import NonFiniteError, Watch, watch

__all__ = ["NonFiniteError", "Watch", "watch"]
