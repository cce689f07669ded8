"""Train the trials of a search in chunks of chosen size, resumable bit for bit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
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
from tikhon.tuning.draws import Draws
from tikhon.tuning.metric import Metric, blocks_of
from tikhon.tuning.space import known
from tikhon.tuning.trials import DEFAULT, Outcome, Trial, Value

SIZES = (1, 4, 8, 16, 32, 64)
VALIDATION = 64  # rows of a validation batch for adaptive strengths
Config = Mapping[str, Value]
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class SearchJob:
    """The fixed part of all trials: data, loss and settings other than hyperparameters.

    `kept` (folds, rows) is 1 for the rows that a fold trains on; without folds it is None and
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
    kept: Tensor | None = None
    optimizer: Callable[..., optim.Optimizer] = optim.AdamW
    seed: int = 0
    metric: Metric | None = None  # compares trials, by default the loss
    loader: DataLoader[Any] | None = None  # draws rows if not simply shuffled,
    place: Tensor | None = None  # and positions of the drawn rows in `x`: see `Draws`

    @property
    def scored(self) -> tuple[Any, Tensor]:
        """Rows that are scored; with folds all rows, each by the fold that left it out."""
        return (self.x, self.y) if self.valid is None else self.valid

    @property
    def folds(self) -> int:
        """Members needed for one trial."""
        return 1 if self.kept is None else len(self.kept)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.draws.batches

    @property
    def draws(self) -> Draws:
        """The rows of each batch."""
        return Draws(len(self.y), self.batch_size, self.seed, self.loader, self.place)

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
class Trained:
    """Result of one unit: its state unless it failed, and the validation loss by epoch."""

    state: State | None
    curve: list[tuple[int, float]]
    failure: str
    seconds: float
    epochs: int


Found = dict[tuple[int, int], Trained]  # by trial and fold


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
    expired: Callable[[], bool] = never_stop
    _beside: dict[str, int] = field(default_factory=dict)

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Train every trial from its parent's state to its own budget.

        Once `expired`, members stop after the current epoch (their outcomes have the shorter
        budget) and the rest is skipped; at least one trial is finished.
        """
        units = [FoldUnit(trial, fold) for trial in trials for fold in range(self.job.folds)]
        found: Found = {}
        done: list[tuple[int, int]] = []
        ended: dict[int, Outcome | None] = {}
        for chunk in self._chunks(units):
            done += [(unit.trial.id, unit.fold) for unit in chunk]
            whole = self._whole(trials, done)
            found.update(self._train(chunk, self.expired if whole else lambda: False))
            ended |= {t.id: self._ended(t, found) for t in whole if t.id not in ended}
            if whole and self.expired():
                break
        outcomes = (ended.get(trial.id) for trial in trials)
        return [outcome for outcome in outcomes if outcome is not None]

    def _ended(self, trial: Trial, found: Found) -> Outcome | None:
        """Return the outcome of a trial with all folds found, and keep its state.

        None if its folds ended at different epochs.
        """
        parts = [found.pop((trial.id, fold)) for fold in range(self.job.folds)]
        if len({part.epochs for part in parts}) > 1:
            return None
        trial = replace(trial, budget=parts[0].epochs)
        states = [part.state for part in parts if part.state is not None]
        if len(states) == len(parts):
            self.states[trial.id] = {
                name: torch.stack([state[name] for state in states]) for name in states[0]
            }
        return self._outcome(trial, parts)

    def _whole(self, trials: Sequence[Trial], done: Iterable[tuple[int, int]]) -> list[Trial]:
        """Return the trials with all folds in `done`."""
        known = set(done)
        folds = range(self.job.folds)
        return [t for t in trials if all((t.id, fold) in known for fold in folds)]

    def _chunks(self, units: list[FoldUnit]) -> Iterable[list[FoldUnit]]:
        """Yield units that can train together: equal length, kinds of settings and model."""
        parents = {u.trial.parent for u in units if u.trial.parent is not None}
        starts = {p: int(self.states[p]["epoch"][0]) for p in parents if p in self.states}

        def alike(unit: FoldUnit) -> str:
            config = {k: v == "auto" for k, v in sorted(unit.trial.config.items())}
            parent = unit.trial.parent
            start = 0 if parent is None else starts.get(parent, 0)
            return repr((unit.trial.budget, start, config, free(unit.trial.config)))

        for _, group in groupby(sorted(units, key=alike), key=alike):
            members = list(group)
            size = self.beside(members[0].trial.config)
            for i in range(0, len(members), size):
                yield members[i : i + size]

    def beside(self, config: Config) -> int:
        """Return how many members of this model can train at once."""
        kind = repr(free(config))
        if kind not in self._beside:
            alone = self.chunk == 1 or not together(self.job, config)[0]
            self._beside[kind] = 1 if alone else self.chunk
        return self._beside[kind]

    def _train(self, units: list[FoldUnit], expired: Callable[[], bool]) -> Found:
        first, started = units[0].trial, time.perf_counter()
        job = as_judged(self.job, first)
        population = populate(job, [unit.trial.config for unit in units])
        start = 0
        if first.parent is not None:
            parents = [u.trial.parent for u in units if u.trial.parent is not None]
            rows = [_row(self.states[p], u.fold) for p, u in zip(parents, units)]
            start = int(rows[0].pop("epoch"))
            stacked = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
            population.load(stacked)
        kept = None if job.kept is None else job.kept[[unit.fold for unit in units]]
        curves: list[list[tuple[int, float]]] = [[] for _ in units]
        last = first.budget
        for epoch in range(start, first.budget):
            if self.stop():
                raise Stopped
            losses = train_epoch(job, population, kept, epoch)
            for member in (~losses.isfinite()).nonzero().flatten().tolist():
                if member not in population.failed:
                    population.fail(member, f"diverged in epoch {epoch + 1}")
            last = epoch + 1 if expired() else last
            if (epoch + 1) % job.checks == 0 or epoch + 1 == last:
                for member, loss in enumerate(validation(job, population, kept).tolist()):
                    if member not in population.failed:
                        curves[member].append((epoch + 1, loss))
            self.progress({"epoch": epoch + 1, "budget": first.budget, "members": len(units)})
            if len(population.failed) == len(units) or epoch + 1 == last:
                break
        seconds = (time.perf_counter() - started) / len(units)
        state = population.state()
        found: Found = {}
        for member, unit in enumerate(units):
            why = population.failed.get(member, "")
            row = None if why else {name: value[member] for name, value in state.items()}
            if row is not None:
                row["epoch"] = torch.tensor(last)
            found[unit.trial.id, unit.fold] = Trained(row, curves[member], why, seconds, last)
        return found

    def _outcome(self, trial: Trial, parts: Sequence[Trained]) -> Outcome:
        why = next((part.failure for part in parts if part.failure), "")
        seconds = sum(part.seconds for part in parts)
        if why:
            return Outcome(trial, math.nan, seconds, failure=why)
        epochs = [epoch for epoch, _ in parts[0].curve]
        losses = zip(*([loss for _, loss in part.curve] for part in parts))
        curve = tuple(zip(epochs, (sum(folds) / len(folds) for folds in losses)))
        last = [loss for _, loss in curve[-3:]]  # average, as one check is noisy
        finals = torch.tensor([loss for part in parts for _, loss in part.curve[-1:]])
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


def as_judged(job: SearchJob, trial: Trial) -> SearchJob:
    """Return the job of a trial: the default has a schedule of its own length."""
    return replace(job, epochs=trial.budget) if trial.id == DEFAULT else job


def populate(job: SearchJob, configs: Sequence[Config]) -> Population:
    """Return freshly initialised members; equal seeds give equal initial weights."""
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


def free(config: Config) -> list[tuple[str, Value]]:
    """Return the entries known only to the builder, which may change the model's computation."""
    return sorted((name, value) for name, value in config.items() if not known(name))


def _row(state: State, fold: int) -> State:
    return {name: value[fold] for name, value in state.items()}


def train_epoch(job: SearchJob, population: Population, kept: Tensor | None, epoch: int) -> Tensor:
    """Train one epoch; return the sum of losses (members,), non-finite if any was."""
    batches = job.draws.epoch(epoch)
    drawn, sizes = torch.cat(batches).to(job.y.device), [len(batch) for batch in batches]
    weights = [None] * len(sizes) if kept is None else kept[:, drawn].split(sizes, dim=1)
    ys = job.y[drawn].split(sizes)
    if isinstance(job.x, Tensor):
        xs = job.x[drawn].split(sizes)
    else:
        xs = (take_rows(job.x, batch) for batch in batches)
    total = torch.zeros(population.members, device=job.y.device)
    step = epoch * job.steps_per_epoch
    for x, y, weight in zip(xs, ys, weights):
        total += population.step(x, y, weight, step, seed=noise_seed(job.seed, step))
        if population.decay is not None and population.decay.due(step):
            population.adapt(*_validation_batch(job, kept, step), step)
        step += 1
    return total


def noise_seed(seed: int, step: int) -> int:
    """Return the seed of a step's noise; stateless, so nothing is stored for resuming."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**62


def _validation_batch(
    job: SearchJob, kept: Tensor | None, step: int
) -> tuple[Tensor, Tensor, Any]:
    x, y = (job.x, job.y) if job.valid is None else job.valid
    size = min(VALIDATION * job.folds, len(y))  # each fold left out its share of these
    begin = (step * size) % max(len(y) - size + 1, 1)
    rows = slice(begin, begin + size)
    part = slice_rows((x, y), rows)
    return *part, None if kept is None else 1 - kept[:, rows]


def validation_rows(job: SearchJob, population: Population, kept: Tensor | None) -> Tensor:
    """Return losses (members, rows) of the scored rows.

    Without row losses, those of blocks of the rows left out by the only member.
    """
    x, y = job.scored
    if not job.objective.batch_only:
        return population.row_losses(x, y)
    if kept is not None:
        x, y = take_rows((x, y), (kept[0] == 0).nonzero()[:, 0])
    return population.block_losses(x, y, blocks_of(y))


def validation(job: SearchJob, population: Population, kept: Tensor | None) -> Tensor:
    """Return scores (members,): mean validation losses, or the metric if there is one."""
    if job.valid is None and kept is None:
        return torch.zeros(population.members)
    if job.metric is not None:
        x, y = job.scored
        outputs = population.predict(x)
        left = torch.ones(len(outputs), len(y)) if kept is None else 1 - kept
        out = [job.metric.score(o[part > 0], y[part > 0]) for o, part in zip(outputs, left)]
        return torch.tensor(out, dtype=torch.float64)
    rows = validation_rows(job, population, kept)
    return weighted_mean(rows, None if kept is None or job.objective.batch_only else 1 - kept)


def train_on_all(
    job: SearchJob,
    configs: Sequence[Config],
    traces: Sequence[Tensor | None],
    stop: Callable[[], bool] = never_stop,
) -> list[dict[str, Tensor] | None]:
    """Train each configuration fully; return state dicts. `traces` replay earlier strengths.

    None for a member that diverges, and for all if `stop` returns true before the end.
    """
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
    healthy = losses.isfinite().tolist()
    return [population.state_dict_of(k) if fine else None for k, fine in enumerate(healthy)]


WORK = 11_000_000  # parameters times batch size times members that saturate a CPU
CACHED = 320_000  # total parameters of all members that fit in a core's cache
TIMED = 4  # models of a space that are timed
FLOPS = 200_000_000  # FLOPs of a forward pass of all members, from which convolutions saturate it
ACCELERATOR = 50  # factor on both for an accelerator
ALONE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)  # no batching rule


def choose_chunk(job: SearchJob, configs: Sequence[Config]) -> tuple[int, str]:
    """Choose the number of members to train at once, and the reason for not more.

    Depends only on model and batch: timing would depend on the machine's load, while the chunk
    size affects rounding, so that equal searches must choose equally. The limits fit the fastest
    sizes in `benchmarks/tune.py`, measured on an idle core for perceptrons and small convolutions.
    """
    if job.objective.batch_only:
        return 1, job.objective.batch_only
    groups = _by_model(configs)
    found = [together(job, group[0]) for group in groups]
    fits = [group for group, (fine, _) in zip(groups, found) if fine]
    reason = next((why for fine, why in found if not fine), found[0][1])
    if not fits:
        return 1, reason
    model = build(job, fits[0][0])
    most = max(map(len, fits)) * job.folds
    size = sum(p.numel() for p in model.parameters())
    room = 1 if job.y.device.type == "cpu" else ACCELERATOR
    members = room * _room(job, model, size) // min(job.batch_size, len(job.y))
    sizes = [s for s in SIZES if s <= min(most, members) and s * size <= room * CACHED]
    return max(sizes, default=1), reason


def together(job: SearchJob, config: Config) -> tuple[bool, str]:
    """Return whether members with this model can train at once; and why not, or why not by the
    fastest route.
    """
    if job.objective.batch_only:
        return False, job.objective.batch_only
    model = build(job, config)
    if job.kept is not None and any("running_mean" in name for name, _ in model.named_buffers()):
        return False, "batch normalisation would see the rows of the held-out fold"
    if found := next((m for m in model.modules() if isinstance(m, ALONE)), None):
        return False, f"{type(found).__name__} has no batched form that is faster"
    try:
        return True, populate(job, [config] * 2).reason
    except Unsupported as error:
        return False, str(error)


def _by_model(configs: Sequence[Config]) -> list[list[Config]]:
    groups: dict[str, list[Config]] = {}
    for config in configs:
        groups.setdefault(repr(free(config)), []).append(config)
    return list(groups.values())


def _room(job: SearchJob, model: nn.Module, size: int) -> int:
    """Return the rows, over all members, that saturate a CPU; convolutions reuse their weights."""
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return WORK // size
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(slice_rows(job.x, slice(1)))
    return FLOPS // max(counter.get_total_flops(), 1)


def step_time(job: SearchJob, configs: Sequence[Config], chunk: int) -> float:
    """Microseconds of a step of one member of the costliest model, at this chunk size."""
    groups = _by_model(configs)
    timed = groups[:: math.ceil(len(groups) / TIMED)]
    sizes = [chunk if chunk > 1 and together(job, group[0])[0] else 1 for group in timed]
    return max(_pace(job, group, size) for group, size in zip(timed, sizes))


def _pace(job: SearchJob, configs: Sequence[Config], chunk: int) -> float:
    """Time a step of one member of a model in microseconds, including adaptive strengths."""
    members = [configs[i % len(configs)] for i in range(chunk)]
    kept = None
    if job.kept is not None:
        kept = job.kept[[i % job.folds for i in range(chunk)]]
    population = populate(job, members)
    microseconds(job, population, kept, 1)  # warm-up
    pace = microseconds(job, population, kept)
    if population.decay is not None:
        due = population.decay.every - 1
        batch = _validation_batch(job, kept, due)
        adapting = _typical(lambda step: population.adapt(*batch, due), 4)
        pace += adapting / population.decay.every
    return pace / chunk


def microseconds(
    job: SearchJob, population: Population, kept: Tensor | None = None, repeats: int = 8
) -> float:
    """Median time of a step of all members, which includes the machine's load."""
    x, y = slice_rows((job.x, job.y), slice(job.batch_size))
    weights = None if kept is None else kept[:, : job.batch_size]
    return _typical(lambda step: population.step(x, y, weights, step, seed=step), repeats)


def _typical(run: Callable[[int], object], repeats: int) -> float:
    times = []
    for step in range(repeats + 2):
        begin = time.perf_counter_ns()  # wall time, as in budgets
        run(step)
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times[2:]) / 1e3
