"""What goes on beside the model and its optimizer: one place that looks, reads and judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tikhon.monitoring.followers import Followers
from tikhon.monitoring.history import Sample
from tikhon.monitoring.laws import Alarm
from tikhon.monitoring.norms import FrozenNorms
from tikhon.monitoring.readers import Readers
from tikhon.monitoring.schedules import Schedules
from tikhon.monitoring.states import KeptStates
from tikhon.monitoring.strays import Strays
from tikhon.monitoring.surroundings import Surroundings

FIRST, EACH = 3, 8  # sampled steps that search: the first ones, and each so many


class Company:
    """Followers of the model, tensors of a loss, schedules, frozen norms, kept states, readers."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, step: Callable[[], int]) -> None:
        self._optimizer = optimizer
        self.scaler: Any = None  # the loop's own
        self.followers, self.strays = Followers(model), Strays(model)
        self.schedules, self.norms = Schedules(optimizer), FrozenNorms(model)
        self.states, self.readers = KeptStates(model, step), Readers()
        self._counts: list[int] = []
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
        near = Surroundings(frame)
        modules, optimizers = near.of(nn.Module), [self._optimizer, *near.of(Optimizer).values()]
        enabled = [s for s in near.of(torch.amp.GradScaler).values() if s.is_enabled()]
        self.scaler = enabled[0] if enabled else None
        self.followers.find(modules, optimizers)
        self.strays.find(modules, near.of(Tensor), optimizers)
        self.schedules.find(near.of(LRScheduler), near.of(DataLoader), forwards)
        self.readers.find(near.of(cycle), near.of(_BaseDataLoaderIter), forwards)

    def numbers(self) -> list[Tensor]:
        """Everything that is to be read with the sampled step."""
        parts = [part.numbers() for part in (self.followers, self.strays, self.norms)]
        self._counts = [len(part) for part in parts]
        return [number for part in parts for number in part]

    def take(self, values: Sequence[float], sample: Sample) -> None:
        """What was read with a sampled step."""
        rest = iter(values)
        for part, count in zip((self.followers, self.strays, self.norms), self._counts):
            part.take(list(islice(rest, count)), sample)

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
