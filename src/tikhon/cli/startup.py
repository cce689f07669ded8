"""A quick start: what torch imports for a compiler that no command uses."""

from __future__ import annotations

from typing import Any

is_program = False  # whether this process is the command line and nothing else


def spare_the_compiler() -> None:
    """Let torch's own optimizers step without importing `torch._dynamo`, which takes seconds.

    Their methods import it at their first call, to tell a compiler that traces them where to
    stop. A command line traces no optimizer. What a torch of another version has not is left.
    """
    import torch
    from torch.optim import Optimizer

    from tikhon.training.settings import OPTIMIZERS

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        own: Any = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if own is not None:  # what `torch._disable_dynamo` would have found on a second call
            setattr(own, "__dynamo_disable", own)
    for kind in OPTIMIZERS.values():
        step: Any = kind.step
        own = getattr(step, "__wrapped__", None)
        if own is not None and step.__code__.co_name == "_use_grad":
            kind.step = torch.no_grad()(own)  # as it does where nothing is differentiable
