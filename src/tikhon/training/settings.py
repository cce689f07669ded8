"""Settings of a training run other than regularization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tikhon.errors import InputError, unknown_name
from tikhon.numbers import check_seed
from tikhon.options import SCHEDULES, TrainingOptions
from tikhon.regularizer.targets import entries_matching, entries_of
from tikhon.training.losses import canonical_name, loss_name
from tikhon.wrappers import unwrap

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
_FUSED = ("sgd", "adam", "adamw")  # one fused call for each step, on the CPU too
_MOMENTUM = ("sgd", "rmsprop")


@dataclass(frozen=True)
class Settings(TrainingOptions):
    """Optimizer, loss, length and seed of a training run.

    `optimizer` is a name, a class, a function from parameters to optimizer, or an instance bound
    to the model (the last two set their own lr and momentum); `loss` a name, a callable or "auto";
    `budget` is in seconds.
    """

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise InputError(unknown_name("optimizer", self.optimizer, OPTIMIZERS))
        if isinstance(self.loss, str) and self.loss != "auto":
            canonical_name(self.loss)
        if self.schedule not in SCHEDULES:
            raise InputError(unknown_name("schedule", self.schedule, SCHEDULES))
        if not (isinstance(self.optimizer, (str, Optimizer)) or callable(self.optimizer)):
            raise InputError(
                "optimizer must be a name, a class of torch's, a function of the parameters or an "
                f"optimizer, received {self.optimizer!r}"
            )
        for name in ("lr", "momentum"):
            if not isinstance(getattr(self, name), (int, float)):
                raise InputError(f"{name} must be a number, received {getattr(self, name)!r}")
        if not (0 < self.lr < math.inf):
            raise InputError(f"lr must be finite and > 0, received {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in [0, 1), received {self.momentum!r}")
        if self.momentum and self.optimizer not in _MOMENTUM:
            raise InputError(
                f"momentum is for {' and '.join(_MOMENTUM)}; {self.optimizer!r} has its own"
            )
        for name in ("batch_size", "epochs"):
            number = getattr(self, name)
            if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
                raise InputError(f"{name} must be a whole number, 1 or more, received {number!r}")
        check_seed(self.seed)

    def build_optimizer(
        self, model: nn.Module, rates: Mapping[str, float] | None = None
    ) -> Optimizer:
        """Build the optimizer of the trainable parameters, with `rates` by pattern replacing lr.

        Raises `InputError` where `lr` conflicts with that of a given optimizer, and for `rates`
        with an optimizer that is already built.
        """
        if isinstance(self.optimizer, Optimizer):
            if rates:
                raise InputError(
                    "learning_rates need an optimizer that is not built yet, and this one has "
                    "parameter groups: give its name, or set their lr"
                )
            return self._check_rates(self.optimizer.param_groups, self.optimizer)
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            raise InputError(f"{type(model).__name__} has no trainable parameter")
        groups: Any = _parameter_groups(model, params, rates) if rates else params
        if not isinstance(self.optimizer, (str, type)):
            built: Any = self.optimizer(groups)
            own = set((rates or {}).values())
            return self._check_rates(
                (g for g in built.param_groups if g.get("lr") not in own), built
            )
        if isinstance(self.optimizer, type):
            return self.optimizer(groups, lr=self.lr)
        options: dict[str, Any] = {"lr": self.lr}
        if self.optimizer in _MOMENTUM:
            options["momentum"] = self.momentum
        if self.optimizer == "adamw":
            options["weight_decay"] = 0.0  # torch defaults to 0.01; here weight decay is a penalty
        if self.optimizer in _FUSED and all(p.is_floating_point() for p in params):
            options["fused"] = True
        return OPTIMIZERS[self.optimizer](groups, **options)

    def _check_rates(self, groups: Iterable[Mapping[str, Any]], optimizer: Optimizer) -> Optimizer:
        rates = {float(group["lr"]) for group in groups if group.get("lr") is not None}
        if self.lr != type(self).lr and rates - {self.lr}:
            found = ", ".join(f"{rate:g}" for rate in sorted(rates))
            raise InputError(
                f"lr={self.lr:g} is given with an optimizer that was built with lr={found}, "
                "which is used; give one of the two"
            )
        return optimizer

    def rate(self, step: int, steps: int) -> float:
        """Factor on lr at `step` of `steps`; stateless, so nothing to resume.

        >>> [Settings(schedule="linear").rate(s, 4) for s in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        """
        done = step / steps
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "linear":
            return 1.0 - done
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        warmup = max(1, steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def describe(self) -> dict[str, object]:
        """Describe the optimizer for the run's configuration."""
        given, lr = self.optimizer, float(self.lr)
        if isinstance(given, Optimizer):
            name, lr = type(given).__name__, float(given.param_groups[0].get("lr", lr))
        else:
            name = given if isinstance(given, str) else loss_name(given)
        return {
            "name": name,
            "lr": lr,
            "momentum": self.momentum,
            "schedule": self.schedule,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "loss": loss_name(self.loss),
        }


def match_learning_rates(
    model: nn.Module, rates: Mapping[str, float]
) -> dict[nn.Parameter, float]:
    """Return the learning rate of each parameter matched by a pattern; the last match wins.

    Raises `InputError` for a pattern without a match.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> list(match_learning_rates(model, {"*": 0.1, "1.*": 0.3}).values())
    [0.1, 0.1, 0.3, 0.3]
    """
    entries = entries_of(unwrap(model))
    matched: dict[nn.Parameter, float] = {}
    for pattern, rate in rates.items():
        try:
            matched |= {entry.param: rate for entry in entries_matching(entries, pattern)}
        except ValueError as error:
            raise InputError(f"learning_rates: {error}") from error
    return matched


def _parameter_groups(
    model: nn.Module, params: Sequence[nn.Parameter], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Build the parameter groups: default learning rate first, then one for each other rate."""
    rate_of = match_learning_rates(model, rates)
    groups: list[dict[str, Any]] = [{"params": [p for p in params if p not in rate_of]}]
    for rate in dict.fromkeys(rate_of.values()):
        groups.append({"params": [p for p in params if rate_of.get(p) == rate], "lr": rate})
    return [group for group in groups if group["params"]]


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" prefers cuda, then mps, then cpu.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    kind = name.partition(":")[0]
    if kind not in available:
        raise InputError(unknown_name("device", name, (*available, "auto")))
    if not available[kind]:
        raise InputError(f"device {name!r} is not available on this machine; use cpu or auto")
    return torch.device(name)
