"""Start quickly: without the compiler imports of torch, with one thread for small networks."""

from __future__ import annotations

from typing import Any

_SMALL = 50_000_000  # parameters times batch size
is_program = False  # whether this process is only the command line


def skip_compiler_imports() -> None:
    """Let torch's optimizers run without importing `torch._dynamo`, which takes seconds.

    Their methods import it on first use, to mark themselves for a tracing compiler, which the
    command line never uses. Attributes missing in other versions of torch are skipped.
    """
    import torch
    from torch.optim import Optimizer

    from tikhon.training.settings import OPTIMIZERS

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        own: Any = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if own is not None:  # what `torch._disable_dynamo` would find on a second call
            setattr(own, "__dynamo_disable", own)
    for kind in OPTIMIZERS.values():
        step: Any = kind.step
        own = getattr(step, "__wrapped__", None)
        if own is not None and step.__code__.co_name == "_use_grad":
            kind.step = torch.no_grad()(own)  # as torch does if nothing is differentiable


def limit_threads(work: int) -> None:
    """Use one thread for small steps, where threads would wait longer than they compute.

    `work` is the number of parameters times the batch size. OMP_NUM_THREADS takes precedence.
    """
    import os

    import torch

    if is_program:
        skip_compiler_imports()
    if work < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
