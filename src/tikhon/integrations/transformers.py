"""Hugging Face: penalties and the watch as callbacks of the `transformers.Trainer`.

Needs `pip install tikhon[hf]`. Gradient accumulation, mixed precision and Accelerate's wrappers
work, because the penalty sits on the optimizer's step.
"""

# this file has the name of the package that it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tikhon.integrations.readings import readings
from tikhon.monitoring.watch import Watch as Watching, watch
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import How, Terms
from tikhon.runs import checkpoint

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("these callbacks need transformers: pip install tikhon[hf]") from error

FOLDER = "tikhon"  # within a checkpoint of the Trainer


@dataclass(eq=False)
class Regularize(TrainerCallback):
    """`tikhon.regularize` for a `transformers.Trainer`.

    Args:
        terms: as for `tikhon.regularize`. Trainer's own `weight_decay` is a penalty too; leave it
            at 0 where an L2 stands here.
        how: "objective" or "decoupled".
        log: whether each log of the Trainer gets value, strength and zeros of every kind of
            penalty.
        per_parameter: whether it gets these of every parameter, not of every kind of penalty.

    `regularizer` is the handle while and after `train`. Its state (steps, moving strengths) is
    written into each checkpoint and read when training resumes from one. Raises what
    `tikhon.regularize` raises.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[Regularize(tk.L1(1e-5))])
    """

    terms: Terms
    _: KW_ONLY
    how: How = "objective"
    log: bool = True
    per_parameter: bool = False
    regularizer: Regularizer | None = field(default=None, init=False)

    def on_train_begin(
        self,
        args: object,
        state: object,
        control: object,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: object,
    ) -> None:
        """Attach; continue from the checkpoint that the Trainer resumes from."""
        self.regularizer = regularize(model, optimizer, self.terms, how=self.how)
        if state.global_step:
            self._resume(_checkpoint(args, state))

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Write the state beside the optimizer's."""
        if self.regularizer is not None and state.is_world_process_zero:
            folder = _checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder, self.regularizer.state_dict())

    def on_log(
        self,
        args: object,
        state: object,
        control: object,
        logs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """Add to the log line and to `state.log_history`."""
        if self.log and self.regularizer is not None and logs is not None and "loss" in logs:
            found = readings(self.regularizer, per_parameter=self.per_parameter)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Detach; the handle stays readable."""
        if self.regularizer is not None:
            self.regularizer.remove()

    def _resume(self, folder: Path) -> None:
        assert self.regularizer is not None
        if checkpoint.exists(folder):
            self.regularizer.load_state_dict(checkpoint.load(folder))
        else:
            warnings.warn(
                f"{folder} holds no state of the penalties: schedules and controllers start over",
                stacklevel=2,
            )


@dataclass(eq=False)
class Watch(TrainerCallback):
    """`tikhon.watch` for a `transformers.Trainer`: stops at the first non-finite number.

    Args:
        every: steps between two readings.
        output: a folder for what led to a failure; None writes nothing.

    `watch.rows` and `watch.alarms` hold what was read, also after `train`.
    """

    every: int = 50
    _: KW_ONLY
    output: str | Path | None = None
    watch: Watching | None = field(default=None, init=False)

    def on_train_begin(
        self,
        args: object,
        state: object,
        control: object,
        *,
        model: nn.Module,
        optimizer: object,
        **kwargs: object,
    ) -> None:
        """Attach."""
        self.watch = watch(model, optimizer, every=self.every, output=self.output)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Detach."""
        if self.watch is not None:
            self.watch.remove()


def _checkpoint(args: object, state: object) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FOLDER
