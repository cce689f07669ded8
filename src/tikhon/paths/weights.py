"""Paths of all weights of a network: one training, then one sweep over all strengths.

The sweep goes from dense to sparse, since a network without weights receives no gradient. As the
networks lag behind its rising strength, each strength asked gets the network on the way with the
lowest objective: of the losses and penalties passed, the lower convex hull.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tikhon.data.stream import Stream
from tikhon.errors import InputError
from tikhon.paths.networks import refit_supports
from tikhon.paths.penalised import check_path_penalty
from tikhon.paths.result import PathResult, mean_and_error
from tikhon.penalties import Hierarchical, Penalty, Proximable
from tikhon.penalties.optimality import max_strength
from tikhon.population.losses import RowLosses
from tikhon.regularizer.audit import warn
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.targets import entries_of
from tikhon.regularizer.terms import Term, bind
from tikhon.runs.checkpoint import PeriodicCheckpoint
from tikhon.training.measures import predict
from tikhon.training.settings import Settings
from tikhon.training.step import Step

SWEEP = 1.3  # steps of a sweep at most, in trainings
LAST_RATE = 0.02  # of Adam, to which the learning rate of the training rises in a sweep
SMALLEST = 1e-3  # smallest strength over the largest
SNAPSHOTS = 100  # networks kept in a sweep
LEAD = 0.1  # a sweep begins at this share of `smallest` times its largest strength
SAMPLE = 1024  # training rows from which the largest strength is found
FEW = 256  # rows between two networks, below which their losses are measured on this many

State = dict[str, Tensor]


def check_weight_penalty(penalty: Penalty) -> None:
    """Raise `InputError` for a penalty that a path of all weights cannot follow."""
    penalty = check_path_penalty(penalty)
    name = type(penalty).__name__
    if isinstance(penalty, Hierarchical) or not (penalty.elementwise or penalty.diagonal):
        raise InputError(
            f"of='weights' needs a penalty of single weights or rows, such as L1, LogSum or "
            f"GroupLasso, not {name}"
        )
    if getattr(penalty, "weights", None) is not None:
        penalty = replace(penalty, weights=None)
    ones = torch.ones(2, 2)
    large, small = (float(penalty.with_strength(s).value(ones)) for s in (1.0, 1e-3))
    if not math.isclose(1e-3 * large, small, rel_tol=1e-4):
        raise InputError(
            f"of='weights' needs a penalty that is proportional to its strength, such as L1, "
            f"LogSum or GroupLasso; that of {name} moves its threshold too"
        )


def weight_path(
    build_model: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    penalty: Proximable,
    settings: Settings,
    *,
    valid: tuple[Tensor, Tensor] | None,
    strengths: int | Sequence[float],
    smallest: float | None,
    debias: bool,
    keeper: PeriodicCheckpoint,
    on_progress: Callable[[float], None],
) -> PathResult:
    """Return the network at strength 0 and at all others, in ascending order."""
    check_weight_penalty(penalty)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model()
        torch.manual_seed(settings.seed)  # as in `fit` of a model built under this seed
        sweep = WeightSweep(model, data, penalty, settings, smallest or SMALLEST)
        if isinstance(strengths, int):
            strengths = _affordable_strengths(strengths, sweep)
        snapshots = sweep.run(keeper, on_progress)
        grid, picks = choose_snapshots(snapshots, strengths, sweep.smallest)
        states = {k: snapshots[k].state for k in picks}
        supports = torch.stack([sweep.support(states[k]) for k in picks])
        if debias:
            states = _refit(build_model, sweep, states, valid, keeper)
        scores, errors, accuracies = _scores(sweep, states, picks, valid)
    sizes = [model.get_parameter(name).numel() for name in sweep.penalised]
    shares = [part.double().mean(1) for part in supports.split(sizes, dim=1)]
    return PathResult(
        strengths=tuple(grid),
        supports=supports,
        importances=torch.stack(shares, dim=1),
        scores=tuple(scores),
        errors=tuple(errors),
        states=tuple(states[k] for k in picks),
        build=build_model,
        penalty=type(penalty).__name__,
        of="weights",
        accuracies=accuracies,
        feature_names=tuple(sweep.penalised),
    )


@dataclass(frozen=True, eq=False)
class SweptNetwork:
    """A network on the way, with its training loss and its penalty at strength 1."""

    loss: float
    penalty: float
    state: State


def _affordable_strengths(strengths: int, sweep: WeightSweep) -> int:
    """Return as many strengths as the sweep has steps, at most; warn where these are fewer."""
    if min(strengths, sweep.steps) < 2:
        raise InputError(
            f"strengths={strengths}: a path needs 2 or more, one step of its sweep for each; the "
            f"epochs give {sweep.steps} steps"
        )
    if strengths > sweep.steps:
        warn(
            f"the path has {sweep.steps} strengths instead of {strengths}: its sweep has no more "
            f"steps; more epochs or smaller batches give more"
        )
    return min(strengths, sweep.steps)


def choose_snapshots(
    snapshots: Sequence[SweptNetwork], strengths: int | Sequence[float], smallest: float
) -> tuple[list[float], list[int]]:
    """Return strengths, 0 first, and for each the snapshot with the lowest objective.

    The first snapshot is the dense network, which alone answers strength 0; the last one is empty,
    and its penalty 0. A number of strengths ends at the smallest that makes it the best one.

    >>> points = [SweptNetwork(2.0 - k, k * k, {}) for k in (2, 1, 0)]
    >>> choose_snapshots(points, 4, 0.1)
    ([0.0, 0.1, 0.31622776601683794, 1.0], [0, 0, 0, 2])
    """
    points = torch.tensor([(s.loss, s.penalty) for s in snapshots], dtype=torch.float64)
    loss, penalty = points.unbind(1)
    if isinstance(strengths, int):
        is_not_empty = penalty > 0
        top = float(((loss[-1] - loss) / penalty)[is_not_empty].max())
        if top <= 0:
            raise InputError(
                f"the network learned nothing: its loss without the penalty is {loss[0]:.4g}, and "
                f"{loss[-1]:.4g} without any weights; train longer (epochs), or change lr"
            )
        low, high = math.log10(top * smallest), math.log10(top)
        grid = torch.logspace(low, high, strengths - 1, dtype=torch.float64).tolist()
        grid[-1] = top
    else:
        grid = sorted(s for s in strengths if s)
    last = len(snapshots) - 1
    objectives = ((loss + s * penalty).flip(0) for s in grid)  # the sparser network on ties
    picks = [last - int(values.argmin()) for values in objectives]
    if isinstance(strengths, int):
        picks[-1] = last
    return [0.0, *grid], [0, *picks]


@dataclass(eq=False)
class Place:
    """Position in a sweep: the step, and the sum of the losses since the last snapshot."""

    step: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    steps: int = 0
    top: float = 0.0  # strength at which the sweep ends


class WeightSweep:
    """A training without the penalty, then one in which the strength rises."""

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        penalty: Proximable,
        settings: Settings,
        smallest: float,
    ) -> None:
        self.model, self.settings, self.smallest = model, settings, smallest
        self.stream = Stream(data, size=settings.batch_size, seed=settings.seed)
        self.y = data[1]
        self.objective = RowLosses("auto", self.y)
        self.loss = partial(self.objective.on, model)
        self.epoch = self.stream.batches or 0
        self.training = settings.epochs * self.epoch
        self.steps = int(SWEEP * self.training)
        self.count = min(SNAPSHOTS, self.steps)
        self.place = Place()
        self.snapshots: list[SweptNetwork] = []
        self.empty: SweptNetwork | None = None
        self.optimizer = settings.build_optimizer(model)
        self.term = Term(penalty, strength=self._strength)
        self.regularizer: Regularizer | None = None  # of the sweep
        try:
            regularize(model, self.optimizer, self.term).remove()
            entries = [e for e in entries_of(model) if not e.excluded and e.param.requires_grad]
            self.bindings = bind(model, entries, penalty.with_strength(1.0))
        except ValueError as error:
            raise InputError(str(error)) from error
        bound = {name for binding in self.bindings for name in binding.target.names}
        self.penalised = [name for name, _ in model.named_parameters() if name in bound]

    def run(
        self, keeper: PeriodicCheckpoint, on_progress: Callable[[float], None]
    ) -> list[SweptNetwork]:
        """Return the networks passed, the dense one first and the empty one last."""
        if keeper.found:
            self._load(keeper.found)
        take_step = Step(self.model, self.optimizer, self.loss, rate=self._rate)
        self.model.train()
        place, last = self.place, self.training + self.steps
        while place.step < last:
            keeper.save_if_due(self.state)
            if place.step == self.training - self.epoch:  # the loss of the last epoch
                place.loss, place.steps = torch.zeros(()), 0
            place.loss += take_step(self.stream.batch(place.step), place.step)
            place.steps += 1
            place.step += 1
            if self._snapshots_by(place.step) > len(self.snapshots):
                self._keep()
                on_progress(place.step / last)
                if not self.support(self.snapshots[-1].state).any():
                    place.step = last  # also for a process that resumes
        on_progress(1.0)
        assert self.empty is not None and self.regularizer is not None
        self.regularizer.remove()
        return [*self.snapshots, self.empty]

    def support(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return which penalised weights are not zero, flat, in the order of the parameters."""
        return torch.cat([(state[name] != 0).flatten() for name in self.penalised])

    def _snapshots_by(self, step: int) -> int:
        swept = step - self.training
        return 0 if swept < 0 else 1 + swept * self.count // self.steps

    def _strength(self, step: int) -> float:
        """Strength at a step of the sweep, constant until the next snapshot."""
        left = 1 - step * self.count // self.steps / max(self.count - 1, 1)
        return self.place.top * (LEAD * self.smallest) ** max(left, 0.0)

    def _rate(self, step: int) -> float:
        """Factor on the learning rate: a larger one follows the rising strength faster."""
        swept = (step - self.training) / self.steps
        return max(1.0, LAST_RATE / self.settings.lr) ** max(swept, 0.0)

    def _keep(self) -> None:
        """Keep the network with the mean loss of the steps that led to it, or where these are few
        with its loss on a sample.
        """
        place = self.place
        loss = float(place.loss / place.steps)
        if self.settings.batch_size * self.steps < FEW * self.count:
            x, y = self.stream.sample(FEW)
            loss = float(self.objective.mean(predict(self.model, x), y))
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} after {place.step} steps: lower lr (now {self.settings.lr:g})"
            )
        values = (b.base.with_strength(1.0).value(b.read()).detach() for b in self.bindings)
        state = copy.deepcopy(dict(self.model.state_dict()))
        self.snapshots.append(SweptNetwork(loss, float(sum(values)), state))
        if self.empty is None:
            self.empty, place.top = self._empty(), self._largest()
            self.optimizer.state.clear()
            self.regularizer = regularize(self.model, self.optimizer, self.term)
        place.loss, place.steps = torch.zeros(()), 0

    def _largest(self) -> float:
        """Return the smallest strength at which no layer would leave zero by itself.

        Each layer is emptied in turn, the others as trained: its KKT condition.
        """
        strengths = []
        self.model.eval()
        batch = self.stream.sample(SAMPLE)
        for binding in self.bindings:
            params = binding.target.params
            before = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p in params:
                    p.zero_()
            gradient = torch.autograd.grad(
                self.loss(batch), params, allow_unused=True, materialize_grads=True
            )
            try:
                penalty = cast(Proximable, binding.base)
                strengths.append(max_strength(penalty, binding.target.arrange(gradient)))
            except ValueError as error:
                raise InputError(str(error)) from error
            with torch.no_grad():
                for p, value in zip(params, before):
                    p.copy_(value)
        self.model.train()
        if not max(strengths):
            raise InputError("no penalised weight lowers the loss: there is no path to follow")
        return max(strengths)

    def _empty(self) -> SweptNetwork:
        """Return the network without penalised weights, its other parameters fitted.

        Its outputs are usually the same for all rows, so that one row stands for them.
        """
        model = copy.deepcopy(self.model).eval()
        for name in self.penalised:
            model.get_parameter(name).data.zero_()
            model.get_parameter(name).requires_grad_(False)
        x, y = self.stream.sample(SAMPLE)
        output = predict(model, x)
        if torch.equal(output, output[:1].expand_as(output)):
            x, y = x[:1], self.y

        def loss() -> Tensor:
            output = model(x)
            return self.objective.mean(output.expand(len(y), *output.shape[1:]), y)

        if fitted := [p for p in model.parameters() if p.requires_grad]:
            search = torch.optim.LBFGS(fitted, max_iter=50, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                search.zero_grad()
                value = loss()
                value.backward()
                return value

            search.step(closure)
        return SweptNetwork(float(loss().detach()), 0.0, dict(model.state_dict()))

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, for a checkpoint."""
        return {
            "place": dict(vars(self.place)),
            "snapshots": [dict(vars(s)) for s in self.snapshots],
            "empty": dict(vars(self.empty)) if self.empty else None,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": self.regularizer.state_dict() if self.regularizer else None,
            "random": torch.get_rng_state(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        vars(self.place).update(state["place"])
        self.snapshots = [SweptNetwork(**values) for values in state["snapshots"]]
        self.empty = SweptNetwork(**state["empty"]) if state["empty"] else None
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr
        if state["regularizer"]:
            self.regularizer = regularize(self.model, self.optimizer, self.term)
            self.regularizer.load_state_dict(state["regularizer"])
        torch.set_rng_state(state["random"])


def _refit(
    build: Callable[[], nn.Module],
    sweep: WeightSweep,
    states: Mapping[int, State],
    valid: tuple[Tensor, Tensor] | None,
    keeper: PeriodicCheckpoint,
) -> dict[int, State]:
    """Return all networks trained on without the penalty, their zeros frozen."""
    models, masks = [], []
    for state in states.values():
        model = build()
        model.load_state_dict(state)
        mask = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        models.append(model)
        masks.append(mask | {name: (state[name] != 0).to(mask[name]) for name in sweep.penalised})
    population = refit_supports(
        models,
        masks,
        sweep.objective,
        sweep.stream,
        valid,
        lr=sweep.settings.lr,
        decay=0.0,
        each=lambda: keeper.save_if_due(sweep.state),
    )
    return {k: population.state_dict_of(place) for place, k in enumerate(states)}


def _scores(
    sweep: WeightSweep,
    states: Mapping[int, State],
    picks: Sequence[int],
    valid: tuple[Tensor, Tensor] | None,
) -> tuple[list[float], list[float], tuple[tuple[float, float], ...]]:
    """Return validation losses with their errors, and for classes the accuracies with theirs."""
    if valid is None:
        return [math.nan] * len(picks), [math.nan] * len(picks), ()
    (x, y), losses, hits = valid, {}, {}
    for k, state in states.items():
        sweep.model.load_state_dict(state)
        output = predict(sweep.model, x)
        losses[k] = sweep.objective.rows(output[None], y)[0]
        if sweep.objective.is_classification:
            hits[k] = (output.argmax(1) == y).double().flatten()
    scores, errors = mean_and_error(torch.stack([losses[k] for k in picks]))
    if not hits:
        return scores, errors, ()
    return scores, errors, tuple(zip(*mean_and_error(torch.stack([hits[k] for k in picks]))))
