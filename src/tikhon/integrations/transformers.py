"""Hugging Face: penalties, sparsify and the watch as callbacks of the `transformers.Trainer`.

Needs `pip install tikhon[hf]`. Gradient accumulation, mixed precision and Accelerate's wrappers
work, because the penalty sits on the optimizer's step.
"""

# this file has the name of the package that it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import sys
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
from tikhon.sparsity import Sparsifier, Thinning
from tikhon.sparsity.thinning import Asked
from tikhon.wrappers import unwrap

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("these callbacks need transformers: pip install tikhon[hf]") from error

FOLDER = "tikhon"  # within a checkpoint of the Trainer
SPARSITY = "tikhon-sparsify"


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

    asked: Asked
    _: KW_ONLY
    within: str = ""
    example: object = None
    steps: int | None = None
    log: bool = True
    sparsifier: Sparsifier | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.asked = Thinning.read(self.asked)

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
        self.sparsifier = Sparsifier(
            unwrap(model).get_submodule(self.within),
            optimizer,
            Thinning.read(self.asked),
            steps=self.steps or state.max_steps,
            example=self.example,
        )
        folder = self._folder(args, state)
        if state.global_step and checkpoint.exists(folder):
            self.sparsifier.load_state_dict(checkpoint.load(folder))
        elif state.global_step:
            warnings.warn(
                f"{folder} holds no state of sparsify: its schedule starts over", stacklevel=2
            )

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Write the state beside the optimizer's."""
        if self.sparsifier is not None and state.is_world_process_zero:
            checkpoint.save(self._folder(args, state), self.sparsifier.state_dict())

    def on_log(
        self,
        args: object,
        state: object,
        control: object,
        logs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """Add to the log line and to `state.log_history`."""
        if self.log and self.sparsifier is not None and logs is not None and "loss" in logs:
            found = {"sparsity/zeros": self.sparsifier.audit().share}
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self,
        args: object,
        state: object,
        control: object,
        *,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Zero what has gone in the model that comes out, and detach."""
        if self.sparsifier is not None:
            self.sparsifier.apply(unwrap(model).get_submodule(self.within))
            self.sparsifier.remove()

    def _folder(self, args: object, state: object) -> Path:
        """Of this handle: a model may have one for its heads and one for its channels."""
        asked = Thinning.read(self.asked)
        told = "-".join(part for part in (SPARSITY, asked.of, self.within) if part)
        return _checkpoint(args, state, told)


@dataclass(eq=False)
class Watch(TrainerCallback):
    """`tikhon.watch` for a `transformers.Trainer`: stops at the first non-finite number.

    Args:
        every: steps between two readings.
        output: a folder for what led to a failure; None writes nothing.

    When training ends one line says what was found, or that nothing was and what was looked at
    (on stderr, unless `disable_tqdm` is set). `watch.rows` and `watch.alarms` hold what was read,
    also after `train`.
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
        """Detach, and say what was found."""
        if self.watch is None:
            return
        said = self.watch.end()
        if state.is_world_process_zero and not args.disable_tqdm:
            print(f"\n{said}", file=sys.stderr)  # below the bar


def _checkpoint(args: object, state: object, folder: str = FOLDER) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / folder
