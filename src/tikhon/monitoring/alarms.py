"""An alarm, the state of a loop that rules judge, and rules that a lasting sign violates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from tikhon.languages import Sentence, Value, sentence
from tikhon.monitoring.history import StepHistory, Streak

MIN_SAMPLES = 3  # successive sampled steps


@dataclass(frozen=True)
class Alarm:
    """One rule that a loop violates.

    `step` is the first step that showed it, `where` the tensors, `meaning` the effect on training,
    `change` the line to change; `severity` is "warning" or "info".
    """

    code: str
    step: int
    meaning: Sentence
    change: Sentence
    where: tuple[str, ...] = ()
    severity: str = "warning"

    def __str__(self) -> str:
        tensors = f" ({_shortened(self.where)})" if self.where else ""
        return f"since step {self.step}{tensors}: {self.meaning}; {self.change}"

    def to_dict(self) -> dict[str, object]:
        """Return plain values; `sentences` has keys and values of both, for other languages."""
        sentences = {"meaning": self.meaning.to_dict(), "change": self.change.to_dict()}
        return {**asdict(self), "sentences": sentences}


def alarm(
    code: str,
    step: int = 0,
    /,
    *,
    key: str = "",
    where: Iterable[str] = (),
    severity: str = "warning",
    **values: Value,
) -> Alarm:
    """The alarm of a code with its sentences, those of a `key` where a code has several."""
    key = key or code
    meaning, change = f"alarm_{key}", f"change_{key}"
    return Alarm(code, step, sentence(meaning, **values), sentence(change), tuple(where), severity)


@dataclass(frozen=True)
class LoopState:
    """State of a loop: counts over all steps, and the history of the sampled ones."""

    steps: int
    forwards: int  # passes of the model that built a graph
    backwards: bool  # the model has a gradient
    steps_without_gradient: (
        int  # successive steps in which no tensor of the optimizer had a gradient
    )
    frozen: frozenset[str]  # tensors that did not require a gradient when the watch began
    ended: bool
    history: StepHistory
    repeated_steps: int = 0  # steps without a pass, along the gradient of the previous step
    passes_without_step: int = 0  # backward passes since steps became rare
    max_passes: int = 0  # the most forward passes between two steps
    is_federated: bool = False  # loaded weights are means over several clients
    epochs: int = 0  # of the loader that is trained on
    has_improved: bool = False  # a plateau lowered the rate after many epochs had been the best

    def is_lasting(self, streak: Streak, min_samples: int = MIN_SAMPLES) -> bool:
        """Whether a streak is long enough to be reported."""
        minimum = 2 if min_samples <= MIN_SAMPLES else MIN_SAMPLES
        return streak.count >= (min(minimum, min_samples) if self.ended else min_samples)


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
