"""The arms of a cure: treatments run against doing nothing, paired, by successive halving."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import mean, pstdev
from typing import Any

import torch
from torch import nn

from tikhon.cures.treatments import NOTHING, Treatment, candidates, popular
from tikhon.data.rows import Batch
from tikhon.diagnosis.diagnose import anew
from tikhon.diagnosis.dry_run import Trial, advance, score
from tikhon.diagnosis.feed import Feed
from tikhon.diagnosis.record import Point
from tikhon.diagnosis.replica import Loss, Replica, isolated, replicate
from tikhon.wrappers import unwrap

RUNGS = (20, 75, 300)
RELEVANT = 0.02  # of the untreated score: less is no cure, however sure (convention)
WIDTHS = (10, 4)  # arms that go on from the first and the second rung, at most


@dataclass(frozen=True)
class Arm:
    """One treatment that was tried: its scores (lower is better) against doing nothing, paired."""

    name: str
    size: int
    steps: int  # of the last rung that it reached
    scores: tuple[float, ...]  # one a seed
    effects: tuple[float, ...]  # do-nothing minus this arm, one a seed
    verdict: str  # "confirmed" | "not confirmed" | "worse" | "stopped early"
    metric: float | None = None

    @property
    def effect(self) -> float:
        """The mean effect over the seeds."""
        return mean(self.effects)

    @property
    def spread(self) -> float:
        """The standard deviation of the effect over the seeds."""
        return pstdev(self.effects)


def shell(model: Any) -> nn.Module:
    """Something to read devices from."""
    return unwrap(model) if isinstance(model, nn.Module) else nn.Module()


@dataclass
class Trials:
    """The program under treatment, and the search over treatments."""

    model: Any
    loss: Loss
    optimizer: Any
    penalty: Any
    clip: float | None
    source: Feed
    judge: Batch | None
    batch_size: int
    seeds: list[int]
    codes: set[str]
    limit: float
    scores: dict[tuple[str, int, int], tuple[float, float | None]] = field(default_factory=dict)
    pace: float = 0.0  # CPU seconds per step of the slowest arm seen

    def build(self, treatment: Treatment, seed: int) -> Replica:
        """The treated program with the weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model if isinstance(self.model, nn.Module) else self.model()
            fixed = isinstance(self.model, nn.Module)
            engine = self.optimizer if fixed else anew(self.optimizer)
            replica = replicate(model, self.loss, engine, penalty=self.penalty, clip=self.clip)
            torch.manual_seed(seed + 1)
            if treatment is not NOTHING and not treatment.apply(replica, self.source, self.judge):
                raise DoesNotApplyError
        return replica.attach()

    def run(self, treatment: Treatment, seed: int, steps: int) -> float:
        """The score after some steps; infinite where the run blew up."""
        key = (treatment.name, seed, steps)
        if key in self.scores:
            return self.scores[key][0]
        with isolated(shell(self.model), seed):
            began = time.process_time()
            replica = self.build(treatment, seed)
            size = treatment.batch or self.batch_size
            end = train(replica, self.source, self.judge, steps, size, seed, loss=self.loss)
            self.pace = max(self.pace, (time.process_time() - began) / (steps + 5))
        self.scores[key] = (self._score(end), end.valid_metric or end.metric)
        return self.scores[key][0]

    def _score(self, end: Point) -> float:
        losses = [end.valid_loss] if self._memorises and end.valid_loss is not None else [
            end.eval_loss, *([end.valid_loss] if self.judge is not None else [])
        ]  # fmt: skip
        if any(v is None or not math.isfinite(v) for v in losses):
            return math.inf
        return mean(v for v in losses if v is not None)

    @property
    def _memorises(self) -> bool:
        return "overfitting" in self.codes and self.judge is not None

    def search(self, steps: int) -> tuple[tuple[Arm, ...], Treatment | None]:
        """Successive halving; all arms with their verdicts, and the one to keep."""
        rungs = [r for r in RUNGS if r < steps] + [steps]
        rungs = rungs[-3:]
        arms = candidates(self.codes)
        arms += [t for t in popular(self.codes) if t.name not in {a.name for a in arms}]
        reached: dict[str, int] = {}
        for place, rung in enumerate(rungs):
            last = place == len(rungs) - 1
            seeds = self.seeds if place or len(rungs) == 1 else self.seeds[:1]
            if last:
                arms = arms[: self._affordable(rung, len(arms))]
            arms = self._rung(arms, rung, seeds, last)
            reached |= {a.name: rung for a in arms}
            if not last:
                arms = self._best(arms, rung, seeds, WIDTHS[-len(rungs) + 1 :][place])
        return self._verdicts(reached, arms, rungs[-1])

    def _affordable(self, rung: int, count: int) -> int:
        """How many arms the rest of the budget pays for in the last rung, one at least."""
        left = self.limit - time.process_time()
        each = max(self.pace, 1e-6) * rung * len(self.seeds)
        return max(1, min(count, int(left / each) - 1))

    def _rung(
        self, arms: list[Treatment], rung: int, seeds: list[int], last: bool
    ) -> list[Treatment]:
        """The arms that apply, run for a rung; a cut where the budget for it is spent."""
        self._each(NOTHING, rung, seeds)
        done: list[Treatment] = []
        now = time.process_time()
        share = 1.0 if last else 0.35
        stop = now + share * max(0.0, self.limit - now)
        for arm in arms:
            if done and time.process_time() > stop:
                break
            try:
                self._each(arm, rung, seeds)
            except DoesNotApplyError:
                continue
            done.append(arm)
        return done

    def _each(self, arm: Treatment, rung: int, seeds: list[int]) -> None:
        for seed in seeds:
            try:
                self.run(arm, seed, rung)
            except Exception as error:
                if arm is NOTHING:
                    raise
                raise DoesNotApplyError from error  # not what the edit, or user code, is made for

    def _mean(self, arm: Treatment, rung: int, seeds: list[int]) -> float:
        return mean(self.scores[arm.name, s, rung][0] for s in seeds)

    def _best(
        self, arms: list[Treatment], rung: int, seeds: list[int], count: int
    ) -> list[Treatment]:
        """The best arms, the best of each kind first in line, so that slow starters stay in.

        Arms that are no better or worse yet than doing nothing stay in the order in which the
        findings ask for them: their scores are noise.
        """
        base = self._mean(NOTHING, rung, seeds)

        def rank(arm: Treatment) -> tuple[float, int]:
            score = self._mean(arm, rung, seeds)
            undecided = math.isfinite(base) and abs(score - base) <= RELEVANT * abs(base)
            return (base, 0) if undecided else (score, arm.size)

        ranked = sorted(arms, key=rank)
        firsts: dict[str, Treatment] = {}
        for arm in ranked:
            firsts.setdefault(arm.kind, arm)
        varied = list(firsts.values())[: max(1, count // 2)]
        rest = [a for a in ranked if a not in varied]
        return sorted(varied + rest[: count - len(varied)], key=rank)

    def _verdicts(
        self, reached: dict[str, int], finalists: list[Treatment], rung: int
    ) -> tuple[tuple[Arm, ...], Treatment | None]:
        arms = [self._arm(NOTHING.name, 0, rung, False)]
        sizes = {t.name: t.size for t in (*candidates(self.codes), *popular(self.codes))}
        final = {t.name for t in finalists}
        for name, step in reached.items():
            arms.append(self._arm(name, sizes[name], step, name in final and step == rung))
        good = [a for a in arms if a.verdict == "confirmed"]
        good.sort(key=lambda a: mean(a.scores))
        chosen = None
        if good:
            best = good[0]
            margin = max(0.05 * best.effect, 0.5 * min(best.spread, best.effect))
            equal = [a for a in good if mean(a.scores) <= mean(best.scores) + margin]
            name = min(equal, key=lambda a: (a.size, mean(a.scores))).name
            chosen = next(t for t in finalists if t.name == name)
        order = {"confirmed": 0, "not confirmed": 1, "worse": 2, "stopped early": 3}
        arms[1:] = sorted(arms[1:], key=lambda a: (order[a.verdict], -a.steps, mean(a.scores)))
        return tuple(arms), chosen

    def _arm(self, name: str, size: int, rung: int, final: bool) -> Arm:
        seeds = [s for s in self.seeds if (name, s, rung) in self.scores]
        scores = tuple(self.scores[name, s, rung][0] for s in seeds)
        ceiling = self._ceiling(rung, seeds)
        base = [min(self.scores[NOTHING.name, s, rung][0], ceiling) for s in seeds]
        effects = tuple(b - min(s, ceiling) for b, s in zip(base, scores))
        metrics = [m for s in seeds if (m := self.scores[name, s, rung][1]) is not None]
        metric = mean(metrics) if metrics else None
        verdict = "stopped early"
        if final:
            sure = min(effects) > 0 and mean(effects) > pstdev(effects)
            sure = sure and mean(effects) > RELEVANT * abs(mean(base))
            verdict = "confirmed" if sure else "worse" if mean(effects) < 0 else "not confirmed"
        return Arm(name, size, rung, scores, effects, verdict, metric)

    def _ceiling(self, rung: int, seeds: list[int]) -> float:
        """What an infinite score counts as: twice the largest finite one of the rung."""
        found = [v for (_, s, r), (v, _) in self.scores.items() if r == rung and s in seeds]
        known = [v for v in found if math.isfinite(v)]
        return 2 * max(known, default=1.0) + 1e-12


class DoesNotApplyError(Exception):
    """The treatment has nothing to edit in this model."""


def train(
    replica: Replica,
    source: Feed,
    judge: Batch | None,
    steps: int,
    size: int,
    seed: int,
    *,
    loss: Loss,
) -> Point:
    """Train a treated replica; its scores at the end, in the units of the user's loss."""
    stream = source.stream(size, seed)
    trial = Trial()
    for step in range(steps):
        replica.model.train()
        if not advance(trial, replica, next(stream), step):
            break
    if trial.failure is not None:
        return Point(trial.failure.step, math.inf, math.inf, math.inf)
    if replica.finish is not None:
        replica.finish()
    return score(Replica(replica.model, loss), source.probe, judge, steps)
