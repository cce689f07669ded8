"""Training the trials of a search: in chunks of a measured size, resumable, bit for bit."""

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

from tikhon.data.rows import cut, take
from tikhon.population.batched import Unsupported
from tikhon.population.decay import ReplayedDecay
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses, mean_over
from tikhon.population.population import Population
from tikhon.runs.interrupt import Stopped, never, silent
from tikhon.tuning.draws import Draws
from tikhon.tuning.metric import Metric, blocks_of
from tikhon.tuning.space import known
from tikhon.tuning.trials import DEFAULT, Outcome, Trial, Value

SIZES = (1, 4, 8, 16, 32, 64)
VALIDATION = 64  # rows of a validation batch that adapts a strength
Config = Mapping[str, Value]
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class SearchJob:
    """What every trial trains on, and how: all that is not a hyperparameter.

    `kept` (folds, rows) holds 1 for the rows that a fold trains on; without folds it is None and
    `valid` gives the scores (or is None: nothing is scored). A member that trains alone sees only
    its fold's rows; in a population the others weigh nothing.
    """

    build: Callable[[Config], nn.Module]
    x: Any  # one tensor, or several inputs of one model
    y: Tensor
    objective: RowLosses
    epochs: int
    batch_size: int
    valid: tuple[Any, Tensor] | None = None
    kept: Tensor | None = None
    optimizer: Callable[..., optim.Optimizer] = optim.AdamW
    seed: int = 0
    metric: Metric | None = None  # what trials are compared by, if not by the loss
    loader: DataLoader[Any] | None = None  # draws the rows, where they are not only shuffled,
    place: Tensor | None = None  # and where those that it draws are among `x`: see `Draws`

    @property
    def scored(self) -> tuple[Any, Tensor]:
        """The rows that scores are made of; with folds all, each by the fold that left it out."""
        return (self.x, self.y) if self.valid is None else self.valid

    @property
    def folds(self) -> int:
        """Members that one trial needs."""
        return 1 if self.kept is None else len(self.kept)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.draws.batches

    @property
    def draws(self) -> Draws:
        """Which rows each batch trains on."""
        return Draws(len(self.y), self.batch_size, self.seed, self.loader, self.place)

    @property
    def checks(self) -> int:
        """Epochs between two validation losses."""
        return max(1, self.epochs // 20)


@dataclass(frozen=True)
class FoldUnit:
    """One member to train: a trial on one fold."""

    trial: Trial
    fold: int


@dataclass(frozen=True, eq=False)
class Trained:
    """What one unit came to: its state unless it failed, and the validation losses by epoch."""

    state: State | None
    curve: list[tuple[int, float]]
    failure: str
    seconds: float
    epochs: int


Found = dict[tuple[int, int], Trained]  # by trial and fold


@dataclass(eq=False)
class PopulationRunner:
    """Trains up to `chunk` members at once; `chunk=1` is plain PyTorch, one after another.

    Their states are kept, so that later trials can continue them.
    """

    job: SearchJob
    chunk: int = 1
    states: MutableMapping[int, State] = field(default_factory=dict)
    progress: Callable[[dict[str, Any]], None] = silent
    stop: Callable[[], bool] = never
    expired: Callable[[], bool] = never
    _beside: dict[str, int] = field(default_factory=dict)

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Train every trial from its parent's end to its own budget.

        Once `expired`, the members in training end with the epoch they are in (their outcome
        carries the shorter budget) and the rest is left out; at least one trial is finished.
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
        """The outcome of a trial all of whose folds are found, which are taken; its state is kept.

        None where its folds ended at different epochs.
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
        """The trials all of whose folds are in `done`."""
        known = set(done)
        folds = range(self.job.folds)
        return [t for t in trials if all((t.id, fold) in known for fold in folds)]

    def _chunks(self, units: list[FoldUnit]) -> Iterable[list[FoldUnit]]:
        """Units that can run side by side: same length, same kind of settings, same model."""
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
        """How many members of this model are trained at once: of some no two can be."""
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
        last = [loss for _, loss in curve[-3:]]  # one check is noise
        finals = torch.tensor([loss for part in parts for _, loss in part.curve[-1:]])
        error = float(finals.std() / math.sqrt(len(finals))) if len(finals) > 1 else 0.0
        strengths = {}
        trace = self.states[trial.id].get("decay.trace")  # (folds, moves, layers), what acted
        if trace is not None:
            found = trace[:, -1].mean(0).exp().tolist()
            strengths = {f"layer {i + 1}": strength for i, strength in enumerate(found)}
        score = sum(last) / len(last) if last else 0.0
        if not math.isfinite(score):
            return Outcome(trial, math.nan, seconds, failure="the validation score is not finite")
        return Outcome(trial, score, seconds, error, curve=curve, strengths=strengths)


def as_judged(job: SearchJob, trial: Trial) -> SearchJob:
    """The job of a trial: the untuned one has a schedule of its own length."""
    return replace(job, epochs=trial.budget) if trial.id == DEFAULT else job


def populate(job: SearchJob, configs: Sequence[Config]) -> Population:
    """Freshly initialised members; the same seed gives all of them the same start."""
    return Population(
        [build(job, config) for config in configs],
        Hyperparameters.of(configs),
        objective=job.objective,
        example=cut(job.x, slice(2)),
        steps=job.epochs * job.steps_per_epoch,
        optimizer=job.optimizer,
    )


def build(job: SearchJob, config: Config) -> nn.Module:
    """The freshly initialised model of a configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(config.get("seed", job.seed)))
        return job.build(config).to(job.y.device)


def free(config: Config) -> list[tuple[str, Value]]:
    """The entries that only the model's builder knows: they may change what the model does."""
    return sorted((name, value) for name, value in config.items() if not known(name))


def _row(state: State, fold: int) -> State:
    return {name: value[fold] for name, value in state.items()}


def train_epoch(job: SearchJob, population: Population, kept: Tensor | None, epoch: int) -> Tensor:
    """All batches of one epoch; (members,) sum of their losses (non-finite if any was)."""
    batches = job.draws.epoch(epoch)
    drawn, sizes = torch.cat(batches).to(job.y.device), [len(batch) for batch in batches]
    weights = [None] * len(sizes) if kept is None else kept[:, drawn].split(sizes, dim=1)
    ys = job.y[drawn].split(sizes)
    if isinstance(job.x, Tensor):
        xs = job.x[drawn].split(sizes)
    else:
        xs = (take(job.x, batch) for batch in batches)
    total = torch.zeros(population.members, device=job.y.device)
    step = epoch * job.steps_per_epoch
    for x, y, weight in zip(xs, ys, weights):
        total += population.step(x, y, weight, step, seed=noise_seed(job.seed, step))
        if population.decay is not None and population.decay.due(step):
            population.adapt(*_validation_batch(job, kept, step), step)
        step += 1
    return total


def noise_seed(seed: int, step: int) -> int:
    """Seed of the noise of one step: nothing has to be stored to continue a run."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**62


def _validation_batch(
    job: SearchJob, kept: Tensor | None, step: int
) -> tuple[Tensor, Tensor, Any]:
    x, y = (job.x, job.y) if job.valid is None else job.valid
    size = min(VALIDATION * job.folds, len(y))  # of which each fold left out its share
    begin = (step * size) % max(len(y) - size + 1, 1)
    rows = slice(begin, begin + size)
    part = cut((x, y), rows)
    return *part, None if kept is None else 1 - kept[:, rows]


def validation_rows(job: SearchJob, population: Population, kept: Tensor | None) -> Tensor:
    """(members, rows) losses of the rows that scores are made of.

    Where rows have none, those of blocks of the rows that the only member leaves out.
    """
    x, y = job.scored
    if not job.objective.alone:
        return population.row_losses(x, y)
    if kept is not None:
        x, y = take((x, y), (kept[0] == 0).nonzero()[:, 0])
    return population.block_losses(x, y, blocks_of(y))


def validation(job: SearchJob, population: Population, kept: Tensor | None) -> Tensor:
    """(members,) scores: mean validation losses, or the metric where there is one."""
    if job.valid is None and kept is None:
        return torch.zeros(population.members)
    if job.metric is not None:
        x, y = job.scored
        outputs = population.predict(x)
        left = torch.ones(len(outputs), len(y)) if kept is None else 1 - kept
        out = [job.metric.score(o[part > 0], y[part > 0]) for o, part in zip(outputs, left)]
        return torch.tensor(out, dtype=torch.float64)
    rows = validation_rows(job, population, kept)
    return mean_over(rows, None if kept is None or job.objective.alone else 1 - kept)


def train_on_all(
    job: SearchJob,
    configs: Sequence[Config],
    traces: Sequence[Tensor | None],
    stop: Callable[[], bool] = never,
) -> list[dict[str, Tensor] | None]:
    """State dicts of one full training each; `traces` replay strengths found before.

    A member that diverges gives None, as do all of them when `stop` is true before the end.
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


WORK = 11_000_000  # parameters times rows of a batch times members, beyond which a CPU is full
CACHED = 320_000  # parameters of all members together, beyond which they leave a core's cache
TIMED = 4  # models of a space whose steps are timed
FLOPS = 200_000_000  # of one forward pass of all members, beyond which convolutions fill it
ACCELERATOR = 50  # how much more of both an accelerator takes
ALONE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)  # no batching rule


def choose_chunk(job: SearchJob, configs: Sequence[Config]) -> tuple[int, str]:
    """How many members to train at once, and why not more: from the model and the batch alone.

    A stopwatch would choose by what else the machine does, and the size of a chunk decides how
    sums are rounded: the same search has to choose the same. The limits fit the fastest sizes that
    `benchmarks/tune.py` measures on an idle core for perceptrons and small convolutions.
    """
    if job.objective.alone:
        return 1, job.objective.alone
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
    """Whether members of this configuration's model can be trained at once; why not, or why not
    in the fastest way.
    """
    if job.objective.alone:
        return False, job.objective.alone
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
    """Rows, of all members together, that fill a CPU: a convolution uses its weights often."""
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return WORK // size
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(cut(job.x, slice(1)))
    return FLOPS // max(counter.get_total_flops(), 1)


def step_time(job: SearchJob, configs: Sequence[Config], chunk: int) -> float:
    """Microseconds of one step of one member of the costliest model, in chunks of this size."""
    groups = _by_model(configs)
    timed = groups[:: math.ceil(len(groups) / TIMED)]
    sizes = [chunk if chunk > 1 and together(job, group[0])[0] else 1 for group in timed]
    return max(_pace(job, group, size) for group, size in zip(timed, sizes))


def _pace(job: SearchJob, configs: Sequence[Config], chunk: int) -> float:
    """Microseconds of one step of one member of one model, with what adapting adds to it."""
    members = [configs[i % len(configs)] for i in range(chunk)]
    kept = None
    if job.kept is not None:
        kept = job.kept[[i % job.folds for i in range(chunk)]]
    population = populate(job, members)
    microseconds(job, population, kept, 1)  # torch loads its parts on first use
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
    """Of one step of all members, the median of some: a busy machine is busy later, too."""
    x, y = cut((job.x, job.y), slice(job.batch_size))
    weights = None if kept is None else kept[:, : job.batch_size]
    return _typical(lambda step: population.step(x, y, weights, step, seed=step), repeats)


def _typical(run: Callable[[int], object], repeats: int) -> float:
    times = []
    for step in range(repeats + 2):
        begin = time.perf_counter_ns()  # wall time: what a budget is given in
        run(step)
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times[2:]) / 1e3
