"""Hugging Face: penalties, sparsify and the watch as callbacks of the `transformers.Trainer`.

Needs `pip install tikhon[hf]`. Gradient accumulation, mixed precision and Accelerate's wrappers
work, because the penalty sits on the optimizer's step.
"""

# this file has the name of the package that it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from tikhon import monitoring
from tikhon.integrations.readings import readings
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import How, Terms
from tikhon.runs import checkpoint
from tikhon.sparsity import Sparsifier, Thinning
from tikhon.wrappers import unwrap

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("these callbacks need transformers: pip install tikhon[hf]") from error

FOLDER = "tikhon"  # within a checkpoint of the Trainer
SPARSITY = "tikhon-sparsify"


class Regularize(TrainerCallback):
    """`tikhon.regularize` for a `transformers.Trainer`.

    Args:
        terms: as for `tikhon.regularize`. Trainer's own `weight_decay` is a penalty too; leave it
            at 0 where an L2 stands here.
        how: "objective" or "decoupled".
        log: whether each log of the Trainer gets value, strength and zeros of every term.

    `regularizer` is the handle while and after `train`. Its state (steps, moving strengths) is
    written into each checkpoint and read when training resumes from one. Raises what
    `tikhon.regularize` raises.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[Regularize(tk.L1(1e-5))])
    """

    def __init__(self, terms: Terms, *, how: How = "objective", log: bool = True) -> None:
        self.terms, self.log = terms, log
        self.how: How = how
        self.regularizer: Regularizer | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Attach; continue from the checkpoint that the Trainer resumes from."""
        self.regularizer = regularize(model, optimizer, self.terms, how=self.how)
        if state.global_step:
            self._resume(_checkpoint(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state beside the optimizer's."""
        if self.regularizer is not None and state.is_world_process_zero:
            folder = _checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder, self.regularizer.state_dict())

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the log line and to `state.log_history`."""
        if self.log and self.regularizer is not None and logs is not None and "loss" in logs:
            found = readings(self.regularizer)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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


class Sparsify(TrainerCallback):
    """`tikhon.sparsify` for a `transformers.Trainer`.

    Args:
        asked: a share in (0, 1), a text as "50%,of=ranks", or a `Thinning`.
        within: the name of the submodule that it acts in; patterns are of its parameters. Units
            of a traced model ("channels", "features") need a module with a plain `forward`.
        example: one batch of inputs of that module, where it is traced.
        steps: optimizer steps of the whole run; by default the Trainer's `max_steps`.
        log: whether each log of the Trainer gets the share of zeros, as `sparsity/zeros`.

    `sparsifier` is the handle while and after `train`; its state is written into each checkpoint
    and read when training resumes. The model that `train` leaves, the best one perhaps, has the
    zeros. Raises what `tikhon.sparsify` raises.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[Sparsify("90%")])
    """

    def __init__(
        self,
        asked: Any,
        *,
        within: str = "",
        example: Any = None,
        steps: int | None = None,
        log: bool = True,
    ) -> None:
        self.asked = Thinning.read(asked)
        self.within, self.example, self.steps, self.log = within, example, steps, log
        self.sparsifier: Sparsifier | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Attach; continue from the checkpoint that the Trainer resumes from."""
        self.sparsifier = Sparsifier(
            unwrap(model).get_submodule(self.within),
            optimizer,
            self.asked,
            steps=self.steps or state.max_steps,
            example=self.example,
        )
        folder = _checkpoint(args, state, SPARSITY)
        if state.global_step and checkpoint.exists(folder):
            self.sparsifier.load_state_dict(checkpoint.load(folder))
        elif state.global_step:
            warnings.warn(
                f"{folder} holds no state of sparsify: its schedule starts over", stacklevel=2
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state beside the optimizer's."""
        if self.sparsifier is not None and state.is_world_process_zero:
            checkpoint.save(_checkpoint(args, state, SPARSITY), self.sparsifier.state_dict())

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the log line and to `state.log_history`."""
        if self.log and self.sparsifier is not None and logs is not None and "loss" in logs:
            found = {"sparsity/zeros": self.sparsifier.audit().share}
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Zero what has gone in the model that comes out, and detach."""
        if self.sparsifier is not None:
            self.sparsifier.apply(unwrap(model).get_submodule(self.within))
            self.sparsifier.remove()


class Watch(TrainerCallback):
    """`tikhon.watch` for a `transformers.Trainer`: stops at the first non-finite number.

    Args:
        every: steps between two readings.
        output: a folder for what led to a failure; None writes nothing.

    `watch.rows` and `watch.alarms` hold what was read, also after `train`.
    """

    def __init__(self, every: int = 50, *, output: str | Path | None = None) -> None:
        self.every, self.output = every, output
        self.watch: monitoring.Watch | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Attach."""
        self.watch = monitoring.watch(model, optimizer, every=self.every, output=self.output)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        if self.watch is not None:
            self.watch.remove()


def _checkpoint(args: Any, state: Any, folder: str = FOLDER) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / folder
