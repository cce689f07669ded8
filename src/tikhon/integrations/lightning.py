"""Lightning: penalties and the watch as callbacks of the Trainer.

Needs `pip install tikhon[lightning]`. Automatic and manual optimization, gradient accumulation,
16-bit precision and every strategy work, because the penalty sits on the optimizer's step.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from tikhon.integrations.readings import readings
from tikhon.monitoring.watch import Watch as Watching, watch
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import How, Terms

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("these callbacks need Lightning: pip install tikhon[lightning]") from error


@dataclass(eq=False)
class Regularize(Callback):
    """`tikhon.regularize` for a `pytorch_lightning.Trainer`.

    Args:
        terms: as for `tikhon.regularize`; patterns are names of the LightningModule's parameters.
        how: "objective" or "decoupled".
        optimizer: which of the module's optimizers, from 0; None for all of them together.
        log: whether each epoch logs value, strength and zeros of every kind of penalty.
        per_parameter: whether it gets these of every parameter, not of every kind of penalty.

    `regularizer` is the handle while and after `fit`. Its state (steps, moving strengths) travels
    in Lightning's checkpoints. Layers that a `BackboneFinetuning` sets free later join in when it
    gives them to the optimizer. Raises IndexError where there is no such optimizer, and what
    `tikhon.regularize` raises.

        trainer = Trainer(callbacks=[Regularize({"net.*": tk.L1(1e-4)})])
    """

    terms: Terms
    _: KW_ONLY
    how: How = "objective"
    optimizer: int | None = None
    log: bool = True
    per_parameter: bool = False
    regularizer: Regularizer | None = field(default=None, init=False)
    _restored: dict[str, object] | None = field(default=None, init=False)

    @property
    def state_key(self) -> str:
        """Lightning's key of this callback in a checkpoint, which names the optimizer."""
        return self._generate_state_key(optimizer=self.optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizers exist and are restored by now."""
        count = len(trainer.optimizers)
        if self.optimizer is not None and self.optimizer >= count:
            raise IndexError(
                f"Regularize(optimizer={self.optimizer}): {type(pl_module).__name__} has {count} "
                f"optimizer{'s' * (count != 1)}; count from 0"
            )
        chosen = trainer.optimizers
        if self.optimizer is not None:
            chosen = [chosen[self.optimizer]]
        self.regularizer = regularize(pl_module, chosen, self.terms, how=self.how)
        if self._restored is not None:
            self.regularizer.load_state_dict(self._restored)
            self._restored = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log to whatever logger the Trainer has."""
        if self.log and self.regularizer is not None:
            pl_module.log_dict(readings(self.regularizer, per_parameter=self.per_parameter))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach; the handle stays readable."""
        if self.regularizer is not None:
            self.regularizer.remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach after a failure too, so that the next `fit` does not penalize twice."""
        if self.regularizer is not None:
            self.regularizer.remove()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {} if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint, used when training starts."""
        self._restored = state_dict or None


@dataclass(eq=False)
class Watch(Callback):
    """`tikhon.watch` for a `pytorch_lightning.Trainer`: stops at the first non-finite number.

    Args:
        every: steps between two readings.
        optimizer: which of the module's optimizers, from 0.
        output: a folder for what led to a failure; None writes nothing.

    `watch.rows` and `watch.alarms` hold what was read, also after `fit`.
    """

    every: int = 50
    _: KW_ONLY
    optimizer: int = 0
    output: str | Path | None = None
    watch: Watching | None = field(default=None, init=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        chosen = trainer.optimizers[self.optimizer]
        self.watch = watch(pl_module, chosen, every=self.every, output=self.output)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        if self.watch is not None:
            self.watch.remove()
