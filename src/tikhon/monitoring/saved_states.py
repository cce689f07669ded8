"""States of the model that are kept during training and loaded later."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.alarms import Alarm, alarm
from tikhon.monitoring.federated import FederatedRounds
from tikhon.monitoring.hooks import Hook

MAX_STATES = 64  # states that are remembered by their first tensor, as long as someone holds it

# the hook on loading that a closed watch has left, taken off by the next one
_LOAD_HOOKS: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class SavedStates:
    """Records every `state_dict()` and `load_state_dict()` of the model, also for `federated`.

    A state is made of the weights themselves: unless it is copied it follows them, and loading
    it later changes nothing. Loading often comes when training is over, so that the hook on it
    outlasts the watch.
    """

    def __init__(self, model: nn.Module, step: Callable[[], int]) -> None:
        self._model, self._step = weakref.ref(model), step
        self._states: deque[tuple[weakref.ref[Tensor], int]] = deque(maxlen=MAX_STATES)
        self.loaded: tuple[int, int] | None = None  # steps: of the state, and of its loading
        self.on_reload: Callable[[], None] | None = None
        self.federated = FederatedRounds()
        self._save_hook = model.register_state_dict_post_hook(Hook(self._on_state_dict))
        self._load_hook = model.register_load_state_dict_pre_hook(Hook(self._on_load_state_dict))
        self._is_watching, self._last_load = True, 0
        if model in _LOAD_HOOKS:
            _LOAD_HOOKS.pop(model).remove()

    def close(self) -> None:
        """Record no more states; loading one still."""
        self._is_watching = False
        self._save_hook.remove()
        model = self._model()
        if model is not None:
            _LOAD_HOOKS[model] = self._load_hook

    def alarms(self) -> list[Alarm]:
        """A state that was kept without a copy, and loaded."""
        if self.loaded is None:
            return []
        saved_at, loaded_at = self.loaded
        return [alarm("best_is_a_reference", saved_at, step=loaded_at)]

    def _on_state_dict(self, module: nn.Module, state: Any, prefix: str, metadata: object) -> None:
        if module is not self._model():
            return
        self.federated.state_requested = True
        name = next((f"{prefix}{n}" for n, _ in module.named_parameters()), "")
        if isinstance(state.get(name), Tensor):
            self._states.append((weakref.ref(state[name]), self._step()))

    def _on_load_state_dict(
        self, module: nn.Module, state: Any, prefix: str, *rest: object
    ) -> None:
        if module is not self._model():
            return
        parameters = dict(module.named_parameters())
        loaded = {name: state.get(f"{prefix}{name}") for name in parameters}
        if self._is_watching:
            self.federated.steps = self._step() - self._last_load
            self._last_load = self._step()
            self.federated.record_load(parameters, loaded)
        pairs = [(loaded[name], p) for name, p in parameters.items()]
        if self.loaded is not None or not all(_shares_memory(given, p) for given, p in pairs):
            return
        earlier = [(ref(), step) for ref, step in self._states if step < self._step()]
        saved = next((step for state, step in earlier if pairs and state is pairs[0][0]), None)
        if saved is not None:
            self.loaded = (saved, self._step())
            if self.on_reload is not None:
                self.on_reload()


def _shares_memory(loaded: object, parameter: Tensor) -> bool:
    return (
        isinstance(loaded, Tensor)
        and loaded.device == parameter.device
        and loaded.data_ptr() == parameter.data_ptr()
        and loaded.shape == parameter.shape
    )
