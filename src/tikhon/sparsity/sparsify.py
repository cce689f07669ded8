"""The verb `sparsify`: an exact share of zeros at the end of one run, on the user's own loop."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn, optim

from tikhon.errors import unknown
from tikhon.regularizer.audit import warn
from tikhon.regularizer.hooks import StepHooks
from tikhon.regularizer.targets import Pattern
from tikhon.sparsity import units
from tikhon.sparsity.allocation import Per, keeps
from tikhon.wrappers import unwrap

Of = Literal["weights", "channels", "heads"]
SCHEMA_VERSION = 1

_attached: weakref.WeakKeyDictionary[optim.Optimizer, weakref.ref[Sparsifier]]


@dataclass(frozen=True)
class LayerShare:
    """One layer of the audit."""

    layer: str
    units: int
    zeros: int

    @property
    def share(self) -> float:
        """Share of the units that are exactly zero."""
        return self.zeros / max(1, self.units)


@dataclass(frozen=True)
class Sparsity:
    """What was asked and what is there; printed as a table."""

    of: str
    asked: float
    phase: str
    step: int
    steps: int
    layers: tuple[LayerShare, ...]

    @property
    def share(self) -> float:
        """Share of all units that are exactly zero."""
        return sum(x.zeros for x in self.layers) / max(1, sum(x.units for x in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([len("layer"), *(len(x.layer) for x in self.layers)])
        lines = [
            f"{self.share:.2%} of the {self.of} are zero ({self.asked:.2%} asked); "
            f"{self.phase}, step {self.step} of {self.steps}",
            f"{'layer':<{width}}  {self.of:>9}  {'zero':>9}  share",
        ]
        lines += [
            f"{x.layer:<{width}}  {x.units:>9,}  {x.zeros:>9,}  {x.share:.1%}" for x in self.layers
        ]
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    optimizer: optim.Optimizer,
    share: float,
    *,
    of: Of = "weights",
    steps: int,
    example: Any = None,
    pattern: Pattern = "*",
    per: Per | None = None,
    multiple: int = 1,
    warmup: float = 0.1,
    repair: float = 0.35,
) -> Sparsifier:
    r"""Zero a share of the model while it trains, then let the rest repair the damage.

    Three phases of one run of `steps` optimizer steps. In the warm-up nothing happens. Then, at
    progress `p` in [0, 1], the share ``share * (1 - (1 - p)^3)`` of the units with the smallest
    scores goes: within an interval they fade linearly, and what grows back against that stays;
    at its end they are exactly zero. In the repair the zeros are frozen and nothing presses on
    the weights that stay, which keep the optimizer's state.

    The score of a unit is its squared norm over the sum of those in its layer that are not
    smaller, so that layers compare and none is emptied. Where a BatchNorm, InstanceNorm or
    GroupNorm follows, its weight stands for the norm, since the scale of what stands before it is
    free; unit and norm go together, with the norm's bias, so `tikhon.compact` removes all of them.

    Args:
        model: the module; wrappers are looked through.
        optimizer: any torch optimizer; its `step` drives the schedule.
        share: of the units that go, in (0, 1); exact to the unit.
        of: "weights" (single entries), "channels" (output units of linear and convolutional
            layers, coupled ones together) or "heads" (of `nn.MultiheadAttention`).
        steps: optimizer steps of the whole run.
        example: one batch of inputs, for "channels": the model is traced with it once.
        pattern: which weights may go, as for `select`: by default no biases, norms, embeddings.
        per: "model" counts over all layers together (the default for weights), "layer" in each.
        multiple: layers keep a multiple of so many channels, for hardware that likes 8.
        warmup: share of the steps before anything goes, in [0, 1).
        repair: share of the steps after everything has gone, in [0, 1); `warmup + repair < 1`.

    Raises ValueError for arguments out of their range and where no unit may go (with the reason),
    RuntimeError for a second handle on one optimizer.

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
    return Sparsifier(
        model,
        optimizer,
        share,
        of=of,
        steps=steps,
        example=example,
        pattern=pattern,
        per=per or ("model" if of == "weights" else "layer"),
        multiple=multiple,
        warmup=warmup,
        repair=repair,
    )


class Sparsifier:
    """The schedule on its optimizer; a handle, and a context manager that removes itself."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        share: float,
        *,
        of: Of,
        steps: int,
        example: Any,
        pattern: Pattern,
        per: Per,
        multiple: int,
        warmup: float,
        repair: float,
    ) -> None:
        _check(share, of, steps, per, multiple, warmup, repair)
        self.model, self.optimizer = unwrap(model), optimizer
        self.share, self.of, self.multiple = share, of, multiple
        self.per: Per = per
        self.steps, self.step = steps, 0
        self.layers = _layers(self.model, of, example, pattern)
        self.begin, self.end = round(warmup * steps), max(1, round((1 - repair) * steps))
        self.every = max(1, (self.end - self.begin) // 50)
        self._keep: list[Tensor] = [
            torch.ones(layer.units, dtype=torch.bool, device=layer.parts[0].parameter.device)
            for layer in self.layers
        ]
        self._gone = [keep.clone() for keep in self._keep]  # True for what has not gone for good
        earlier = _attached.get(optimizer)
        if earlier is not None and earlier() is not None:
            raise RuntimeError(
                "this optimizer has a sparsify handle already; remove() it, or give one handle "
                "all of the model"
            )
        _attached[optimizer] = weakref.ref(self)
        self._hooks = StepHooks(optimizer, _nothing, self._after_step, _nothing)

    @property
    def phase(self) -> str:
        """ "warm-up", "thinning" or "repair"."""
        if self.step <= self.begin:
            return "warm-up"
        return "thinning" if self.step < self.end else "repair"

    def audit(self) -> Sparsity:
        """What is zero now, layer by layer, beside what was asked."""
        rows = tuple(LayerShare(x.name, x.units, x.zeros()) for x in self.layers)
        return Sparsity(self.of, self.share, self.phase, self.step, self.steps, rows)

    @torch.no_grad()
    def apply(self, copy: nn.Module) -> None:
        """Zero in a copy of the model (an EMA, a SWA average) what has gone in the model."""
        parameters = dict(unwrap(copy).named_parameters())
        for layer, keep in zip(self.layers, self._gone):
            for part in layer.parts:
                if part.name not in parameters:
                    raise ValueError(
                        f"the copy has no parameter {part.name!r}; is it of this model?"
                    )
                own = parameters[part.name]
                own.mul_(part.mask(keep).to(own))

    def state_dict(self) -> dict[str, Any]:
        """The step and what has gone, by layer."""
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "asked": self.share,
            "of": self.of,
            "steps": self.steps,
            "keep": {x.name: k.clone() for x, k in zip(self.layers, self._keep)},
            "gone": {x.name: k.clone() for x, k in zip(self.layers, self._gone)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the `state_dict` was taken; ValueError for another target."""
        for name in ("asked", "of", "steps"):
            ours = self.share if name == "asked" else getattr(self, name)
            if state[name] != ours:
                raise ValueError(
                    f"the state is of a run with {name}={state[name]!r}, this one has {ours!r}"
                )
        if set(state["keep"]) != {x.name for x in self.layers}:
            raise ValueError("the state is of another model: its layers differ")
        self.step = state["step"]
        self._keep = [state["keep"][x.name].to(k) for x, k in zip(self.layers, self._keep)]
        self._gone = [state["gone"][x.name].to(k) for x, k in zip(self.layers, self._gone)]

    def remove(self) -> None:
        """Detach; the zeros stay, but the optimizer may move them from now on."""
        if self.optimizer in _attached:
            if self.step < self.end:
                reached = self.audit().share
                warn(
                    f"sparsify was removed at step {self.step}, before its schedule ended at "
                    f"{self.end}: {reached:.1%} of the {self.of} are zero, {self.share:.1%} "
                    "asked; give `steps` the optimizer steps of the whole run"
                )
            del _attached[self.optimizer]
        self._hooks.remove()

    def __enter__(self) -> Sparsifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Sparsifier({self.share:.0%} of {self.of}, {self.phase}, step {self.step})"

    # one step

    def _after_step(self) -> None:
        self.step += 1
        if self.step <= self.begin:
            return
        if self.step >= self.end:
            if self.step == self.end:
                self._keep = self._gone = self._choose(self.share)
            self._fade(self._gone, 0.0)
            return
        place = (self.step - self.begin) % self.every
        if place == 0 and self.step > self.begin + 1:
            self._gone = self._choose(self._planned(self.step))
        if place in (0, 1) or self.every == 1:
            self._keep = self._choose(self._planned(min(self.step + self.every, self.end)))
        left = self.every - place
        self._fade(self._keep, 1 - 1 / (left + 1))
        self._fade(self._gone, 0.0)

    def _planned(self, step: int) -> float:
        progress = (step - self.begin) / max(1, self.end - self.begin)
        return self.share * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)

    def _choose(self, share: float) -> list[Tensor]:
        scores = [layer.scores() for layer in self.layers]
        multiple = self.multiple if share == self.share else 1
        return keeps(scores, share, per=self.per, multiple=multiple)

    def _fade(self, keep: Sequence[Tensor], factor: float) -> None:
        for layer, flags in zip(self.layers, keep):
            layer.fade_(flags, factor)


_attached = weakref.WeakKeyDictionary()


def _nothing(*step: Any) -> None:
    """Before a step, and after one that has raised."""


def _layers(model: nn.Module, of: Of, example: Any, pattern: Pattern) -> list[units.Layer]:
    if of == "weights":
        return units.weights(model, pattern)
    if of == "heads":
        found = units.heads(model, pattern)
        if not found:
            raise ValueError('of="heads": the model has no nn.MultiheadAttention that matches')
        return found
    if example is None:
        raise ValueError('of="channels" traces the model once: give example, one batch of inputs')
    found = units.channels(model, example, pattern)
    if not found:
        raise ValueError(
            "no layer may lose channels: every one is an output of the model, or is held by an "
            "operation without a rule; tikhon.compact names them"
        )
    return found


def _check(
    share: float, of: str, steps: int, per: str, multiple: int, warmup: float, repair: float
) -> None:
    rules = {
        "share": (share, 0 < share < 1, "in (0, 1): the part that goes"),
        "steps": (steps, steps >= 1, "the optimizer steps of the whole run, at least 1"),
        "per": (per, per in get_args(Per), "'model' or 'layer'"),
        "multiple": (multiple, multiple >= 1, "at least 1"),
        "warmup": (warmup, 0 <= warmup < 1, "in [0, 1)"),
        "repair": (repair, 0 <= repair < 1 - warmup, "in [0, 1), and less than 1 - warmup"),
    }
    if of not in get_args(Of):
        raise ValueError(f"sparsify: {unknown('kind of unit', of, get_args(Of))}")
    for name, (received, fine, rule) in rules.items():
        if not fine:
            raise ValueError(f"sparsify: {name} must be {rule}, received {received!r}")
