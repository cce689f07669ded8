"""States of the model that are kept during training and loaded later."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.laws import Alarm
from tikhon.monitoring.rounds import Rounds

KEPT = 64  # states that are remembered by their first tensor, as long as someone holds it

# the hook on loading that a closed watch has left, taken off by the next one
_LEFT: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class KeptStates:
    """Hears of every `state_dict()` and `load_state_dict()` of the model, for itself and `rounds`.

    A state is made of the weights themselves: unless it is copied it follows them, and loading
    it later changes nothing. Loading often comes when training is over, so that the hook on it
    outlasts the watch.
    """

    def __init__(self, model: nn.Module, step: Callable[[], int]) -> None:
        self._model, self._step = weakref.ref(model), step
        self._kept: deque[tuple[weakref.ref[Tensor], int]] = deque(maxlen=KEPT)
        self.loaded: tuple[int, int] | None = None  # steps: of the state, and of its loading
        self.told: Callable[[], None] | None = None
        self.rounds = Rounds()
        self._asks = model.register_state_dict_post_hook(Hook(self._made))
        self._loads = model.register_load_state_dict_pre_hook(Hook(self._loading))
        self._open = True
        if model in _LEFT:
            _LEFT.pop(model).remove()

    def close(self) -> None:
        """Hear of no more states; of loading one still."""
        self._open = False
        self._asks.remove()
        model = self._model()
        if model is not None:
            _LEFT[model] = self._loads

    def alarms(self) -> list[Alarm]:
        """A state that was kept without a copy, and loaded."""
        if self.loaded is None:
            return []
        kept, now = self.loaded
        return [
            Alarm(
                "best_is_a_reference",
                kept,
                f"the state that is loaded at step {now} was kept without a copy: it is made of "
                "the weights themselves and has followed them, so that loading changes nothing",
                "keep copy.deepcopy(model.state_dict()), or save it to a file",
            )
        ]

    def _made(self, module: nn.Module, state: Any, prefix: str, metadata: object) -> None:
        if module is not self._model():
            return
        self.rounds.asked = True
        name = next((f"{prefix}{n}" for n, _ in module.named_parameters()), "")
        if isinstance(state.get(name), Tensor):
            self._kept.append((weakref.ref(state[name]), self._step()))

    def _loading(self, module: nn.Module, state: Any, prefix: str, *rest: object) -> None:
        if module is not self._model():
            return
        own = dict(module.named_parameters())
        given = {name: state.get(f"{prefix}{name}") for name in own}
        if self._open:
            self.rounds.load(own, given)
        if self.loaded is not None or not own or not all(_same(given[n], own[n]) for n in own):
            return
        for ref, step in self._kept:
            if step < self._step() and ref() is given[next(iter(own))]:
                self.loaded = (step, self._step())
                if self.told is not None:
                    self.told()
                return


def _same(given: object, own: Tensor) -> bool:
    return (
        isinstance(given, Tensor)
        and given.device == own.device
        and given.data_ptr() == own.data_ptr()
        and given.shape == own.shape
    )
