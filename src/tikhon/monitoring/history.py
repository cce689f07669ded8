"""History of the sampled steps of a loop, as plain values: how often, since when, where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tikhon.diagnosis.thresholds import STUCK

COLLAPSED = 5e-3  # of the largest learning rate: a cosine is below it for its last 5 %
# change of the weights between two steps / their size: averaged weights left in 0.02 and more
REPLACED = 0.01
ONCE = 0.1  # the same, for a single change to be reported (convention)
SUDDEN = 5.0  # the same, in steps of the optimizer: a look ahead of k = 5 goes back 2.5
RESOLVED = 1e-5  # relative update that a float32 norm resolves
DIFFERENT = 1e-4  # relative difference of norms between processes
SCALED = 16.0  # a loss scale, or what clipping takes from a gradient beside it (convention)
OFTEN = 5  # sampled steps, not necessarily successive
LOST = 3  # passes per step, each cleared before the next: sharpness-aware steps have two
SUMMED = 4  # backward passes per step: the halves of a discriminator's loss are two


@dataclass(frozen=True)
class TensorReading:
    """One tensor of the optimizer at a sampled step; norms are over the entries read."""

    gradient: float | None
    weight: float
    move: float
    outside: float  # change since the previous step, not by the optimizer
    rate: float
    whole: bool  # all entries were read
    kind: str  # its type, such as bfloat16
    vector: bool  # a bias or a scale, which a loss may not depend on
    foreign: bool  # not a parameter of the model
    stuck: float = 0.0  # share of 16-bit entries with a gradient that did not change
    frozen: bool = False  # it does not require a gradient


@dataclass(frozen=True)
class Sample:
    """Readings of one sampled step."""

    step: int
    forwards: int
    backwards: int
    unfinished: bool
    training: bool | None
    stale: bool
    arrived: bool
    reached: Mapping[str, bool]
    listening: bool  # hooks on tensors could see backward passes
    tapped: bool  # the outputs of layers could be listened to
    signal: bool  # a gradient came through one of them
    faded: bool  # and next to nothing of the last one's reached the first
    rates: tuple[float, ...]
    tensors: Mapping[str, TensorReading]
    held: int  # tensors of the optimizer
    shared: int  # those that are the model's too
    doubled: tuple[str, ...]
    strangers: Mapping[str, float]  # trainable tensors of the model with a gradient, left out
    own: float | None  # a norm of the model's weights where the optimizer has none of them
    repeated: bool  # the batch of the step before
    handed: bool  # in the very same tensor
    apart: float  # relative distance to the mean of the processes
    shrunk: float | None = None  # a gradient as the backward pass left it / at the step
    factor: float = 1.0  # by which the loss was multiplied at its end
    scale: float | None = None  # of the loop's gradient scaler
    equal: bool = False  # the losses that went backward are of one kind, none is a share
    prints: tuple[tuple[float, float], ...] = ()  # fingerprints of all batches of the step
    rows: int = 0  # of the batch
    joined: bool = True  # a backward pass found the gradient of another
    last_joined: bool = True  # and the last one did
    mixed: bool = False  # with what was there before the step of another optimizer
    share: float = 1.0  # what the last loss was divided by, as a factor
    evaluations: int = 0  # of a closure
    attacked: bool = False  # an input of the model has a gradient
    late: bool = False  # the gradient of the sampled step before was written after it
    graphs: int = 0  # of earlier sampled steps that are still alive
    called_frozen: tuple[str, ...] = ()  # modules whose attribute says so, and that move

    @property
    def size(self) -> float:
        """Gradient norm over all tensors."""
        return math.hypot(*(t.gradient or 0.0 for t in self.tensors.values()))

    @property
    def move(self) -> float:
        """Norm of the update over all entries read."""
        return math.hypot(*(t.move for t in self.tensors.values()))


@dataclass
class Streak:
    """Number of successive sampled steps that showed a sign, and the first of them."""

    count: int = 0
    first: int = 0

    def add(self, seen: bool, step: int) -> None:
        """Add a sampled step."""
        self.first = step if seen and not self.count else self.first
        self.count = self.count + 1 if seen else 0


@dataclass
class StepHistory:
    """All sampled steps, condensed."""

    samples: int = 0
    last: Sample | None = None
    first_step: int = 0
    streaks: dict[str, Streak] = field(default_factory=dict)
    tallies: dict[str, Streak] = field(default_factory=dict)  # all steps with the sign
    still: dict[str, Streak] = field(default_factory=dict)  # by tensor: never moved
    silent: dict[str, Streak] = field(default_factory=dict)  # by tensor: never had a gradient
    left_out: dict[str, Streak] = field(default_factory=dict)
    thawed: dict[str, Streak] = field(default_factory=dict)  # by tensor: frozen, but moves
    replaced: list[tuple[int, str, float]] = field(default_factory=list)
    set_back: int | None = None  # the first step since which the same weights are written
    largest: list[float] = field(default_factory=list)  # learning rate by group
    low: list[Streak] = field(default_factory=list)
    rising: list[Streak] = field(default_factory=list)  # by group: above all previous rates
    _moved: set[str] = field(default_factory=set)
    _strangers: Mapping[str, float] = field(default_factory=dict)
    _own: float | None = None
    _weights: tuple[float, ...] = ()

    def streak(self, name: str) -> Streak:
        """Return a streak by name, empty if new."""
        return self.streaks.setdefault(name, Streak())

    def often(self, name: str) -> Streak | None:
        """Return the tally of a sign that recurs, such as at ends of epochs, or None."""
        tally = self.tallies.get(name, Streak())
        return tally if tally.count >= OFTEN and tally.count >= 0.1 * self.samples else None

    def add(self, sample: Sample) -> None:
        """Add a sampled step."""
        if not self.samples:
            self.first_step = sample.step
        self.samples += 1
        self._passes(sample)
        self._structure(sample)
        self._tensors(sample)
        self._rates(sample)
        self.last = sample

    def _passes(self, sample: Sample) -> None:
        step, graded = sample.step, _graded(sample)
        late = sample.unfinished and 0 < sample.forwards == sample.backwards
        zero = graded and not any(t.gradient for t in sample.tensors.values())
        beside = graded and sample.tapped and not (sample.signal or zero or late)
        for name, seen in {
            "stale": sample.stale and graded,
            "mixed": sample.mixed and graded,
            "late": late and graded,
            "eval": sample.training is False,
            "zero": zero,
            "faded": sample.faded,
            "beside": beside and sample.backwards > 0,
            "repeated": sample.repeated,
            "handed": sample.repeated and sample.handed,
            "apart": sample.apart > DIFFERENT,
            "crushed": _crushed(sample),
            "scaled": _scaled(sample),
            "lost": _lost(sample),
            "clipped late": sample.late,
            "summed": sample.equal and sample.backwards >= SUMMED,
        }.items():
            self.streak(name).add(seen, step)
            if seen:
                self.tallies.setdefault(name, Streak()).add(True, step)

    def _structure(self, sample: Sample) -> None:
        """Record tensors that only one of model and optimizer has, and that do not move."""
        foreign = sample.held > 0 and sample.shared == 0
        still = sample.own is not None and sample.own == self._own
        silent = not _graded(sample)
        self.streak("foreign").add(foreign and (still or silent), sample.step)
        self._own = sample.own
        for name in list(self.left_out):
            if name not in sample.strangers:
                del self.left_out[name]
        for name, size in sample.strangers.items():
            unmoved = self._strangers.get(name, size) == size
            self.left_out.setdefault(name, Streak()).add(unmoved, sample.step)
        self._strangers = sample.strangers

    def _tensors(self, sample: Sample) -> None:
        if not _graded(sample):
            return
        for name, tensor in sample.tensors.items():
            if tensor.rate == 0 or tensor.frozen or name in self._moved:
                continue
            none = not tensor.gradient
            still = not none and (tensor.stuck > STUCK or (tensor.whole and tensor.move == 0))
            if not none and not still:
                self._moved.add(name)
            self.silent.setdefault(name, Streak()).add(none, sample.step)
            self.still.setdefault(name, Streak()).add(still, sample.step)
        for name, tensor in sample.tensors.items():
            self.thawed.setdefault(name, Streak()).add(
                tensor.frozen and tensor.move > 0, sample.step
            )
        for known in (self.silent, self.still, self.thawed):
            for name in known.keys() - sample.tensors.keys():
                del known[name]  # has been frozen
        self._overwritten(sample)

    def _overwritten(self, sample: Sample) -> None:
        """Record weights that were overwritten or reset between two steps."""
        read = [t for t in sample.tensors.values() if t.gradient is not None]
        size = math.hypot(*(t.weight for t in read)) or 1.0
        move = math.hypot(*(t.move for t in read)) / size
        outside = math.hypot(*(t.outside for t in read)) / size
        if outside > REPLACED and outside > SUDDEN * move:
            where = max(sample.tensors, key=lambda n: sample.tensors[n].outside)
            self.replaced.append((sample.step, where, outside))
        weights = tuple(t.weight for t in read)
        back = move > RESOLVED and weights == self._weights
        self.streak("back").add(back, sample.step)
        self._weights = weights

    def _rates(self, sample: Sample) -> None:
        for index, rate in enumerate(sample.rates):
            if index == len(self.largest):
                self.largest.append(rate)
                self.low.append(Streak())
                self.rising.append(Streak())
            else:
                self.rising[index].add(rate > self.largest[index], sample.step)
            self.largest[index] = max(rate, self.largest[index])
            self.low[index].add(rate <= COLLAPSED * self.largest[index], sample.step)


def _graded(sample: Sample) -> bool:
    return any(t.gradient is not None for t in sample.tensors.values())


def _crushed(sample: Sample) -> bool:
    """Whether a gradient was clipped while scaled, and is too small by that scale."""
    if sample.scale is None or sample.shrunk is None or sample.scale < SCALED:
        return False
    return sample.shrunk > SCALED * sample.scale and sample.size * SCALED < 0.5


def _lost(sample: Sample) -> bool:
    """Whether gradients of micro-batches were cleared before the next one."""
    several = LOST <= sample.backwards == sample.forwards
    whole = sample.shrunk is not None and sample.shrunk > 0.99
    alone = not sample.joined
    # adversarial passes may clear on purpose; losses divided by the count are to be summed
    shares = abs(sample.share * sample.backwards - 1) < 1e-3 and not sample.last_joined
    meant = sample.attacked or sample.evaluations > 0
    return several and sample.arrived and ((whole and alone) or shares) and not meant


def _scaled(sample: Sample) -> bool:
    """Whether a step used a gradient that is still multiplied by the loss scale."""
    scale, shrunk = sample.scale, sample.shrunk
    if scale is None or shrunk is None or scale < SCALED:
        return False
    return abs(sample.factor / scale - 1) < 1e-3 and shrunk < 2
