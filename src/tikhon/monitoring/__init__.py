"""The questions of a diagnosis in a live loop, cheaply."""

from tikhon.monitoring.watch import NonFiniteError, Watch, watch

__all__ = ["NonFiniteError", "Watch", "watch"]
