"""Feature paths of networks: one sweep from dense to sparse, then a joint refit of all supports.

The strength grows slightly with every step, so that features drop out one by one; the networks
with the supports encountered are refitted as one population without the penalty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.stream import Stream
from tikhon.errors import InputError
from tikhon.models.skip import SkipNetwork
from tikhon.paths.result import PathResult, mean_and_error
from tikhon.penalties import GroupLasso, Hierarchical, Proximable
from tikhon.penalties.optimality import max_strength
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses
from tikhon.population.population import Population
from tikhon.regularizer.targets import Target, select
from tikhon.runs.checkpoint import PeriodicCheckpoint
from tikhon.training.step import Step

DENSE_STEPS, SWEEP_STEPS, REFIT_STEPS = 200, 500, 40
CHECK = 10  # refit steps between validations
DECAY = 3.0  # decoupled, outside the sweep: prevents memorising few rows
BATCH, MOMENTUM = 128, 0.9
RANGE = 1e4  # largest factor on the strength over a sweep


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The model when this support first occurred."""

    strength: float
    support: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class TargetScale:
    """Standardisation of numeric targets in a sweep: `(y - mean) / size`, of unit variance
    overall.

    The sweep's learning rate and strengths are for such targets; losses and strengths in the
    targets' own unit are larger by `size` squared.
    """

    mean: Tensor
    size: float

    @classmethod
    def of(cls, y: Tensor) -> TargetScale | None:
        """Return the scale of the training targets; None for classes."""
        if not y.is_floating_point():
            return None
        mean = y.double().mean(0)
        return cls(mean, float((y.double() - mean).square().mean().sqrt()) or 1.0)

    def scaled(self, y: Tensor) -> Tensor:
        """Return targets standardised for the sweep."""
        return ((y.double() - self.mean) / self.size).float()


class Rescaled(nn.Module):
    """A network trained on standardised targets that predicts in their own unit."""

    mean: Tensor
    size: Tensor

    def __init__(self, net: nn.Module, unit: TargetScale) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", unit.mean.float())
        self.register_buffer("size", torch.tensor(unit.size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (rows, outputs)."""
        return self.mean + self.size * self.net(x)


@dataclass(eq=False)
class SweepProgress:
    """Progress of a sweep: next step, strength, and snapshots so far."""

    step: int
    strength: float
    growth: float
    found: list[Snapshot]

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "step": self.step,
            "strength": self.strength,
            "growth": self.growth,
            "found": [[s.strength, s.support, s.state] for s in self.found],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }


def network_path(
    build_model: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    penalty: Proximable,
    *,
    valid: tuple[Tensor, Tensor] | None,
    strengths: int | Sequence[float] | object,
    debias: bool,
    seed: int,
    keeper: PeriodicCheckpoint,
) -> PathResult:
    """Return the features dropped as the strength grows, and networks without them.

    `strengths` limits the number of refitted supports (spread over feature counts).
    """
    if debias:
        raise InputError("a path of features always refits its networks: leave debias out")
    if not isinstance(strengths, int):
        raise InputError("a network's strengths come from its sweep: give how many, not which")
    if not isinstance(penalty, (GroupLasso, Hierarchical)):
        raise InputError(
            f"a network's path switches features off: use GroupLasso or Hierarchical, not "
            f"{type(penalty).__name__}; of='weights' follows all weights under it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unit = TargetScale.of(data[1])
        x, y = data[0], data[1] if unit is None else unit.scaled(data[1])
        build, penalty = _with_skip(build_model, penalty, x)
        penalty = _with_factors(penalty, build(), x[0].numel())
        sweep = Sweep(build(), (x, y), penalty, seed)
        snapshots = _select_snapshots(sweep.run(keeper), strengths)
    if valid is not None:
        valid = valid[0], valid[1] if unit is None else unit.scaled(valid[1])
    population = _refit(build, sweep, snapshots, valid)
    result = _build_result(build, sweep, snapshots, population, valid, penalty)
    return result if unit is None else _in_target_units(result, unit)


class Sweep:
    """Train one model densely, then under a growing penalty on its features."""

    def __init__(
        self, model: nn.Module, data: tuple[Tensor, Tensor], penalty: Proximable, seed: int
    ) -> None:
        self.model, self.penalty = model, penalty
        self.x, self.y = data
        self.objective = RowLosses("auto", self.y)
        self.target = _features(model, penalty)
        size = len(self.x) if len(self.x) <= 2 * BATCH else BATCH
        self.stream = Stream(data, size=size, seed=seed)

    def densify(self) -> None:
        """Train without the penalty."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-2, weight_decay=DECAY, fused=True
        )
        step_once = Step(
            self.model, optimizer, self._loss, rate=lambda number: 1 - number / DENSE_STEPS
        )
        for step in range(DENSE_STEPS):
            step_once(self.stream.batch(step), step)

    def run(self, keeper: PeriodicCheckpoint) -> list[Snapshot]:
        """Raise the strength at every step until no feature is left; one snapshot per support."""
        lr = 1e-2
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=MOMENTUM, fused=True)
        step_once, gain = Step(self.model, optimizer, self._loss), lr / (1 - MOMENTUM)
        place = self._begin(keeper.found, optimizer)
        support = place.found[-1].support
        while place.step < DENSE_STEPS + 4 * SWEEP_STEPS and support.any():
            keeper.save_if_due(lambda: place.state(self.model, optimizer))
            step_once(self.stream.batch(place.step))
            with torch.no_grad():
                penalty = self.penalty.with_strength(place.strength)
                rows = penalty.prox(self.target.read(), gain)
                self.target.write_(rows)
            now = self._support(rows)
            if not torch.equal(now, support):
                support = now
                place.found.append(self._snapshot(place.strength, support))
            place.strength *= place.growth
            place.step += 1
        return place.found

    def _begin(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> SweepProgress:
        """Return the progress of an earlier process, or that after dense training."""
        if state:
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            found = [Snapshot(*row) for row in state["found"]]
            return SweepProgress(state["step"], state["strength"], state["growth"], found)
        self.densify()
        strength, growth = self._strength_range()
        dense = self._snapshot(0.0, self._support(self.target.read()))
        return SweepProgress(DENSE_STEPS, strength, growth, [dense])

    def _strength_range(self) -> tuple[float, float]:
        """Return initial strength and growth per step, up to where a zero first layer stays zero.

        The upper end follows from the gradient at zero features, with other layers unchanged; the
        sweep confirms it, as it ends when all features are off.
        """
        dense = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            self.target.write_(torch.zeros_like(self.target.read()))
        gradients = torch.autograd.grad(self._loss((self.x, self.y)), self.target.params)
        gradient = self.target.arrange(list(gradients))
        self.model.load_state_dict(dense)
        top = _threshold(self.penalty, gradient)
        return top / RANGE**0.75, RANGE ** (1 / SWEEP_STEPS)

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return self.objective.mean(self.model(x), y)

    def _support(self, rows: Tensor) -> Tensor:
        return (rows != 0).any(1)

    def _snapshot(self, strength: float, support: Tensor) -> Snapshot:
        return Snapshot(strength, support, copy.deepcopy(self.model.state_dict()))


def _threshold(penalty: Proximable, gradient: Tensor) -> float:
    """Largest strength at which a zero feature stays zero, by its KKT condition."""
    if isinstance(penalty, Hierarchical):
        head, tail = gradient[:, : penalty.skip], gradient[:, penalty.skip :]
        sizes = head.norm(dim=1) + penalty.M * tail.abs().sum(1)
        return float((sizes if penalty.weights is None else sizes / penalty.weights).max())
    return max_strength(penalty, gradient)


def _with_skip(
    build_model: Callable[[], nn.Module], penalty: Proximable, x: Tensor
) -> tuple[Callable[[], nn.Module], Proximable]:
    if not isinstance(penalty, Hierarchical):
        return build_model, penalty
    features = x[0].numel()
    with torch.no_grad():
        model = build_model().eval()
        outputs = model(x[:2]).shape[1]
    if isinstance(model, SkipNetwork):
        return build_model, replace(penalty, skip=outputs)

    def build() -> nn.Module:
        return SkipNetwork(build_model(), features, outputs).to(x.dtype)

    return build, replace(penalty, skip=outputs)


def _with_factors(penalty: Proximable, model: nn.Module, features: int) -> Proximable:
    """Return the penalty with one factor for each feature, if it has factors."""
    try:
        penalty = penalty.for_parameter(_first_weight(model))
    except ValueError as error:
        raise InputError(str(error)) from error
    factors = getattr(penalty, "weights", None)
    if factors is not None and (factors.numel() != features or not (factors > 0).all()):
        raise InputError(
            f"{type(penalty).__name__}: a network's path needs weights > 0, one for each of the "
            f"{features} features (one that is 0 is never switched off), received shape "
            f"{tuple(factors.shape)}"
        )
    return penalty


def _first_weight(model: nn.Module) -> str:
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith("skip."):
            return name
    raise InputError(f"{type(model).__name__} has no linear layer whose inputs are features")


def _features(model: nn.Module, penalty: Proximable) -> Target:
    """Return rows by feature: first-layer weights, after skip weights if there are any."""
    names = (_first_weight(model),)
    if isinstance(penalty, Hierarchical):
        names = ("skip.weight", *names)
    return select(model, names, rows="feature")[0]


def _select_snapshots(snapshots: list[Snapshot], limit: int) -> list[Snapshot]:
    """Return the last snapshot for each feature count, at most `limit`, dense first."""
    by_count = {int(s.support.sum()): s for s in snapshots}
    counts = sorted(by_count, reverse=True)
    if len(counts) > limit:
        places = torch.linspace(0, len(counts) - 1, limit).round().long().unique().tolist()
        counts = [counts[i] for i in places]
    return [by_count[count] for count in counts]


def _refit(
    build: Callable[[], nn.Module],
    sweep: Sweep,
    snapshots: list[Snapshot],
    valid: tuple[Tensor, Tensor] | None,
) -> Population:
    """Refit all supports together without the penalty; dropped features stay zero."""
    models, masks = [], []
    for snapshot in snapshots:
        model = build()
        model.load_state_dict(snapshot.state)
        target = _features(model, sweep.penalty)
        live = snapshot.support[:, None].expand_as(target.read()).float()
        mask = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        names = {id(p): n for n, p in model.named_parameters()}
        target.place_([mask[names[id(p)]] for p in target.params], live)
        models.append(model)
        masks.append(mask)
    return refit_supports(
        models, masks, sweep.objective, sweep.stream, valid, lr=5e-3, decay=DECAY
    )


def refit_supports(
    models: Sequence[nn.Module],
    masks: Sequence[Mapping[str, Tensor]],
    objective: RowLosses,
    stream: Stream,
    valid: tuple[Tensor, Tensor] | None,
    *,
    lr: float,
    decay: float,
    each: Callable[[], None] = lambda: None,
) -> Population:
    """Train all models together; entries with mask 0 stay as they are.

    With validation rows each model ends at its lowest validation loss. `each` is called before
    every step.
    """
    settings = Hyperparameters(
        lr=torch.full((len(models),), lr),
        weight_decay={"*": torch.full((len(models),), decay)} if decay else {},
    )
    example = stream.batch(0)[0][:2]
    population = Population(
        models, settings, objective=objective, example=example, steps=REFIT_STEPS
    )
    stacked = [torch.stack([m[name] for m in masks]).flatten() for name in population.stack.names]
    population.mask = torch.cat(stacked)
    tensors = {**population.stack.blocks, **population.stack.buffers}
    best_state = {name: value.detach().clone() for name, value in tensors.items()}
    best = torch.full((len(models),), math.inf)
    for step in range(REFIT_STEPS):
        each()
        population.step(*stream.batch(step), None, step, seed=step)
        if valid is not None and (step + 1) % CHECK == 0:
            losses = population.row_losses(*valid).mean(1)
            lower, best = losses < best, torch.minimum(losses, best)
            for name, value in tensors.items():
                best_state[name][lower] = value.detach()[lower]
    if valid is not None:
        for name, value in tensors.items():
            value.detach().copy_(best_state[name])
    return population


def _build_result(
    build: Callable[[], nn.Module],
    sweep: Sweep,
    snapshots: list[Snapshot],
    population: Population,
    valid: tuple[Tensor, Tensor] | None,
    penalty: Proximable,
) -> PathResult:
    scores = errors = [math.nan] * len(snapshots)
    if valid is not None:
        scores, errors = mean_and_error(population.row_losses(*valid))
    states = tuple(population.state_dict_of(k) for k in range(len(snapshots)))
    importances = []
    for state in states:
        sweep.model.load_state_dict(state)
        importances.append(sweep.target.read().norm(dim=1))
    return PathResult(
        strengths=tuple(s.strength for s in snapshots),
        supports=torch.stack([s.support for s in snapshots]),
        importances=torch.stack(importances),
        scores=tuple(scores),
        errors=tuple(errors),
        states=states,
        build=build,
        penalty=type(penalty).__name__,
    )


def _in_target_units(result: PathResult, unit: TargetScale) -> PathResult:
    """Convert losses, strengths and predictions to the unit of the targets."""
    build, square = result.build, unit.size**2
    own = Rescaled(nn.Identity(), unit).state_dict()
    return replace(
        result,
        strengths=tuple(s * square for s in result.strengths),
        scores=tuple(s * square for s in result.scores),
        errors=tuple(s * square for s in result.errors),
        states=tuple(
            {**{f"net.{name}": value for name, value in state.items()}, **own}
            for state in result.states
        ),
        build=lambda: Rescaled(build(), unit),
    )
