"""Lightning callbacks: penalties, sparsify and the watch.

Needs `pip install tikhon[lightning]`. Automatic and manual optimization, gradient accumulation,
16-bit precision and all strategies work, as penalties act in the optimizer's step.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tikhon.integrations.handles import Handle, RegularizeHandle, SparsifyHandle
from tikhon.monitoring.watch import Watch as WatchHandle, watch
from tikhon.regularizer.regularizer import regularize

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import rank_zero_info
except ImportError as error:
    raise ImportError("these callbacks need Lightning: pip install tikhon[lightning]") from error


class _Handle(Handle, Callback):
    """A handle whose state is stored in Lightning's checkpoints."""

    _restored: dict[str, object] | None = None

    def _resume(self) -> None:
        if self._handle is not None and self._restored is not None:
            self._handle.load_state_dict(self._restored)
            self._restored = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach, also after a failure; the handle stays readable."""
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoint."""
        return {} if self._handle is None else self._handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Store the state from Lightning's checkpoint until training starts."""
        self._restored = state_dict or None


@dataclass(eq=False)
class Regularize(RegularizeHandle, _Handle):
    """`tikhon.regularize` for a `pytorch_lightning.Trainer`.

    Args:
        terms: as for `tikhon.regularize`, with parameter names of the LightningModule.
        how: "objective" or "decoupled".
        optimizer: index of the module's optimizer; None for all of them together.
        log: whether to log value, strength and zeros of each kind of penalty every epoch.
        per_parameter: whether to log these for each parameter instead.

    `regularizer` is the handle during and after `fit`. Its state (steps, moving strengths) is
    stored in Lightning's checkpoints. Layers unfrozen later by a `BackboneFinetuning` join once
    they are in the optimizer. If `fit` ends with averaged weights (`StochasticWeightAveraging`,
    `EMAWeightAveraging`), they get the zeros and constraints of the trained ones. Raises
    IndexError for a missing optimizer, and the errors of `tikhon.regularize`.

        trainer = Trainer(callbacks=[Regularize({"net.*": tk.L1(1e-4)})])
    """

    _: KW_ONLY
    optimizer: int | None = None
    _zeros: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)
    _zeros_step: int = field(default=0, init=False)  # steps at which these were read

    @property
    def state_key(self) -> str:
        """Return this callback's key in a Lightning checkpoint, which includes the optimizer."""
        return self._generate_state_key(optimizer=self.optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, once the optimizers exist and are restored."""
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
        self._zeros, self._zeros_step = {}, 0
        self._resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log to the Trainer's logger."""
        if self.regularizer is not None and self.regularizer.steps > self._zeros_step:
            # once averaged, the module is no longer trained and has other zeros
            self._zeros, self._zeros_step = self.regularizer.zeros(), self.regularizer.steps
        if self.log and self.regularizer is not None:
            pl_module.log_dict(self._readings())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the trained zeros and bounds to the final weights, which may be an average."""
        if self.regularizer is not None and self._zeros_step == self.regularizer.steps > 0:
            self.regularizer.apply(pl_module, zeros=self._zeros)
            self._zeros, self._zeros_step = {}, 0


@dataclass(eq=False)
class Sparsify(SparsifyHandle, _Handle):
    """`tikhon.sparsify` for a `pytorch_lightning.Trainer`.

    Args:
        asked: a share in (0, 1), a text such as "50%,of=channels,multiple=8", or a `Thinning`.
        within: name of the submodule to prune; patterns refer to its parameters. Units of a traced
            model ("channels", "features") need a module with a plain `forward`.
        example: a batch of inputs of that module, if it is traced.
        steps: optimizer steps of the whole run; by default the Trainer's estimate.
        log: whether to log the share of zeros as `sparsity/zeros` every epoch.

    `sparsifier` is the handle during and after `fit`; its state is stored in Lightning's
    checkpoints. At the end of `fit` the zeros are applied again, also to averaged weights. Raises
    the errors of `tikhon.sparsify`, and ValueError if the Trainer has no number of steps.

        trainer = Trainer(max_epochs=20, callbacks=[Sparsify("90%", within="net")])
    """

    @property
    def state_key(self) -> str:
        """Return this callback's key in a Lightning checkpoint, which includes what it prunes."""
        of, pattern = self.thinning.of, str(self.thinning.pattern)
        return self._generate_state_key(within=self.within, of=of, pattern=pattern)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, once the optimizers exist and are restored."""
        steps = self.steps or trainer.estimated_stepping_batches
        if not steps < float("inf"):
            raise ValueError("Sparsify: the Trainer has no end; give it max_steps, or give steps")
        self._attach(pl_module, trainer.optimizers, int(steps))
        self._resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log to the Trainer's logger."""
        if self.log and self.sparsifier is not None:
            pl_module.log_dict(self._readings())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the zeros to the final weights, which may be an average."""
        self._apply(pl_module)


@dataclass(eq=False)
class Watch(Callback):
    """`tikhon.watch` for a `pytorch_lightning.Trainer`: stops at the first non-finite value.

    Args:
        every: steps between readings.
        optimizer: index of the module's optimizer.
        output: folder for a report on a failure; None writes nothing.

    At the end of training one line reports the findings, or that there are none and what was
    checked. `watch.rows` and `watch.alarms` hold the readings, also after `fit`.
    """

    every: int = 50
    _: KW_ONLY
    optimizer: int = 0
    output: str | Path | None = None
    watch: WatchHandle | None = field(default=None, init=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        chosen = trainer.optimizers[self.optimizer]
        self.watch = watch(pl_module, chosen, every=self.every, output=self.output)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the findings."""
        if self.watch is not None:
            rank_zero_info(self.watch.end())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        if self.watch is not None:
            self.watch.remove()
