"""`cure`: try treatments on copies, paired and in rungs, and keep only what proves to help."""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from tikhon import plotting
from tikhon.budget import Deadline, OutOfTimeError, parse_seconds
from tikhon.cures.baseline import Baseline
from tikhon.cures.data import without_gaps
from tikhon.cures.scoring import root_codes, root_faults, scoring_batches
from tikhon.cures.treatment import Treatment, optimizer_option
from tikhon.cures.treatments import (
    INTENDED_LOSSES,
    NO_DUPLICATES,
    SYMPTOMS,
    TREATMENTS_BY_CODE,
    UNTREATED,
    VALIDATION_FAULTS,
)
from tikhon.cures.trials import (
    TreatmentResult,
    Trials,
    as_module,
    score_by_intended_loss,
    stopped_at,
    train,
)
from tikhon.data.forward import LossFunction
from tikhon.data.nested import Batch
from tikhon.diagnosis.diagnose import Diagnosis, diagnose, draw, rebuilder
from tikhon.diagnosis.penalty import separate_penalty
from tikhon.diagnosis.record import Point, finite
from tikhon.diagnosis.reference import has_real_targets
from tikhon.diagnosis.replica import Replica, isolated
from tikhon.diagnosis.samples import Samples, samples
from tikhon.diagnosis.save import save
from tikhon.diagnosis.text import WIDTH
from tikhon.errors import InputError
from tikhon.numbers import format_number
from tikhon.penalties import L2
from tikhon.regularizer.terms import Term
from tikhon.training.losses import unaligned_loss
from tikhon.training.recipe import Recipe

DIAGNOSIS_SHARE = 0.5  # of the budget, at most
MAX_FURTHER_DIAGNOSES = 2  # further diagnoses of the treated program
TOO_SHORT = (
    "the budget ended in the first, short runs of one seed: give more time, such as ten times it"
)


@dataclass(frozen=True, eq=False)
class Cure:
    """Result of `cure`: the trials, the treated model, a patch and a recipe.

    `patch` is the PyTorch code that was run, empty if nothing helped; `model` is the treated model
    before training, `replica` the whole treated program, and `train` runs it.
    """

    diagnosis: Diagnosis
    treatments: tuple[TreatmentResult, ...]
    treatment: Treatment | None
    program: Callable[[int], Replica] = field(repr=False)
    batch_size: int
    source: Samples = field(repr=False)
    valid_batch: Batch | None = field(repr=False)
    loss: LossFunction = field(repr=False)
    baseline: Baseline = field(default_factory=Baseline)
    patch: str = ""
    seconds: float = 0.0
    remaining: Diagnosis | None = None  # of the treated program, if time was left

    @property
    def confirmed(self) -> bool:
        """Whether a treatment beat the untreated program with every seed, beyond the spread."""
        return self.treatment is not None

    @property
    def best(self) -> TreatmentResult | None:
        """Result of the chosen treatment."""
        name = self.treatment.name if self.treatment is not None else None
        return next((a for a in self.treatments if a.name == name), None)

    @property
    def recipe(self) -> Recipe:
        """Part of the cure that a recipe can express: clipping, dropout, decay, early stopping."""
        known = dict((self.treatment or UNTREATED).recipe)
        strength = known.pop("decay", None)
        decay = Term(L2(strength), how="decoupled") if strength else ()
        return Recipe(decay, **known)

    @cached_property
    def options(self) -> dict[str, str | None] | None:
        """Options of a command that the treatment sets, `None` for one that it removes.

        None if no command says its optimizer. `place` says what else there is to change.
        """
        treatment = self.treatment or UNTREATED
        kinds = {part.kind for part in treatment.parts or (treatment,)}
        found: dict[str, str | None] = {"--penalty": None} if "penalty" in kinds else {}
        decayed = "penalty" in kinds and self.diagnosis.record.optimizer.get("weight_decay")
        if decayed or kinds & {"lr", "adam", "decay"}:
            found["--optimizer"] = optimizer_option(self.program(0).optimizer)
        if found.get("--optimizer", "") is None:
            return None
        found |= {"--clip": "1"} if "clip" in kinds else {}
        return found | ({"--batch-size": str(treatment.batch)} if "batch" in kinds else {})

    @property
    def place(self) -> str:
        """Where to make the change: in "options" of a command, the "model" or the "program"."""
        place = (self.treatment or UNTREATED).place
        return "program" if self.options is None else place

    def replica(self, seed: int = 0) -> Replica:
        """Return the treated program before its first step, initialised with a seed."""
        return self.program(seed)

    @property
    def model(self) -> nn.Module:
        """Treated model, before training."""
        return self.program(0).model

    def train(self, steps: int, *, seed: int = 0) -> tuple[nn.Module, Point]:
        """Run the treated program in full; return the trained model and its last scores."""
        with isolated(nn.Module(), seed):
            replica = self.program(seed)
            end = train(
                replica,
                self.source,
                self.valid_batch,
                steps,
                self.batch_size,
                seed,
                loss=self.loss,
            )
        return replica.model, end

    def __str__(self) -> str:
        return _summary(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values without NaN."""
        best = self.best
        return {
            "schema_version": 1,
            "kind": "cure",
            "confirmed": self.confirmed,
            "treatment": self.treatment.name if self.treatment else None,
            "patch": self.patch,
            "place": self.place if self.confirmed else None,
            "options": self.options,
            "recipe": self.recipe.to_dict(),
            "effect": finite(best.effect) if best else None,
            "yardstick": finite(self.baseline),
            "seconds": self.seconds,
            "arms": [finite({**a.__dict__, "effect": a.effect}) for a in self.treatments],
            "diagnosis": self.diagnosis.to_dict(),
        }

    def to_json(self) -> str:
        """Return `to_dict` as a JSON string."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save as a run folder for `tikhon report`; `result.json` holds `to_dict`."""
        save(self.to_dict(), path, overwrite=overwrite)

    def plot(self, *, ax: plotting.Axes | None = None) -> plotting.Display:
        """Plot the decrease of the loss by each treatment, with the spread over seeds.

        Args:
            ax: matplotlib axes to draw on; a new figure if None.

        Raises:
            InputError: if matplotlib is not installed.
        """
        display = plotting.canvas(ax)
        last = [r for r in self.treatments[1:] if r.steps == self.treatments[0].steps]
        colours = {"confirmed": plotting.BLUE, "worse": plotting.RED}
        plotting.bars(
            display.ax_,
            [r.name for r in last],
            [r.effect for r in last],
            x="loss without the treatment - loss with it",
            spread=[r.spread for r in last],
            colours=[colours.get(r.verdict, plotting.GREY) for r in last],
        )
        display.ax_.set_title("Effect of treatments (blue: confirmed)")
        return display


def cure(
    model: nn.Module | Callable[[], nn.Module],
    data: object,
    loss: str | LossFunction,
    *,
    optimizer: object,
    diagnosis: Diagnosis | None = None,
    valid: object = None,
    budget: str = "60s",
    seeds: int = 3,
    steps: int = 300,
    batch_size: int = 64,
    seed: int = 0,
    penalty: object = None,
    clip: float | None = None,
    on_progress: Callable[[str, float, float], None] | None = None,
) -> Cure:
    """Find a change that makes the model train, and prove it against the untreated program.

    The findings select treatments; each is tried on copies with the seeds, batches and random
    numbers of the untreated program, in rungs of 20, 75 and `steps` steps. Learning rates are
    always tried. The treatment of a certain cause runs first, and ends the search if confirmed.
    Treatments that the findings rank first always reach the last rung, and while nothing is
    confirmed the rest of the budget goes into longer rungs. The score is the training loss plus
    the validation loss (the validation loss alone against overfitting). "Confirmed" means: better
    with every seed, by more than the spread, better than a constant prediction, and with at least
    half the skill of a reference model on the same data. Among equals the smallest edit wins.

    Args:
        model: the module, or a factory of it (then each seed draws new weights).
        data, loss, valid, batch_size, penalty, clip: as for `diagnose`.
        optimizer: an optimizer bound to the model, or a factory called with the parameters.
        diagnosis: of the same program; None diagnoses first, within the budget.
        budget: wall-clock time such as "60s" or "2m", including the diagnosis.
        seeds: paired repetitions, >= 2.
        steps: length of the last planned rung, >= 1.
        on_progress: called with the current treatment, the seconds spent and the budget.

    Raises:
        InputError: as for `diagnose`, if the optimizer is missing, or `budget` is not a time.

    References:
        Jamieson and Talwalkar, successive halving, 2016, https://arxiv.org/abs/1502.07943

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(256, 8); y = (x[:, 0] > 0).long()
    >>> net = nn.Sequential(nn.Linear(8, 2))
    >>> found = cure(net, (x, y), nn.CrossEntropyLoss(), steps=60, budget="10s",
    ...              optimizer=torch.optim.SGD(net.parameters(), lr=1e-6))
    >>> found.confirmed
    True
    """
    if optimizer is None:
        raise InputError("cure trains: pass an optimizer, or a factory such as torch.optim.Adam")
    if seeds < 2 or steps < 1:
        raise InputError(f"seeds must be >= 2 and steps >= 1, received {seeds} and {steps}")
    deadline = Deadline(parse_seconds(budget) or math.inf)

    def report_progress(text: str) -> None:
        if on_progress is not None:
            on_progress(text, deadline.elapsed, deadline.seconds)

    report_progress("diagnosing")
    net = model if isinstance(model, nn.Module) else draw(model, seed)
    if diagnosis is None:
        with deadline.fraction(DIAGNOSIS_SHARE).activate():
            diagnosis = diagnose(
                net,
                data,
                loss,
                optimizer=optimizer if net is model else rebuilder(optimizer),
                valid=valid,
                steps=min(steps, 200),
                batch_size=batch_size,
                seed=seed,
                penalty=penalty,
                clip=clip,
            )
    if "nothing_to_train" in diagnosis.labels:
        raise InputError("no parameter requires a gradient: call requires_grad_(True) on some")
    with isolated(as_module(model), seed):
        source = samples(data)
        loss = unaligned_loss(loss, source.probe[1])
        loss, penalty = separate_penalty(net, loss, penalty, source)
        valid_batch = samples(valid, rows=512, name="valid").probe if valid is not None else None
    source, valid_batch = scoring_batches(source, valid_batch, diagnosis, as_module(model))
    trials = Trials(
        model=model,
        loss=loss,
        optimizer=optimizer,
        penalty=penalty,
        clip=clip,
        source=source,
        valid_batch=valid_batch,
        batch_size=min(batch_size, source.rows),
        seeds=[seed + i for i in range(seeds)],
        codes=diagnosis.labels,
        faults=[code for code in root_codes(diagnosis) if code not in VALIDATION_FAULTS],
        deadline=deadline,
        on_progress=report_progress,
    )
    treatments, treatment, remaining = _search(trials, diagnosis, steps)
    final = replace(trials, base=treatment)
    return Cure(
        diagnosis=diagnosis,
        treatments=treatments,
        treatment=treatment if treatment is not UNTREATED else None,
        program=lambda s: final.build(UNTREATED, s),
        batch_size=treatment.batch or trials.batch_size,
        source=trials.source,
        valid_batch=valid_batch,
        loss=trials.intended_loss or loss,
        baseline=trials.baseline,
        patch=trials.patches.get(treatment.name, ""),
        seconds=deadline.elapsed,
        remaining=remaining,
    )


def _search(
    trials: Trials, diagnosis: Diagnosis, steps: int
) -> tuple[tuple[TreatmentResult, ...], Treatment, Diagnosis | None]:
    """Return the trials, the treatment to keep or `UNTREATED`, and the remaining diagnosis."""
    if set(root_codes(diagnosis)) == {"valid_differs"}:
        return (), UNTREATED, None
    if "rows_in_both" in diagnosis.labels and trials.corrected_loss(NO_DUPLICATES) is not None:
        trials.base = NO_DUPLICATES
    treatments, treatment, remaining = (), UNTREATED, None
    with suppress(OutOfTimeError):
        with stopped_at(trials.deadline):
            score_by_intended_loss(trials, diagnosis)
        treatments, chosen = trials.search(steps)
        helped = chosen or trials.best_partial(treatments)
        if helped is not None:
            treatments, treatment, remaining = _treat_again(trials, treatments, helped, chosen)
        if treatment is UNTREATED:
            treatments, chosen = trials.search_longer()
            treatment = trials.combined(chosen) if chosen is not None else UNTREATED
    return treatments, treatment, remaining


def _treat_again(
    trials: Trials,
    results: tuple[TreatmentResult, ...],
    helped: Treatment,
    chosen: Treatment | None,
) -> tuple[tuple[TreatmentResult, ...], Treatment, Diagnosis | None]:
    """Diagnose and treat the treated program again while a treatable cause remains.

    A treatment that is not confirmed by itself counts only together with a further one.
    """
    first, treatment, remaining = trials, trials.combined(helped), None
    kept = treatment if chosen is not None else UNTREATED
    for _ in range(MAX_FURTHER_DIAGNOSES):
        trials = replace(trials, base=treatment, scores={})
        trials.on_progress("diagnosing again")
        with trials.deadline.fraction(DIAGNOSIS_SHARE).activate():
            remaining = _diagnose_again(trials)
        codes = [
            code
            for code in (root_codes(remaining) if remaining is not None else ())
            if code in TREATMENTS_BY_CODE
            and code not in SYMPTOMS | VALIDATION_FAULTS
            and (
                code in trials.faults or code not in INTENDED_LOSSES
            )  # else the judge would be another
            and not treatment.names & {t.name for t in TREATMENTS_BY_CODE[code]}
        ]
        trials = replace(trials, codes=set(codes), faults=codes)
        more, further = trials.search_named(results[0].steps) if codes else ((), None)
        if further is None:
            break
        more = tuple(replace(a, effects=first.effects(a.scores, a.steps)) for a in more[1:])
        results, treatment = (*results, *more), trials.combined(further)
        kept = treatment
    return results, kept, remaining if kept is not UNTREATED else None


def _diagnose_again(trials: Trials) -> Diagnosis | None:
    """Diagnose the program as treated so far; return None if it is refused."""
    seed = trials.seeds[0]
    with isolated(as_module(trials.model), seed), suppress(InputError):
        replica = trials.build(UNTREATED, seed, attach=False)
        source = replica.source or trials.source
        return diagnose(
            replica.model,
            without_gaps(source.source) if source.indexed else source.source,
            replica.loss,
            optimizer=replica.optimizer,
            valid=trials.valid_batch,
            batch_size=trials.base.batch or trials.batch_size,
            seed=seed,
            penalty=replica.penalty or replica.terms,
            clip=trials.clip,
        )
    return None


def _summary(found: Cure) -> str:
    """Format the verdict, the treatments run to the end, the failed ones, and the patch."""
    count = max(0, len(found.treatments) - 1)
    lines = [f"tikhon cure: {count} treatment{'s' * (count != 1)} in {found.seconds:.0f} s"]
    if not found.treatments:
        reason = "the budget ended before the untreated program had run once"
        if set(root_codes(found.diagnosis)) == {"valid_differs"}:
            reason = "the fault is in the validation rows, which no change of the training mends"
        lines.append(f" no cure found: {reason}")
        return "\n".join([*lines, *_remaining_lines(found)])
    base, chosen = found.treatments[0], found.best
    seeds, steps, measured = len(base.scores), base.steps, math.isfinite(mean(base.scores))
    lines[0] += f", {seeds} seed{'s' * (seeds > 1)} x {steps} steps"
    if chosen is None:
        reason = "no treatment beat the untreated program and a constant predictor clearly"
        if found.diagnosis.ok:
            reason = "no problem was found, and no treatment is confirmed to do better"
        lines.append(f" {'nothing to cure' if found.diagnosis.ok else 'no cure found'}: {reason}")
        lines += [] if seeds > 1 else [f" {TOO_SHORT}"]
        lines += _remaining_lines(found)
    else:
        before, after = (format_number(mean(a.scores)) for a in (base, chosen))
        change = f"lower by {format_number(chosen.effect)} ± {format_number(chosen.spread)}, "
        if not measured:
            before, change = "not finite", ""
        lines.append(
            f" {chosen.name}: loss {before} -> {after}, {change}with each of {seeds} seeds"
        )
        lines += _remaining_lines(found)
        own = found.treatment.code_fix if found.treatment else ""
        lines += [f" in your own code: {own}"] if own else []
    lines += _baseline_lines(found)
    lines.append(f" {'treatment':44} {'loss':>9} {'lower by':>9} {'±':>8}  verdict")
    finals = [a for a in found.treatments if a.steps == steps]
    for treatment in finals:
        verdict = treatment.verdict if treatment is not base else ""
        name = treatment.name if len(treatment.name) <= 44 else f"{treatment.name[:43]}…"
        change = (treatment.effect, treatment.spread) if measured else (None, None)
        effect, spread = map(format_number, change)
        lines.append(
            f" {name:44} {format_number(mean(treatment.scores)):>9} "
            f"{effect:>9} {spread:>8}  {verdict}"
        )
    failed = [
        a.name
        for a in finals
        if a is not base and a.verdict != "confirmed"
        if not a.effect > (0.05 * abs(base.scores[0]) if measured else 0.0)
    ]
    if failed:
        text = f"did not help: {', '.join(dict.fromkeys(failed))}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=" ", subsequent_indent="   ")
    if found.patch:
        lines += [" patch:", *(f"   {line}" for line in found.patch.splitlines())]
        lines.append(f" next: {_how_to_apply(found)}, train in full, diagnose again")
    return "\n".join(lines)


def _how_to_apply(found: Cure) -> str:
    """Say what to do with the patch."""
    if found.place != "options":
        return "paste each part where its comment says"
    options = (found.options or {}).items()
    set_to = [f"{name} {value}" for name, value in options if value is not None]
    removed = [f"without {name}" for name, value in options if value is None]
    return f"paste it, or say {' '.join([*set_to, *removed])} on the command line"


def _remaining_lines(found: Cure) -> list[str]:
    """Return the fix of each fault that no treatment addresses."""
    again, used = found.remaining, found.treatment.names if found.treatment is not None else set()
    left = [
        f
        for f in root_faults(found.diagnosis if again is None else again)
        if f.advice
        and not (used and f.code in SYMPTOMS)  # what is cured shows no symptom any more
        and not used & {treatment.name for treatment in TREATMENTS_BY_CODE.get(f.code, ())}
    ]
    stays = "is" if not used else "may stay and is then" if again is None else "stays and is"
    return [f" {f.code} {stays} yours to change: {f.fix or f.advice[0]}" for f in left]


def _baseline_lines(found: Cure) -> list[str]:
    """Return the scores of a constant and of a reference model on the same data."""
    known = found.baseline
    lines = (
        [f" a constant predictor has loss {format_number(known.loss)}"]
        if math.isfinite(known.loss)
        else []
    )
    metric = found.treatments[0].metric if found.best is None else found.best.metric
    if metric is not None and math.isfinite(known.reference):
        name = "R2" if has_real_targets(found.source.probe[1]) else "accuracy"
        lines.append(
            f" {name} {metric:.2f}; a constant predictor {known.chance:.2f}, ridge regression on "
            f"random features {known.reference:.2f}"
        )
    return lines
