"""Treatments tried on copies, paired and in rungs; only what proves to help is kept."""

from tikhon.cures.cure import Cure, cure

__all__ = ["Cure", "cure"]
