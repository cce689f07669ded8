"""Paired trials of treatments against the untreated program, by successive halving."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, pstdev
from typing import Any

import torch
from torch import nn

from tikhon.budget import Deadline, OutOfTimeError
from tikhon.cures.judging import AS_USED, FEW, Used
from tikhon.cures.treatment import Treatment
from tikhon.cures.treatments import (
    ADAMS,
    FOR,
    MEANT,
    NOTHING,
    SYMPTOMS,
    YIELDING,
    candidates,
    named,
)
from tikhon.cures.yardstick import Yardstick, answers_targets, yardstick
from tikhon.data.rows import Batch, LossFunction, length, take
from tikhon.diagnosis.diagnose import Diagnosis, rebuilder
from tikhon.diagnosis.dry_run import DryRun, advance, score
from tikhon.diagnosis.record import Point
from tikhon.diagnosis.replica import Replica, isolated, replicate
from tikhon.diagnosis.samples import Samples
from tikhon.errors import InputError
from tikhon.wrappers import unwrap

RUNGS = (20, 75, 300)
LONGER = 3  # times the steps of the last rung, while nothing is confirmed and time is left
BESIDE = "leaves the fault"  # a verdict
SLIP = 0.005  # of accuracy or R2 that a treatment may lose (convention)
RELEVANT = 0.02  # of the untreated score: less is no cure, however significant (convention)
STUCK = 0.5  # of the score of a program that is no better than a constant: not yet worse
WIDTHS = (10, 4)  # maximum number of treatments promoted from the first and second rung


@dataclass(frozen=True)
class TreatmentResult:
    """One treatment's scores (lower is better), paired with those of the untreated program."""

    name: str
    size: int
    steps: int  # of the last rung reached
    scores: tuple[float, ...]  # one per seed
    effects: tuple[float, ...]  # untreated minus treated score, one per seed
    verdict: str  # "confirmed" | BESIDE | "not confirmed" | "worse" | "stopped early"
    metric: float | None = None

    @property
    def effect(self) -> float:
        """Mean effect over the seeds."""
        return mean(self.effects)

    @property
    def spread(self) -> float:
        """Standard deviation of the effect over the seeds."""
        return pstdev(self.effects)


def judge_by_what_is_meant(trials: Trials, diagnosis: Diagnosis) -> None:
    """Score the trials by a corrected loss or use, where loss or batch is the fault.

    The corrected loss is used if it works with the program, as a loss may broadcast internally.
    Models that mix rows are evaluated row by row.
    """
    static = diagnosis.record.static
    for code in trials.faults:
        meant = MEANT.get(code, ())
        if code == "loss_upside_down" and static.get("maximize"):
            meant = ()  # then the optimizer is the fault
        if code == "head_mismatch" and not static.get("unbounded_shares"):
            meant = ()  # then the user's loss says how good an answer is
        if code == "missing_log" and static.get("probabilities"):
            meant = (*meant[:1], *meant[:0:-1])
        for treatment in meant:
            mended = trials.mended(treatment)
            if mended is not None and trials.works(*mended):
                trials.loss_meant, trials.used = mended
                break
        used, whole = AS_USED.get(code), trials.source
        if used:
            few = torch.arange(min(FEW, length(whole.probe)))
            trials.source = replace(whole, probe=take(whole.probe, few))
            if trials.works(trials.loss, used):
                trials.used = used
            else:
                trials.source = whole


def shell(model: object) -> nn.Module:
    """Something to read devices from."""
    return unwrap(model) if isinstance(model, nn.Module) else nn.Module()


@dataclass
class Trials:
    """The program under treatment, and the search over treatments."""

    model: Any
    loss: LossFunction
    optimizer: Any
    penalty: Any
    clip: float | None
    source: Samples
    judge: Batch | None
    batch_size: int
    seeds: list[int]
    codes: Collection[str]
    deadline: Deadline = field(default_factory=Deadline)
    faults: Sequence[str] = ()  # the codes that follow from no other, the first in front
    scores: dict[tuple[str, int, int], tuple[float, float | None]] = field(default_factory=dict)
    loss_meant: LossFunction | None = None  # scores are its losses, where the user's is the fault
    used: Used | None = None  # what a trained model is judged in
    on_progress: Callable[[str], None] = lambda text: None
    base: Treatment = NOTHING  # what the program has been treated with so far
    patches: dict[str, str] = field(default_factory=dict)
    pace: float = 0.0  # seconds per step of the slowest treatment seen
    reached: dict[str, int] = field(default_factory=dict)  # by the search, steps of a name
    finalists: list[Treatment] = field(default_factory=list)  # of its last rung
    rung: int = 0
    yardstick: Yardstick = field(default_factory=Yardstick)

    def joined(self, treatment: Treatment) -> Treatment:
        """The treatment behind those that the program has been treated with."""
        return self.base & treatment

    def build(self, treatment: Treatment, seed: int) -> Replica:
        """The treated program with the weights of a seed."""
        return self.untried(treatment, seed).attach()

    def untried(self, treatment: Treatment, seed: int) -> Replica:
        """The same, before its penalty terms are on the optimizer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model if isinstance(self.model, nn.Module) else self.model()
            fixed = isinstance(self.model, nn.Module)
            engine = self.optimizer if fixed else rebuilder(self.optimizer)
            replica = replicate(model, self.loss, engine, penalty=self.penalty, clip=self.clip)
            torch.manual_seed(seed + 1)
            self._treat(treatment, replica)
        return replica

    def works(self, loss: LossFunction, used: Used | None = None) -> bool:
        """Whether another loss gives a number for the untreated program on the probe batch."""
        with isolated(shell(self.model), self.seeds[0]), torch.no_grad():
            try:
                own = self.build(NOTHING, self.seeds[0]).model
                own = used(own) if used is not None else own
                found = score(Replica(own, loss), self.source.probe, None, 0).eval_loss
                return math.isfinite(found or 0.0)
            except InputError:
                return False

    def mended(self, treatment: Treatment) -> tuple[LossFunction, Used | None] | None:
        """The loss of the treated program, and the treated model where that computes its loss.

        None where the treatment does not apply.
        """
        with isolated(shell(self.model), self.seeds[0]):
            try:
                plain, treated = (self.build(t, self.seeds[0]) for t in (NOTHING, treatment))
            except (DoesNotApplyError, InputError):
                return None
        before, after = type(plain.model), type(treated.model)
        if not plain.whole or not issubclass(after, before) or after is before:
            return treated.loss, None

        def used(model: nn.Module) -> nn.Module:
            twin = copy.copy(model)
            twin.__class__ = after if type(model) is before else type(model)
            return twin

        return treated.loss, used

    def _treat(self, treatment: Treatment, replica: Replica) -> None:
        """Apply it; the user's own program under another name is not a treatment."""
        sized = not self.source.indexed or treatment.batch == self.batch_size
        same = treatment.kind == "batch" and sized  # a loader brings its own batches
        changes_only_settings = "register" not in treatment.setup and treatment.edit is None
        if treatment.kind in ("adam", "decay") and changes_only_settings:
            same = treatment.is_optimizer_of(replica)
        if same or not self.joined(treatment).apply(replica, self.source, self.judge):
            raise DoesNotApplyError

    def run(self, treatment: Treatment, seed: int, steps: int) -> float:
        """The score after some steps; infinite where the run blew up."""
        key = (treatment.name, seed, steps)
        if key in self.scores:
            return self.scores[key][0]
        with isolated(shell(self.model), seed):
            began = self.deadline.spent
            with interrupted(self.deadline):
                replica = self.build(treatment, seed)
            self.patches.setdefault(self.joined(treatment).name, replica.patch)
            size = treatment.batch or self.batch_size
            end = train(
                replica,
                self.source,
                self.judge,
                steps,
                size,
                seed,
                loss=self.loss_meant or self.loss,
                used=self.used,
                deadline=self.deadline,
            )
            self.pace = max(self.pace, (self.deadline.spent - began) / (steps + 5))
        self.scores[key] = (self._score(end), end.valid_metric or end.metric)
        return self.scores[key][0]

    def _score(self, end: Point) -> float:
        losses = (
            [end.valid_loss]
            if self._memorises and end.valid_loss is not None
            else [end.eval_loss, *([end.valid_loss] if self.judge is not None else [])]
        )
        if any(v is None or not math.isfinite(v) for v in losses):
            return math.inf
        return mean(v for v in losses if v is not None)

    @property
    def _memorises(self) -> bool:
        return "overfitting" in self.codes and self.judge is not None

    def search(self, steps: int) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        """Successive halving; all treatments, and the treatment to keep.

        What the findings name first is carried to the last rung however it starts: a cure of a
        cause may well be slow in the first twenty steps. What a sure cause asks for goes first,
        and ends the search where it is confirmed: nothing else treats that cause.
        """
        rungs = ([r for r in RUNGS if r < steps] + [steps])[-3:]
        with interrupted(self.deadline):  # what all results are measured by comes first
            self.yardstick = self.measured()
            treatments = self._planned()
        kept, sure = named(self._first), named(c for c in self._first if c not in SYMPTOMS)
        reached: dict[str, int] = {}
        done: tuple[list[Treatment], int] = ([], rungs[0])
        at_once = self._at_once(treatments, steps)
        own = {a.name: steps for a in at_once}
        found, chosen = self._verdicts(own, at_once, steps)
        if chosen is not None:
            return found, chosen
        for place, rung in enumerate(rungs):
            last = place == len(rungs) - 1
            seeds = self.seeds if place or last else self.seeds[:1]
            if last:
                treatments = treatments[: self._affordable(rung, len(treatments))]
            ran = self._rung(treatments, rung, seeds, last)
            if ran is None:
                break
            done = (ran, rung)
            reached |= {a.name: rung for a in ran}
            if not last:
                treatments = self._best(ran, rung, seeds, WIDTHS[-len(rungs) + 1 :][place])
                treatments += [a for a in ran if a.name in kept and a not in treatments]
                treatments.sort(key=lambda a: a.name not in sure)  # these are not cut off
        if at_once:
            reached |= own
            later = [a for a in done[0] if a not in at_once] if done[1] == steps else []
            done = ([*at_once, *later], steps)
        self.reached, self.finalists, self.rung = reached, *done
        return self._verdicts(reached, *done)

    def of_some_help(self, results: Sequence[TreatmentResult]) -> Treatment | None:
        """What treats the first fault and helps with every seed, but is no cure by itself."""
        first = next(iter(self.faults), "")
        own = {self.joined(t).name: t for t in FOR.get(first, ()) if first not in YIELDING}
        found = [a for a in results if a.name in own and a.verdict == "not confirmed"]
        found = [a for a in found if min(a.effects) > 0 and a.effect > a.spread]
        return own[min(found, key=lambda a: mean(a.scores)).name] if found else None

    def search_named(self, steps: int) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        """The same of what the faults name alone, all of which runs to the end."""
        asked = [t for t in self._candidates if t.name in named(self.faults)]
        ran = self._rung(asked, steps, self.seeds, True) or []
        return self._verdicts({t.name: steps for t in ran}, ran, steps)

    def _at_once(self, treatments: list[Treatment], steps: int) -> list[Treatment]:
        """What the first cause asks for, run to the end before anything else takes its time.

        A symptom, or a fault that many a treatment may cure, names no treatment before the rest;
        and half of the budget has to pay for one.
        """
        first = next(iter(self.faults), "")
        own = named([first]) if first not in YIELDING else set()
        asked = [a for a in treatments if a.name in own]
        if not asked or self._rung([NOTHING], RUNGS[0], self.seeds[:1], True) is None:
            return []
        if 2 * self.pace * steps * len(self.seeds) > self.deadline.left / 2:
            return []
        return self._rung(asked, steps, self.seeds, False) or []

    def _planned(self) -> list[Treatment]:
        """Treatments to try: those of the findings first, for a short budget reaches no more."""
        with isolated(shell(self.model), self.seeds[0]):
            own = self.build(NOTHING, self.seeds[0])
        same = tuple(f"+ {t.name}" for t in ADAMS if t.is_optimizer_of(own))
        treatments = [t for t in self._candidates if not t.name.endswith(same)]
        first = named(self._first)
        return sorted(treatments, key=lambda treatment: treatment.name not in first)

    @property
    def _candidates(self) -> list[Treatment]:
        """The treatments for the faults in their order, then for what follows from them."""
        return candidates([*self.faults, *sorted(set(self.codes) - set(self.faults))])

    @property
    def _first(self) -> Collection[str]:
        """The codes whose treatments go first: of faults where they are known."""
        return self.faults or self.codes

    def longer(self) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        """While nothing is confirmed, more steps for the best and what was named."""
        reached, finalists, rung = self.reached, self.finalists, self.rung
        treatments, chosen = self._verdicts(reached, finalists, rung)
        kept = named(self._first)
        while chosen is None and finalists and math.isfinite(self.deadline.seconds):
            rung *= LONGER
            count = self._affordable(rung, len(finalists))
            if self.pace * rung * len(self.seeds) * 2 > self.deadline.left:
                break
            before = rung // LONGER
            ranked = sorted(finalists, key=lambda t: self._mean(t, before, self.seeds))
            first = ranked[0]
            ranked.sort(key=lambda t: t.name not in kept and t is not first)
            ran = self._rung(ranked[:count], rung, self.seeds, True)
            if ran is None:
                break
            finalists = ran
            reached |= {a.name: rung for a in ran}
            treatments, chosen = self._verdicts(reached, finalists, rung)
        return treatments, chosen

    def _affordable(self, rung: int, count: int) -> int:
        """How many treatments the rest of the budget pays for in a rung, one at least."""
        left = self.deadline.left
        each = max(self.pace, 1e-6) * rung * len(self.seeds)
        return max(1, min(count, int(min(left / each, count + 1)) - 1))

    def _rung(
        self, treatments: list[Treatment], rung: int, seeds: list[int], last: bool
    ) -> list[Treatment] | None:
        """Those that apply, run for a rung; a cut where its time is spent, None before any."""
        done: list[Treatment] = []
        own = self.deadline.part(1.0 if last else 0.35)
        try:
            self._each(NOTHING, rung, seeds)
            for treatment in treatments:
                if done and own.over:
                    break
                self.on_progress(f"{treatment.name}, {rung} steps")
                try:
                    self._each(treatment, rung, seeds)
                except DoesNotApplyError:
                    continue
                done.append(treatment)
        except OutOfTimeError:
            pass
        return done or None

    def _each(self, treatment: Treatment, rung: int, seeds: list[int]) -> None:
        for seed in seeds:
            try:
                self.run(treatment, seed, rung)
            except Exception as error:
                if treatment is NOTHING:
                    raise
                raise DoesNotApplyError from error  # not what the edit, or user code, is made for

    def measured(self) -> Yardstick:
        """What a constant and a plain reference reach with this program's data and loss."""
        with isolated(shell(self.model), self.seeds[0]):
            own = self.build(NOTHING, self.seeds[0])
            plain = Replica(own.model, self.loss_meant or self.loss)
            found = yardstick(plain, self.source.probe, self.judge, held_out=self._memorises)
            # accuracy says nothing where one class has most of the rows, nor R2 of angles
            blind = {"class_imbalance", "angle_wraps"} & set(self.faults)
            if blind or not answers_targets(plain, self.source.probe):
                found = Yardstick(found.loss, skilled=False)
            return found

    def _mean(self, treatment: Treatment, rung: int, seeds: list[int]) -> float:
        return mean(self.scores[treatment.name, s, rung][0] for s in seeds)

    def _best(
        self, treatments: list[Treatment], rung: int, seeds: list[int], count: int
    ) -> list[Treatment]:
        """The best treatments, the best of each kind first in line, so that slow starters stay in.

        Arms that are no better or worse yet than doing nothing stay in the order in which the
        findings ask for them: their scores are noise. Where the untreated program is at a constant
        answer, only what gets below is better: what learns may begin above it.
        """
        base = self._mean(NOTHING, rung, seeds)
        ceiling = (1 + STUCK) * abs(self.yardstick.loss)
        stuck = not self.yardstick.beaten(base, None) and base <= ceiling

        def rank(treatment: Treatment) -> tuple[float, int]:
            score = self._mean(treatment, rung, seeds)
            undecided = math.isfinite(base) and abs(score - base) <= RELEVANT * abs(base)
            if stuck and not self.yardstick.beaten(score, None):
                undecided = score <= ceiling
            return (base, 0) if undecided else (score, treatment.size)

        ranked = sorted(treatments, key=rank)
        firsts: dict[str, Treatment] = {}
        for treatment in ranked:
            firsts.setdefault(treatment.kind, treatment)
        varied = list(firsts.values())[: max(1, count // 2)]
        rest = [a for a in ranked if a not in varied]
        return sorted(varied + rest[: count - len(varied)], key=rank)

    def _verdicts(
        self, reached: dict[str, int], finalists: list[Treatment], rung: int
    ) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        if (NOTHING.name, self.seeds[0], rung) not in self.scores:
            return (), None
        treatments = [self._result_of(NOTHING.name, 0, rung, False)]
        sizes = {t.name: t.size for t in self._candidates}
        final = {t.name for t in finalists}
        for name, step in reached.items():
            treatments.append(
                self._result_of(name, sizes[name], step, name in final and step == rung)
            )
        treatments = self._of_the_cause(treatments)
        good = [a for a in treatments if a.verdict == "confirmed"]
        good.sort(key=lambda a: mean(a.scores))
        chosen = None
        if good:
            equal = [a for a in good if self._equal(a, good[0])]
            name = min(equal, key=lambda a: (a.size, mean(a.scores))).name
            chosen = next(t for t in finalists if t.name == name)
        order = {"confirmed": 0, BESIDE: 1, "not confirmed": 1, "worse": 2, "stopped early": 3}
        treatments[1:] = sorted(
            treatments[1:], key=lambda a: (order[a.verdict], -a.steps, mean(a.scores))
        )
        if self.base is not NOTHING:
            before = self.base.name
            names = [before, *(f"{before} + {a.name}" for a in treatments[1:])]
            treatments = [replace(a, name=name) for a, name in zip(treatments, names)]
        return tuple(treatments), chosen

    def _of_the_cause(self, treatments: list[TreatmentResult]) -> list[TreatmentResult]:
        """The same, but none is confirmed that leaves the faults where they are.

        Faster steps may well lower the loss of such a program. What treats the first fault goes
        before what treats another. A symptom is what any treatment may cure, and a fault that
        yields to others is left to them if nothing of its own does it.
        """
        good = [a for a in treatments if a.verdict == "confirmed"]
        first = next(iter(self.faults), "")
        if not first or first in SYMPTOMS:
            return treatments
        kept = {a.name for a in good} if first in YIELDING else set()
        for code in self.faults:
            names = {t.name for t in FOR.get(code, ())}
            own = {a.name for a in good if names & set(a.name.split(" + "))}
            if own:
                kept = own
                break
        beside = {a.name for a in good} - kept
        return [replace(a, verdict=BESIDE) if a.name in beside else a for a in treatments]

    def _equal(self, treatment: TreatmentResult, best: TreatmentResult) -> bool:
        """Whether two treated results are equal among the treated, not beside the untreated."""
        gaps = [a - b for a, b in zip(treatment.scores, best.scores)]
        constant = self.yardstick.loss
        fine = 0.01 * abs(constant) if math.isfinite(constant) else 0.0
        noise = min(gaps) <= 0 and mean(gaps) <= pstdev(gaps)
        return noise or mean(gaps) <= max(0.05 * abs(mean(best.scores)), fine)

    def _result_of(self, name: str, size: int, rung: int, final: bool) -> TreatmentResult:
        seeds = [s for s in self.seeds if (name, s, rung) in self.scores]
        scores = tuple(self.scores[name, s, rung][0] for s in seeds)
        effects = self.effects(scores, rung)
        metrics = [m for s in seeds if (m := self.scores[name, s, rung][1]) is not None]
        metric = mean(metrics) if metrics else None
        verdict = "stopped early"
        if final:
            sure = min(effects) > 0 and mean(effects) > pstdev(effects)
            ceiling = self._ceiling(rung, seeds)
            base = mean(min(self.scores[NOTHING.name, s, rung][0], ceiling) for s in seeds)
            sure = sure and mean(effects) > RELEVANT * abs(base) and len(effects) > 1
            sure = sure and self.yardstick.beaten(mean(scores), metric)
            sure = sure and not self._lowers_skill(rung, seeds, metric)
            verdict = "confirmed" if sure else "worse" if mean(effects) < 0 else "not confirmed"
        return TreatmentResult(name, size, rung, scores, effects, verdict, metric)

    def effects(self, scores: Sequence[float], rung: int) -> tuple[float, ...]:
        """How much lower scores of the first seeds are than those of doing nothing."""
        seeds = [s for s in self.seeds if (NOTHING.name, s, rung) in self.scores]
        ceiling = self._ceiling(rung, seeds)
        base = (min(self.scores[NOTHING.name, s, rung][0], ceiling) for s in seeds)
        return tuple(b - min(s, ceiling) for b, s in zip(base, scores))

    def _lowers_skill(self, rung: int, seeds: list[int], metric: float | None) -> bool:
        """Whether accuracy or R2 falls along with the loss: more confident, but wrong."""
        found = [self.scores[NOTHING.name, s, rung][1] for s in seeds]
        known = [m for m in found if m is not None]
        if metric is None or not known or not self.yardstick.skilled:
            return False
        return metric < mean(known) - SLIP

    def _ceiling(self, rung: int, seeds: list[int]) -> float:
        """Return the substitute for infinite scores: twice the largest finite one of the rung."""
        found = [v for (_, s, r), (v, _) in self.scores.items() if r == rung and s in seeds]
        known = [v for v in found if math.isfinite(v)]
        return 2 * max(known, default=1.0) + 1e-12


class DoesNotApplyError(Exception):
    """The treatment has nothing to edit in this model."""


def train(
    replica: Replica,
    source: Samples,
    judge: Batch | None,
    steps: int,
    size: int,
    seed: int,
    *,
    loss: LossFunction,
    used: Used | None = None,
    deadline: Deadline | None = None,
) -> Point:
    """Train a treated replica; return its final scores, in units of the user's loss.

    Raises:
        OutOfTimeError: past the deadline.
    """
    deadline = deadline or Deadline()
    stream = (replica.source or source).stream(size, seed)
    trial = DryRun()
    for step in range(steps):
        deadline.check()
        replica.model.train()
        if not advance(trial, replica, next(stream), step):
            break
    if trial.failure is not None:
        return Point(trial.failure.step, math.inf, math.inf, math.inf)
    if replica.finish is not None:
        replica.finish()
    judged = used(replica.model) if used is not None else replica.model
    with interrupted(deadline):
        return score(Replica(judged, loss), source.probe, judge, steps)


@contextmanager
def interrupted(deadline: Deadline) -> Iterator[None]:
    """Within it, no layer is called past the deadline: a patch or a score may take many passes."""
    handle = nn.modules.module.register_module_forward_pre_hook(deadline.check)
    try:
        yield
    finally:
        handle.remove()
