"""Let torch's optimizers run without importing `torch._dynamo`, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from tikhon.training.settings import OPTIMIZERS

_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@contextmanager
def without_compiler() -> Iterator[None]:
    """Spare torch's optimizers the import of the compiler within the block.

    Their methods import it on first use, to mark themselves for a compiler that traces them, which
    training here never does. Nothing changes where it is already imported; attributes missing in
    other versions of torch are skipped. Optimizers that outlive the block act as any other.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    marked, steps = _mark_methods(), {kind: _plain_step(kind) for kind in OPTIMIZERS.values()}
    for kind, step in steps.items():
        if step.__code__.co_name == "_use_grad":  # as it does if nothing is differentiable
            kind.step = _with_hooks(torch.no_grad()(step.__wrapped__))
    try:
        yield
    finally:
        for method in marked:
            delattr(method, "__dynamo_disable")
        for kind, step in steps.items():
            kind.step = _with_hooks(step)


def _plain_step(kind: type[Optimizer]) -> Any:
    """Return the `step` of a class without the hooks that the first optimizer of it adds."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _with_hooks(step: Any) -> Any:
    """Return a `step` that calls the hooks of its optimizer, as torch builds it."""
    found: Any = Optimizer.profile_hook_step(step)
    found.hooked = True
    return found


def _mark_methods() -> list[Any]:
    """Mark methods with what `torch._disable_dynamo` would find on a second call."""
    wrapped = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in _MARKED]
    methods: list[Any] = [m for m in wrapped if m and not hasattr(m, "__dynamo_disable")]
    for method in methods:
        setattr(method, "__dynamo_disable", method)
    return methods
