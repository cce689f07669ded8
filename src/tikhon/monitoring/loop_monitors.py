"""Monitors of what a loop has besides the model and its optimizer: schedules, loaders, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from types import FrameType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from tikhon.monitoring.alarms import Alarm
from tikhon.monitoring.frozen_norms import FrozenNorms
from tikhon.monitoring.history import Sample
from tikhon.monitoring.loader_epochs import Loaders
from tikhon.monitoring.loop_variables import LoopVariables
from tikhon.monitoring.saved_states import SavedStates
from tikhon.monitoring.schedules import Schedules
from tikhon.monitoring.target_networks import TargetNetworks
from tikhon.monitoring.unoptimized_tensors import UnoptimizedTensors

FIRST_SEARCHES, SEARCH_EVERY = 3, 8  # sampled steps that search: the first ones, and each so many


class LoopMonitors:
    """Monitors of the loop's variables; some of them read numbers with the sampled step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, step: Callable[[], int]) -> None:
        self._optimizer = optimizer
        self.scaler: torch.amp.GradScaler | None = None  # the loop's own
        self.target_networks = TargetNetworks(model, step)
        self.unoptimized_tensors = UnoptimizedTensors(model)
        self.frozen_norms = FrozenNorms(model)
        self.schedules = Schedules(optimizer)
        self.saved_states = SavedStates(model, step)
        self.loaders = Loaders()
        self._reading = {
            "target_networks": self.target_networks,
            "unoptimized_tensors": self.unoptimized_tensors,
            "frozen_norms": self.frozen_norms,
        }
        self._samples = 0
        self._final_alarms: list[Alarm] | None = None  # what was wrong when the loop ended

    def find(self, frame: FrameType | None, forwards: int, inputs: Iterable[int]) -> None:
        """Look at the variables of the loop, in some sampled steps before they are made."""
        self._samples += 1
        if self._samples <= FIRST_SEARCHES or self._samples % SEARCH_EVERY == 0:
            self._search(frame, forwards, inputs)
        self.schedules.observe()
        self.loaders.observe()
        self.target_networks.measure()

    def _search(self, frame: FrameType | None, forwards: int, inputs: Iterable[int]) -> None:
        variables = LoopVariables(frame)
        modules = variables.of_type(nn.Module)
        optimizers = [self._optimizer, *variables.of_type(Optimizer).values()]
        scalers = variables.of_type(torch.amp.GradScaler).values()
        self.scaler = next((s for s in scalers if s.is_enabled()), None)
        self.target_networks.find(modules, optimizers)
        self.target_networks.find_model(variables.modules)
        leaves = variables.of_type(Tensor)
        self.unoptimized_tensors.find(modules, leaves, optimizers, inputs)
        self.frozen_norms.find(modules)
        loaders = variables.of_type(DataLoader)
        self.schedules.find(variables.of_type(LRScheduler), loaders, forwards)
        self.loaders.find(loaders, variables.of_type(cycle), forwards)

    def tensors_to_read(self) -> dict[str, list[Tensor]]:
        """Everything that is to be read with the sampled step, by monitor."""
        return {name: monitor.tensors_to_read() for name, monitor in self._reading.items()}

    def update(self, values: Mapping[str, Sequence[float]], sample: Sample) -> None:
        """What was read with a sampled step."""
        for name, monitor in self._reading.items():
            monitor.update(values[name], sample)

    def alarms(self, steps: int, forwards: int, *, ended: bool) -> list[Alarm]:
        """What is wrong with them, so far."""
        if self._final_alarms is not None:  # the loop's variables may be gone
            return [*self._final_alarms, *self._late_alarms()]
        return [
            *self.unoptimized_tensors.alarms(),
            *self.frozen_norms.alarms(),
            *self.target_networks.alarms(steps, forwards, ended=ended),
            *self.schedules.alarms(steps, forwards, ended=ended),
            *self.loaders.alarms(),
            *self._late_alarms(),
        ]

    def _late_alarms(self) -> list[Alarm]:
        """What may show once training is over: a state that is loaded, an average that is used."""
        return [*self.saved_states.alarms(), *self.target_networks.stale_alarms()]

    def close(self, steps: int, forwards: int, *, ended: bool) -> None:
        """Take the hooks off, but for those on what follows training."""
        self.loaders.close()
        alarms, later = self.alarms(steps, forwards, ended=ended), self._late_alarms()
        self._final_alarms = [alarm for alarm in alarms if alarm not in later]
        self.target_networks.close()
        self.frozen_norms.close()
        self.saved_states.close()
