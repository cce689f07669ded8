"""The function `tune`: a population, guarded halving, a reliable choice, a refit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon import notebook, plotting
from tikhon.data.batches import pair
from tikhon.data.classes import check_classes
from tikhon.data.nested import slice_rows, tensors
from tikhon.errors import InputError
from tikhon.models import Average
from tikhon.options import with_mode
from tikhon.population.population import Population
from tikhon.regularizer.audit import warn
from tikhon.runs.interrupt import Stopped, ignore_messages, never_stop
from tikhon.runs.run_directory import STATES
from tikhon.training.input_check import check_model_accepts
from tikhon.training.losses import Loss, loss_name, loss_of
from tikhon.training.recipe import Recipe
from tikhon.tuning.builder import Builder
from tikhon.tuning.choice import SearchAudit, audit, blend, choose, near_best
from tikhon.tuning.draws import batch_size_of, read
from tikhon.tuning.fit_arguments import recipe_of, settings_of
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.plan import SearchPlan, configs_near_defaults, default_config, make_plan
from tikhon.tuning.preparation import (
    all_rows,
    check_shared_entries,
    default_space,
    make_job,
    open_journal,
    optimizer_of,
)
from tikhon.tuning.runners import (
    PopulationRunner,
    SearchJob,
    build,
    job_of,
    populate,
    shared_entries,
    train_fully,
    validation_rows,
)
from tikhon.tuning.searches import Halving, Search, SpaceFilling
from tikhon.tuning.session import (
    MAX_RESERVE,
    MIN_RESERVE,
    TIMED_OUT,
    TOP,
    Session,
    without_default,
)
from tikhon.tuning.space import Space
from tikhon.tuning.states import State, States
from tikhon.tuning.study import StudySearch, direction_of
from tikhon.tuning.trials import DEFAULT, Config, History, Outcome, Trial

_PROBED = 64  # rows to test whether the loss is a mean over rows


@dataclass(frozen=True, eq=False)
class TuneResult:
    """Result of a search.

    `model` is the chosen model, refitted on all rows; `average` a module with the mean of the
    members whose mean scores best on validation rows, refitted, some with several seeds (or the
    models of their folds if time ran out), and `members` their configurations; `config` the chosen
    hyperparameters; `trials` every outcome as a row; `audit` the uncertainty of the choice; `plan`
    the measured decisions.
    `recipe` and `settings` are the chosen configuration for `fit`:
    `fit(model, train, result.recipe, **result.settings)`
    (a strength "auto" is tuned again, and needs `valid`).
    """

    model: nn.Module
    average: Average
    config: Config
    history: History
    audit: SearchAudit
    plan: SearchPlan
    space: Space
    seconds: float
    stopped: str = ""
    members: tuple[Config, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The regularization of the chosen configuration."""
        return recipe_of(self.config)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """One row for each trial: its configuration, budget, score, curve."""
        return [outcome.to_dict() for outcome in self.history]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict of everything but the models."""
        return {
            "schema_version": 1,
            "kind": "tune",
            "config": dict(self.config),
            "recipe": self.recipe.to_dict(),
            "settings": {k: loss_name(v) if callable(v) else v for k, v in self.settings.items()},
            "score": self.audit.chosen_score,
            "metric": self.audit.metric,
            "audit": self.audit.to_dict(),
            "plan": self.plan.to_dict(),
            "space": self.space.to_dict(),
            "trials": self.trials,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def __repr__(self) -> str:
        entries = ", ".join(f"{k}={_format_value(v)}" for k, v in self.config.items())
        return f"TuneResult({entries}; {self.audit.metric} {self.audit.chosen_score:.4g})"

    def _repr_html_(self) -> str:
        ranked = self._ranked()
        names = list(dict.fromkeys(name for o in ranked for name in o.trial.config))
        rows = [
            (
                o.trial.budget,
                self._signed(o.score),
                *(_format_value(o.trial.config.get(n, "")) for n in names),
            )
            for o in ranked
        ]
        label = f"validation {self.audit.metric}"
        chart = notebook.svg_lines(self._curves(ranked), "epoch", label)
        head = ("epochs", label, *map(with_mode, names))
        return notebook.html_card(repr(self), str(self).splitlines(), head, rows, chart)

    def plot(self, *, ax: plotting.Axes | None = None) -> plotting.Display:
        """Plot the curves of the five best trials, and below the best score so far.

        Args:
            ax: two matplotlib axes to draw on; a new figure if None.

        Raises:
            InputError: if matplotlib is not installed.
        """
        display = plotting.canvas(ax, 1, 0.6)
        above, below = display.axes_
        label = f"validation {self.audit.metric}"
        plotting.lines(above, self._curves(self._ranked()), x="epoch", y=label)
        above.set_title(repr(self))
        scores = [self._signed(outcome.score) for outcome in self.history if not outcome.failed]
        places = range(1, len(scores) + 1)
        better = max if self.audit.maximised else min
        below.plot(places, scores, ".", color=plotting.GREY, label="trial")
        below.step(places, list(accumulate(scores, better)), where="post", label="best so far")
        below.set(
            xlabel="trials finished",
            ylabel=f"score ({'higher' if self.audit.maximised else 'lower'} is better)",
        )
        below.legend(fontsize="small")
        return display

    def _ranked(self) -> list[Outcome]:
        """Return finished trials, the longest trained and best first."""
        finished = (o for o in self.history if not o.failed)
        return sorted(finished, key=lambda o: (-o.trial.budget, o.score))

    def _signed(self, score: float) -> float:
        """Return a score with the metric's own sign."""
        return -score if self.audit.maximised else score

    def _curves(self, ranked: list[Outcome]) -> dict[str, Any]:
        """Return (epochs, scores) of the five best trials."""
        return {
            _title(o): ([e for e, _ in o.curve], [self._signed(score) for _, score in o.curve])
            for o in ranked[:5]
            if o.curve
        }

    def __str__(self) -> str:
        entries = ", ".join(f"{with_mode(k)} {_format_value(v)}" for k, v in self.config.items())
        lines = [f"chosen: {entries}", *self.audit.lines()]
        if self.stopped:
            lines.append(f"ended early: {self.stopped}")
        return "\n".join(lines)


def tune(
    build_model: Callable[..., nn.Module],
    train: Any,
    *,
    valid: object = None,
    loss: Any = "auto",
    metric: object = None,
    direction: str | None = None,
    space: Space | Mapping[str, Any] | None = None,
    budget: str | None = None,
    seed: int = 0,
    search: Search | Callable[[Space, SearchPlan], Search] | None = None,
    study: object = None,
    folds: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str | Callable[..., optim.Optimizer] = "adamw",
    device: str = "cpu",
    refit: bool = True,
    runner: Callable[[SearchJob, int], PopulationRunner] = PopulationRunner,
    output: str | Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> TuneResult:
    """Find the hyperparameters of a space in the time of a few trainings.

    Members train together where that is faster (measured first); strong regularization gets enough
    time before it is judged; for few rows, cross-validation folds are members too.

    Args:
        build_model: a function or class that returns a fresh model. Parameters named like entries
            of the space receive them, `**kwargs` the other entries unknown to training; a single
            other one (or one called config) receives the whole configuration.
        train: (x, y), where x may be several inputs, a loader, a data set or its name. Rows are
            read once; a loader's batch size and sampler are kept, redrawing each epoch.
        valid: rows for the scores. By default a fifth of `train` is held out, or 3 folds are used
            for fewer than 2,500 rows.
        loss: as for `fit`: a name, a torch function or module, a callable of (output, target) or
            of (model, batch). Members train one by one unless it is a mean over rows of one output
            tensor; `plan.reason` says why.
        metric: compares trials instead of the loss: the name of a scikit-learn scorer ("roc_auc",
            "f1_macro"), a scorer, or a function of (output, target) like the loss.
        direction: of a function, "minimize" or "maximize"; by default that of the study, of a
            torch loss, or its `higher_is_better`. Scorers are maximised.
        space: a Space or a mapping from names to entries; by default dropout (if the model has
            it), lr, and weight_decay="auto".
        budget: wall time such as "60s" or "5m", or "200runs" for the number of configurations,
            most of which halving trains only partly.
        seed: of initial weights, batches, noise and the design.
        search: a search, or a function (space, plan) -> search; guarded halving by default.
        study: an Optuna study that proposes trials, each trained fully, and receives the results.
        folds: number of folds, 0 for a held-out part.
        epochs, batch_size: length of a full training; by default from the number of rows.
        optimizer: name, class or factory of an elementwise optimizer.
        device: where to train.
        refit: retrain the best configurations on all rows.
        runner: called with the job and the chunk size, returns what trains the trials.
        output: folder for journal and states, which `resume` continues bit for bit.
        stop: called between epochs; once it returns true, results so far are returned (or
            `Stopped` raised if there are none).
        on_event: called with dicts that describe the progress.

    Raises `InputError` for a budget below one trial, fewer rows than folds, a validation set
    without a class, all members diverged, or a resume with another space or other data.

    >>> x = torch.randn(300, 5); y = (x[:, 0] * x[:, 1] > 0).long()
    >>> result = tune(lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2)),
    ...               (x, y), space=Space(lr=tk.Log(1e-3, 1e-1)), budget="4runs", epochs=8)
    >>> sorted(result.config), len(result.audit.lines()) >= 3
    (['lr'], True)
    """
    started, stop, on_event = time.perf_counter(), stop or never_stop, on_event or ignore_messages
    x, y, loader = read(train)
    held_out = None if valid is None else pair(valid, name="valid")
    loss = loss_of(loss, y)
    x, y = _prepare_rows(x, y, loss)
    held_out = None if held_out is None else _prepare_rows(*held_out, loss)
    check_classes(y, None if held_out is None else held_out[1])
    space = space if space is None or isinstance(space, Space) else Space(**space)
    builder = Builder(build_model, space or {}, slice_rows(x, slice(2)))
    space = space or default_space(builder)
    defaults = default_config(space)
    builder.check(space, defaults)
    job = make_job(
        builder,
        x,
        y,
        held_out,
        loss,
        folds,
        epochs,
        batch_size_of(train) if batch_size is None else batch_size,
        optimizer_of(optimizer),
        device,
        seed,
        metric,
        direction or direction_of(study, metric),
        loader,
    )
    if held_out is not None and loss.kind != "whole":
        check_model_accepts(build(job, defaults), job.x, slice_rows(job.scored[0], slice(2)))
    check_shared_entries(job, space, defaults)
    job.objective.probe(build(job, defaults), slice_rows((job.x, job.y), slice(_PROBED)))
    journal = open_journal(output, resume, space, job, budget)
    plan = _make_plan(job, space, budget, journal, fixed=epochs is not None)
    job = replace(job, epochs=plan.epochs)
    full = all_rows(job, x, y, held_out)
    expected = plan.expected(job.steps_per_epoch * job.folds, full.steps_per_epoch)
    planned = {"event": "plan", **plan.to_dict(), "reason": plan.reason, "expected": expected}
    on_event(planned | {"metric": job.metric})
    strategy = _make_search(search, study, job, space, plan)
    trainer = runner(job, plan.chunk)
    trainer.states = states = States(None if output is None else Path(output) / STATES)
    trainer.stop = stop
    trainer.progress = lambda event: on_event({"event": "epoch", **event})
    history = History() if journal is None else journal.history
    limit = math.inf if plan.seconds is None else plan.seconds
    reserve = _reserved_share(plan, full) if refit else MIN_RESERVE
    session = Session(trainer, states, history, journal, started, limit, stop, on_event, reserve)
    session.run(strategy)
    on_event({"event": "searched", "history": session.history})
    session.history = strategy.collect(session.history)
    session.finish(space, plan)
    return _build_result(job, full, space, plan, session, refit)


def _reserved_share(plan: SearchPlan, full: SearchJob) -> float:
    """Share of a time budget reserved for the untuned trial and an average of `TOP`."""
    if plan.seconds is None:
        return MIN_RESERVE
    steps = (TOP + 2) * plan.epochs * full.steps_per_epoch
    needed = 1.25 * steps * plan.microseconds[0][1] * 1e-6
    return min(max(needed / plan.seconds, MIN_RESERVE), MAX_RESERVE)


def _prepare_rows(x: Any, y: Tensor, loss: Loss) -> tuple[Any, Tensor]:
    """Return rows for training: a single named input becomes one tensor, unless a user's own step
    may use the name.
    """
    found = tensors(x)
    return found[0] if len(found) == 1 and loss.kind != "whole" else x, loss.targets(y)


def _build_result(
    job: SearchJob,
    full: SearchJob,
    space: Space,
    plan: SearchPlan,
    session: Session,
    refit: bool,
) -> TuneResult:
    history, states = session.history, session.states
    timed_out = session.ended == TIMED_OUT
    ends = [o for o in _final_trials(history, timed_out=timed_out) if o.trial.id in states]
    if not history:
        raise Stopped("before the first rung was complete")
    if not ends:
        failures = sorted({o.failure for o in history if o.failed})[:3]
        raise InputError(
            f"all {len(history)} trials failed ({'; '.join(failures)}): lower the learning rates "
            "of the space"
        )
    outputs = [_held_out_outputs(job, o.trial.config, states[o.trial.id]) for o in ends]
    rows = torch.stack([_row_losses(job, out) for out in outputs])
    configs = [o.trial.config for o in ends]
    weights = [-1.0 if o.trial.id == DEFAULT else space.weight(o.trial.config) for o in ends]
    chosen = choose(rows, weights, [repr(shared_entries(config)) for config in configs])
    default = next((k for k, o in enumerate(ends) if o.trial.id == DEFAULT), None)
    failed = sum(o.failed for o in history)
    epoch = session.untuned_epochs if default is None else ends[default].trial.budget
    search_audit = audit(
        space, configs, rows, chosen, default, failed, job.metric, default_epoch=epoch
    )
    top = _select_members(job, outputs, rows, chosen)
    refits = _refit(full, ends, top, session) if refit else []
    refitted_indices = {k for k, _ in refits}
    if not (timed_out and refitted_indices):  # partially trained members would degrade the mean
        refits += [(k, None) for k in dict.fromkeys(top) if k not in refitted_indices]
    refits.sort(key=lambda pair: pair[0] != chosen)
    parts = [  # members not retrained are the mean of their folds
        (k, fold, model)
        for k, model in refits
        for fold in range(job.folds if model is None else 1)
    ][:TOP]
    members = [
        _model(job, configs[k], states[ends[k].trial.id], fold, model) for k, fold, model in parts
    ]
    probabilities = job.objective.is_classification
    return TuneResult(
        model=members[0],
        average=Average(members, probabilities=probabilities).eval(),
        config=configs[chosen],
        history=history,
        audit=search_audit,
        plan=plan,
        space=space,
        seconds=time.perf_counter() - session.started,
        stopped=session.ended,
        members=tuple(configs[k] for k, *_ in parts),
        settings=settings_of(configs[chosen], job_of(full, ends[chosen].trial)),
    )


def _final_trials(history: History, *, timed_out: bool) -> list[Outcome]:
    """Return the longest trials and the default; all final states if time ran out."""
    tuned = without_default(history)
    default = (o for o in history if o.trial.id == DEFAULT and not o.failed)
    return [*(tuned.ends() if timed_out else tuned.ranked()), *default]


def _held_out_outputs(job: SearchJob, config: Config, state: State) -> Tensor:
    """Return outputs of the scored rows; with folds each by the fold that left it out.

    Without row losses, losses of blocks of rows for each fold.
    """
    population, by_fold = populate(job, [config]), []
    only_losses = job.metric is None and bool(job.objective.batch_only)
    for fold in range(job.folds):
        _load_fold(population, state, fold)
        fold_mask = None if job.fold_mask is None else job.fold_mask[fold : fold + 1]
        if only_losses:
            by_fold.append(validation_rows(job, population, fold_mask)[0])
        else:
            by_fold.append(population.predict(job.scored[0])[0])
    if only_losses:
        return torch.cat(by_fold)
    if job.fold_mask is None:
        return by_fold[0]
    return torch.stack(by_fold)[(1 - job.fold_mask).argmax(0), torch.arange(len(job.y))]


def _load_fold(population: Population, state: State, fold: int) -> None:
    """Load the state of one fold into a population of one member."""
    population.load({n: v[fold : fold + 1] for n, v in state.items() if n != "epoch"})


def _row_losses(job: SearchJob, outputs: Tensor) -> Tensor:
    """Return losses of rows or blocks, or pseudo-values of a metric."""
    if job.metric is not None:
        return job.metric.pseudo_values(outputs, job.scored[1])
    if job.objective.batch_only:
        return outputs
    return job.objective.rows(outputs[None], job.scored[1])[0]


def _select_members(job: SearchJob, outputs: list[Tensor], rows: Tensor, chosen: int) -> list[int]:
    """Select members to average, the chosen one first; repeated ones get new seeds.

    Where outputs cannot be averaged, those nearly as good as the best.
    """
    if job.objective.batch_only or outputs[0].ndim > 2:
        return [chosen, *[k for k in near_best(rows) if k != chosen]][:TOP]

    def score(out: Tensor) -> float:
        if job.metric is not None:
            return job.metric.score(out, job.scored[1])
        return float(job.objective.rows(out[None], job.scored[1]).mean())

    return blend(outputs, score, chosen, TOP, probabilities=job.objective.is_classification)


def _refit(
    full: SearchJob, ends: list[Outcome], top: list[int], session: Session
) -> list[tuple[int, State | None]]:
    """Retrain on all rows, each with the strengths found in its search.

    Up to `TOP` models as time allows: the configurations in `top` cyclically, each round with
    other initial weights, as averages gain from diversity. The default trains as long as it was
    judged.
    """
    trials, configs = [o.trial for o in ends], [o.trial.config for o in ends]
    pace = sum(session.pace(trials[k].id) for k in top) / len(top)
    cost = pace * full.epochs * len(full.y) / max(len(session.runner.job.y), 1)
    left = session.seconds_left
    count = min(TOP, int(0.8 * left / cost)) if math.isfinite(left) else TOP
    if session.should_stop() or count < 1:
        return []
    chosen = [top[i % len(top)] for i in range(count)]
    seeds = [
        int(configs[k].get("seed", full.seed)) + chosen[:i].count(k) for i, k in enumerate(chosen)
    ]
    wanted: list[Config] = [{**configs[k], "seed": seed} for k, seed in zip(chosen, seeds)]
    refitted: list[State | None] = [None] * count

    def stop() -> bool:
        return session.is_spent(1.05) or session.stop()

    jobs = [job_of(full, trials[k]) for k in chosen]
    traces = [_mean_trace(session, trials[k], job.epochs) for k, job in zip(chosen, jobs)]
    kinds = [(job.epochs, 0 if t is None else len(t)) for job, t in zip(jobs, traces)]
    for alike in _group_by_population(wanted, kinds):
        size = session.runner.group_size(wanted[alike[0]])
        for group in (alike[i : i + size] for i in range(0, len(alike), size)):
            configs_of, recorded = [wanted[k] for k in group], [traces[k] for k in group]
            for k, model in zip(group, train_fully(jobs[group[0]], configs_of, recorded, stop)):
                refitted[k] = model
    if None in refitted:
        session.should_stop()
    return [(k, model) for k, model in zip(chosen, refitted) if model is not None]


def _mean_trace(session: Session, trial: Trial, epochs: int) -> Tensor | None:
    """Return a trial's adapted strengths, averaged over folds; None without any.

    For a trial cut short, the last strengths are repeated.
    """
    if (trace := session.states[trial.id].get("decay.trace")) is None:
        return None
    mean = trace.mean(0)
    missing = len(mean) * epochs // trial.budget - len(mean)
    return torch.cat([mean, mean[-1:].expand(max(missing, 0), -1)])


def _group_by_population(configs: list[Config], kinds: list[tuple[int, int]]) -> list[list[int]]:
    """Group the indices of configurations that one population can train."""
    groups: dict[str, list[int]] = {}
    for k, config in enumerate(configs):
        adapts = config.get("weight_decay") == "auto"
        key = (sorted(config), adapts, shared_entries(config), kinds[k])
        groups.setdefault(repr(key), []).append(k)
    return list(groups.values())


def _model(
    job: SearchJob, config: Config, state: State, fold: int, refitted: State | None
) -> nn.Module:
    population = populate(job, [config])
    _load_fold(population, state, fold)
    model = population.model
    for module in model.modules():
        if hasattr(module, "generator"):
            cast(Any, module).generator = None
    if refitted is not None:
        model.load_state_dict(refitted)
    return model.eval()


def _make_search(
    search: Search | Callable[[Space, SearchPlan], Search] | None,
    study: object,
    job: SearchJob,
    space: Space,
    plan: SearchPlan,
) -> Search:
    if study is not None:
        if search is not None:
            raise InputError("study and search both say how to search: give one of them")
        maximised = job.metric is not None and job.metric.maximised
        batch = min(max(plan.chunk // job.folds, 1), 16)
        return StudySearch(space, study, plan.members, batch, plan.epochs, maximised)
    if isinstance(search, Search):
        return search
    if callable(search):
        return search(space, plan)
    if search is not None:
        raise InputError(
            f"search must be a search or a function (space, plan) -> search, received {search!r}: "
            "to name a sampler, give study=optuna.create_study(sampler=...)"
        )
    first = tuple(configs_near_defaults(space, plan.members // 4))
    design = SpaceFilling(space, count=plan.members, seed=job.seed, first=first)
    return Halving(space, design, full=plan.epochs)


def _make_plan(
    job: SearchJob, space: Space, budget: str | None, journal: SearchJournal | None, *, fixed: bool
) -> SearchPlan:
    if journal is not None and journal.plan is not None:
        try:
            plan = SearchPlan(**journal.plan)
        except TypeError as error:
            raise journal.record.malformed(error) from error
        if plan.threads not in (0, threads := torch.get_num_threads()):
            warn(
                f"tune: this search began with {plan.threads} threads of torch and goes on with "
                f"{threads}: what is trained from here on agrees to rounding with what one run "
                f"would have found, not in every bit; torch.set_num_threads({plan.threads}) "
                "repeats it"
            )
        return plan
    plan = make_plan(job, space, budget, fixed=fixed)
    if journal is not None:
        journal.record_plan(plan.to_dict())
    return plan


def _format_value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _title(outcome: Outcome) -> str:
    return "the default" if outcome.trial.id == DEFAULT else f"trial {outcome.trial.id}"
