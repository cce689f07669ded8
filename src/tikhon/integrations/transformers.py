"""Hugging Face callbacks: penalties, sparsify and the watch.

Needs `pip install tikhon[hf]`. Gradient accumulation, mixed precision and Accelerate's wrappers
work, as penalties act in the optimizer's step.
"""

# named like the package it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import sys
import warnings
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from tikhon.integrations.handles import Handle, RegularizeHandle, SparsifyHandle
from tikhon.monitoring.watch import Watch as WatchHandle, watch
from tikhon.regularizer.regularizer import regularize
from tikhon.runs import checkpoint
from tikhon.wrappers import unwrap

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("these callbacks need transformers: pip install tikhon[hf]") from error


class _Handle(Handle, TrainerCallback):
    """A handle with its state in the Trainer's checkpoints and its readings in the log."""

    log: bool

    @property
    def _name(self) -> str:
        """Name of the state's folder in a checkpoint."""
        raise NotImplementedError

    def _resume(self, args: object, state: object) -> None:
        """Restore the state from the checkpoint that the Trainer resumes from."""
        folder = _checkpoint(args, state) / self._name
        if self._handle is None or not state.global_step:
            return
        if checkpoint.exists(folder):
            self._handle.load_state_dict(checkpoint.load(folder))
        else:
            warnings.warn(
                f"{folder} holds no state of {type(self).__name__}: schedules and controllers "
                "start over",
                stacklevel=3,
            )

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Write the state next to the optimizer's."""
        if self._handle is not None and state.is_world_process_zero:
            folder = _checkpoint(args, state) / self._name
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder, self._handle.state_dict())

    def on_log(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Add the readings to the log line and to `state.log_history`."""
        logs = kwargs.get("logs") or {}
        if self.log and self._handle is not None and "loss" in logs:
            found = self._readings()
            logs.update(found)
            state.log_history[-1].update(found)


@dataclass(eq=False)
class Regularize(RegularizeHandle, _Handle):
    """`tikhon.regularize` for a `transformers.Trainer`.

    Args:
        terms: as for `tikhon.regularize`. The Trainer's own `weight_decay` is a penalty too; leave
            it at 0 when using L2 here.
        how: "objective" or "decoupled".
        log: whether to log value, strength and zeros of each kind of penalty.
        per_parameter: whether to log these for each parameter instead.

    `regularizer` is the handle during and after `train`. Its state (steps, moving strengths) is
    written to each checkpoint and restored on resuming. Raises the errors of `tikhon.regularize`.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[Regularize(tk.L1(1e-5))])
    """

    @property
    def _name(self) -> str:
        return "tikhon"

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Attach; restore the state if the Trainer resumes from a checkpoint."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.regularizer = regularize(model, optimizer, self.terms, how=self.how)
        self._resume(args, state)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Detach; the handle stays readable."""
        if self.regularizer is not None:
            self.regularizer.remove()


@dataclass(eq=False)
class Sparsify(SparsifyHandle, _Handle):
    """`tikhon.sparsify` for a `transformers.Trainer`.

    Args:
        asked: a share in (0, 1), a text such as "50%,of=ranks", or a `Thinning`.
        within: name of the submodule to prune; patterns refer to its parameters. Units of a traced
            model ("channels", "features") need a module with a plain `forward`.
        example: a batch of inputs of that module, if it is traced.
        steps: optimizer steps of the whole run; by default the Trainer's `max_steps`.
        log: whether to log the share of zeros, as `sparsity/zeros`.

    `sparsifier` is the handle during and after `train`; its state is written to each checkpoint
    and restored on resuming. The final model, which may be the best one, has the zeros. Raises the
    errors of `tikhon.sparsify`.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[Sparsify("90%")])
    """

    @property
    def _name(self) -> str:
        # a model may have one for heads and one for channels
        return "-".join(filter(None, ("tikhon-sparsify", self.thinning.of, self.within)))

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Attach; restore the state if the Trainer resumes from a checkpoint."""
        model, optimizer = unwrap(kwargs["model"]), kwargs["optimizer"]
        self._attach(model, optimizer, self.steps or state.max_steps)
        self._resume(args, state)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Apply the zeros to the final model, and detach."""
        if self.sparsifier is not None:
            self._apply(unwrap(kwargs["model"]))
            self.sparsifier.remove()


@dataclass(eq=False)
class Watch(TrainerCallback):
    """`tikhon.watch` for a `transformers.Trainer`: stops at the first non-finite value.

    Args:
        every: steps between readings.
        output: folder for a report on a failure; None writes nothing.

    At the end of training one line reports the findings, or that there are none and what was
    checked (on stderr, unless `disable_tqdm` is set). `watch.rows` and `watch.alarms` hold the
    readings, also after `train`.
    """

    every: int = 50
    _: KW_ONLY
    output: str | Path | None = None
    watch: WatchHandle | None = field(default=None, init=False)

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Attach."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.watch = watch(model, optimizer, every=self.every, output=self.output)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Detach, and report the findings."""
        if self.watch is None:
            return
        summary = self.watch.end()
        if state.is_world_process_zero and not args.disable_tqdm:
            print(f"\n{summary}", file=sys.stderr)  # below the progress bar


def _checkpoint(args: object, state: object) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
