"""Start quickly: without the compiler of torch, with one thread for small networks."""

from __future__ import annotations

_SMALL = 50_000_000  # parameters times batch size
is_program = False  # whether this process is only the command line


def limit_threads(work: int) -> None:
    """Use one thread for small steps, where threads would wait longer than they compute.

    `work` is the number of parameters times the batch size. OMP_NUM_THREADS takes precedence.
    """
    import atexit
    import os

    import torch

    from tikhon.training.compiler_imports import without_compiler

    if is_program:
        spared = without_compiler()
        spared.__enter__()
        atexit.register(spared.__exit__, None, None, None)
    if work < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
