"""Change rates by pattern, over depth, over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tikhon.arguments import check_field
from tikhon.errors import describe, unknown_name
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.paths import Pattern, matches, pattern_name
from tikhon.wrappers import named_modules


def noise_layers(model: nn.Module, pattern: Pattern = "*") -> dict[str, NoiseLayer]:
    """Return path -> layer for the noise layers that match `pattern`; raise if there are none."""
    layers = {p: m for p, m in named_modules(model) if isinstance(m, NoiseLayer)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no noise layer: use tikhon.layers.insert_dropout, or "
            "replace_dropout for a model whose rates are fixed"
        )
    for path, layer in layers.items():
        layer.path = path
    found = {p: m for p, m in layers.items() if matches(pattern, p, m)}
    if not found:
        raise ValueError(unknown_name("noise layer", pattern_name(pattern), layers))
    return found


def set_rate(model: nn.Module, pattern: Pattern, rate: float | Tensor) -> list[str]:
    """Set the rate of every noise layer whose module path matches, and return those paths.

    `pattern` is a shell glob (`*` crosses dots) or a layer class; `rate` is a number in the
    layer's range, usually [0, 1]. The buffers are written in place, so a compiled model is not
    recompiled. Raises ValueError, without any change, for a pattern that matches nothing or a
    rate out of range.

    >>> from tikhon.layers import Dropout
    >>> model = nn.Sequential(nn.Linear(4, 4), Dropout(0.5))
    >>> set_rate(model, "1", 0.1)
    ['1']
    >>> model[1]
    Dropout(rate=0.1)
    """
    found = noise_layers(model, pattern)
    for layer in found.values():
        layer.check(rate)
    for layer in found.values():
        layer.set_rate(rate)
    return list(found)


def set_rate_by_depth(model: nn.Module, pattern: Pattern, last: float) -> dict[str, float]:
    """Stochastic depth's rule: of L layers that match `pattern`, layer l gets last * l / L.

    Layers are counted in model order; `last` is in [0, 1]. Returns path -> rate. Raises ValueError
    as `set_rate` does. Reference: Huang et al. 2016, section 3, https://arxiv.org/abs/1603.09382
    (timm starts from 0 instead: l - 1 of L - 1).

    >>> from tikhon.layers import DropPath
    >>> set_rate_by_depth(nn.Sequential(DropPath(), DropPath()), "*", 0.2)
    {'0': 0.1, '1': 0.2}
    """
    found = noise_layers(model, pattern)
    for layer in found.values():
        last = layer.check(last)
    rates = {path: last * (k + 1) / len(found) for k, path in enumerate(found)}
    for path, layer in found.items():
        layer.set_rate(rates[path])
    return rates


def _check(schedule: Early | Late | Curriculum, steps: str, *, least: int) -> None:
    """Raise unless the rate is one and the count of steps no smaller than `least`."""
    check_field(schedule, "rate", "finite and >= 0", lambda rate: 0 <= rate < math.inf)
    check_field(schedule, steps, f">= {least}", lambda n: least <= n < math.inf)


@dataclass(frozen=True)
class Early:
    """`rate` until step `until`, 0 from there on: against underfitting.

    Reference: Liu et al. 2023, https://arxiv.org/abs/2303.01500

    >>> [Early(0.1, until=2)(step) for step in range(4)]
    [0.1, 0.1, 0.0, 0.0]
    """

    rate: float
    until: int

    def __post_init__(self) -> None:
        _check(self, "until", least=0)

    def __call__(self, step: int) -> float:
        """Return the rate at a step, counted from 0."""
        return self.rate if step < self.until else 0.0


@dataclass(frozen=True)
class Late:
    """0 until step `after`, `rate` from there on: against overfitting.

    Reference: Liu et al. 2023, https://arxiv.org/abs/2303.01500

    >>> [Late(0.1, after=2)(step) for step in range(4)]
    [0.0, 0.0, 0.1, 0.1]
    """

    rate: float
    after: int

    def __post_init__(self) -> None:
        _check(self, "after", least=0)

    def __call__(self, step: int) -> float:
        """Return the rate at a step, counted from 0."""
        return 0.0 if step < self.after else self.rate


@dataclass(frozen=True)
class Curriculum:
    """rate * (1 - exp(-10 step / steps)): rises from 0 and reaches `rate` long before `steps`.

    Reference: Morerio et al. 2017 (gamma = 10 / steps), https://arxiv.org/abs/1703.06229

    >>> [round(Curriculum(0.5, steps=100)(step), 3) for step in (0, 10, 100)]
    [0.0, 0.316, 0.5]
    """

    rate: float
    steps: int

    def __post_init__(self) -> None:
        _check(self, "steps", least=1)

    def __call__(self, step: int) -> float:
        """Return the rate at a step, counted from 0."""
        return self.rate * (1 - math.exp(-10 * step / self.steps))


class RateSchedule:
    """Rates that follow schedules: the learning-rate scheduler of the noise layers.

    `schedules` maps patterns to callables of the step (`Early`, `Late`, `Curriculum`,
    `tikhon.schedules.Linear(...)`, any function); later patterns win. The rates of step 0 are set
    immediately; call `step()` after every optimizer step. Raises ValueError for a pattern that
    matches nothing.

    >>> from tikhon.layers import Dropout
    >>> model = nn.Sequential(Dropout(0.5))
    >>> rates = RateSchedule(model, {"*": Early(0.1, until=1)})
    >>> rates.step(); model
    Sequential(
      (0): Dropout(rate=0)
    )
    """

    model: nn.Module
    schedules: dict[Pattern, Callable[[int], float]]
    last_step: int

    def __init__(
        self, model: nn.Module, schedules: Mapping[Pattern, Callable[[int], float]]
    ) -> None:
        if not isinstance(schedules, Mapping):
            raise TypeError(
                f"RateSchedule: schedules map patterns to callables of the step, received "
                f"{describe(schedules)}"
            )
        for pattern, schedule in schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"RateSchedule: the schedule of {pattern!r} must be a callable of the step, "
                    f"received {describe(schedule)}"
                )
        self.model, self.schedules, self.last_step = model, dict(schedules), 0
        self._write()

    def step(self) -> None:
        """Advance by one step and set its rates."""
        self.last_step += 1
        self._write()

    def state_dict(self) -> dict[str, int]:
        """Return the step; rates are in the model's own state."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a saved step."""
        self.last_step = state["last_step"]
        self._write()

    def _write(self) -> None:
        for pattern, schedule in self.schedules.items():
            set_rate(self.model, pattern, schedule(self.last_step))
