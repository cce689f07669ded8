"""Lightning: penalties, sparsify and the watch as callbacks of the Trainer.

Needs `pip install tikhon[lightning]`. Automatic and manual optimization, gradient accumulation,
16-bit precision and every strategy work, because the penalty sits on the optimizer's step.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tikhon.integrations.readings import readings
from tikhon.monitoring.watch import Watch as Watching, watch
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import How, Terms
from tikhon.sparsity import Sparsifier, Thinning
from tikhon.sparsity.thinning import Asked

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import rank_zero_info
except ImportError as error:
    raise ImportError("these callbacks need Lightning: pip install tikhon[lightning]") from error


class _Handle(Callback):
    """A handle whose state travels in Lightning's checkpoints."""

    _restored: dict[str, object] | None = None

    @property
    def _handle(self) -> Regularizer | Sparsifier | None:
        """What was attached when training started."""
        raise NotImplementedError

    def _resume(self) -> None:
        if self._handle is not None and self._restored is not None:
            self._handle.load_state_dict(self._restored)
            self._restored = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach, after a failure too; the handle stays readable."""
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {} if self._handle is None else self._handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """From Lightning's checkpoint, used when training starts."""
        self._restored = state_dict or None


@dataclass(eq=False)
class Regularize(_Handle):
    """`tikhon.regularize` for a `pytorch_lightning.Trainer`.

    Args:
        terms: as for `tikhon.regularize`; patterns are names of the LightningModule's parameters.
        how: "objective" or "decoupled".
        optimizer: which of the module's optimizers, from 0; None for all of them together.
        log: whether each epoch logs value, strength and zeros of every kind of penalty.
        per_parameter: whether it gets these of every parameter, not of every kind of penalty.

    `regularizer` is the handle while and after `fit`. Its state (steps, moving strengths) travels
    in Lightning's checkpoints. Layers that a `BackboneFinetuning` sets free later join in when it
    gives them to the optimizer. Where `fit` leaves averaged weights (`StochasticWeightAveraging`,
    `EMAWeightAveraging`), these get the zeros and constraints of the trained ones. Raises
    IndexError where there is no such optimizer, and what `tikhon.regularize` raises.

        trainer = Trainer(callbacks=[Regularize({"net.*": tk.L1(1e-4)})])
    """

    terms: Terms
    _: KW_ONLY
    how: How = "objective"
    optimizer: int | None = None
    log: bool = True
    per_parameter: bool = False
    regularizer: Regularizer | None = field(default=None, init=False)
    _zeros: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)
    _zeros_at: int = field(default=0, init=False)  # after how many steps these were seen

    @property
    def _handle(self) -> Regularizer | None:
        return self.regularizer

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
        self._zeros, self._zeros_at = {}, 0
        self._resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log to whatever logger the Trainer has."""
        if self.regularizer is not None and self.regularizer.steps > self._zeros_at:
            # once it is averaged the module is not trained any more, and its zeros are none
            self._zeros, self._zeros_at = self.regularizer.zeros(), self.regularizer.steps
        if self.log and self.regularizer is not None:
            pl_module.log_dict(readings(self.regularizer, per_parameter=self.per_parameter))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zeros and bounds of the trained weights in those that come out, an average perhaps."""
        if self.regularizer is not None and self._zeros_at == self.regularizer.steps > 0:
            self.regularizer.apply(pl_module, zeros=self._zeros)
            self._zeros, self._zeros_at = {}, 0


@dataclass(eq=False)
class Sparsify(_Handle):
    """`tikhon.sparsify` for a `pytorch_lightning.Trainer`.

    Args:
        asked: a share in (0, 1), a text as "50%,of=channels,multiple=8", or a `Thinning`.
        within: the name of the submodule that it acts in; patterns are of its parameters. Units
            of a traced model ("channels", "features") need a module with a plain `forward`.
        example: one batch of inputs of that module, where it is traced.
        steps: optimizer steps of the whole run; by default as many as the Trainer expects.
        log: whether each epoch logs the share of zeros, as `sparsity/zeros`.

    `sparsifier` is the handle while and after `fit`; its state travels in Lightning's checkpoints.
    When `fit` ends the model gets the zeros once more, so averaged weights have them too. Raises
    what `tikhon.sparsify` raises, and ValueError where the Trainer knows no number of steps.

        trainer = Trainer(max_epochs=20, callbacks=[Sparsify("90%", within="net")])
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

    @property
    def _handle(self) -> Sparsifier | None:
        return self.sparsifier

    @property
    def state_key(self) -> str:
        """Lightning's key of this callback in a checkpoint, which names what it thins."""
        asked = Thinning.read(self.asked)
        return self._generate_state_key(
            within=self.within, of=asked.of, pattern=str(asked.pattern)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizers exist and are restored by now."""
        steps = self.steps or trainer.estimated_stepping_batches
        if not steps < float("inf"):
            raise ValueError("Sparsify: the Trainer has no end; give it max_steps, or give steps")
        self.sparsifier = Sparsifier(
            pl_module.get_submodule(self.within),
            trainer.optimizers,
            Thinning.read(self.asked),
            steps=int(steps),
            example=self.example,
        )
        self._resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log to whatever logger the Trainer has."""
        if self.log and self.sparsifier is not None:
            pl_module.log("sparsity/zeros", self.sparsifier.audit().share)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero what has gone in the weights that come out, an average perhaps."""
        if self.sparsifier is not None:
            self.sparsifier.apply(pl_module.get_submodule(self.within))


@dataclass(eq=False)
class Watch(Callback):
    """`tikhon.watch` for a `pytorch_lightning.Trainer`: stops at the first non-finite number.

    Args:
        every: steps between two readings.
        optimizer: which of the module's optimizers, from 0.
        output: a folder for what led to a failure; None writes nothing.

    When training ends one line says what was found, or that nothing was and what was looked at.
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was found."""
        if self.watch is not None:
            rank_zero_info(self.watch.end())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        if self.watch is not None:
            self.watch.remove()
