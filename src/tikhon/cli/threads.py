"""What a command sets up before it trains: threads that a small network deserves."""

from __future__ import annotations

from tikhon.cli import startup

_SMALL = 50_000_000  # parameters times rows of a batch


def limit_threads(work: int) -> None:
    """Use one thread when a step is small: more wait for each other longer than they compute.

    `work` is the number of parameters times the rows of a batch. OMP_NUM_THREADS, if set, wins.
    """
    import os

    import torch

    if startup.is_program:
        startup.spare_the_compiler()
    if work < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
