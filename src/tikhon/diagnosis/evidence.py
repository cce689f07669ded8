"""Quantities derived from a record: dimensionless ratios, so that thresholds transfer.

Standard library only. The thresholds are in `thresholds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from statistics import median

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.record import Point, Probe, Record, Site


class Evidence:
    """Derived quantities of a record: signal flow, activations, learning."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.static = record.static
        self.wiring = record.wiring

    def fact(self, name: str) -> float | None:
        """Return a number measured by the wiring tests; None where the test could not run."""
        return number(self.wiring.get(name))

    # layers

    @cached_property
    def chain(self) -> list[int]:
        """Positions of the layers with weights, in the order of the forward pass."""
        roles = ("weight", "recurrent")
        return [i for i, s in enumerate(self.record.sites) if s.role in roles]

    @cached_property
    def norms_at_end(self) -> list[str]:
        """Names of normalisations after the last layer with weights."""
        last = max(self.chain, default=len(self.record.sites))
        return [s.name for s in self.record.sites[last + 1 :] if s.role == "norm"]

    def site(self, position: int) -> Site:
        """Return the site at a position."""
        return self.record.sites[position]

    def activation_after(self, position: int) -> int | None:
        """Return the activation after a layer, before the next layer with weights."""
        sites = self.record.sites
        for i in range(position + 1, len(sites)):
            if sites[i].role in ("weight", "recurrent"):
                return None
            if sites[i].role == "activation":
                return i
        return None

    def layer_before(self, position: int) -> int | None:
        """Return the layer with weights before an activation."""
        return max((i for i in self.chain if i < position), default=None)

    # the backward signal

    def ratio(self, probe: Probe) -> float | None:
        """Return the gradient at the first / last layer; None where the last has none.

        The first layer may be one of several branches, such as an attention query; the gradient
        of a normalisation before it covers all of them. A mean over pixels or steps scales the
        gradient per place down but loses no signal, so a fall is measured over all places.
        """
        signals = [probe.readings[i].signal for i in self.chain]
        signals = [s for s in signals if s is not None]
        if not signals or not math.isfinite(signals[0]) or not math.isfinite(signals[-1]):
            return None
        if signals[-1] == 0:
            return None
        in_front = [probe.readings[i].signal for i in range(self.chain[0])]
        norms = [self.site(i).role == "norm" for i in range(self.chain[0])]
        known = [s for s, norm in zip(in_front, norms) if norm and s is not None]
        found = max(signals[0], *known, 0.0) / signals[-1]
        first, last = (self.site(self.chain[k]).places for k in (0, -1))
        return max(found, min(1.0, found * math.sqrt(first / last)))

    @cached_property
    def early(self) -> list[Probe]:
        """Probes of the first fifth of the run."""
        probes = self.record.probes
        last = max(5, 0.2 * self.record.steps)
        return [p for p in probes if 0 < p.step <= last] or list(probes[:1])

    @cached_property
    def first_ratio(self) -> float | None:
        """Signal ratio before the first step."""
        return self.ratio(self.record.probes[0]) if self.record.probes else None

    @cached_property
    def early_ratio(self) -> float | None:
        """Median signal ratio early in the run; that at step 0 without a dry run."""
        return middle(self.ratio(p) for p in self.early)

    @cached_property
    def has_zero_gradients(self) -> bool:
        """Whether all gradients are zero from the start."""
        probes = [p for p in self.record.probes[:4]]
        return bool(probes) and all(p.gradient == 0 for p in probes) and self.record.trainable > 0

    @property
    def has_softmax_of_one(self) -> bool:
        """Whether loss or network takes a softmax over one unit."""
        head = (self.static.get("head"), self.static.get("output_units"))
        return bool(self.wiring.get("softmax_over_one")) or head == (["softmax"], 1)

    def time_ratios(self) -> list[tuple[int, float, float]]:
        """Return (position, log10 decay over time at step 0, early median) per recurrent layer."""
        found = []
        for i in self.chain:
            first = self.record.probes[0].readings[i].time_ratio if self.record.probes else None
            later = middle(p.readings[i].time_ratio for p in self.early)
            if first is not None:
                found.append((i, first, later if later is not None else first))
        return found

    # activations

    def late_median(self, name: str, position: int) -> float:
        """Return the median of a reading over the last three probes."""
        return middle(getattr(p.readings[position], name) for p in self.record.probes[-3:]) or 0.0

    @property
    def first(self) -> Probe | None:
        """The probe before the first step."""
        return self.record.probes[0] if self.record.probes else None

    @property
    def last(self) -> Probe | None:
        """The last probe."""
        return self.record.probes[-1] if self.record.probes else None

    @cached_property
    def median_update(self) -> float | None:
        """Median update / weight ratio over layers and probes."""
        return middle(
            p.readings[i].update
            for p in self.record.probes
            for i in self.chain
            if self.site(i).trainable
        )

    @cached_property
    def has_constant_output(self) -> bool:
        """Whether the network ends with the same output for every sample."""
        return self.is_constant(self.last)

    def is_constant(self, probe: Probe | None) -> bool:
        """Whether the output at a probe is the same for every sample."""
        if probe is None or not self.chain:
            return False
        spread = probe.readings[self.chain[-1]].diversity
        return spread is not None and spread < e.NARROW

    @cached_property
    def dead_rectifiers(self) -> list[int]:
        """Positions of rectifiers with a large share of dead units at the end."""
        fails, last = (
            self.record.failure is not None,
            self.last if self.record.failure is None else self.first,
        )
        return [
            i
            for i, reading in enumerate(last.readings if last is not None else ())
            if reading.dead is not None
            and reading.dead >= e.DEAD
            and (fails or self.late_median("dead", i) >= e.DEAD)
        ]

    @cached_property
    def saturated_activations(self) -> list[int]:
        """Positions of bounded activations that saturated during the run."""
        first = self.first
        return [
            i
            for i, reading in enumerate(first.readings if first is not None else ())
            if reading.saturated is not None
            and reading.saturated < e.SATURATED <= self.late_median("saturated", i)
        ]

    @cached_property
    def oscillates(self) -> bool:
        """Whether the loss oscillates in a run with skill below 0.7."""
        late = self.curve[len(self.curve) // 3 :]
        if self.record.failure is not None or len(self.curve) < 12 or self.final_skill >= 0.7:
            return False
        rises = mean_rise(late) >= e.SWING and upward_share(late) >= e.BACK
        return rises and not self.has_constant_output

    # learning

    @cached_property
    def trivial(self) -> float | None:
        """Loss of the best constant prediction."""
        return number(self.static.get("trivial"))

    @property
    def start(self) -> Point | None:
        """The scores before the first step."""
        return self.record.points[0] if self.record.points else None

    @property
    def end(self) -> Point | None:
        """The scores after the last step."""
        return self.record.points[-1] if self.record.points else None

    @property
    def trained(self) -> bool:
        """Whether there was a dry run."""
        return self.record.steps > 0

    @cached_property
    def may_be_harmed(self) -> bool:
        """Whether a fault may have done harm: nothing was trained, or skill is below `LEARNED`."""
        return not self.trained or self.final_skill < e.LEARNED

    def severity(self, otherwise: str) -> str:
        """Return "critical" if a fault may have done harm, else the given one."""
        return "critical" if self.may_be_harmed else otherwise

    @cached_property
    def mode_losses(self) -> tuple[float, float] | None:
        """Losses in training and evaluation mode, if the second is much higher."""
        if self.end is None or not self.trained or self.record.failure is not None:
            return None
        train, evaluated = number(self.end.loss), number(self.end.eval_loss)
        few = self.record.steps < e.MOVED_STATISTICS
        if train is None or evaluated is None or not self.trivial or few:
            return None
        excess = (evaluated - train) / self.trivial
        return (train, evaluated) if excess > e.EXCESS and evaluated > 3 * train else None

    @cached_property
    def final_skill(self) -> float:
        """Skill at the end: 0 = constant prediction, 1 = shallow model on the same rows."""
        if self.record.failure is not None or self.end is None:
            return 0.0
        return self._skill(self.end.metric, self.end.eval_loss)

    @cached_property
    def validation_skill(self) -> float:
        """Skill on validation data if there are any, else `final_skill`."""
        if self.end is None or self.end.valid_loss is None:
            return self.final_skill
        if self.record.failure is not None:
            return 0.0
        return self._skill(self.end.valid_metric, self.end.valid_loss)

    @cached_property
    def late_skill(self) -> float:
        """Median skill over the last third: single values of an oscillating loss are luck."""
        if self.record.failure is not None:
            return 0.0
        loss, metric = late_scores(self.record.points)
        return self._skill(metric, loss)

    @property
    def momentum(self) -> float:
        """Momentum or beta1 of the optimizer; 0 for plain SGD."""
        engine = self.record.optimizer
        betas = engine.get("betas") or (0.0,)
        return number(engine.get("momentum")) or number(betas[0]) or 0.0

    def control(self, name: str) -> float | None:
        """Return the skill of a control run (`tikhon.diagnosis.controls`); None if not run."""
        loss = number(self.record.reference.get(f"{name}_loss"))
        metric = number(self.record.reference.get(f"{name}_metric"))
        return None if loss is None else self._skill(metric, loss)

    @cached_property
    def baseline_skills(self) -> tuple[float, float, float] | None:
        """Accuracy or R2: at the end, of the best constant, and held-out of a shallow model."""
        if self.own_loss_gain is not None or self.end is None or self.wiring.get("embeds"):
            return None
        known = self.record.reference
        reached = number(self.end.metric)
        constant, shallow = number(known.get("constant")), number(known.get("shallow"))
        if reached is None or constant is None or shallow is None:
            return None
        return reached, constant, shallow

    @cached_property
    def shallow_gain(self) -> float | None:
        """Gain of a shallow model over a constant on held-out rows; None if there is none.

        A small gain counts if the relation is significant: noisy data are no fault. Outputs that
        the loss compares with each other, and not with targets, have no such reference.
        """
        if self.wiring.get("embeds"):
            return None
        if self.own_loss_gain is not None:
            gain, constant = self.own_loss_gain
            return gain / abs(constant) if gain > e.OWN_GAIN * abs(constant) > 0 else None
        shallow = number(self.record.reference.get("shallow"))
        constant = number(self.record.reference.get("constant"))
        if shallow is None or constant is None:
            return None
        related = (self.fact("relation") or 0.0) >= e.RELATED
        gain = shallow - constant
        return gain if gain > 0.1 or (related and gain > e.WEAK) else None

    @cached_property
    def own_loss_gain(self) -> tuple[float, float] | None:
        """(gain of a shallow model over a constant, the constant's loss), where R2 does not apply.

        Both by the user's loss, whose best constant need not be the mean, as with quantiles.
        """
        known = self.static.get("own_loss") or {}
        constant, shallow = (number(known.get(f"{k}_loss")) for k in ("constant", "shallow"))
        return None if constant is None or shallow is None else (constant - shallow, constant)

    @cached_property
    def penalty_share(self) -> float:
        """The largest share of a gradient, in a layer and at a probe, that is a penalty's."""
        readings = (r for probe in self.record.probes for r in probe.readings)
        return max((r.penalty for r in readings if r.penalty is not None), default=0.0)

    @cached_property
    def lacks_yardstick(self) -> bool:
        """Whether skill is the fall of the loss alone: no metric and no constant's loss."""
        return self.trivial is None and (self.end is None or number(self.end.metric) is None)

    def skill_gain(self, name: str) -> float:
        """Return the gain in skill of a control run over the end of the run; 0 if not run.

        And over its last third: a single evaluation may be unlucky.
        """
        known = self.control(name)
        return 0.0 if known is None else known - max(self.final_skill, self.late_skill, 0.0)

    def loss_gain(self, name: str) -> float:
        """Return the share of the trivial loss that a control run ends lower; 0 if not run."""
        known = number(self.record.reference.get(f"{name}_loss"))
        if known is None or self.end is None:
            return 0.0
        return self._loss_skill(known) - max(self._loss_skill(self.end.eval_loss), 0.0)

    @cached_property
    def loss_at_chance(self) -> bool:
        """Whether a finished run ends near the trivial loss, whatever its accuracy."""
        if not self.trained or self.end is None or not self.trivial:
            return False
        if (self.shallow_gain or 0.0) < e.ATTAINABLE:
            return False  # noisy targets: a low loss would be memorised
        return self._loss_skill(self.end.eval_loss) < e.AT_CHANCE

    def skill_evidence(self, name: str) -> dict[str, float]:
        """Return the skills of the run and of a control run, as evidence."""
        return {"learned": max(self.final_skill, 0.0), name: self.control(name) or 0.0}

    def _skill(self, metric: float | None, loss: float | None) -> float:
        if "own_loss" in self.static:
            known, trivial = number(loss), self.trivial
            if self.shallow_gain is None or self.own_loss_gain is None:
                return self._loss_skill(loss)
            if known is None or trivial is None:
                return self._loss_skill(loss)
            return (trivial - known) / self.own_loss_gain[0]
        constant = number(self.record.reference.get("constant"))
        metric, by_loss = number(metric), self._loss_skill(loss)
        if self.shallow_gain is None or constant is None or metric is None:
            return by_loss
        skill = (metric - constant) / self.shallow_gain
        if by_loss >= e.LEARNED:  # the metric may not apply, as for one action of several
            return max(skill, by_loss)
        # outputs not in the units of the targets: log rates, margins, embeddings
        return by_loss if by_loss - skill > 0.5 else skill

    def _loss_skill(self, loss: float | None) -> float:
        loss = number(loss)
        if loss is None:
            return 0.0
        trivial, lowest = self.trivial, number(self.static.get("lowest"))
        if trivial is not None and trivial > 0:
            # with soft targets the lowest loss is above 0
            floor = lowest if lowest is not None and 0 < lowest < 0.99 * trivial else 0.0
            return (trivial - loss) / (trivial - floor)
        first = number(self.start.loss) if self.start else None
        return 1 - loss / first if first is not None and first > 0 else 0.0

    @cached_property
    def curve(self) -> list[float]:
        """Finite probe losses in training mode."""
        return [p.loss for p in self.record.points if number(p.loss) is not None]  # type: ignore[misc]

    @cached_property
    def falls_smoothly(self) -> bool:
        """Whether the loss still falls smoothly at the end."""
        tail = self.curve[len(self.curve) // 3 :]
        if len(tail) < 6:
            return False
        total = max(self.curve) - min(self.curve)
        recent = tail[-len(tail) // 3] - tail[-1]
        return total > 0 and recent > 0.05 * total and upward_share(tail) < 0.2

    @property
    def ignores_code(self) -> bool:
        """Whether the reconstructions of a sampling network do not depend on the row."""
        left = self.fact("given_back")
        return (
            left is not None
            and left < e.GIVEN_BACK
            and self.record.steps >= e.LONG
            and not self.falls_smoothly
        )

    @cached_property
    def learned_nothing(self) -> bool:
        """Whether nothing was learned and the loss has not fallen."""
        if not self.trained or self.final_skill >= e.STILL or len(self.curve) < 6:
            return False
        first, late = self.curve[0], median(self.curve[-len(self.curve) // 3 :])
        return late >= first - e.STILL * abs(first)

    @property
    def far_behind(self) -> bool:
        """Whether skill is below half of that of a shallow model."""
        return self.trained and self.shallow_gain is not None and self.final_skill < e.FAR_BEHIND

    @cached_property
    def falls_fast(self) -> bool:
        """Whether the loss still falls fast at the end, smoothly or not."""
        tail = self.curve[len(self.curve) // 3 :]
        if len(tail) < 12:
            return False
        third = len(tail) // 3
        recent = median(tail[third:-third]) - median(tail[-third:])
        return recent > e.LIVELY * (max(self.curve) - min(self.curve))


def late_scores(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """Return the medians of loss and metric over the last third of the points."""
    tail = points[-max(1, len(points) // 3) :]
    return middle(p.eval_loss for p in tail), middle(p.metric for p in tail)


def sizes(shape: Iterable[int], rows: int) -> str:
    """Format a shape with n for the number of rows."""
    inner = ["n" if s == rows else str(s) for s in shape]
    return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"


def number(value: object) -> float | None:
    """Return a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def middle(values: Iterable[float | None]) -> float | None:
    """Return the median without None and NaN."""
    present = [v for v in values if v is not None and not math.isnan(v)]
    return median(present) if present else None


def upward_share(values: list[float]) -> float:
    """Return the upward share of a curve's movement: 0 = always falling, 0.5 = no trend."""
    moves = [b - a for a, b in pairwise(values)]
    total = sum(abs(m) for m in moves)
    return sum(m for m in moves if m > 0) / total if total > 0 else 0.0


def mean_rise(values: list[float]) -> float:
    """Return the mean rise between successive points, relative to the median."""
    moves = [max(0.0, b - a) for a, b in pairwise(values)]
    level = abs(median(values)) if values else 0.0
    return sum(moves) / len(moves) / level if moves and level > 0 else 0.0
