"""Measurements as plain values: a record can be saved, sent and judged without the model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Site:
    """A place in the network that is measured: a layer with weights, or an activation."""

    name: str
    kind: str  # "Linear 64>10", "relu", "LSTM 1>32"
    role: str  # "weight" | "recurrent" | "attention" | "norm" | "embedding" | "activation"
    fan_in: int = 0
    fan_out: int = 0
    trainable: bool = True
    leaf: bool = True  # in a plain chain: its input is the output of the previous site
    places: int = 1  # positions per channel and row: pixels of a map, steps of a sequence


@dataclass(frozen=True)
class SiteReading:
    """The numbers of one site at one step; None where a number does not apply."""

    rms: float | None = None  # root mean square of the output
    diversity: float | None = None  # spread over the batch / rms: 0 if all samples are alike
    signal: float | None = None  # rms of the loss gradient with respect to the output
    weight_rms: float | None = None
    weight_factor: float | None = None  # rms(W) * sqrt(fan_out): gain of the backward pass
    constant: bool | None = None  # all weights equal
    bias: float | None = None  # rms of the bias
    slope: float | None = None  # rms of the activation's derivative
    dead: float | None = None  # share of units with a zero derivative on the whole probe batch
    saturated: float | None = None  # share of entries below 5% of the largest slope
    stuck: float | None = None  # share of 16-bit weights with a gradient that did not change
    update: float | None = None  # |change of the weights in one optimizer step| / |weights|
    gradient: float | None = None  # rms of the weight gradient
    penalty: float | None = None  # penalty's share of the gradient, 0 to 1
    time_ratio: float | None = (
        None  # log10 of gradient at the first / last tenth of the time steps
    )
    entropy: float | None = None  # of the attention, 1 = uniform


@dataclass(frozen=True)
class Probe:
    """All sites at one step of the dry run, on the same probe batch."""

    step: int
    loss: float | None  # training mode; None where it is not finite
    readings: tuple[SiteReading, ...]
    gradient: float | None = None  # global norm of the parameter gradients


@dataclass(frozen=True)
class Point:
    """Scores at one step: losses in evaluation mode except `loss`, metrics at most 1."""

    step: int
    loss: float | None
    eval_loss: float | None = None
    valid_loss: float | None = None
    metric: float | None = None
    valid_metric: float | None = None


@dataclass(frozen=True)
class Failure:
    """The first non-finite value: where, when and in which tensor."""

    step: int
    what: str  # "input" | "activation" | "loss" | "gradient" | "weight"
    where: str
    call: str = ""  # the torch function that produced it from finite arguments
    place: str = ""  # the user's line of that call, or the module
    smallest: float | None = None  # smallest argument of that function


@dataclass(frozen=True)
class Record:
    """Everything that `diagnose` measured; `tikhon.diagnosis.checks` judges it."""

    model: str
    parameters: int
    trainable: int
    batch_size: int
    steps: int
    seed: int
    loss: str
    optimizer: dict[str, Any]
    data: dict[str, Any]
    static: dict[str, Any]
    sites: tuple[Site, ...]
    probes: tuple[Probe, ...]
    points: tuple[Point, ...] = ()
    losses: tuple[float | None, ...] = ()
    gradients: tuple[float | None, ...] = ()
    reference: dict[str, float | None] = field(default_factory=dict)
    failure: Failure | None = None
    wiring: dict[str, Any] = field(default_factory=dict)  # facts of `tikhon.diagnosis.wiring`
    inits: tuple[tuple[str, ...], ...] = ()  # labels at step 0 of further draws of a factory
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists without NaN or infinity."""
        return finite(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """Restore a record from `to_dict`."""
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"record has schema_version {values.get('schema_version')!r}, "
                f"this tikhon reads {SCHEMA_VERSION}; record again"
            )
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in values.items() if k in known}
        kept["sites"] = tuple(Site(**s) for s in kept["sites"])
        kept["probes"] = tuple(
            Probe(**{**p, "readings": tuple(SiteReading(**r) for r in p["readings"])})
            for p in kept["probes"]
        )
        kept["points"] = tuple(Point(**p) for p in kept["points"])
        kept["losses"] = tuple(kept["losses"])
        kept["gradients"] = tuple(kept["gradients"])
        kept["inits"] = tuple(tuple(labels) for labels in kept["inits"])
        kept["failure"] = Failure(**kept["failure"]) if kept["failure"] else None
        return cls(**kept)


def finite(value: Any) -> Any:
    """Convert tuples to lists and non-finite numbers to None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
