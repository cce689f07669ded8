"""skorch: penalties and the watch as callbacks of a `NeuralNet`.

Needs `pip install tikhon[skorch]`.
"""

# this file has the name of the package that it imports, which misleads the type checker:
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
        terms: as for `tikhon.regularize`, with the names of the module's parameters.
        how: "objective" or "decoupled".
        optimizer: name of the net's optimizer.
        module: name of the net's module.
        log: whether each epoch of the history gets value, strength and zeros of every kind of
            penalty.
        per_parameter: whether it gets these of every parameter, not of every kind of penalty.

    `regularizer_` is the handle while and after `fit`; `partial_fit` and warm starts continue
    with it. A grid over `callbacks__<name>__terms` searches penalties. Raises what
    `tikhon.regularize` raises.

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
        """Attach to the optimizer, which `initialize` may have rebuilt."""
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
        """Record into the net's history; the keys of the table skip it, files keep it."""
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
    """`tikhon.watch` for a `skorch.NeuralNet`: stops at the first non-finite number.

    Args:
        every: steps between two readings.
        output: a folder for what led to a failure; None writes nothing.

    When training ends one line says what was found, or that nothing was and what was looked at
    (on stderr, if the net is verbose). `watch_.rows` and `watch_.alarms` hold what was read, also
    after `fit`.
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
        """Detach, and say what was found."""
        said = self.watch_.end()
        if net.verbose:
            print(said, file=sys.stderr)
