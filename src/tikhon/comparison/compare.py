"""The comparison behind `tikhon compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from tikhon import notebook, plotting
from tikhon.budget import parse_seconds
from tikhon.comparison.methods import Method, design
from tikhon.comparison.statistics import LEVEL, interval, p_value, tied
from tikhon.comparison.trainings import Fitted, Records, Trainer
from tikhon.data import Dataset, Split, split
from tikhon.errors import InputError
from tikhon.languages import Sentence, Value, sentence
from tikhon.numbers import Z_95, format_duration, format_number
from tikhon.runs.interrupt import ignore_messages

_MIN_TRIALS = 3  # fewest trainings for a choice
_MIN_SPLITS = 3  # fewest splits for a meaningful interval
_NOTABLE = 0.1  # gain relative to the error without regularization that noise may hide
_MIN_METHODS = 2  # fewest methods, whatever the budget
_OVERRUN = 1.05  # time after which no training starts, relative to the budget
_MAX_TRIALS = 8  # most trainings for each split; further budget goes to more splits
_COST_MARGIN = 1.3  # mean cost of a method relative to training without one

Event = Callable[[str, int, int], None]  # current task, trainings done, trainings in total


@dataclass
class Contender:
    """Results of one method over the splits."""

    method: Method
    chosen: list[Fitted] = field(default_factory=list)  # one for each split
    reseeded: list[float] = field(default_factory=list)  # test scores on the first split

    def tune(
        self, trainer: Trainer, records: Records, parts: Split, trials: int, number: int, seed: int
    ) -> None:
        """Tune on one split: train every point, choose by validation loss."""
        candidates = []
        for index, point in enumerate(design(self.method.dimensions, trials)):
            name = f"split {number + 1}, {self.method.name}, point {index + 1}"
            train = partial(trainer.fit, parts, *self.method.recipe(point), seed=seed)
            candidates.append(records.fitted(name, train))
        self.chosen.append(min(candidates, key=lambda fitted: fitted.metrics["valid/loss"]))

    def repeat(self, trainer: Trainer, records: Records, parts: Split, seeds: int) -> None:
        """Repeat the first split's choice with other seeds."""
        chosen = self.chosen[0]
        self.reseeded = [chosen.score("test")]
        for index in range(1, seeds):
            refitted = records.fitted(
                f"split 1, {self.method.name}, seed {index + 1}",
                partial(trainer.fit, parts, chosen.recipe, chosen.lr, seed=1000 + index),
            )
            self.reseeded.append(refitted.score("test"))


@dataclass(frozen=True)
class Constant:
    """Score of a constant prediction: the most frequent class, or the mean."""

    answer: str | None  # the class; None for the mean
    test: float  # mean over the splits, higher is better
    beaten: bool  # whether the best method is significantly better

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"answer": self.answer, "test": self.test, "beaten": self.beaten}


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison; `rows` are sorted, best first."""

    data: str
    metric: str
    rows: tuple[dict[str, Any], ...]
    trials: int
    splits: int
    epochs: int
    seconds: float
    notice: Sentence | None = None  # what exceeded the budget
    constant: Constant | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `result.json`; `sentences` are keys and values of its texts."""
        sentences = {"verdict": self.verdict(), "notice": self.notice}
        return {
            "kind": "compare",
            "data": self.data,
            "metric": self.metric,
            "trials": self.trials,
            "splits": self.splits,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "verdict": sentences["verdict"],
            "notice": self.notice or "",
            "sentences": {name: text.to_dict() for name, text in sentences.items() if text},
            "methods": list(self.rows),
            "constant": None if self.constant is None else self.constant.to_dict(),
        }

    def __str__(self) -> str:
        return self.verdict()

    def __repr__(self) -> str:
        best = self.rows[0]
        return (
            f"Comparison({self.data}, {len(self.rows)} methods, {self.splits} splits; first "
            f"{best['method']}, {self.metric} {format_number(abs(best['test']))})"
        )

    def _repr_html_(self) -> str:
        rows = []
        for row in self.rows:
            verdict = "tied with the first" if row["tied"] else "worse"
            rows.append((row["method"], *self._shown_interval(row), verdict))
        head = ("method", f"test {self.metric}", "low", "high", "")
        return notebook.html_card(repr(self), [self.verdict()], head, rows)

    def plot(self, *, ax: plotting.Axes | None = None) -> plotting.Display:
        """Plot the test score of each method with its interval; grey if worse than the best.

        Args:
            ax: matplotlib axes to draw on; a new figure if None.

        Raises:
            InputError: if matplotlib is not installed.
        """
        display = plotting.canvas(ax)
        tests, lows, highs = zip(*map(self._shown_interval, self.rows))
        plotting.intervals(
            display.ax_,
            [row["method"] for row in self.rows],
            tests,
            list(zip(lows, highs)),
            x=f"test {self.metric}",
            colours=[plotting.BLUE if row["tied"] else plotting.GREY for row in self.rows],
        )
        display.ax_.set_title(f"{self.data}, {self.splits} splits")
        return display

    def _shown_interval(self, row: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return a row's test score and interval, in the metric's own sign and range."""
        sign, upper = (1, 1.0) if self.metric == "accuracy" else (-1, math.inf)
        low, high = sorted((sign * row["low"], sign * row["high"]))
        return sign * row["test"], max(low, 0.0), min(high, upper)

    def verdict(self) -> Sentence:
        """Return in one sentence whether regularization helps here, and the best method.

        "Tied" means no significant difference on these splits (`statistics.tied`).
        """
        best, *others = self.rows
        equal = [row["method"] for row in others if row["tied"]]
        unregularized = next((row for row in self.rows if row["method"] == "none"), None)
        values: dict[str, Value] = {
            "method": best["method"],
            "metric": sentence(f"metric_{self.metric}_word"),
            "score": format_number(abs(best["test"])),
            "splits": self.splits,
        }
        if self.constant is not None and not self.constant.beaten:
            answer = self.constant.answer or sentence("the_mean")
            constant = format_number(abs(self.constant.test))
            return sentence("compare_nothing", answer=answer, constant=constant, **values)
        values |= {"equal": ", ".join(equal)}
        if unregularized is None:
            return sentence("compare_tied" if equal else "compare_best", **values)
        values |= {"bare": format_number(abs(unregularized["test"]))}
        regularized = next((row for row in self.rows if row is not unregularized), None)
        if self.splits == 1 and regularized is not None:  # ties every method with the best
            values |= {"method": regularized["method"]}
            values |= {"score": format_number(abs(regularized["test"]))}
            return sentence("compare_one_split", **values)
        if not unregularized["tied"]:
            return sentence("compare_helps_tied" if equal else "compare_helps", **values)
        if best is unregularized:
            return sentence("compare_none_best", **values)
        error = 1 - unregularized["test"] if self.metric == "accuracy" else -unregularized["test"]
        gain, low, high = map(format_number, unregularized["behind"])
        if unregularized["behind"][0] <= _NOTABLE * error:
            return sentence("compare_none_tied", **values)
        return sentence("compare_unclear", gain=gain, low=low, high=high, **values)


@dataclass
class _Plan:
    """The splits and trials of a comparison; `trials` falls where the budget asks for fewer."""

    data: Dataset
    trainer: Trainer
    records: Records
    limit: float | None
    splits: int
    trials: int
    seeds: int
    seed: int

    def run(self, contenders: list[Contender], on_event: Event) -> list[float]:
        """Tune the methods on one split after another, the first also with other seeds.

        Returns the score of a constant prediction on each split. A method that the first split
        does not reach has nothing chosen.
        """
        total = len(contenders) * (self.splits * self.trials + self.seeds - 1)
        done, trials, constants = 0, self.trials, list[float]()
        for index in range(self.splits):
            if index:
                trials = self._affordable_trials(trials, len(contenders), done, index)
            if not trials:
                break
            parts = _draw_split(self.data, index, self.splits, self.seed)
            seed = (self.seed + index) % (1 << 32)
            for number, contender in enumerate(contenders):
                name = contender.method.name
                late = index > 0 or number >= _MIN_METHODS
                growth = (trials + (self.seeds - 1) * (index == 0)) / max(done, 1)
                if late and self._is_over(f"{name}, split {index + 1}", growth):
                    break
                on_event(f"split {index + 1}/{self.splits}: {name}", done, total)
                contender.tune(self.trainer, self.records, parts, trials, index, seed)
                done += trials
                if index == 0:
                    contender.repeat(self.trainer, self.records, parts, self.seeds)
                    done += self.seeds - 1
            if index == 0:
                contenders = [contender for contender in contenders if contender.chosen]
            if any(len(contender.chosen) <= index for contender in contenders):
                for contender in contenders:
                    del contender.chosen[index:]
                break
            self.trials = trials
            constants.append(_constant_score(parts)[1])
        return constants

    def _affordable_trials(self, trials: int, contenders: int, done: int, index: int) -> int:
        """Return the trials of the next split, 0 if there is no time for it."""
        if self.limit is None:
            return trials
        left = _OVERRUN * self.limit - self.records.seconds
        rounds = _affordable_rounds(left, self.records.seconds / done * contenders, index)
        name = f"trainings per method, split {index + 1}"
        return min(trials, self.records.once(name, lambda: rounds))

    def _is_over(self, task: str, growth: float) -> bool:
        """Return whether the budget is too short for a task, as decided when it was first met.

        The task takes `growth` times what was done so far.
        """
        limit = self.limit
        if limit is None:
            return False
        name = f"the time is over before {task}"
        return self.records.once(
            name, lambda: self.records.seconds * (1 + growth) > _OVERRUN * limit
        )


def compare(
    data: Dataset,
    methods: Sequence[str],
    *,
    model: str = "mlp",
    splits: int = 5,
    trials: int | None = None,
    epochs: int = 30,
    batch_size: int = 64,
    budget: str | None = None,
    seeds: int = 3,
    seed: int = 0,
    records: Records | None = None,
    on_event: Event | None = None,
) -> Comparison:
    """Tune every method on every split with the same number of trainings, then test the choice.

    Each split is random (60 % train, 20 % validation, 20 % test); for a table with a time column,
    splits end at different times and test on their latest rows. A method tries `trials` points of
    (learning rate, strengths), chosen by validation loss; test rows are used once. Initial weights
    and learning rates are the same for all methods.

    Args:
        data: result of `tikhon.data.load`.
        methods: names of `tikhon.comparison.NAMES`, joined by "+".
        model: as for `tikhon fit`.
        splits: >= 2 for confidence intervals.
        trials: trainings for each method and split; by default 1 to 8 as the budget allows, or 6.
        epochs, batch_size: of every training.
        budget: total time, such as "5m". Trials follow from it and the time of one training; if it
            is short, fewer splits are planned (at least 3) so that each method is tuned. A later
            split has as many trials as there is time for, and none counts that does not end in
            time. Methods after the second that the first split does not reach are left out.
        seeds: number of seeds for the first split's choice (its stability); one if the budget is
            short.
        seed: of everything.
        records: results of an earlier process and storage for new ones; its `stop` ends the
            comparison.

    Raises `InputError` for unknown methods or ones that need classes, `Stopped` on a stop
    request.
    """
    for name, count in (("splits", splits), ("seeds", seeds), ("trials", trials)):
        if count is not None and count < 1:
            raise InputError(f"{name} must be 1 or more, received {count}")
    limit = parse_seconds(budget)
    contenders = [Contender(Method.of(name)) for name in dict.fromkeys(methods)]
    if not contenders:
        raise InputError("compare needs a method: names of tikhon.comparison.NAMES")
    for contender in contenders:
        if contender.method.classes_only and data.task != "classification":
            raise InputError(
                f"method {contender.method.name!r} needs classes; the target is a number"
            )
    records, on_event = Records() if records is None else records, on_event or ignore_messages
    trainer = Trainer(model, epochs, batch_size, records.stop)
    parts = _draw_split(data, 0, splits, seed)
    cost = 0.0
    if trials is None:
        if limit is not None:
            cost = _COST_MARGIN * float(records.once("seconds", lambda: trainer.cost(parts)))
            seeds = _affordable_seeds(limit, cost, len(contenders), seeds)
        trials = _plan_trials(limit, cost, len(contenders), splits, len(contenders) * (seeds - 1))
    plan = _Plan(data, trainer, records, limit, splits, trials, seeds, seed)
    least = cost * min(_MIN_METHODS, len(contenders)) * (trials + seeds - 1)
    if limit is not None and least > limit:
        on_event(str(sentence("compare_least", seconds=format_duration(least))), 0, 0)
    constants = plan.run(contenders, on_event)
    left_out = [contender.method.name for contender in contenders if not contender.chosen]
    contenders = [contender for contender in contenders if contender.chosen]
    share = len(parts.test.x) / len(parts.train.x)
    step = 1 / len(parts.test.x) if data.task == "classification" else 0.0
    rows = _rows(contenders, share, step)
    metric = "accuracy" if data.task == "classification" else "rmse"
    notice = None
    if limit is not None:
        notice = _budget_notice(plan, splits, len(constants), left_out, len(contenders))
    beaten = _beats_constant(rows[0]["scores"], constants, share, step, len(parts.test.x))
    constant = Constant(_constant_score(parts)[0], fmean(constants), beaten)
    done = (plan.trials, len(constants), epochs, records.seconds)
    return Comparison(data.name, metric, rows, *done, notice, constant)


def _draw_split(data: Dataset, index: int, splits: int, seed: int) -> Split:
    """Draw a split; with a time column, later splits drop up to half of the latest rows."""
    times = None if data.table is None else data.table.times
    if times is None:
        return split(data, seed=(seed + index) % (1 << 32))
    count = round(len(times) * (1 - 0.5 * index / splits))
    first = np.sort(np.argsort(times, kind="stable")[:count])
    return split(data.take(torch.from_numpy(first)), seed=seed)


def _constant_score(parts: Split) -> tuple[str | None, float]:
    """Return the constant prediction and its score on the test rows."""
    train, test = parts.train.y, parts.test.y
    if parts.train.classes:
        most_frequent = int(train.bincount().argmax())
        return repr(parts.train.classes[most_frequent]), float(
            (test == most_frequent).double().mean()
        )
    return None, -float((test - train.mean(0)).square().mean().sqrt()) * parts.train.unit


def _beats_constant(
    best: Sequence[float], constants: Sequence[float], share: float, step: float, rows: int
) -> bool:
    """Return whether the best method is significantly better than a constant prediction.

    Either by the spread over splits, or by the number of test rows in one of them.
    """
    gains = [a - b for a, b in zip(best, constants, strict=True)]
    gain, best_score, other = fmean(gains), fmean(best), fmean(constants)
    if step:  # shares of rows
        error = math.sqrt(
            (best_score * (1 - best_score) + other * (1 - other)) / rows + step**2 / 4
        )
    else:
        error = math.sqrt((best_score**2 + other**2) / (2 * rows))
    is_clear = gain > Z_95 * error
    return is_clear or (gain > 0 and p_value(gains, share=share, step=step) <= 1 - LEVEL)


def _budget_notice(
    plan: _Plan, asked: int, splits: int, left_out: Sequence[str], reached: int
) -> Sentence | None:
    """Report what the budget was too short for; None if nothing."""
    trials, seconds = plan.trials, plan.records.seconds
    if trials >= _MIN_TRIALS and splits >= asked and not left_out:
        return None
    more = max(trials, _MIN_TRIALS)
    share = (reached + len(left_out)) * asked * more / (reached * splits * trials)
    needed = math.ceil(1.2 * seconds * share)
    values: dict[str, Value] = {
        "splits": splits,
        "asked": asked,
        "trials": trials,
        "more": more,
        "budget": f"{needed}s" if needed < 120 else f"{-(-needed // 60)}m",
    }
    if left_out:
        return sentence("compare_short_methods", methods=", ".join(left_out), **values)
    return sentence("compare_short", **values)


def _affordable_rounds(left: float, cost: float, splits: int) -> int:
    """Return how often each method can train on the next split, where once takes `cost` seconds.

    The time is shared with the splits that are missing to the least number, if it suffices.
    """
    rounds = max(0, int(left / cost))
    return rounds // max(1, _MIN_SPLITS - splits) or rounds


def _affordable_seeds(budget: float, cost: float, contenders: int, seeds: int) -> int:
    """Return the seeds for the first split: one if more would prevent the minimal splits."""
    fits_budget = budget / cost >= contenders * (_MIN_SPLITS + seeds - 1)
    return seeds if fits_budget else 1


def _plan_trials(
    budget: float | None, cost: float, contenders: int, splits: int, fixed: int
) -> int:
    """Return trainings for each method and split; budget and cost in seconds."""
    if budget is None:
        return 6
    trainings_per_method = (budget / cost - fixed) / contenders
    min_splits = min(splits, _MIN_SPLITS)
    count = next(
        (n for n in range(splits, min_splits, -1) if trainings_per_method / n >= _MIN_TRIALS),
        min_splits,
    )
    return max(1, min(_MAX_TRIALS, int(trainings_per_method / count)))


def _rows(contenders: list[Contender], share: float, step: float) -> tuple[dict[str, Any], ...]:
    scores = {
        contender.method.name: [f.score("test") for f in contender.chosen]
        for contender in contenders
    }
    best = tied(scores, share=share, step=step)
    leader = scores[max(scores, key=lambda name: fmean(scores[name]))]
    rows = []
    for contender in contenders:
        behind = [a - b for a, b in zip(leader, scores[contender.method.name], strict=True)]
        mean, low, high = interval(scores[contender.method.name], share=share, step=step)
        gaps = [f.score("train") - f.score("test") for f in contender.chosen]
        first = contender.chosen[0]
        rows.append(
            {
                "method": contender.method.name,
                "test": mean,
                "low": low,
                "high": high,
                "tied": contender.method.name in best,
                "behind": interval(behind, share=share, step=step),  # the first
                "scores": scores[contender.method.name],
                "gap": fmean(gaps),
                "zeros": fmean(f.zeros for f in contender.chosen),
                "size": fmean(f.parameters[1] / f.parameters[0] for f in contender.chosen),
                "seed_std": stdev(contender.reseeded) if len(contender.reseeded) > 1 else None,
                "seconds": fmean(f.seconds for f in contender.chosen),
                "recipe": first.recipe.to_dict(),
                "lr": first.lr,
            }
        )
    return tuple(sorted(rows, key=lambda row: -row["test"]))
