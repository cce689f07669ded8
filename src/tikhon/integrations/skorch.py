"""skorch callbacks: penalties and the watch.

Needs `pip install tikhon[skorch]`.
"""

# named like the package it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from tikhon.integrations.readings import readings
from tikhon.monitoring.watch import watch
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import How, Terms

try:
    from skorch.callbacks import Callback
except ImportError as error:
    raise ImportError("these callbacks need skorch: pip install tikhon[skorch]") from error


@dataclass(eq=False, repr=False)
class Regularize(Callback):
    """`tikhon.regularize` for a `skorch.NeuralNet`.

    Args:
        terms: as for `tikhon.regularize`, with parameter names of the module.
        how: "objective" or "decoupled".
        optimizer: name of the net's optimizer.
        module: name of the net's module.
        log: whether to record value, strength and zeros of each kind of penalty every epoch.
        per_parameter: whether to record these for each parameter instead.

    `regularizer_` is the handle during and after `fit`; `partial_fit` and warm starts continue
    with it. Penalties can be searched by a grid over `callbacks__<name>__terms`. Raises the errors
    of `tikhon.regularize`.

        net = NeuralNetClassifier(Net, callbacks=[("penalty", Regularize(tk.L1(1e-4)))])
    """

    terms: Terms
    _: KW_ONLY
    how: How = "objective"
    optimizer: str = "optimizer"
    module: str = "module"
    log: bool = True
    per_parameter: bool = False

    def on_train_begin(
        self, net: object, X: object = None, y: object = None, **kwargs: object
    ) -> None:
        """Attach to the optimizer, which `initialize` may have recreated."""
        optimizer = getattr(net, f"{self.optimizer}_")
        earlier: Regularizer | None = getattr(self, "regularizer_", None)
        if earlier is not None and earlier.optimizer is optimizer:
            earlier.attach(optimizer)
            return
        module = getattr(net, f"{self.module}_")
        self.regularizer_ = regularize(module, optimizer, self.terms, how=self.how)

    def on_epoch_end(
        self,
        net: object,
        dataset_train: object = None,
        dataset_valid: object = None,
        **kwargs: object,
    ) -> None:
        """Record in the net's history; hidden in its printed table, but saved with it."""
        if self.log:
            for key, value in readings(
                self.regularizer_, per_parameter=self.per_parameter
            ).items():
                net.history.record(key, value)

    def on_train_end(
        self, net: object, X: object = None, y: object = None, **kwargs: object
    ) -> None:
        """Detach; the handle stays readable."""
        self.regularizer_.remove()


@dataclass(eq=False, repr=False)
class Watch(Callback):
    """`tikhon.watch` for a `skorch.NeuralNet`: stops at the first non-finite value.

    Args:
        every: steps between readings.
        output: folder for a report on a failure; None writes nothing.

    At the end of training one line reports the findings, or that there are none and what was
    checked (on stderr, if the net is verbose). `watch_.rows` and `watch_.alarms` hold the
    readings, also after `fit`.
    """

    every: int = 50
    _: KW_ONLY
    output: str | Path | None = None

    def on_train_begin(
        self, net: object, X: object = None, y: object = None, **kwargs: object
    ) -> None:
        """Attach."""
        self.watch_ = watch(net.module_, net.optimizer_, every=self.every, output=self.output)

    def on_train_end(
        self, net: object, X: object = None, y: object = None, **kwargs: object
    ) -> None:
        """Detach, and report the findings."""
        summary = self.watch_.end()
        if net.verbose:
            print(summary, file=sys.stderr)
