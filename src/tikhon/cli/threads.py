"""Limit the threads used for small networks."""

from __future__ import annotations

from tikhon.cli import startup

_SMALL = 50_000_000  # parameters times batch size


def limit_threads(work: int) -> None:
    """Use one thread for small steps, where threads would wait longer than they compute.

    `work` is the number of parameters times the batch size. OMP_NUM_THREADS takes precedence.
    """
    import os

    import torch

    if startup.is_program:
        startup.spare_the_compiler()
    if work < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
