"""What goes on beside the model and its optimizer: one place that looks, reads and judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.monitoring.followers import Followers
from tikhon.monitoring.history import Sample
from tikhon.monitoring.kept_states import KeptStates
from tikhon.monitoring.laws import Alarm
from tikhon.monitoring.norms import FrozenNorms
from tikhon.monitoring.readers import Readers
from tikhon.monitoring.schedules import Schedules
from tikhon.monitoring.strays import Strays
from tikhon.monitoring.surroundings import surroundings

FIRST, EACH = 3, 8  # sampled steps that search: the first ones, and each so many


class Company:
    """Followers of the model, tensors of a loss, schedules, frozen norms, kept states, readers."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, step: Callable[[], int]) -> None:
        self._optimizer = optimizer
        self.scaler: Any = None  # the loop's own
        self.followers, self.strays = Followers(model), Strays(model)
        self.schedules, self.norms = Schedules(optimizer), FrozenNorms(model)
        self.states, self.readers = KeptStates(model, step), Readers()
        self._counts: tuple[int, int] = (0, 0)
        self._looks = 0
        self._last: list[Alarm] | None = None  # what was wrong when the loop ended

    def find(self, frame: FrameType | None, forwards: int) -> None:
        """Look at the variables of the loop, in some sampled steps before they are made."""
        self._looks += 1
        if self._looks <= FIRST or self._looks % EACH == 0:
            self._search(frame, forwards)
        self.schedules.look()
        self.followers.measure()

    def _search(self, frame: FrameType | None, forwards: int) -> None:
        near = surroundings(frame)
        optimizers = [self._optimizer, *near.optimizers.values()]
        enabled = [s for s in near.scalers.values() if s.is_enabled()]
        self.scaler = enabled[0] if enabled else None
        self.followers.find(near.modules, optimizers)
        self.strays.find(near.modules, near.tensors, optimizers)
        self.schedules.find(near.schedulers, near.loaders, forwards)
        self.readers.find(near.cycles, near.iterators, forwards)

    def before_step(self) -> None:
        """What is looked at in every step: the learning rate, and where the iterator stands."""
        self.schedules.before_step()
        self.readers.before_step()

    def numbers(self) -> list[Tensor]:
        """Everything that is to be read with the sampled step."""
        parts = (self.followers.numbers(), self.strays.numbers(), self.norms.numbers())
        self._counts = (len(parts[0]), len(parts[0]) + len(parts[1]))
        return [number for part in parts for number in part]

    def take(self, values: Sequence[float], sample: Sample) -> None:
        """What was read with a sampled step."""
        first, second = self._counts
        self.followers.take(values[:first], sample)
        self.strays.take(values[first:second], sample.step)
        self.norms.take(values[second:], sample.step)

    def alarms(self, steps: int, forwards: int, *, ended: bool) -> list[Alarm]:
        """What is wrong beside the model."""
        if self._last is not None:  # the loop's variables may be gone
            return [*self._last, *self.states.alarms()]
        return [
            *self.strays.alarms(),
            *self.norms.alarms(),
            *self.followers.alarms(steps, ended=ended),
            *self.schedules.alarms(steps, forwards, ended=ended),
            *self.readers.alarms(),
            *self.states.alarms(),
        ]

    def close(self, steps: int, forwards: int, *, ended: bool) -> None:
        """Take the hooks off, but for the one on loading a state."""
        told = self.states.alarms()
        self._last = [a for a in self.alarms(steps, forwards, ended=ended) if a not in told]
        self.followers.close()
        self.norms.close()
        self.states.close()
