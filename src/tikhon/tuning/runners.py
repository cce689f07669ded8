"""Train the trials of a search in chunks of chosen size, resumable bit for bit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from tikhon.data.nested import slice_rows, take_rows
from tikhon.population.batched import Unsupported
from tikhon.population.decay import ReplayedDecay
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses, weighted_mean
from tikhon.population.population import Population
from tikhon.runs.interrupt import Stopped, ignore_messages, never_stop
from tikhon.training.settings import OPTIMIZERS
from tikhon.tuning.draws import Draws
from tikhon.tuning.metric import Metric, blocks_of
from tikhon.tuning.space import known
from tikhon.tuning.states import State
from tikhon.tuning.trials import DEFAULT, Config, Outcome, Trial, Value

SIZES = (1, 4, 8, 16, 32, 64)
VALIDATION_ROWS = 64  # rows of a validation batch for adaptive strengths


@dataclass(frozen=True, eq=False)
class SearchJob:
    """The fixed part of all trials: data, loss and settings other than hyperparameters.

    `fold_mask` (folds, rows) is 1 for the rows that a fold trains on; without folds it is None and
    `valid` gives the scores (if None, nothing is scored). A member trained alone sees only its
    fold's rows; in a population the others have weight 0.
    """

    build: Callable[[Config], nn.Module]
    x: Any  # one tensor, or several inputs
    y: Tensor
    objective: RowLosses
    epochs: int
    batch_size: int
    valid: tuple[Any, Tensor] | None = None
    fold_mask: Tensor | None = None
    optimizer: Callable[..., optim.Optimizer] = optim.AdamW
    seed: int = 0
    metric: Metric | None = None  # compares trials, by default the loss
    loader: DataLoader[Any] | None = None  # draws rows if not simply shuffled,
    positions: Tensor | None = None  # and positions of the drawn rows in `x`: see `Draws`
    batching: dict[Hashable, tuple[bool, str]] = field(default_factory=dict)  # by `can_batch`

    @property
    def scored(self) -> tuple[Any, Tensor]:
        """Rows that are scored; with folds all rows, each by the fold that left it out."""
        return (self.x, self.y) if self.valid is None else self.valid

    @property
    def folds(self) -> int:
        """Members needed for one trial."""
        return 1 if self.fold_mask is None else len(self.fold_mask)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.draws.batches

    @property
    def draws(self) -> Draws:
        """The rows of each batch."""
        return Draws(len(self.y), self.batch_size, self.seed, self.loader, self.positions)

    @property
    def checks(self) -> int:
        """Epochs between validations."""
        return max(1, self.epochs // 20)


@dataclass(frozen=True)
class FoldUnit:
    """One member to train: a trial on one fold."""

    trial: Trial
    fold: int


@dataclass(frozen=True, eq=False)
class UnitResult:
    """Result of one unit: its state unless it failed, and the validation loss by epoch."""

    state: State | None
    curve: list[tuple[int, float]]
    failure: str
    seconds: float
    epochs: int


UnitResults = dict[tuple[int, int], UnitResult]  # by trial and fold


@dataclass(eq=False)
class PopulationRunner:
    """Train up to `chunk` members at once; `chunk=1` is plain PyTorch, one after another.

    States are kept, so that later trials can continue them.
    """

    job: SearchJob
    chunk: int = 1
    states: MutableMapping[int, State] = field(default_factory=dict)
    progress: Callable[[dict[str, Any]], None] = ignore_messages
    stop: Callable[[], bool] = never_stop
    expired: Callable[[float], bool] = lambda ahead: False

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Train every trial from its parent's state to its own budget.

        Once `expired(0)`, members stop after the current epoch (their outcomes have the shorter
        budget) and the rest is skipped; at least one trial is finished. Folds that train one after
        another get the epochs of the first, which stops while `expired(ahead)` still leaves
        seconds for the others.
        """
        folds = range(self.job.folds)
        results: UnitResults = {}  # of trials with folds left to train
        epochs: dict[int, int] = {}  # of trials begun
        finished: dict[int, Outcome] = {}
        for chunk in self._chunks([FoldUnit(trial, fold) for trial in trials for fold in folds]):
            until = min((epochs[u.trial.id] for u in chunk if u.trial.id in epochs), default=None)
            results |= self._train(chunk, until)
            epochs |= {unit.trial.id: results[unit.trial.id, unit.fold].epochs for unit in chunk}
            for trial in trials:
                if all((trial.id, fold) in results for fold in folds):
                    parts = [results.pop((trial.id, fold)) for fold in folds]
                    finished[trial.id] = self._finish_trial(trial, parts)
            if finished and self.expired(0.0):
                break
        return [finished[trial.id] for trial in trials if trial.id in finished]

    def _finish_trial(self, trial: Trial, fold_results: Sequence[UnitResult]) -> Outcome:
        """Return the outcome of a trial, and keep its state."""
        trial = replace(trial, budget=fold_results[0].epochs)
        states = [part.state for part in fold_results if part.state is not None]
        if len(states) == len(fold_results):
            self.states[trial.id] = {
                name: torch.stack([state[name] for state in states]) for name in states[0]
            }
        return self._outcome(trial, fold_results)

    def _chunks(self, units: list[FoldUnit]) -> Iterable[list[FoldUnit]]:
        """Yield units that can train together: equal length, kinds of settings and model."""
        parents = {u.trial.parent for u in units if u.trial.parent is not None}
        starts = {p: int(self.states[p]["epoch"][0]) for p in parents if p in self.states}

        def key_of(unit: FoldUnit) -> str:
            config = {k: v == "auto" for k, v in sorted(unit.trial.config.items())}
            parent = unit.trial.parent
            start = 0 if parent is None else starts.get(parent, 0)
            return repr((unit.trial.budget, start, config, shared_entries(unit.trial.config)))

        for _, group in groupby(sorted(units, key=key_of), key=key_of):
            members = list(group)
            size = self.group_size(members[0].trial.config)
            for i in range(0, len(members), size):
                yield members[i : i + size]

    def group_size(self, config: Config) -> int:
        """Return how many members of this model can train at once."""
        return self.chunk if self.chunk > 1 and can_batch(self.job, config)[0] else 1

    def _train(self, units: list[FoldUnit], until: int | None) -> UnitResults:
        """Train until that epoch; if None, to the budget of the trials or until time is up."""
        first, started = units[0].trial, time.perf_counter()
        others = math.ceil(self.job.folds / len(units)) - 1  # groups of folds to train as long
        job = job_of(self.job, first)
        population = populate(job, [unit.trial.config for unit in units])
        start = 0
        if first.parent is not None:
            parents = [u.trial.parent for u in units if u.trial.parent is not None]
            folds = [(self.states[p], u.fold) for p, u in zip(parents, units)]
            state = {n: torch.stack([part[n][fold] for part, fold in folds]) for n in folds[0][0]}
            start = int(state.pop("epoch")[0])
            population.load(state)
        fold_mask = None if job.fold_mask is None else job.fold_mask[[unit.fold for unit in units]]
        curves: list[list[tuple[int, float]]] = [[] for _ in units]
        last = until or first.budget
        for epoch in range(start, last):
            if self.stop():
                raise Stopped
            losses = train_epoch(job, population, fold_mask, epoch)
            for member in (~losses.isfinite()).nonzero().flatten().tolist():
                if member not in population.failed:
                    population.fail(member, f"diverged in epoch {epoch + 1}")
            ahead = others * (time.perf_counter() - started)
            last = epoch + 1 if until is None and self.expired(ahead) else last
            if (epoch + 1) % job.checks == 0 or epoch + 1 == last:
                for member, loss in enumerate(validation(job, population, fold_mask).tolist()):
                    if member not in population.failed:
                        curves[member].append((epoch + 1, loss))
            self.progress({"epoch": epoch + 1, "budget": first.budget, "members": len(units)})
            if len(population.failed) == len(units) or epoch + 1 == last:
                break
        seconds = (time.perf_counter() - started) / len(units)
        state = population.state()
        results: UnitResults = {}
        for member, unit in enumerate(units):
            failure = population.failed.get(member, "")
            row = None if failure else {name: value[member] for name, value in state.items()}
            if row is not None:
                row["epoch"] = torch.tensor(last)
            result = UnitResult(row, curves[member], failure, seconds, last)
            results[unit.trial.id, unit.fold] = result
        return results

    def _outcome(self, trial: Trial, fold_results: Sequence[UnitResult]) -> Outcome:
        failure = next((part.failure for part in fold_results if part.failure), "")
        seconds = sum(part.seconds for part in fold_results)
        if failure:
            return Outcome(trial, math.nan, seconds, failure=failure)
        epochs = [epoch for epoch, _ in fold_results[0].curve]
        losses = zip(*([loss for _, loss in part.curve] for part in fold_results))
        curve = tuple(zip(epochs, (sum(folds) / len(folds) for folds in losses)))
        last = [loss for _, loss in curve[-3:]]  # average, as one check is noisy
        finals = torch.tensor([loss for part in fold_results for _, loss in part.curve[-1:]])
        error = float(finals.std() / math.sqrt(len(finals))) if len(finals) > 1 else 0.0
        strengths = {}
        trace = self.states[trial.id].get("decay.trace")  # (folds, updates, layers)
        if trace is not None:
            found = trace[:, -1].mean(0).exp().tolist()
            strengths = {f"layer {i + 1}": strength for i, strength in enumerate(found)}
        score = sum(last) / len(last) if last else 0.0
        if not math.isfinite(score):
            return Outcome(trial, math.nan, seconds, failure="the validation score is not finite")
        return Outcome(trial, score, seconds, error, curve=curve, strengths=strengths)


def job_of(job: SearchJob, trial: Trial) -> SearchJob:
    """Return the job of a trial: with its own batch size and optimizer, if the space varies them,
    and for the default a schedule of its own length.
    """
    job = replace(job, epochs=trial.budget) if trial.id == DEFAULT else job
    return with_settings(job, trial.config)


def with_settings(job: SearchJob, config: Config) -> SearchJob:
    """Return the job with the batch size and the optimizer of a configuration."""
    name = config.get("optimizer")
    return replace(
        job,
        batch_size=int(config.get("batch_size", job.batch_size)),
        optimizer=job.optimizer if name is None else OPTIMIZERS[str(name)],
    )


def populate(job: SearchJob, configs: Sequence[Config]) -> Population:
    """Return freshly initialised members; equal seeds give equal initial weights."""
    job = with_settings(job, configs[0])
    return Population(
        [build(job, config) for config in configs],
        Hyperparameters.of(configs),
        objective=job.objective,
        example=slice_rows(job.x, slice(2)),
        steps=job.epochs * job.steps_per_epoch,
        optimizer=job.optimizer,
    )


def build(job: SearchJob, config: Config) -> nn.Module:
    """Build the freshly initialised model of a configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(config.get("seed", job.seed)))
        return job.build(config).to(job.y.device)


def shared_entries(config: Config) -> list[tuple[str, Value]]:
    """Return the entries that members trained together have in common."""
    shared = ("batch_size", "optimizer")
    return sorted((n, value) for n, value in config.items() if n in shared or not known(n))


def train_epoch(
    job: SearchJob, population: Population, fold_mask: Tensor | None, epoch: int
) -> Tensor:
    """Train one epoch; return the sum of losses (members,), non-finite if any was."""
    batches = job.draws.epoch(epoch)
    drawn, sizes = torch.cat(batches).to(job.y.device), [len(batch) for batch in batches]
    weights = [None] * len(sizes) if fold_mask is None else fold_mask[:, drawn].split(sizes, dim=1)
    ys = job.y[drawn].split(sizes)
    if isinstance(job.x, Tensor):
        xs = job.x[drawn].split(sizes)
    else:
        xs = (take_rows(job.x, batch) for batch in batches)
    total = torch.zeros(population.members, device=job.y.device)
    step = epoch * job.steps_per_epoch
    for x, y, weight in zip(xs, ys, weights):
        seed = (job.seed * 1_000_003 + step) * 2_654_435_761 % 2**62  # of noise; nothing to resume
        total += population.step(x, y, weight, step, seed=seed)
        if population.decay is not None and population.decay.due(step):
            population.adapt(*_validation_batch(job, fold_mask, step), step)
        step += 1
    return total


def _validation_batch(
    job: SearchJob, fold_mask: Tensor | None, step: int
) -> tuple[Tensor, Tensor, Any]:
    x, y = (job.x, job.y) if job.valid is None else job.valid
    size = min(VALIDATION_ROWS * job.folds, len(y))  # each fold left out its share of these
    start = (step * size) % max(len(y) - size + 1, 1)
    rows = slice(start, start + size)
    part = slice_rows((x, y), rows)
    return *part, None if fold_mask is None else 1 - fold_mask[:, rows]


def validation_rows(job: SearchJob, population: Population, fold_mask: Tensor | None) -> Tensor:
    """Return losses (members, rows) of the scored rows.

    Without row losses, those of blocks of the rows left out by the only member.
    """
    x, y = job.scored
    if not job.objective.batch_only:
        return population.row_losses(x, y)
    if fold_mask is not None:
        x, y = take_rows((x, y), (fold_mask[0] == 0).nonzero()[:, 0])
    return population.block_losses(x, y, blocks_of(y))


def validation(job: SearchJob, population: Population, fold_mask: Tensor | None) -> Tensor:
    """Return scores (members,): mean validation losses, or the metric if there is one."""
    if job.valid is None and fold_mask is None:
        return torch.zeros(population.members)
    if job.metric is not None:
        x, y = job.scored
        outputs = population.predict(x)
        held_out = torch.ones(len(outputs), len(y)) if fold_mask is None else 1 - fold_mask
        out = [job.metric.score(o[part > 0], y[part > 0]) for o, part in zip(outputs, held_out)]
        return torch.tensor(out, dtype=torch.float64)
    rows = validation_rows(job, population, fold_mask)
    return weighted_mean(
        rows, None if fold_mask is None or job.objective.batch_only else 1 - fold_mask
    )


def train_fully(
    job: SearchJob,
    configs: Sequence[Config],
    traces: Sequence[Tensor | None],
    stop: Callable[[], bool] = never_stop,
) -> list[dict[str, Tensor] | None]:
    """Train each configuration fully; return state dicts. `traces` replay earlier strengths.

    None for a member that diverges, and for all if `stop` returns true before the end.
    """
    job = with_settings(job, configs[0])
    population = populate(job, configs)
    if population.decay is not None:
        found = torch.stack([trace for trace in traces if trace is not None])
        population.decay = ReplayedDecay(
            population.decay.weights, found, lr=population.layer_rates(), steps=population.steps
        )
    losses = torch.zeros(len(configs))
    for epoch in range(job.epochs):
        if stop():
            return [None] * len(configs)
        losses = train_epoch(job, population, None, epoch)
    finite = losses.isfinite().tolist()
    return [
        population.state_dict_of(k) if is_finite else None for k, is_finite in enumerate(finite)
    ]


SATURATING_WORK = 11_000_000  # parameters times batch size times members that saturate a CPU
CACHED_PARAMETERS = 320_000  # total parameters of all members that fit in a core's cache
TIMED_MODELS = 4  # models of a space that are timed
FLOPS = 200_000_000  # FLOPs of a forward pass of all members, from which convolutions saturate it
ACCELERATOR = 50  # factor on both for an accelerator
UNBATCHED_LAYERS = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.RNNBase,
)  # no batching rule


def choose_chunk(job: SearchJob, configs: Sequence[Config]) -> tuple[int, str]:
    """Choose the number of members to train at once, and the reason for not more.

    Depends only on model and batch: timing would depend on the machine's load, while the chunk
    size affects rounding, so that equal searches must choose equally. The limits fit the fastest
    sizes in `benchmarks/tune.py`, measured on an idle core for perceptrons and small convolutions.
    """
    if job.objective.batch_only:
        return 1, job.objective.batch_only
    groups = _by_model(configs)
    answers = [can_batch(job, group[0]) for group in groups]
    batchable = [group for group, (can, _) in zip(groups, answers) if can]
    reason = next((why_not for can, why_not in answers if not can), answers[0][1])
    if not batchable:
        return 1, reason
    model = build(job, batchable[0][0])
    rows = max(with_settings(job, group[0]).batch_size for group in batchable)
    max_members = max(map(len, batchable)) * job.folds
    size = sum(p.numel() for p in model.parameters())
    factor = 1 if job.y.device.type == "cpu" else ACCELERATOR
    members = factor * _saturating_rows(job, model, size) // min(rows, len(job.y))
    sizes = [
        s
        for s in SIZES
        if s <= min(max_members, members) and s * size <= factor * CACHED_PARAMETERS
    ]
    return max(sizes, default=1), reason


def can_batch(job: SearchJob, config: Config) -> tuple[bool, str]:
    """Return whether members with this model can train at once; and why not, or why not by the
    fastest route. A model is built and tried once for each kind, kept by the job.
    """
    if job.objective.batch_only:
        return False, job.objective.batch_only
    of_builder = sorted((name, value) for name, value in config.items() if not known(name))
    kind = (job.build, job.fold_mask is None, repr(of_builder))
    if kind not in job.batching:
        job.batching[kind] = _try_batching(job, config)
    return job.batching[kind]


def _try_batching(job: SearchJob, config: Config) -> tuple[bool, str]:
    model = build(job, config)
    if job.fold_mask is not None and any("running_mean" in name for name in model.state_dict()):
        return False, "batch normalisation would see the rows of the held-out fold"
    if found := next((m for m in model.modules() if isinstance(m, UNBATCHED_LAYERS)), None):
        return False, f"{type(found).__name__} has no batched form that is faster"
    try:
        return True, populate(job, [config] * 2).reason
    except Unsupported as error:
        return False, str(error)


def _by_model(configs: Sequence[Config]) -> list[list[Config]]:
    groups: dict[str, list[Config]] = {}
    for config in configs:
        groups.setdefault(repr(shared_entries(config)), []).append(config)
    return list(groups.values())


def _saturating_rows(job: SearchJob, model: nn.Module, size: int) -> int:
    """Return the rows, over all members, that saturate a CPU; convolutions reuse their weights."""
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return SATURATING_WORK // size
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(slice_rows(job.x, slice(1)))
    return FLOPS // max(counter.get_total_flops(), 1)


def step_time(job: SearchJob, configs: Sequence[Config], chunk: int) -> float:
    """Microseconds of a step of one member of the costliest model, at this chunk size.

    Where batch sizes differ, as many of them as there are steps of the job's own size in an epoch.
    """
    groups = _by_model(configs)
    sampled = groups[:: math.ceil(len(groups) / TIMED_MODELS)]
    sizes = [chunk if chunk > 1 and can_batch(job, group[0])[0] else 1 for group in sampled]
    return max(_member_step_time(job, group, size) for group, size in zip(sampled, sizes))


def _member_step_time(job: SearchJob, configs: Sequence[Config], chunk: int) -> float:
    """Time a step of one member of a model in microseconds, including adaptive strengths."""
    members = [configs[i % len(configs)] for i in range(chunk)]
    own_steps, job = job.steps_per_epoch, with_settings(job, configs[0])
    fold_mask = None
    if job.fold_mask is not None:
        fold_mask = job.fold_mask[[i % job.folds for i in range(chunk)]]
    population = populate(job, members)
    microseconds(job, population, fold_mask, 1)  # warm-up
    microseconds_per_step = microseconds(job, population, fold_mask)
    if population.decay is not None:
        update = population.decay.every - 1
        batch = _validation_batch(job, fold_mask, update)
        adapting = _median_microseconds(lambda step: population.adapt(*batch, update), 4)
        microseconds_per_step += adapting / population.decay.every
    return microseconds_per_step / chunk * job.steps_per_epoch / own_steps


def microseconds(
    job: SearchJob, population: Population, fold_mask: Tensor | None = None, repeats: int = 8
) -> float:
    """Median time of a step of all members, which includes the machine's load."""
    x, y = slice_rows((job.x, job.y), slice(job.batch_size))
    weights = None if fold_mask is None else fold_mask[:, : job.batch_size]
    return _median_microseconds(
        lambda step: population.step(x, y, weights, step, seed=step), repeats
    )


def _median_microseconds(run: Callable[[int], object], repeats: int) -> float:
    times = []
    for step in range(repeats + 2):
        start = time.perf_counter_ns()  # wall time, as in budgets
        run(step)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times[2:]) / 1e3
