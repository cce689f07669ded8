"""The small model in the user's own class, where its forward runs with the smaller parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import nn

from .rewrite import Replaced


def in_own_class(model: nn.Module, replaced: Replaced) -> nn.Module | None:
    """The model with the smaller modules and tensors in place of its own, which it gives up.

    None where the graph has parts that the model does not have under their names: functions of
    parameters that stand beside their modules.
    """
    for name, new in replaced.items():
        try:
            old = attrgetter(name)(model)
        except AttributeError:
            return None
        if isinstance(old, nn.Module) is not isinstance(new, nn.Module):
            return None
        if _shapes(old) == _shapes(new):
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model


def _shapes(part: Any) -> object:
    if isinstance(part, nn.Module):
        return {name: tensor.shape for name, tensor in part.state_dict().items()}
    return part.shape


@contextmanager
def without_cache(model: nn.Module) -> Iterator[dict[int, Any]]:
    """A Hugging Face model returns no cache of keys and values, which no graph could.

    Yields the settings that are changed for so long, by their `id`: copies of the model that share
    them (the memo of `copy.deepcopy`) have their cache again as well.
    """
    configs = [getattr(part, "config", None) for part in model.modules()]
    configs = [config for config in configs if getattr(config, "use_cache", False) is True]
    for config in configs:
        config.use_cache = False
    try:
        yield {id(config): config for config in configs}
    finally:
        for config in configs:
            config.use_cache = True
