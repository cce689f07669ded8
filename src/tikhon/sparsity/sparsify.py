"""The function `sparsify`: an exact share of zeros after one run of the user's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn, optim

from tikhon.arguments import check_number, is_count
from tikhon.regularizer.audit import warn
from tikhon.regularizer.bypass_detection import GradientArrival
from tikhon.regularizer.hooks import StepHooks, hook_owners
from tikhon.regularizer.metric import group_of, rule_of
from tikhon.regularizer.optimizers import as_list, find_weight_copies, inner_optimizer
from tikhon.regularizer.regularizer import Optimizers
from tikhon.regularizer.shards import refuse_flattened
from tikhon.regularizer.targets import Pattern, entries_of, is_lazy
from tikhon.sparsity.allocation import CostFunction, Per, Sizes, round_to_multiples, units_to_keep
from tikhon.sparsity.audit import RETURNED, LayerShare, Sparsity
from tikhon.sparsity.kinds import find_layers
from tikhon.sparsity.thinning import Cost, Of, Thinning
from tikhon.sparsity.units import Layer, first_names
from tikhon.wrappers import unwrap

SCHEMA_VERSION = 2
DECISIONS = 25  # decisions on removals during thinning
FADES = 4  # fading steps between two decisions
CHECKS = 13  # steps in which zeros are checked: wrappers synchronise every 5 or 6

_NOT_TRAINED = (
    "the optimizer does not hold them; give the one that was built from this model's parameters, "
    "all of them as a list, or a pattern without these",
    "they are frozen (requires_grad=False); let them train, or give a pattern without these",
)
_many: Any = torch  # its _foreach functions are public except by name


def sparsify(
    model: nn.Module,
    optimizer: Optimizers,
    share: float,
    *,
    of: Of = "weights",
    steps: int,
    example: object = None,
    pattern: Pattern = "*",
    per: Per | None = None,
    cost: Cost | None = None,
    multiple: int = 1,
    warmup: float = 0.1,
    repair: float = 0.5,
) -> Sparsifier:
    r"""Zero a share of the model while it trains, then let the rest recover.

    Three phases of one run of `steps` optimizer steps. In the warm-up nothing happens. Then, at
    progress `p` in [0, 1], the share ``share * (1 - (1 - p)^3)`` of the units with the smallest
    scores is removed: within an interval they fade linearly, and units that grow against that
    stay; at its end they are exactly zero. In the repair phase the zeros are frozen and nothing
    pulls on the remaining weights, which keep the optimizer's state.

    The score of a unit is its squared size over the sum of those in its layer that are not
    smaller (sizes within 0.8 % count as equal), so that layers are comparable and none is emptied.
    If a BatchNorm, InstanceNorm or GroupNorm follows, its weight is used as the size, since the
    scale before a norm has no effect; the unit is removed together with the norm's weight and
    bias, so `tikhon.compact` removes all of them.

    Args:
        model: the module; wrappers are unwrapped.
        optimizer: any torch optimizer, or a list or dict of those that train the model together;
            steps of the last one are counted.
        share: of the units to remove, in (0, 1); exact to the unit.
        of: "weights" (single entries), "channels" (output units of linear and convolutional
            layers, coupled ones together), "heads" (of attention), "features" (inputs of the
            model: their columns in all layers that read them) or "ranks" (of pairs of factors as
            in LoRA: a row of one with a column of the other).
        steps: optimizer steps of the whole run.
        example: one batch of inputs (a tuple for several), needed to trace the model: for
            "channels", "features", heads outside `nn.MultiheadAttention`, and `cost`.
        pattern: the weights that may be removed, as for `select`; by default no biases, norms or
            embeddings.
        per: "model" counts over all layers together (the default for weights and ranks), "layer"
            in each.
        cost: "flops" makes `share` one of the floating-point operations of a forward pass, and
            ranks units by score per operation.
        multiple: keep a multiple of this many units in each layer, for hardware that prefers 8.
        warmup: share of the steps before anything is removed, in [0, 1).
        repair: share of the steps after the last removal, in [0, 1); `warmup + repair < 1`.

    Raises ValueError for arguments out of their range and if no unit may be removed (with the
    reason), RuntimeError for a second handle on the same weights (channels and features of one
    layer, its rows and its columns, are allowed).

    References: Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878 (the cubic schedule); Lee
    et al. (2021), https://arxiv.org/abs/2010.07611 (the score); Liu et al. (2017),
    https://arxiv.org/abs/1708.06519 (the weights of norms as sizes of channels).

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> optimizer = torch.optim.Adam(model.parameters(), 0.01)
    >>> x = torch.randn(64, 8)
    >>> sparse = sparsify(model, optimizer, 0.75, steps=100)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     (model(x) - x[:, :1]).square().mean().backward()
    ...     optimizer.step()
    >>> sparse.audit().share
    0.75
    """
    thinning = Thinning(share, of, pattern, per, cost, multiple, warmup, repair)
    return Sparsifier(model, optimizer, thinning, steps=steps, example=example)


class Sparsifier:
    """A pruning schedule attached to an optimizer; a handle and a context manager."""

    model: nn.Module
    thinning: Thinning
    optimizers: list[optim.Optimizer]
    steps: int
    step: int
    layers: list[Layer]
    begin: int
    end: int
    every: int

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        thinning: Thinning,
        *,
        steps: int,
        example: object = None,
    ) -> None:
        self.model, self.thinning = unwrap(model), thinning
        refuse_flattened(model)
        given = as_list(optimizer)
        self.optimizers = list({id(one): one for one in map(inner_optimizer, given)}.values())
        if not self.optimizers:
            raise ValueError("sparsify needs an optimizer, received an empty list")
        if any(isinstance(one, optim.LBFGS) for one in self.optimizers):
            raise TypeError(
                "sparsify would move weights behind the line search of LBFGS, whose curvature "
                "pairs would be wrong; train with another optimizer"
            )
        _check_materialized(self.model)
        self.step = 0
        allowed = "the optimizer steps of the whole run, 1 or more"
        self.steps: int = check_number("sparsify", "steps", steps, allowed, is_count, whole=True)
        found, self._cost_function = find_layers(self.model, thinning, example)
        self.layers = self._trained_layers(found)
        self.end = max(1, round((1 - thinning.repair) * self.steps))
        self.begin = min(round(thinning.warmup * self.steps), self.end - 1)
        self.every = max(1, (self.end - self.begin) // DECISIONS)
        self._next_alive = [
            torch.ones(x.units, dtype=torch.bool, device=_device(x)) for x in self.layers
        ]
        self._alive = [keep.clone() for keep in self._next_alive]  # False for removed units
        self._list_parts()
        self._zero_masks: list[Tensor] | None = None  # 0 for removed entries, else 1
        self._fade_masks: list[Tensor] | None = None  # 1 for fading entries, else 0
        found_copies = [(one, find_weight_copies(one)) for one in self.optimizers]
        self._copies = [(one, copies) for one, copies in found_copies if copies]
        self._hooks: list[StepHooks] = []
        self._checks_left, self._returns = CHECKS, 0  # of zeros that others have set again
        self._check_reachable()
        self._attach()

    @property
    def optimizer(self) -> optim.Optimizer:
        """The optimizer whose steps are counted."""
        return self.optimizers[-1]

    @property
    def phase(self) -> str:
        """ "warm-up", "thinning" or "repair"."""
        if self.step <= self.begin:
            return "warm-up"
        return "thinning" if self.step < self.end else "repair"

    def audit(self) -> Sparsity:
        """Return the current zeros by layer, compared with what was requested."""
        self._track_parameters()
        rows = tuple(LayerShare(x.name, x.units, x.zeros()) for x in self.layers)
        saved = None
        if self.thinning.cost is not None:
            whole = self._cost_function([x.units for x in rows])
            saved = 1 - self._cost_function([x.units - x.zeros for x in rows]) / whole
        return Sparsity(
            self.thinning.of,
            self.thinning.share,
            self.phase,
            self.step,
            self.steps,
            self.end,
            rows,
            self.thinning.cost,
            saved,
            sum(
                int((x.nonzero_units() & ~keep).sum()) for x, keep in zip(self.layers, self._alive)
            ),
        )

    @torch.no_grad()
    def apply(self, copy: nn.Module) -> None:
        """Apply the zeros to a copy of the model (an EMA or SWA average).

        Raises ValueError for a copy of another model.
        """
        self._track_parameters()
        others = _parameters_by_name(unwrap(copy))
        for layer, keep in zip(self.layers, self._alive):
            for part in layer.parts:
                if part.name not in others:
                    raise ValueError(
                        f"the copy has no parameter {part.name!r}; is it of this model?"
                    )
                own = others[part.name]
                own.mul_(part.expand_mask(keep, outside=1.0).to(own))

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the removed units by layer."""
        self._track_parameters()
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "steps": self.steps,
            "asked": self.thinning.plain(),
            "keep": {x.name: k.clone() for x, k in zip(self.layers, self._next_alive)},
            "gone": {x.name: k.clone() for x, k in zip(self.layers, self._alive)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; ValueError for another target."""
        if not isinstance(state, dict) or state.get("schema_version") != SCHEMA_VERSION:
            held = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"expected what Sparsifier.state_dict() gave, with schema_version "
                f"{SCHEMA_VERSION}, received {held}"
            )
        ours = {**asdict(self.thinning), "steps": self.steps}
        others = {**asdict(Thinning.read(state["asked"])), "steps": state["steps"]}
        for name, value in ours.items():
            if value != others[name]:
                raise ValueError(
                    f"the state is of a run with {name}={others[name]!r}, this one has "
                    f"{value!r}; give the same arguments, or start the run again"
                )
        self._track_parameters()
        sizes = {x.name: x.units for x in self.layers}
        if {name: len(flags) for name, flags in state["keep"].items()} != sizes:
            raise ValueError("the state is of another model: its layers differ")
        self.step = state["step"]
        self._next_alive = [
            state["keep"][x.name].to(k) for x, k in zip(self.layers, self._next_alive)
        ]
        self._alive = [state["gone"][x.name].to(k) for x, k in zip(self.layers, self._alive)]
        self._build_masks()

    def remove(self) -> None:
        """Detach; zeros are kept, but the optimizer may change them from now on."""
        audit = self.audit() if self._hooks else None
        if audit and audit.returned:
            warn(
                f"sparsify: {audit.returned:,} of the {self.thinning.of} that had gone are not "
                f"zero: {RETURNED}; {audit.share:.1%} are zero"
            )
        if audit and self.step < self.end:
            warn(
                f"sparsify was removed at step {self.step}, before its schedule ended at "
                f"{self.end}: {audit.share:.1%} of the {self.thinning.of} are zero, "
                f"{self.thinning.share:.1%} asked; give `steps` the optimizer steps of the whole "
                "run"
            )
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = []
        self._arrival.arrived()

    def __enter__(self) -> Sparsifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        requested = f"{self.thinning.share:.0%} of {self.thinning.cost or self.thinning.of}"
        return f"Sparsifier({requested}, {self.phase}, step {self.step} of {self.steps})"

    def __getstate__(self) -> dict[str, Any]:
        self._track_parameters()
        left = ("_places", "_arrival")
        kept = {name: value for name, value in vars(self).items() if name not in left}
        return {**kept, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_hooks")
        vars(self).update(state, _hooks=[])
        self._list_parts()
        if attached:
            self._attach()

    # -- what is attached ---------------------------------------------------------------------

    def _list_parts(self) -> None:
        """List the parts of all layers, and where the model holds their parameters."""
        self._parts = [part for layer in self.layers for part in layer.parts]
        self._params = [part.parameter for part in self._parts]
        places = {
            name: (owner._parameters, name.rpartition(".")[2])
            for entry in entries_of(self.model)
            for name, owner in zip(entry.names, entry.owners)
        }
        self._places = [places[part.name] for part in self._parts]
        self._trained_with = self._optimized()

    def _optimized(self) -> list[nn.Parameter]:
        return [
            p for one in self.optimizers for group in one.param_groups for p in group["params"]
        ]

    def _is_current(self) -> bool:
        """Return whether modules and optimizers hold the identical parameters."""
        held, seen = self._optimized(), self._trained_with
        return (
            len(held) == len(seen)
            and all(map(is_, held, seen))
            and all(own.get(a) is p for (own, a), p in zip(self._places, self._params))
        )

    def _track_parameters(self) -> None:
        """Track parameters that were replaced in the model.

        Layers whose parameters are missing or have another shape are dropped.
        """
        now, dropped = _parameters_by_name(self.model), []
        if all(now.get(part.name) is part.parameter for part in self._parts):
            return
        layers, keep, gone = self.layers, self._next_alive, self._alive
        self.layers, self._next_alive, self._alive = [], [], []
        for number, layer in enumerate(layers):
            found = [now.get(part.name) for part in layer.parts]
            parts = [
                replace(part, parameter=param)
                for part, param in zip(layer.parts, found)
                if param is not None and param.shape == part.parameter.shape
            ]
            if len(parts) < len(found):
                dropped.append((number, layer))
                continue
            device = parts[0].parameter.device
            self.layers.append(replace(layer, parts=tuple(parts)))
            self._next_alive.append(keep[number].to(device))
            self._alive.append(gone[number].to(device))
        if self.thinning.cost is not None:
            for number, layer in dropped:  # its cost is unchanged
                self._cost_function = _with_whole_layer(self._cost_function, number, layer.units)
        self._list_parts()
        self._build_masks()
        if dropped:
            warn(
                f"sparsify leaves out {first_names(layer.name for _, layer in dropped)} from here "
                "on: the weights are gone or have another shape; remove() this handle and attach "
                "a new one to thin what is there now"
            )

    def _trained_layers(self, found: list[Layer]) -> list[Layer]:
        """Return the layers that are trained, as others could not recover."""
        held = set(map(id, self._optimized()))
        out: dict[str, list[Layer]] = {reason: [] for reason in _NOT_TRAINED}
        for layer in found:
            params = [part.parameter for part in layer.parts]
            unheld = not all(id(param) in held for param in params)
            if unheld or not all(param.requires_grad for param in params):
                out[_NOT_TRAINED[not unheld]].append(layer)
        left = [x for x in found if not any(x in layers for layers in out.values())]
        for reason, layers in out.items():
            names = first_names(x.name for x in layers)
            if layers and not left:
                raise ValueError(f"sparsify: no chosen weight is trained ({names}): {reason}")
            if layers:
                warn(f"sparsify leaves out {names}, which nothing would repair: {reason}")
        return left

    def _check_reachable(self) -> None:
        """Raise if no unit can be removed, and warn if fewer can than requested."""
        units = [x.units for x in self.layers]
        alike = [Sizes.of(torch.ones(x.units, device=_device(x))) for x in self.layers]
        left = self._kept_counts(alike, self.end)
        requested = self.thinning
        goal = f"{requested.share:.1%} of the {requested.cost or requested.of}"
        keeps = f"each layer keeps {requested.multiple} at least"
        if left == units:
            raise ValueError(
                f"sparsify: nothing would go: {goal}, in layers of {first_names(units)} "
                f"{requested.of}, is less than one, and {keeps}; ask for more, or "
                "count over per='model'"
            )
        reached = 1 - self._cost_function(left) / self._cost_function(units)
        rounding = requested.multiple * len(units) / 2 / sum(units)
        if reached < requested.share - rounding:
            warn(f"sparsify: {goal} cannot go, about {reached:.1%} can: {keeps}")

    def _attach(self) -> None:
        self._arrival = GradientArrival(self._check_zeros)
        for optimizer in self.optimizers:
            for other in hook_owners(optimizer):
                if isinstance(other, Sparsifier) and any(
                    a.overlaps(b) for a in self._parts for b in other._parts
                ):
                    raise RuntimeError(
                        "these weights have a sparsify handle already; remove() it first, or give "
                        "each handle weights of its own by pattern= (one may take the rows of a "
                        "matrix and another its columns)"
                    )
        for optimizer in self.optimizers:
            after = partial(self._after_step, optimizer)
            hooks = StepHooks(optimizer, self._before_step, after, lambda: None, owner=self)
            self._hooks.append(hooks)

    # -- one step -----------------------------------------------------------------------------

    def _before_step(self, *step: object) -> None:
        if not self._is_current():
            self._track_parameters()
            self._trained_with = self._optimized()

    def _check_zeros(self) -> None:
        """Look, as the next gradient arrives, whether something has set zeros again."""
        if not self._checks_left or all(keep.all() for keep in self._alive):
            return
        self._checks_left -= 1
        self._returns += self.audit().returned > 0
        if self._returns == 2:  # once may be weights that were loaded
            self._checks_left = 0
            kind = type(self.optimizer).__name__
            warn(
                f"sparsify: zeros do not last from one step of {kind} to the next gradient; they "
                f"are set by something else (a wrapper such as Lookahead, an average copied into "
                f"the model, another optimizer): give sparsify a plain {kind}"
            )

    @torch.no_grad()
    def _after_step(self, optimizer: optim.Optimizer) -> None:
        counts = optimizer is self.optimizer
        self.step += counts
        if self.step <= self.begin:
            return
        place = (self.step - self.begin) % self.every
        first = self.step == self.begin + 1
        deciding = self.step == self.end or (self.step < self.end and (first or place == 0))
        if counts and deciding:
            self._update_masks(first)
        which = list(range(len(self._params)))
        # a step of one layer within `backward`, which still reads the weights of the others
        within = torch._C._current_graph_task_id() != -1
        if counts and not within and self._checks_left:
            self._arrival.arrived()
            self._arrival.expect(self._params[0])
        if within:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            which = [i for i in which if id(self._params[i]) in held]
        params = [self._params[i] for i in which]
        if not params:
            return
        self._apply_zero_masks(params, which)
        stride = max(1, self.every // FADES)
        if self._fade_masks is not None and (counts or within) and place % stride == 0:
            times = (self.every - 1 - place) // stride + 1  # until the next decision
            part = 1 / (times + 1)  # of the remainder, for linear fading
            masks = [self._fade_masks[i] for i in which]
            _many._foreach_addcmul_(params, params, masks, value=-part)

    def _apply_zero_masks(self, params: list[nn.Parameter], which: Sequence[int]) -> None:
        """Keep removed entries at zero, also in an optimizer's own copies of the weights."""
        if self._zero_masks is None:
            return
        masks = [self._zero_masks[i] for i in which]
        _many._foreach_mul_(params, masks)
        for optimizer, copies in self._copies:
            for param, held in zip(params, masks):
                state = optimizer.state.get(param, {})
                for key in [key for key in copies.keys if key in state]:
                    state[key].mul_(held)

    def _update_masks(self, first: bool) -> None:
        """Decide which units are removed now, and which fade until the next decision."""
        sizes = [Sizes.of(layer.sizes(self._metric)) for layer in self.layers]
        if not first or self.step == self.end:
            self._alive = self._kept_masks(sizes, self.step)
        if self.step < self.end:
            self._next_alive = self._kept_masks(sizes, min(self.step + self.every, self.end))
        else:
            self._next_alive = self._alive
        self._build_masks()

    def _metric(self, param: nn.Parameter) -> Tensor | None:
        """Return an adaptive optimizer's denominators, large where the loss is steep."""
        for optimizer in self.optimizers:
            state, rule = optimizer.state.get(param), rule_of(optimizer)
            if not state or rule is None or rule.uniform:
                continue
            return rule.gain(optimizer, group_of(optimizer, param), state).stiffness()
        return None

    def _kept_masks(self, sizes: Sequence[Sizes], step: int) -> list[Tensor]:
        exact = step >= self.end
        counts = self._kept_counts(sizes, step)
        return [one.largest(count, exact=exact) for one, count in zip(sizes, counts)]

    def _kept_counts(self, sizes: Sequence[Sizes], step: int) -> list[int]:
        """Return how many units of each layer to keep at a step."""
        requested = self.thinning
        progress = (step - self.begin) / max(1, self.end - self.begin)
        share = requested.share * (1 - (1 - min(progress, 1.0)) ** 3)
        counts = units_to_keep(
            sizes, share, per=requested.resolved_per, cost_function=self._cost_function
        )
        if requested.multiple == 1:
            return counts
        return round_to_multiples(
            counts,
            [layer.units for layer in self.layers],
            requested.multiple,
            per=requested.resolved_per,
            final=step >= self.end,
            cost_function=self._cost_function,
        )

    def _build_masks(self) -> None:
        """Expand masks of units to factors on the parameters' entries."""
        owners = [i for i, layer in enumerate(self.layers) for _ in layer.parts]
        pairs = list(zip(self._parts, owners))
        gone, fading = self.step > self.begin, self.begin < self.step < self.end
        self._zero_masks = (
            [p.expand_mask(self._alive[i], outside=1.0) for p, i in pairs] if gone else None
        )
        self._fade_masks = (
            [p.expand_mask(~self._next_alive[i]) for p, i in pairs] if fading else None
        )


def _check_materialized(model: nn.Module) -> None:
    """Raise ValueError for parameters without shape or values, which cannot be ranked."""
    for entry in entries_of(model):
        if is_lazy(entry.param):
            raise ValueError(
                f"sparsify: {entry.name!r} has no shape yet (a lazy layer); run the model on one "
                f"batch first"
            )
        if entry.param.is_meta:
            raise ValueError(
                f"sparsify: {entry.name!r} is on the meta device and has no values; load the "
                f"weights first (load_state_dict(assign=True), or to_empty and initialise)"
            )


def _parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under each of its names."""
    return {name: entry.param for entry in entries_of(model) for name in entry.names}


def _with_whole_layer(cost_function: CostFunction, number: int, units: int) -> CostFunction:
    return lambda counts: cost_function([*counts[:number], units, *counts[number:]])


def _device(layer: Layer) -> torch.device:
    return layer.parts[0].parameter.device
