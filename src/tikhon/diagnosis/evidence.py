"""Quantities derived from a record: ratios and shares without units, so thresholds travel.

Standard library only. The thresholds are in `thresholds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from statistics import median

from tikhon.diagnosis.record import Point, Probe, Record, Site
from tikhon.diagnosis.thresholds import (
    BACK,
    DEAD,
    EXCESS,
    FAR_BEHIND,
    GIVEN_BACK,
    LEARNED,
    LIVELY,
    LONG,
    MOVED_STATISTICS,
    NARROW,
    OWN_GAIN,
    RELATED,
    SATURATED,
    STILL,
    SWING,
    WEAK,
)


class Evidence:
    """A record read with the questions of a physician: what reaches whom, and does it learn?"""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.static = record.static
        self.wiring = record.wiring

    def fact(self, name: str) -> float | None:
        """A number that the wiring tests measured; a test that could not run leaves None."""
        return number(self.wiring.get(name))

    # layers

    @cached_property
    def chain(self) -> list[int]:
        """Positions of the layers with weights, in the order of the forward pass."""
        roles = ("weight", "recurrent")
        return [i for i, s in enumerate(self.record.sites) if s.role in roles]

    @cached_property
    def norms_at_end(self) -> list[str]:
        """Normalisations behind the last layer with weights."""
        last = max(self.chain, default=len(self.record.sites))
        return [s.name for s in self.record.sites[last + 1 :] if s.role == "norm"]

    def site(self, position: int) -> Site:
        """The site at a position."""
        return self.record.sites[position]

    def activation_after(self, position: int) -> int | None:
        """The activation behind a layer, before the next layer with weights."""
        sites = self.record.sites
        for i in range(position + 1, len(sites)):
            if sites[i].role in ("weight", "recurrent"):
                return None
            if sites[i].role == "activation":
                return i
        return None

    def layer_before(self, position: int) -> int | None:
        """The layer with weights that feeds an activation."""
        return max((i for i in self.chain if i < position), default=None)

    # the backward signal

    def ratio(self, probe: Probe) -> float | None:
        """Signal at the first over the last layer; 0 where the first has none, None at 0/0.

        The first may be one of several branches, as a query of an attention: a normalisation in
        front of it knows what arrives along the others.

        A mean over pixels or steps makes each of their shares small, and no signal is lost by it:
        what falls is measured of all places together.
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
        """The probes from the first step to a fifth of the run."""
        probes = self.record.probes
        last = max(5, 0.2 * self.record.steps)
        return [p for p in probes if 0 < p.step <= last] or list(probes[:1])

    @cached_property
    def first_ratio(self) -> float | None:
        """The signal ratio before the first step."""
        return self.ratio(self.record.probes[0]) if self.record.probes else None

    @cached_property
    def early_ratio(self) -> float | None:
        """The median signal ratio early in the run; at step 0 alone without a dry run."""
        return middle(self.ratio(p) for p in self.early)

    @cached_property
    def silent(self) -> bool:
        """Whether no gradient at all arrives anywhere, from the start."""
        probes = [p for p in self.record.probes[:4]]
        return bool(probes) and all(p.gradient == 0 for p in probes) and self.record.trainable > 0

    def time_ratios(self) -> list[tuple[int, float, float]]:
        """(position, log10 over time at step 0, early median) of the recurrent layers."""
        found = []
        for i in self.chain:
            first = self.record.probes[0].readings[i].time_ratio if self.record.probes else None
            later = middle(p.readings[i].time_ratio for p in self.early)
            if first is not None:
                found.append((i, first, later if later is not None else first))
        return found

    # activations

    def late(self, name: str, position: int) -> float:
        """The median of a reading over the last three probes."""
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
    def updates(self) -> float | None:
        """The median update / weight ratio over layers and probes."""
        return middle(
            p.readings[i].update
            for p in self.record.probes
            for i in self.chain
            if self.site(i).trainable
        )

    @cached_property
    def blind(self) -> bool:
        """Whether at the end the network answers every sample alike."""
        return self._alike(self.last)

    @cached_property
    def born_blind(self) -> bool:
        """Whether it did so before the first step."""
        return self._alike(self.first)

    def _alike(self, probe: Probe | None) -> bool:
        if probe is None or not self.chain:
            return False
        spread = probe.readings[self.chain[-1]].diversity
        return spread is not None and spread < NARROW

    @cached_property
    def dying(self) -> list[int]:
        """Positions of rectifiers most of whose units are off for all rows, at the end."""
        fails, last = (
            self.record.failure is not None,
            self.last if self.record.failure is None else self.first,
        )
        return [
            i
            for i, reading in enumerate(last.readings if last is not None else ())
            if reading.dead is not None
            and reading.dead >= DEAD
            and (fails or self.late("dead", i) >= DEAD)
        ]

    @cached_property
    def born_dead(self) -> bool:
        """Whether they were so before the first step."""
        first = self.first
        return first is not None and any((first.readings[i].dead or 0) >= DEAD for i in self.dying)

    @cached_property
    def saturating(self) -> list[int]:
        """Positions of bounded activations that came to their flat ends in the run."""
        first = self.first
        return [
            i
            for i, reading in enumerate(first.readings if first is not None else ())
            if reading.saturated is not None
            and reading.saturated < SATURATED <= self.late("saturated", i)
        ]

    @cached_property
    def swings(self) -> bool:
        """Whether the loss of a run that has not learned much keeps jumping up."""
        late = self.curve[len(self.curve) // 3 :]
        if self.record.failure is not None or len(self.curve) < 12 or self.learned >= 0.7:
            return False
        return upward(late) >= SWING and back_share(late) >= BACK and not self.blind

    # learning

    @cached_property
    def trivial(self) -> float | None:
        """The loss of the best constant."""
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
    def harmed(self) -> bool:
        """Whether a fault may have harmed: nothing was trained, or less learned than could be."""
        return not self.trained or self.learned < LEARNED

    @cached_property
    def modes_apart(self) -> tuple[float, float] | None:
        """The losses in training and in evaluation mode, where the second is much higher."""
        if self.end is None or not self.trained or self.record.failure is not None:
            return None
        train, evaluated = number(self.end.loss), number(self.end.eval_loss)
        few = self.record.steps < MOVED_STATISTICS
        if train is None or evaluated is None or not self.trivial or few:
            return None
        excess = (evaluated - train) / self.trivial
        return (train, evaluated) if excess > EXCESS and evaluated > 3 * train else None

    @cached_property
    def learned(self) -> float:
        """What was learned: 0 a constant, 1 what a shallow model reaches on the same rows."""
        if self.record.failure is not None or self.end is None:
            return 0.0
        return self._skill(self.end.metric, self.end.eval_loss)

    @cached_property
    def generalised(self) -> float:
        """The same on validation data, where there are any."""
        if self.end is None or self.end.valid_loss is None:
            return self.learned
        if self.record.failure is not None:
            return 0.0
        return self._skill(self.end.valid_metric, self.end.valid_loss)

    @cached_property
    def off_scale(self) -> bool:
        """Whether inputs have another size than 1 or lie far from 0, and no norm comes first."""
        inputs = self.record.data.get("inputs") or {}
        spread, mean = number(inputs.get("std")), number(inputs.get("mean"))
        if not spread or mean is None or self.record.data.get("normalised_inside"):
            return False
        return not 0.1 <= spread <= 10 or abs(mean) > 3 * spread

    @cached_property
    def usually(self) -> float:
        """What was learned over the last third of the run: a loss that jumps has lucky moments."""
        if self.record.failure is not None:
            return 0.0
        loss, metric = lately(self.record.points)
        return self._skill(metric, loss)

    @property
    def momentum(self) -> float:
        """The share of the last step that the next one repeats; 0 for plain steps."""
        engine = self.record.optimizer
        betas = engine.get("betas") or (0.0,)
        return number(engine.get("momentum")) or number(betas[0]) or 0.0

    def control(self, name: str) -> float | None:
        """What a control run of `tikhon.diagnosis.controls` learned; None where it was not run."""
        loss = number(self.record.reference.get(f"{name}_loss"))
        metric = number(self.record.reference.get(f"{name}_metric"))
        return None if loss is None else self._skill(metric, loss)

    @cached_property
    def yardstick(self) -> tuple[float, float, float] | None:
        """Accuracy or R2 at the end, of the best constant, and of a shallow model held out."""
        if self.own_loss is not None or self.end is None:
            return None
        known = self.record.reference
        reached = number(self.end.metric)
        constant, shallow = number(known.get("constant")), number(known.get("shallow"))
        if reached is None or constant is None or shallow is None:
            return None
        return reached, constant, shallow

    @cached_property
    def reach(self) -> float | None:
        """How much better than a constant a shallow model is on held-out rows; None if it is not.

        A low ceiling counts where the relation itself is beyond chance: noisy data are no fault.
        """
        if self.own_loss is not None:
            gain, constant = self.own_loss
            return gain / abs(constant) if gain > OWN_GAIN * abs(constant) > 0 else None
        shallow = number(self.record.reference.get("shallow"))
        constant = number(self.record.reference.get("constant"))
        if shallow is None or constant is None:
            return None
        related = (self.fact("relation") or 0.0) >= RELATED
        gain = shallow - constant
        return gain if gain > 0.1 or (related and gain > WEAK) else None

    @cached_property
    def own_loss(self) -> tuple[float, float] | None:
        """What a shallow model gains on a constant, and the constant's loss, where R2 is no judge.

        Both are the user's own loss: a quantile is far from the mean, and right.
        """
        known = self.static.get("own_loss") or {}
        constant, shallow = (number(known.get(f"{k}_loss")) for k in ("constant", "shallow"))
        return None if constant is None or shallow is None else (constant - shallow, constant)

    def gained(self, name: str) -> float:
        """How much more that control run learned; 0 where it was not run."""
        known = self.control(name)
        return 0.0 if known is None else known - max(self.learned, 0.0)

    def shown(self, name: str) -> dict[str, float]:
        """What the run and a control run learned, as evidence."""
        return {"learned": max(self.learned, 0.0), name: self.control(name) or 0.0}

    def _skill(self, metric: float | None, loss: float | None) -> float:
        if "own_loss" in self.static:
            known, trivial = number(loss), self.trivial
            if self.reach is None or self.own_loss is None or known is None or trivial is None:
                return self._loss_skill(loss)
            return (trivial - known) / self.own_loss[0]
        constant = number(self.record.reference.get("constant"))
        metric, by_loss = number(metric), self._loss_skill(loss)
        if self.reach is None or constant is None or metric is None:
            return by_loss
        skill = (metric - constant) / self.reach
        if by_loss >= LEARNED:  # outputs that the metric cannot read, as one action of several
            return max(skill, by_loss)
        # outputs that are no answers in the targets' own units: log rates, margins, embeddings
        return by_loss if by_loss - skill > 0.5 else skill

    def _loss_skill(self, loss: float | None) -> float:
        loss = number(loss)
        if loss is None:
            return 0.0
        trivial, lowest = self.trivial, number(self.static.get("lowest"))
        if trivial is not None and trivial > 0:
            # soft targets leave a loss that no answer is without
            floor = lowest if lowest is not None and 0 < lowest < 0.99 * trivial else 0.0
            return (trivial - loss) / (trivial - floor)
        first = number(self.start.loss) if self.start else None
        return 1 - loss / first if first is not None and first > 0 else 0.0

    @cached_property
    def curve(self) -> list[float]:
        """Probe losses in training mode, finite ones."""
        return [p.loss for p in self.record.points if number(p.loss) is not None]  # type: ignore[misc]

    @cached_property
    def falling(self) -> bool:
        """Whether the loss still falls at the end, and falls smoothly."""
        tail = self.curve[len(self.curve) // 3 :]
        if len(tail) < 6:
            return False
        total = max(self.curve) - min(self.curve)
        recent = tail[-len(tail) // 3] - tail[-1]
        return total > 0 and recent > 0.05 * total and back_share(tail) < 0.2

    @property
    def given_nothing(self) -> bool:
        """Whether what a network that draws gives back is not about its row, after some steps."""
        left = self.fact("given_back")
        return (
            left is not None
            and left < GIVEN_BACK
            and self.record.steps >= LONG
            and not self.falling
        )

    @cached_property
    def still(self) -> bool:
        """Whether a run has learned nothing, and its loss has not fallen either."""
        if not self.trained or self.learned >= STILL or len(self.curve) < 6:
            return False
        first, late = self.curve[0], median(self.curve[-len(self.curve) // 3 :])
        return late >= first - STILL * abs(first)

    @property
    def far_behind(self) -> bool:
        """Whether a shallow model is known to do better, and the run learned less than half."""
        return self.trained and self.reach is not None and self.learned < FAR_BEHIND

    @cached_property
    def learning(self) -> bool:
        """Whether the loss still falls fast at the end, smoothly or not."""
        tail = self.curve[len(self.curve) // 3 :]
        if len(tail) < 12:
            return False
        third = len(tail) // 3
        recent = median(tail[third:-third]) - median(tail[-third:])
        return recent > LIVELY * (max(self.curve) - min(self.curve))


def lately(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """The medians of loss and metric over the last third of the looks."""
    tail = points[-max(1, len(points) // 3) :]
    return middle(p.eval_loss for p in tail), middle(p.metric for p in tail)


def sizes(shape: Iterable[int], rows: int) -> str:
    """A shape with n in the place of the rows."""
    inner = ["n" if s == rows else str(s) for s in shape]
    return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"


def number(value: object) -> float | None:
    """A finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is there."""
    present = [v for v in values if v is not None and not math.isnan(v)]
    return median(present) if present else None


def back_share(values: list[float]) -> float:
    """Share of a curve's motion that goes up: 0 falls all the way, 0.5 goes nowhere."""
    moves = [b - a for a, b in pairwise(values)]
    total = sum(abs(m) for m in moves)
    return sum(m for m in moves if m > 0) / total if total > 0 else 0.0


def upward(values: list[float]) -> float:
    """Mean upward move from one point of a curve to the next, relative to the curve's level."""
    moves = [max(0.0, b - a) for a, b in pairwise(values)]
    level = abs(median(values)) if values else 0.0
    return sum(moves) / len(moves) / level if moves and level > 0 else 0.0
