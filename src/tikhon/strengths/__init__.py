"""Strengths that vary with the step (schedules) or with the weights (controllers)."""

from tikhon.strengths import schedules

__all__ = ["schedules"]
