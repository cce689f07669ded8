"""Train a model: one plain loop, its settings and the run folder."""

from __future__ import annotations

from tikhon.training.clipping import below_the_last, clip_grad_adaptive_
from tikhon.training.fit import Run, fit
from tikhon.training.loop import Diverged, Progress
from tikhon.training.settings import Settings

__all__ = [
    "Diverged",
    "Progress",
    "Run",
    "Settings",
    "below_the_last",
    "clip_grad_adaptive_",
    "fit",
]
