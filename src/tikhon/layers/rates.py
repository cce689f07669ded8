"""Rates that move: by pattern, over depth, over time."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tikhon.errors import unknown
from tikhon.layers.noise import NoiseLayer

Pattern = str | type[nn.Module]
WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel and its kin


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module once, without the names that wrappers add."""
    for path, module in model.named_modules():
        parts = path.split(".")
        while parts and parts[0] in WRAPPERS:
            parts = parts[1:]
        yield ".".join(parts), module


def matches(pattern: Pattern, path: str, module: nn.Module) -> bool:
    """Whether a shell glob on module paths or a module type names this module."""
    if isinstance(pattern, str):
        return fnmatchcase(path, pattern)
    return isinstance(module, pattern)


def noise_layers(model: nn.Module, pattern: Pattern = "*") -> dict[str, NoiseLayer]:
    """Path -> layer for the noise layers of `model` that match `pattern`, or an error."""
    layers = {p: m for p, m in named_modules(model) if isinstance(m, NoiseLayer)}
    found = {p: m for p, m in layers.items() if matches(pattern, p, m)}
    if not found:
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no noise layer: use tikhon.layers.insert_dropout, or "
                "replace_dropout for a model with layers of fixed rate"
            )
        raise ValueError(unknown("noise layer", pattern, layers))
    return found


def set_rate(model: nn.Module, pattern: Pattern, rate: float | Tensor) -> list[str]:
    """Set the rate of every noise layer whose module path matches, and return those paths.

    `pattern` is a shell glob (`*` crosses dots) or a layer class; `rate` is a number in the
    layer's range, usually [0, 1). The buffers are written in place, so a compiled model does not
    compile again. Raises ValueError for a pattern that matches nothing or a rate out of range,
    and then changes nothing.

    >>> from tikhon.layers import Dropout
    >>> model = nn.Sequential(nn.Linear(4, 4), Dropout(0.5))
    >>> set_rate(model, "1", 0.1)
    ['1']
    >>> model[1]
    Dropout(rate=0.1)
    """
    found = noise_layers(model, pattern)
    for path, layer in found.items():
        layer.check(rate, path)
    for layer in found.values():
        layer.set_rate(rate)
    return list(found)
