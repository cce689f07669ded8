"""History of the sampled steps of a loop, as plain values: how often, since when, where."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from tikhon.diagnosis.thresholds import STUCK

COLLAPSED_RATE = 5e-3  # of the largest learning rate: a cosine is below it for its last 5 %
# change of the weights between two steps / their size: averaged weights left in 0.02 and more
REPLACED = 0.01
REPLACED_ONCE = 0.1  # the same, for a single change to be reported (convention)
MAX_OPTIMIZER_STEPS = (
    5.0  # the same, in steps of the optimizer: a look ahead of k = 5 goes back 2.5
)
MIN_UPDATE = 1e-5  # relative update that a float32 norm resolves
REPLICA_TOLERANCE = 1e-4  # relative difference of norms between processes
MIN_SCALE = 16.0  # a loss scale, or what clipping takes from a gradient beside it (convention)
RECENT = 1_000  # sampled steps whose figures are kept, so that a long run costs no more
MIN_ROWS = 8  # of a batch, in which a single class is remarkable
MIN_TALLY = 5  # sampled steps, not necessarily successive
MIN_CLEARED_PASSES = (
    3  # passes per step, each cleared before the next: sharpness-aware steps have two
)
LOSS_FAULTS = (
    "loss_upside_down",
    "broadcast_loss",
    "head_mismatch",
    "missing_log",
    "target_out_of_range",
    "negative_weight",
    "slope_without_graph",
    "nonfinite_loss",
)
MIN_SUMMED_PASSES = 4  # backward passes per step: the halves of a discriminator's loss are two


@dataclass(frozen=True)
class TensorReading:
    """One tensor of the optimizer at a sampled step; norms are over the entries read."""

    gradient: float | None
    weight: float
    update: float
    external_change: float  # change since the previous step, not by the optimizer
    learning_rate: float
    is_complete: bool  # all entries were read
    kind: str  # its type, such as bfloat16
    is_vector: bool  # a bias or a scale, which a loss may not depend on
    foreign: bool  # not a parameter of the model
    stuck_share: float = 0.0  # share of 16-bit entries with a gradient that did not change
    frozen: bool = False  # it does not require a gradient


@dataclass(frozen=True)
class LossReading:
    """The losses that went backward in a sampled step, and their gradients before it."""

    factor: float = 1.0  # by which the last one was multiplied at its end
    share: float = 1.0  # what it was divided by, as a factor
    are_of_one_kind: bool = False  # none divided
    faults: frozenset[str] = frozenset()  # codes of what their graphs show
    output_shape: str = ""  # of outputs that one broadcasts
    broadcast_shape: str = ""  # to this
    is_repeated: bool = False  # one went backward twice
    gain: float | None = None  # part that the order of the targets saves
    first_class: float = math.nan  # the smallest class among the targets
    last_class: float = math.nan  # the largest
    clipped_early: bool = False  # only before the backward passes, where gradients are cleared


@dataclass(frozen=True)
class Sample:
    """Readings of one sampled step."""

    step: int
    forwards: int
    backwards: int
    unfinished: bool
    training: bool | None
    uncleared: bool
    gradient_arrived: bool
    reached: Mapping[str, bool]
    listening: bool  # hooks on tensors could see backward passes
    has_layer_outputs: bool  # the outputs of layers could be listened to
    has_signal: bool  # a gradient came through one of them
    vanished: bool  # and next to nothing of the last one's reached the first
    learning_rates: tuple[float, ...]
    tensors: Mapping[str, TensorReading]
    optimizer_count: int  # tensors of the optimizer
    shared_count: int  # those that are the model's too
    duplicates: tuple[str, ...]
    unoptimized: Mapping[str, float]  # trainable tensors of the model with a gradient, left out
    model_norm: float | None  # a norm of the model's weights where the optimizer has none of them
    repeated_batch: bool  # the batch of the step before
    same_tensor: bool  # in the very same tensor
    replica_distance: float  # relative distance to the mean of the processes
    shrinkage: float | None = None  # a gradient as the backward pass left it / at the step
    scale: float | None = None  # of the loop's gradient scaler
    fingerprints: tuple[tuple[float, float], ...] = ()  # of all batches of the step
    rows: int = 0  # of the batch
    accumulated: bool = True  # a backward pass found the gradient of another
    last_accumulated: bool = True  # and the last one did
    mixed_losses: bool = False  # with what was there before the step of another optimizer
    evaluations: int = 0  # of a closure
    input_gradient: bool = False  # an input of the model has a gradient
    written_after_step: bool = False  # the gradient of the last sampled step, after it
    live_graphs: int = 0  # of earlier sampled steps that are still alive
    frozen_by_attribute: tuple[str, ...] = ()  # modules whose attribute says so, and that move
    unused_passes: int = 0  # passes whose outputs are not in the loss, if these are the most
    nonfinite_loss: bool = False  # though the gradients are finite
    state_cut_off: bool = False  # a recurrent cell goes on from its states without their graphs
    decay: float = 0.0  # part of the weights of a group that weight decay takes
    spread: float | None = None  # of a batch that is part of a tensor that is written to
    seed: int | None = None  # that random numbers of this step were drawn from, if it was set
    losses: LossReading = LossReading()

    @property
    def size(self) -> float:
        """Gradient norm over all tensors."""
        return math.hypot(*(t.gradient or 0.0 for t in self.tensors.values()))

    @property
    def update(self) -> float:
        """Norm of the update over all entries read."""
        return math.hypot(*(t.update for t in self.tensors.values()))


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
    # by tensor
    unmoved: dict[str, Streak] = field(default_factory=dict)
    without_gradient: dict[str, Streak] = field(default_factory=dict)
    left_out: dict[str, Streak] = field(default_factory=dict)
    frozen_but_moving: dict[str, Streak] = field(default_factory=dict)
    replaced: list[tuple[int, str, float]] = field(default_factory=list)
    reset_since: int | None = None  # the first step since which the same weights are written
    largest_rates: list[float] = field(default_factory=list)  # learning rate by group
    collapsed_rates: list[Streak] = field(default_factory=list)
    rising_rates: list[Streak] = field(default_factory=list)  # by group: above all previous rates
    gains: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # of sampled steps
    classes: Counter[float] = field(default_factory=Counter)  # of batches that have only one
    spreads: int = 0  # positive ones, of batches from a tensor that is written to
    least_spread: float = math.inf
    largest_spread: float = 0.0
    path: float = 0.0  # of the weights in the sampled steps, relative to their size
    decays: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # of weights
    _least_shrinkage: float = math.inf  # of gradients between pass and step
    _seed: int | None = None
    _moved: set[str] = field(default_factory=set)
    _unoptimized: Mapping[str, float] = field(default_factory=dict)
    _model_norm: float | None = None
    _weight_norms: tuple[float, ...] = ()

    def streak(self, name: str) -> Streak:
        """Return a streak by name, empty if new."""
        return self.streaks.setdefault(name, Streak())

    @property
    def clipping(self) -> float:
        """What every step took of its gradient, as a factor; 1 while a learning rate rises."""
        rises = any(streak.count for streak in self.rising_rates)
        return 1.0 if rises or not self.samples else self._least_shrinkage

    def frequent(self, name: str) -> Streak | None:
        """Return the tally of a sign that recurs, such as at ends of epochs, or None."""
        tally = self.tallies.get(name, Streak())
        return tally if tally.count >= MIN_TALLY and tally.count >= 0.1 * self.samples else None

    def add(self, sample: Sample) -> None:
        """Add a sampled step."""
        if not self.samples:
            self.first_step = sample.step
        self.samples += 1
        self._add_passes(sample)
        self._add_targets(sample)
        self._add_structure(sample)
        self._add_tensors(sample)
        self._add_rates(sample)
        self.last = sample

    def _add_passes(self, sample: Sample) -> None:
        has_gradients = _has_gradients(sample)
        backward_missing = sample.unfinished and 0 < sample.forwards == sample.backwards
        zero = has_gradients and not any(t.gradient for t in sample.tensors.values())
        explained = sample.has_signal or zero or backward_missing
        unconnected = sample.has_layer_outputs and sample.backwards > 0 and not explained
        for name, seen in {
            "gradients_not_cleared": sample.uncleared and has_gradients,
            "gradients_of_another_loss": sample.mixed_losses and has_gradients,
            "step_before_backward": backward_missing and has_gradients,
            "eval_mode_in_training": sample.training is False,
            "zero_gradient": zero,
            "vanished": sample.vanished,
            "loss_not_connected": unconnected and has_gradients,
            "repeated_batch": sample.repeated_batch,
            "same_tensor": sample.repeated_batch and sample.same_tensor,
            "replicas_differ": sample.replica_distance > REPLICA_TOLERANCE,
            "clipped_before_unscaling": _is_clipped_while_scaled(sample),
            "step_of_scaled_gradients": _uses_scaled_gradients(sample),
            "micro_batches_lost": _clears_micro_batches(sample),
            "clipped_after_step": sample.written_after_step,
            "clipped_before_backward": sample.losses.clipped_early and has_gradients,
            "summed_losses": sample.losses.are_of_one_kind
            and sample.backwards >= MIN_SUMMED_PASSES,
            "batches_unused": sample.unused_passes > 0,
            "backward_twice": sample.losses.is_repeated and sample.last_accumulated,
            "random_numbers_repeat": sample.seed is not None and sample.seed == self._seed,
            **{code: code in sample.losses.faults for code in LOSS_FAULTS},
            "nonfinite_loss": sample.nonfinite_loss,
            "state_cut_off": sample.state_cut_off,
        }.items():
            self.streak(name).add(seen, sample.step)
            if seen:
                self.tallies.setdefault(name, Streak()).add(True, sample.step)

    def _add_targets(self, sample: Sample) -> None:
        """Record how much the order of the targets matters, and batches of one class."""
        self._seed = sample.seed
        shrinkage = 1.0 if sample.shrinkage is None else sample.shrinkage
        self._least_shrinkage = min(self._least_shrinkage, shrinkage)
        self.decays.append(sample.decay)
        if sample.spread is not None and sample.spread > 0:
            self.spreads += 1
            self.least_spread = min(self.least_spread, sample.spread)
            self.largest_spread = max(self.largest_spread, sample.spread)
        size = math.hypot(*(t.weight for t in sample.tensors.values()))
        self.path += sample.update / size if size else 0.0
        losses = sample.losses
        if losses.gain is not None:
            self.gains.append(losses.gain)
        is_single = losses.first_class == losses.last_class and sample.rows >= MIN_ROWS
        if is_single:
            self.classes[losses.first_class] += 1

    def _add_structure(self, sample: Sample) -> None:
        """Record tensors that only one of model and optimizer has, and that do not move."""
        foreign = sample.optimizer_count > 0 and sample.shared_count == 0
        unmoved = sample.model_norm is not None and sample.model_norm == self._model_norm
        without_gradient = not _has_gradients(sample)
        self.streak("optimizer_of_another_model").add(
            foreign and (unmoved or without_gradient), sample.step
        )
        self._model_norm = sample.model_norm
        for name in list(self.left_out):
            if name not in sample.unoptimized:
                del self.left_out[name]
        for name, size in sample.unoptimized.items():
            unmoved = self._unoptimized.get(name, size) == size
            self.left_out.setdefault(name, Streak()).add(unmoved, sample.step)
        self._unoptimized = sample.unoptimized

    def _add_tensors(self, sample: Sample) -> None:
        if not _has_gradients(sample):
            return
        for name, tensor in sample.tensors.items():
            if tensor.learning_rate == 0 or tensor.frozen or name in self._moved:
                continue
            none = not tensor.gradient
            is_still = tensor.is_complete and tensor.update == 0
            unmoved = not none and (tensor.stuck_share > STUCK or is_still)
            if not none and not unmoved:
                self._moved.add(name)
            self.without_gradient.setdefault(name, Streak()).add(none, sample.step)
            self.unmoved.setdefault(name, Streak()).add(unmoved, sample.step)
        for name, tensor in sample.tensors.items():
            self.frozen_but_moving.setdefault(name, Streak()).add(
                tensor.frozen and tensor.update > 0, sample.step
            )
        for known in (self.without_gradient, self.unmoved, self.frozen_but_moving):
            for name in known.keys() - sample.tensors.keys():
                del known[name]  # has been frozen
        self._add_external_changes(sample)

    def _add_external_changes(self, sample: Sample) -> None:
        """Record weights that were overwritten or reset between two steps."""
        read = [t for t in sample.tensors.values() if t.gradient is not None]
        size = math.hypot(*(t.weight for t in read)) or 1.0
        update = math.hypot(*(t.update for t in read)) / size
        external_change = math.hypot(*(t.external_change for t in read)) / size
        if external_change > REPLACED and external_change > MAX_OPTIMIZER_STEPS * update:
            where = max(sample.tensors, key=lambda n: sample.tensors[n].external_change)
            self.replaced.append((sample.step, where, external_change))
        weights = tuple(t.weight for t in read)
        is_reset = update > MIN_UPDATE and weights == self._weight_norms
        self.streak("reset_weights").add(is_reset, sample.step)
        self._weight_norms = weights

    def _add_rates(self, sample: Sample) -> None:
        for index, rate in enumerate(sample.learning_rates):
            if index == len(self.largest_rates):
                self.largest_rates.append(rate)
                self.collapsed_rates.append(Streak())
                self.rising_rates.append(Streak())
            else:
                self.rising_rates[index].add(rate > self.largest_rates[index], sample.step)
            largest = self.largest_rates[index] = max(rate, self.largest_rates[index])
            self.collapsed_rates[index].add(rate <= COLLAPSED_RATE * largest, sample.step)


def _has_gradients(sample: Sample) -> bool:
    return any(t.gradient is not None for t in sample.tensors.values())


def _is_clipped_while_scaled(sample: Sample) -> bool:
    """Whether a gradient was clipped while scaled, and is too small by that scale."""
    if sample.scale is None or sample.shrinkage is None or sample.scale < MIN_SCALE:
        return False
    return sample.shrinkage > MIN_SCALE * sample.scale and sample.size * MIN_SCALE < 0.5


def _clears_micro_batches(sample: Sample) -> bool:
    """Whether gradients of micro-batches were cleared before the next one."""
    if sample.input_gradient or sample.evaluations or not sample.gradient_arrived:
        return False  # adversarial passes may clear on purpose
    several = MIN_CLEARED_PASSES <= sample.backwards == sample.forwards
    unclipped = sample.shrinkage is not None and sample.shrinkage > 0.99
    # losses divided by the count are to be summed
    are_shares = abs(sample.losses.share * sample.backwards - 1) < 1e-3
    only_last = are_shares and not sample.last_accumulated
    return several and ((unclipped and not sample.accumulated) or only_last)


def _uses_scaled_gradients(sample: Sample) -> bool:
    """Whether a step used a gradient that is still multiplied by the loss scale."""
    scale, shrinkage = sample.scale, sample.shrinkage
    if scale is None or shrinkage is None or scale < MIN_SCALE:
        return False
    return abs(sample.losses.factor / scale - 1) < 1e-3 and shrinkage < 2
