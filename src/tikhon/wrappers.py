"""Wrapper modules of torch and its frameworks, recognised by type; the modes of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# by qualified name, to avoid importing the frameworks
_INSIDE = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
}


def wrapped_name(module: nn.Module) -> str | None:
    """Return the attribute in which a wrapper holds the model; None if it is not a wrapper."""
    for kind in type(module).__mro__:
        found = _INSIDE.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return None


@contextmanager
def modes_restored(*models: nn.Module) -> Iterator[list[tuple[nn.Module, bool]]]:
    """Give each module back the mode that it has now, also in a model that is partly frozen.

    Yields the modules, each with whether it is training.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield modes
    finally:
        for module, mode in modes:
            set_mode(module, mode)


def set_mode(module: nn.Module, training: bool) -> None:
    """Set the mode of one module, without its children."""
    state = vars(module)
    if "training" in state:  # past `Module.__setattr__`, which takes as long as a small layer
        state["training"] = training
    else:  # a scripted module
        module.training = training


def require_module(model: object) -> None:
    """Raise TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch module, received {kind}")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DistributedDataParallel, torch.compile and the like.

    Wrappers are recognised by type, so a user's module with a child called `module` is unchanged.

    >>> inner = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(inner)) is inner
    True
    """
    require_module(model)
    while (name := wrapped_name(model)) is not None:
        model = model.get_submodule(name)
    return model


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the module's own parameters, ignoring children and an overridden `parameters`."""
    return [p for p in module._parameters.values() if p is not None]


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of every module, without path components added by wrappers."""
    require_module(model)
    skipped: dict[str, str] = {}  # prefix added by a wrapper -> its replacement
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        short = path
        for prefix, plain in reversed(skipped.items()):  # innermost wrapper first
            if path == prefix or path.startswith(f"{prefix}."):
                short = f"{plain}{path[len(prefix) :]}".strip(".")
                break
        if (name := wrapped_name(module)) is not None:
            skipped[f"{path}.{name}".strip(".")] = short
        yield short, module
