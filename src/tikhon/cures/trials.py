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
from tikhon.cures.baseline import Baseline, measure_baseline, predicts_targets
from tikhon.cures.scoring import EVALUATION_WRAPPERS, MAX_ROWS_ONE_BY_ONE, ModelWrapper
from tikhon.cures.treatment import Treatment
from tikhon.cures.treatments import (
    ADAMS,
    INTENDED_LOSSES,
    SYMPTOMS,
    TREATMENTS_BY_CODE,
    UNTREATED,
    YIELDING,
    candidates,
    treatment_names,
)
from tikhon.data.forward import LossFunction
from tikhon.data.nested import Batch, batch_length, take_rows
from tikhon.diagnosis.diagnose import Diagnosis, rebuilder
from tikhon.diagnosis.dry_run import DryRun, score, take_step
from tikhon.diagnosis.record import Point, Record
from tikhon.diagnosis.replica import Replica, isolated, replicate
from tikhon.diagnosis.samples import Samples
from tikhon.errors import InputError
from tikhon.wrappers import unwrap

RUNGS = (20, 75, 300)
LONGER_FACTOR = 3  # times the steps of the last rung, while nothing is confirmed and time is left
OTHER_CAUSE = "leaves the fault"  # a verdict
SKILL_LOSS_ALLOWED = 0.005  # of accuracy or R2 that a treatment may lose (convention)
MIN_EFFECT = 0.02  # of the untreated score: less is no cure, however significant (convention)
STUCK_MARGIN = 0.5  # of the score of a program that is no better than a constant: not yet worse
WIDTHS = (10, 4)  # maximum number of treatments promoted from the first and second rung


@dataclass(frozen=True)
class TreatmentResult:
    """One treatment's scores (lower is better), paired with those of the untreated program."""

    name: str
    size: int
    steps: int  # of the last rung reached
    scores: tuple[float, ...]  # one per seed
    effects: tuple[float, ...]  # untreated minus treated score, one per seed
    verdict: str  # "confirmed" | OTHER_CAUSE | "not confirmed" | "worse" | "stopped early"
    metric: float | None = None

    @property
    def effect(self) -> float:
        """Mean effect over the seeds."""
        return mean(self.effects)

    @property
    def spread(self) -> float:
        """Standard deviation of the effect over the seeds."""
        return pstdev(self.effects)


def score_by_intended_loss(trials: Trials, diagnosis: Diagnosis) -> None:
    """Score the trials by a corrected loss or use, where loss or batch is the fault.

    The corrected loss is used if it works with the program, as a loss may broadcast internally.
    Models that mix rows are evaluated row by row.
    """
    static = diagnosis.record.static
    for code in trials.faults:
        intended = INTENDED_LOSSES.get(code, ())
        if code == "loss_upside_down" and not _is_loss_upside_down(diagnosis.record):
            intended = ()
        if code == "head_mismatch" and not static.get("unbounded_shares"):
            intended = ()  # then the user's loss says how good an answer is
        if code == "missing_log" and static.get("probabilities"):
            intended = (*intended[:1], *intended[:0:-1])
        for treatment in intended:
            corrected = trials.corrected_loss(treatment)
            if corrected is not None and trials.is_scorable(*corrected):
                trials.intended_loss, trials.wrapper = corrected
                break
        wrapper, whole = EVALUATION_WRAPPERS.get(code), trials.source
        if wrapper:
            few = torch.arange(min(MAX_ROWS_ONE_BY_ONE, batch_length(whole.probe)))
            trials.source = replace(whole, probe=take_rows(whole.probe, few))
            if trials.is_scorable(trials.loss, wrapper):
                trials.wrapper = wrapper
            else:
                trials.source = whole


def _is_loss_upside_down(record: Record) -> bool:
    """Return whether the whole loss has the wrong sign, not one part of it or the optimizer."""
    wiring, start = record.wiring, record.points[0].loss if record.points else None
    pulled = max(wiring.get(k) or 0.0 for k in ("entropy_pulled", "determinant_pulled"))
    endless = (
        wiring.get("whole") and (start or 0.0) > 0
    )  # it has no end with the other sign either
    of_part = pulled > 0 or wiring.get("answer_without_end") or endless
    return not (record.static.get("maximize") or of_part)


def as_module(model: object) -> nn.Module:
    """Return the unwrapped model, or an empty module for a factory."""
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
    valid_batch: Batch | None
    batch_size: int
    seeds: list[int]
    codes: Collection[str]
    deadline: Deadline = field(default_factory=Deadline)
    faults: Sequence[str] = ()  # the codes that follow from no other, the first in front
    scores: dict[tuple[str, int, int], tuple[float, float | None]] = field(default_factory=dict)
    intended_loss: LossFunction | None = None  # scores the trials where the user's is at fault
    wrapper: ModelWrapper | None = None  # what a trained model is judged in
    on_progress: Callable[[str], None] = lambda text: None
    base: Treatment = UNTREATED  # what the program has been treated with so far
    patches: dict[str, str] = field(default_factory=dict)
    seconds_per_step: float = 0.0  # of the slowest treatment so far
    reached: dict[str, int] = field(default_factory=dict)  # by the search, steps of a name
    finalists: list[Treatment] = field(default_factory=list)  # of its last rung
    rung: int = 0
    baseline: Baseline = field(default_factory=Baseline)

    def combined(self, treatment: Treatment) -> Treatment:
        """Return the treatments applied so far, combined with another."""
        return self.base & treatment

    def build(self, treatment: Treatment, seed: int, *, attach: bool = True) -> Replica:
        """Build the treated program with the weights of a seed; `attach` its penalty terms."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model if isinstance(self.model, nn.Module) else self.model()
            fixed = isinstance(self.model, nn.Module)
            engine = self.optimizer if fixed else rebuilder(self.optimizer)
            replica = replicate(model, self.loss, engine, penalty=self.penalty, clip=self.clip)
            torch.manual_seed(seed + 1)
            self._apply_treatment(treatment, replica)
        return replica.attach() if attach else replica

    def is_scorable(self, loss: LossFunction, wrapper: ModelWrapper | None = None) -> bool:
        """Return whether a loss is computable for the untreated program on the probe batch."""
        with isolated(as_module(self.model), self.seeds[0]), torch.no_grad():
            try:
                own = self.build(UNTREATED, self.seeds[0]).model
                own = wrapper(own) if wrapper is not None else own
                found = score(Replica(own, loss), self.source.probe, None, 0).eval_loss
                return math.isfinite(found or 0.0)
            except InputError:
                return False

    def corrected_loss(
        self, treatment: Treatment
    ) -> tuple[LossFunction, ModelWrapper | None] | None:
        """Return the loss of the treated program, and a wrapper of models that compute their loss.

        None if the treatment does not apply.
        """
        with isolated(as_module(self.model), self.seeds[0]):
            try:
                plain, treated = (self.build(t, self.seeds[0]) for t in (UNTREATED, treatment))
            except (DoesNotApplyError, InputError):
                return None
        before, after = type(plain.model), type(treated.model)
        if not plain.whole or not issubclass(after, before) or after is before:
            return treated.loss, None

        def wrapper(model: nn.Module) -> nn.Module:
            copied = copy.copy(model)
            copied.__class__ = after if type(model) is before else type(model)
            return copied

        return treated.loss, wrapper

    def _apply_treatment(self, treatment: Treatment, replica: Replica) -> None:
        """Apply a treatment; raise DoesNotApplyError if it changes nothing."""
        sized = not self.source.indexed or treatment.batch == self.batch_size
        same = treatment.kind == "batch" and sized  # a loader brings its own batches
        changes_only_settings = "register" not in treatment.setup and treatment.edit is None
        if treatment.kind in ("adam", "decay") and changes_only_settings:
            same = treatment.is_optimizer_of(replica)
        try:
            done = self.combined(treatment).apply(replica, self.source, self.valid_batch)
        except Exception as error:  # a program that the edit is not written for
            raise DoesNotApplyError from error
        if same or not done:
            raise DoesNotApplyError

    def run(self, treatment: Treatment, seed: int, steps: int) -> float:
        """Return the score after some steps; infinite if training diverged."""
        key = (treatment.name, seed, steps)
        if key in self.scores:
            return self.scores[key][0]
        with isolated(as_module(self.model), seed):
            began = self.deadline.elapsed
            with stopped_at(self.deadline):
                replica = self.build(treatment, seed)
            self.patches.setdefault(self.combined(treatment).name, replica.patch)
            size = treatment.batch or self.batch_size
            end = train(
                replica,
                self.source,
                self.valid_batch,
                steps,
                size,
                seed,
                loss=self.intended_loss or self.loss,
                wrapper=self.wrapper,
                deadline=self.deadline,
            )
            self.seconds_per_step = max(
                self.seconds_per_step, (self.deadline.elapsed - began) / (steps + 5)
            )
        self.scores[key] = (self._score(end), end.valid_metric or end.metric)
        return self.scores[key][0]

    def _score(self, end: Point) -> float:
        losses = (
            [end.valid_loss]
            if self._is_overfitting and end.valid_loss is not None
            else [end.eval_loss, *([end.valid_loss] if self.valid_batch is not None else [])]
        )
        if any(v is None or not math.isfinite(v) for v in losses):
            return math.inf
        return mean(v for v in losses if v is not None)

    @property
    def _is_overfitting(self) -> bool:
        return "overfitting" in self.codes and self.valid_batch is not None

    def search(self, steps: int) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        """Run successive halving; return all results, and the treatment to keep.

        Treatments that the findings name first always reach the last rung, as they may start
        slowly. The treatments of a certain cause run first, and end the search if confirmed.
        """
        rungs = ([r for r in RUNGS if r < steps] + [steps])[-3:]
        with stopped_at(self.deadline):  # what all results are measured by comes first
            self.baseline = self._measure_baseline()
            treatments = self._planned_treatments()
        kept, sure = (
            treatment_names(self._leading_codes),
            treatment_names(c for c in self._leading_codes if c not in SYMPTOMS),
        )
        reached: dict[str, int] = {}
        done: tuple[list[Treatment], int] = ([], rungs[0])
        at_once, length = self._run_causes(treatments, steps)
        own = {a.name: length for a in at_once}
        found, chosen = self._verdicts(own, at_once, length)
        if chosen is not None:
            return found, chosen
        for place, rung in enumerate(rungs):
            last = place == len(rungs) - 1
            seeds = self.seeds if place or last else self.seeds[:1]
            if last:
                treatments = treatments[: self._affordable(rung, len(treatments))]
            ran = self._run_rung(treatments, rung, seeds, last)
            if ran is None:
                break
            done = (ran, rung)
            reached |= {a.name: rung for a in ran}
            if not last:
                treatments = self._promoted(ran, rung, seeds, WIDTHS[-len(rungs) + 1 :][place])
                treatments += [a for a in ran if a.name in kept and a not in treatments]
                treatments.sort(key=lambda a: a.name not in sure)  # these are not cut off
        if at_once and length >= done[1]:
            reached |= own
            later = [a for a in done[0] if a not in at_once] if done[1] == length else []
            done = ([*at_once, *later], length)
        self.reached, self.finalists, self.rung = reached, *done
        return self._verdicts(reached, *done)

    def best_partial(self, results: Sequence[TreatmentResult]) -> Treatment | None:
        """Return an unconfirmed treatment of the first fault that helps with every seed."""
        first = next(iter(self.faults), "")
        own = {
            self.combined(t).name: t
            for t in TREATMENTS_BY_CODE.get(first, ())
            if first not in YIELDING
        }
        found = [a for a in results if a.name in own and a.verdict == "not confirmed"]
        found = [a for a in found if min(a.effects) > 0 and a.effect > a.spread]
        return own[min(found, key=lambda a: mean(a.scores)).name] if found else None

    def search_named(self, steps: int) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        """Run only the treatments that the faults name, all to the end."""
        requested = [t for t in self._candidates if t.name in treatment_names(self.faults)]
        ran = self._run_rung(requested, steps, self.seeds, True) or []
        return self._verdicts({t.name: steps for t in ran}, ran, steps)

    def _run_causes(self, treatments: list[Treatment], steps: int) -> tuple[list[Treatment], int]:
        """Run the treatments of causes first; return those that apply, and their steps.

        The steps are as many as half of the budget allows. Faults that other treatments may cure
        go before these on a short budget only; symptoms never do.
        """
        causes = [code for code in self.faults if code not in SYMPTOMS]
        requested = [a for a in treatments if a.name in treatment_names(causes)]
        if not requested or self._run_rung([UNTREATED], RUNGS[0], self.seeds[:1], True) is None:
            return [], steps
        most = self.deadline.remaining / (4 * self.seconds_per_step * len(self.seeds))
        length = max((r for r in (*RUNGS, steps) if r <= min(most, steps)), default=0)
        if not length or (length == steps and causes[0] in YIELDING):
            return [], steps
        return self._run_rung(requested, length, self.seeds, False) or [], length

    def _planned_treatments(self) -> list[Treatment]:
        """Return the treatments to try, those of the findings first."""
        with isolated(as_module(self.model), self.seeds[0]):
            own = self.build(UNTREATED, self.seeds[0])
        same = tuple(f"+ {t.name}" for t in ADAMS if t.is_optimizer_of(own))
        treatments = [t for t in self._candidates if not t.name.endswith(same)]
        first = treatment_names(self._leading_codes)
        return sorted(treatments, key=lambda treatment: treatment.name not in first)

    @property
    def _candidates(self) -> list[Treatment]:
        """Treatments of the faults in order, then of their consequences."""
        return candidates([*self.faults, *sorted(set(self.codes) - set(self.faults))])

    @property
    def _leading_codes(self) -> Collection[str]:
        """Codes whose treatments run first: the faults, if known."""
        return self.faults or self.codes

    def search_longer(self) -> tuple[tuple[TreatmentResult, ...], Treatment | None]:
        """Run longer rungs of the best and the named treatments while nothing is confirmed."""
        reached, finalists, rung = self.reached, self.finalists, self.rung
        treatments, chosen = self._verdicts(reached, finalists, rung)
        kept = treatment_names(self._leading_codes)
        while chosen is None and finalists and math.isfinite(self.deadline.seconds):
            rung *= LONGER_FACTOR
            count = self._affordable(rung, len(finalists))
            if self.seconds_per_step * rung * len(self.seeds) * 2 > self.deadline.remaining:
                break
            before = rung // LONGER_FACTOR
            ranked = sorted(finalists, key=lambda t: self._mean(t, before, self.seeds))
            first = ranked[0]
            ranked.sort(key=lambda t: t.name not in kept and t is not first)
            ran = self._run_rung(ranked[:count], rung, self.seeds, True)
            if ran is None:
                break
            finalists = ran
            reached |= {a.name: rung for a in ran}
            treatments, chosen = self._verdicts(reached, finalists, rung)
        return treatments, chosen

    def _affordable(self, rung: int, count: int) -> int:
        """Return how many treatments of a rung fit into the rest of the budget, at least one."""
        left = self.deadline.remaining
        each = max(self.seconds_per_step, 1e-6) * rung * len(self.seeds)
        return max(1, min(count, int(min(left / each, count + 1)) - 1))

    def _run_rung(
        self, treatments: list[Treatment], rung: int, seeds: list[int], last: bool
    ) -> list[Treatment] | None:
        """Run a rung; return the treatments that applied within its time, None if none did."""
        done: list[Treatment] = []
        own = self.deadline.fraction(1.0 if last else 0.35)
        try:
            self._run_seeds(UNTREATED, rung, seeds)
            for treatment in treatments:
                if done and own.is_over:
                    break
                self.on_progress(f"{treatment.name}, {rung} steps")
                try:
                    self._run_seeds(treatment, rung, seeds)
                except DoesNotApplyError:
                    continue
                done.append(treatment)
        except OutOfTimeError:
            pass
        return done or None

    def _run_seeds(self, treatment: Treatment, rung: int, seeds: list[int]) -> None:
        for seed in seeds:
            try:
                self.run(treatment, seed, rung)
            except Exception as error:
                if treatment is UNTREATED:
                    raise
                raise DoesNotApplyError from error  # not what the edit, or user code, is made for

    def _measure_baseline(self) -> Baseline:
        """Measure a constant and a reference model with this program's data and loss."""
        with isolated(as_module(self.model), self.seeds[0]):
            own = self.build(UNTREATED, self.seeds[0])
            plain = Replica(own.model, self.intended_loss or self.loss)
            found = measure_baseline(
                plain, self.source.probe, self.valid_batch, held_out=self._is_overfitting
            )
            # accuracy says nothing where one class has most of the rows, nor R2 of angles
            blind = {"class_imbalance", "angle_wraps"} & set(self.faults)
            if blind or not predicts_targets(plain, self.source.probe):
                found = Baseline(found.loss, skilled=False)
            return found

    def _mean(self, treatment: Treatment, rung: int, seeds: list[int]) -> float:
        return mean(self.scores[treatment.name, s, rung][0] for s in seeds)

    def _promoted(
        self, treatments: list[Treatment], rung: int, seeds: list[int], count: int
    ) -> list[Treatment]:
        """Return the treatments to promote: the best of each kind, then the best of all.

        Treatments within the noise of the untreated program keep their order. If the untreated
        program is no better than a constant, all scores up to a margin above it are noise.
        """
        base = self._mean(UNTREATED, rung, seeds)
        ceiling = (1 + STUCK_MARGIN) * abs(self.baseline.loss)
        stuck = not self.baseline.is_beaten_by(base, None) and base <= ceiling

        def rank(treatment: Treatment) -> tuple[float, int]:
            score = self._mean(treatment, rung, seeds)
            undecided = math.isfinite(base) and abs(score - base) <= MIN_EFFECT * abs(base)
            if stuck and not self.baseline.is_beaten_by(score, None):
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
        if (UNTREATED.name, self.seeds[0], rung) not in self.scores:
            return (), None
        treatments = [self._result_of(UNTREATED.name, 0, rung, False)]
        sizes = {t.name: t.size for t in self._candidates}
        final = {t.name for t in finalists}
        for name, step in reached.items():
            treatments.append(
                self._result_of(name, sizes[name], step, name in final and step == rung)
            )
        treatments = self._mark_other_causes(treatments)
        good = [a for a in treatments if a.verdict == "confirmed"]
        good.sort(key=lambda a: mean(a.scores))
        chosen = None
        if good:
            equal = [a for a in good if self._is_equal(a, good[0])]
            name = min(equal, key=lambda a: (a.size, mean(a.scores))).name
            chosen = next(t for t in finalists if t.name == name)
        order = {
            "confirmed": 0,
            OTHER_CAUSE: 1,
            "not confirmed": 1,
            "worse": 2,
            "stopped early": 3,
        }
        treatments[1:] = sorted(
            treatments[1:], key=lambda a: (order[a.verdict], -a.steps, mean(a.scores))
        )
        if self.base is not UNTREATED:
            before = self.base.name
            names = [before, *(f"{before} + {a.name}" for a in treatments[1:])]
            treatments = [replace(a, name=name) for a, name in zip(treatments, names)]
        return tuple(treatments), chosen

    def _mark_other_causes(self, treatments: list[TreatmentResult]) -> list[TreatmentResult]:
        """Return the results, with treatments that leave the first treatable fault unconfirmed.

        Faster steps may lower the loss of a faulty program. Symptoms may be cured by any
        treatment, and yielding faults by others if none of their own is confirmed.
        """
        good = [a for a in treatments if a.verdict == "confirmed"]
        first = next(iter(self.faults), "")
        if not first or first in SYMPTOMS:
            return treatments
        kept = {a.name for a in good} if first in YIELDING else set()
        for code in self.faults:
            names = {t.name for t in TREATMENTS_BY_CODE.get(code, ())}
            own = {a.name for a in good if names & set(a.name.split(" + "))}
            if own:
                kept = own
                break
        others = {a.name for a in good} - kept
        return [replace(a, verdict=OTHER_CAUSE) if a.name in others else a for a in treatments]

    def _is_equal(self, treatment: TreatmentResult, best: TreatmentResult) -> bool:
        """Return whether two treated results are equal, on the scale of the best treated one."""
        gaps = [a - b for a, b in zip(treatment.scores, best.scores)]
        constant = self.baseline.loss
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
            base = mean(min(self.scores[UNTREATED.name, s, rung][0], ceiling) for s in seeds)
            sure = sure and mean(effects) > MIN_EFFECT * abs(base) and len(effects) > 1
            sure = sure and self.baseline.is_beaten_by(mean(scores), metric)
            sure = sure and not self._lowers_skill(rung, seeds, metric)
            verdict = "confirmed" if sure else "worse" if mean(effects) < 0 else "not confirmed"
        return TreatmentResult(name, size, rung, scores, effects, verdict, metric)

    def effects(self, scores: Sequence[float], rung: int) -> tuple[float, ...]:
        """Return the untreated scores minus these, one per seed."""
        seeds = [s for s in self.seeds if (UNTREATED.name, s, rung) in self.scores]
        ceiling = self._ceiling(rung, seeds)
        base = (min(self.scores[UNTREATED.name, s, rung][0], ceiling) for s in seeds)
        return tuple(b - min(s, ceiling) for b, s in zip(base, scores))

    def _lowers_skill(self, rung: int, seeds: list[int], metric: float | None) -> bool:
        """Return whether accuracy or R2 is lower than untreated, although the loss is lower."""
        found = [self.scores[UNTREATED.name, s, rung][1] for s in seeds]
        known = [m for m in found if m is not None]
        if metric is None or not known or not self.baseline.skilled:
            return False
        return metric < mean(known) - SKILL_LOSS_ALLOWED

    def _ceiling(self, rung: int, seeds: list[int]) -> float:
        """Return the substitute for infinite scores: twice the largest finite one of the rung."""
        found = [v for (_, s, r), (v, _) in self.scores.items() if r == rung and s in seeds]
        known = [v for v in found if math.isfinite(v)]
        return 2 * max(known, default=1.0) + 1e-12


class DoesNotApplyError(Exception):
    """The treatment does not apply to this program."""


def train(
    replica: Replica,
    source: Samples,
    valid_batch: Batch | None,
    steps: int,
    size: int,
    seed: int,
    *,
    loss: LossFunction,
    wrapper: ModelWrapper | None = None,
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
        if not take_step(trial, replica, next(stream), step):
            break
    if trial.failure is not None:
        return Point(trial.failure.step, math.inf, math.inf, math.inf)
    if replica.finish is not None:
        replica.finish()
    judged = wrapper(replica.model) if wrapper is not None else replica.model
    with stopped_at(deadline):
        return score(Replica(judged, loss), source.probe, valid_batch, steps)


@contextmanager
def stopped_at(deadline: Deadline) -> Iterator[None]:
    """Raise OutOfTimeError at the first layer called past the deadline within the block."""
    with nn.modules.module.register_module_forward_pre_hook(deadline.check):
        yield
