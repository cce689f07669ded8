"""The audit: a table of every parameter and the terms that act on it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import pairwise
from typing import Any

import torch
from torch import nn, optim

from tikhon import notebook, plotting
from tikhon.errors import unknown_name
from tikhon.penalties.base import Proximable
from tikhon.regularizer.controller import Controller
from tikhon.regularizer.metric import (
    decoupled_rate,
    group_of,
    has_gain,
    is_uniform,
    stationary_gain,
)
from tikhon.regularizer.plan import bindings_held_by, is_euclidean, keeps_to_face, route_of
from tikhon.regularizer.targets import (
    Entry,
    all_reduce_sum,
    entries_of,
    is_lazy,
    local,
    reason_computed,
)
from tikhon.regularizer.terms import Binding, How, Terms, bind
from tikhon.wrappers import unwrap

CHECK_STEPS = (1, 10, 100, 1000)  # steps after which lost layers are looked for
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Assignment:
    """One parameter: its properties, the terms acting on it, or why there are none.

    `route` says how each term acts: "gradient", "decay", "prox" in the optimizer's metric,
    "orthant" if that is unknown, "project" for constraints that keep the minimum on their set, or
    "project, Euclidean" for those that need not.

    `time_scales` has for each term the steps in which decay alone reduces a weight to 1/e,
    1 / (rate * strength) (Wang and Aitchison 2024, https://arxiv.org/abs/2405.13698): for L2 by
    lr, or in objective mode under SGD by its gain; else None, as under Adam, where it depends on
    the gradients.
    """

    parameter: str
    shape: tuple[int, ...]
    tied_to: tuple[str, ...]
    before_norm: str
    terms: tuple[str, ...]
    strengths: tuple[float, ...]
    how: tuple[str, ...]
    route: tuple[str, ...]
    note: str
    time_scales: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Audit:
    """The assignments of a model; `print` shows the table."""

    assignments: tuple[Assignment, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return plain values, one dict for each parameter."""
        return [asdict(row) for row in self.assignments]

    def __getitem__(self, parameter: str) -> Assignment:
        by_name = {row.parameter: row for row in self.assignments}
        if parameter not in by_name:
            raise KeyError(unknown_name("parameter", parameter, by_name))
        return by_name[parameter]

    def __len__(self) -> int:
        return len(self.assignments)

    def __repr__(self) -> str:
        matched = sum(bool(row.terms) for row in self.assignments)
        return f"Audit({len(self)} parameters, {matched} regularized)"

    def _repr_html_(self) -> str:
        head = ("parameter", "shape", "terms", "strength", "mode", "note")
        rows = [
            (
                row.parameter,
                "x".join(map(str, row.shape)),
                ", ".join(row.terms),
                ", ".join(f"{s:.4g}" for s in row.strengths),
                ", ".join(row.how),
                row.note,
            )
            for row in self.assignments
        ]
        return notebook.html_card(repr(self), (), head, rows)

    def plot(self, *, ax: plotting.Axes | None = None) -> plotting.Display:
        """Plot the strength of every term on every parameter, on a log scale.

        On the matplotlib axes `ax`, or a new figure; InputError without matplotlib.
        """
        display = plotting.canvas(ax)
        pairs = [
            (f"{row.parameter} {term}", strength)
            for row in self.assignments
            for term, strength in zip(row.terms, row.strengths)
        ]
        names, strengths = [name for name, _ in pairs], [strength for _, strength in pairs]
        plotting.bars(display.ax_, names, strengths, x="strength", log=True)
        display.ax_.set_title(repr(self))
        return display

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE, pad_edge=False)
        for heading in ("parameter", "shape", "before", "term", "strength", "mode"):
            table.add_column(heading, no_wrap=True)  # unwrapped, to search and copy
        table.add_column("note", overflow="fold", min_width=30)
        for row in self.assignments:
            table.add_row(
                row.parameter,
                "x".join(map(str, row.shape)) or "-",
                row.before_norm,
                "\n".join(row.terms) or "-",
                "\n".join(f"{strength:.4g}" for strength in row.strengths),
                "\n".join(map(_mode_text, row.how, row.route)),
                "; ".join(filter(None, [row.note, *(f"tied to {name}" for name in row.tied_to)])),
            )
        longest = max((len(row.parameter) for row in self.assignments), default=0)
        console = Console(file=StringIO(), width=max(110, longest + 90), color_system=None)
        console.print(table)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines).strip("\n")


@dataclass(frozen=True)
class Trace:
    """The state and effect of one term on one parameter.

    `share` is the norm of the term's own move divided by the sum of that and the optimizer's; for
    a term that acts through the gradient, the same for gradients. `zeros` is the share of exact
    zeros among the `entries` weights.
    """

    name: str
    parameter: str
    penalty: str
    how: str
    strength: float
    value: float
    zeros: float
    share: float | None
    entries: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        rows = [(name, "" if v is None else v) for name, v in self.to_dict().items()]
        return notebook.html_card(f"Trace of {self.name}", (), ("", "value"), rows)


def audit(model: nn.Module, terms: Terms, *, how: How = "objective") -> Audit:
    """Return the audit of terms before attaching anything.

    Args:
        model: the module.
        terms: as for `regularize`.
        how: as for `regularize`.

    >>> rows = tk.audit(nn.Linear(3, 2), tk.L2(1e-3))
    >>> rows["weight"].terms, rows["bias"].note
    (('L2',), 'not matched: bias')
    """
    model = unwrap(model)
    candidates = entries_of(model)
    return build_audit(model, candidates, bind(model, candidates, terms, how))


def build_audit(
    model: nn.Module,
    candidates: Sequence[Entry],
    bindings: Sequence[Binding],
    optimizers: Sequence[optim.Optimizer] | None = None,
    steps_per_epoch: int | None = None,
) -> Audit:
    """Build one row for each parameter, in the model's order."""
    norms = {id(module): type(norm).__name__ for module, norm in _pairs_before_norm(model)}
    held = {id(p) for o in optimizers or () for group in o.param_groups for p in group["params"]}
    rows = []
    for entry in candidates:
        own = [b for b in bindings if any(p is entry.param for p in b.target.params)]
        norm = next((norms[id(owner)] for owner in entry.owners if id(owner) in norms), "")
        norm = norm if entry.name.rpartition(".")[2] != "bias" else ""
        scales = tuple(_time_scale(b, optimizers or ()) for b in own)
        routes = tuple(_route(b, optimizers or ()) for b in own)
        notes = [_note(entry, own, norm, optimizers is None or id(entry.param) in held)]
        if entry.param.requires_grad:  # what is frozen forgets nothing
            notes += [_time_scale_text(scale, steps_per_epoch) for scale in scales if scale]
        if any(route.endswith("Euclidean") for route in routes):
            notes.append("kept within its set, but not at the minimum on it")
        rows.append(
            Assignment(
                parameter=entry.name,
                shape=entry.shape,
                tied_to=entry.names[1:],
                before_norm=norm,
                terms=tuple(type(b.base).__name__ for b in own),
                strengths=tuple(float(b.live.value) for b in own),
                how=tuple("constraint" if b.base.constraint else b.how for b in own),
                route=routes,
                note="; ".join(filter(None, notes)),
                time_scales=scales,
            )
        )
    return Audit(tuple(rows))


def _route(binding: Binding, optimizers: Sequence[optim.Optimizer]) -> str:
    """Return the route of a term under the first optimizer that holds its parameters."""
    optimizer = next((o for o in optimizers if bindings_held_by(o, [binding])), None)
    if optimizer is None:
        return binding.route
    matters = not (binding.base.elementwise or is_uniform(optimizer))
    if matters and is_euclidean(binding, optimizer) and not keeps_to_face(binding, optimizer):
        return "project, Euclidean"
    return route_of(binding, optimizer)


def _time_scale(binding: Binding, optimizers: Sequence[optim.Optimizer]) -> float | None:
    """Return the steps in which decay alone reduces a weight to 1/e, if that is one number."""
    optimizer = next((o for o in optimizers if bindings_held_by(o, [binding])), None)
    if optimizer is None or not binding.is_plain_decay:
        return None
    group = group_of(optimizer, binding.target.params[0])
    if binding.how != "objective":
        rate = decoupled_rate(binding.how, group, binding.peaks.get(binding.target.params[0]))
    elif isinstance(optimizer, optim.SGD) and is_uniform(optimizer):
        rate = stationary_gain(optimizer, group, {}).numerator
    else:
        return None
    decay = float(rate) * float(binding.live.value)
    return 1 / decay if decay > 0 else None


def _time_scale_text(time_scale: float, steps_per_epoch: int | None) -> str:
    """Return the steps in which weights without a gradient shrink to 1/e."""
    text = f"decay time {time_scale:,.0f} steps"
    if not steps_per_epoch:
        return text
    epochs = f"{time_scale / steps_per_epoch:.3g}"
    return f"{text} ({epochs} {'epoch' if epochs == '1' else 'epochs'})"


def _mode_text(how: str, route: str) -> str:
    """Return the mode of a term, with its route where that adds information."""
    if how == "objective" and route in ("prox", "orthant"):
        return f"{how}, {route}"
    return f"{how}, Euclidean" if route.endswith("Euclidean") else how


def _note(entry: Entry, own: list[Binding], norm: str, held: bool) -> str:
    if not own:
        return f"not matched: {entry.excluded}" if entry.excluded else "not matched"
    notes = []
    if not held:
        frozen = "" if entry.param.requires_grad else "frozen, "
        notes.append(f"{frozen}not in the optimizer: untouched")
    elif not entry.param.requires_grad and entry.param.grad is None:
        notes.append("frozen: untouched")
    elif not entry.param.requires_grad:
        notes.append(
            "frozen, but a gradient is left over: optimizer and penalty move it until `.grad` "
            "is None"
        )
    if is_lazy(entry.param):
        notes.append("shape not known yet")
    kinds = [type(b.base).__name__ for b in own if not b.base.constraint]
    if norm and kinds:
        effect = (
            "L2 acts as a learning rate"
            if "L2" in kinds
            else f"{kinds[0]} shrinks all of it before it selects"
        )
        notes.append(f"followed by {norm}: its scale has no effect, {effect}")
    return "; ".join(notes)


def check_terms_are_held(
    bindings: Sequence[Binding], optimizers: Sequence[optim.Optimizer]
) -> None:
    """Warn of terms on parameters that no optimizer holds.

    Raises ValueError if that is all of them, unless they are frozen and may be added later.
    """
    held = {
        binding for optimizer in optimizers for binding in bindings_held_by(optimizer, bindings)
    }
    kinds = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
    if bindings and not held and any(map(_is_trained, bindings)):
        names = ", ".join(binding.target.name for binding in bindings[:5])
        raise ValueError(
            f"the optimizer ({kinds}) holds none of the matched parameters ({names}); attach to "
            f"the optimizer that was built from this model's parameters"
        )
    for term in dict.fromkeys(binding.term for binding in bindings):
        own = [binding for binding in bindings if binding.term == term]
        if not held.isdisjoint(own):
            continue
        names = ", ".join(binding.target.name for binding in own[:5])
        why = (
            f"not in {kinds}; give all optimizers to regularize as a list"
            if any(map(_is_trained, own))
            else "frozen (requires_grad=False) and not in the optimizer; the term joins in when "
            "they are added by add_param_group"
        )
        warn(f"the term {term} acts on nothing: its parameters ({names}) are {why}")


def messages_on_lost_terms(
    model: nn.Module,
    before: Sequence[Binding],
    now: Sequence[Binding],
    optimizers: Sequence[optim.Optimizer],
) -> Iterator[str]:
    """Yield messages on terms lost because parameters were replaced after attaching."""
    present = {name: binding for binding in now for name in binding.target.names}
    held = {binding for optimizer in optimizers for binding in bindings_held_by(optimizer, now)}
    for binding in before:
        for name in binding.target.names:
            after = present.get(name)
            if after is None and (why := reason_computed(model, name)):
                yield f"{binding.name} acts no more: {why}"
            elif after not in (None, binding) and after not in held and _is_trained(after):
                yield (
                    f"{binding.name} acts on nothing: {name!r} was replaced and no optimizer "
                    f"holds the new parameter, which is not trained either; give it to one by "
                    f"add_param_group"
                )


def _is_trained(binding: Binding) -> bool:
    return any(param.requires_grad for param in binding.target.params)


def warn_of_contradictions(
    model: nn.Module,
    optimizer: optim.Optimizer,
    bindings: Sequence[Binding],
    earlier: Sequence[Binding] = (),
) -> None:
    """Warn once per term of combinations of settings known to be mistakes.

    `earlier` are the bindings of other Regularizers on the same optimizer.
    """
    said: set[tuple[str, str, int]] = set()

    def once(mistake: str, binding: Binding, message: str) -> None:
        key = (mistake, type(binding.base).__name__, id(binding.live))
        if key not in said:
            said.add(key)
            warn(message)

    for binding, other in _duplicates(bindings, earlier):
        once(
            "doubled",
            binding,
            f"an earlier Regularizer of this optimizer has {other.name} on "
            f"{binding.target.name!r}, and both act; remove() that one first (a notebook cell "
            f"that runs again attaches again)",
        )
    decay = {
        id(p): group.get("weight_decay", 0)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for binding in bindings:
        kind, name = type(binding.base).__name__, binding.target.name
        other = max((decay.get(id(p), 0) for p in binding.target.params), default=0)
        if kind in ("L2", "ElasticNet") and other:
            once(
                "decay",
                binding,
                f"{binding.name} (strength {float(binding.live.value):.4g}) and the optimizer's "
                f"weight_decay={other} both shrink {name!r}; set one of them to 0",
            )
        if binding.route == "prox" and binding.how != "objective":
            if not is_uniform(optimizer):
                slopes = getattr(type(binding.base), "slopes", None)
                objective = has_gain(optimizer) or slopes is not Proximable.slopes
                once(
                    "metric",
                    binding,
                    f"{binding.name} is decoupled from the metric of {type(optimizer).__name__}: "
                    f"it is not the minimum of loss + penalty that SGD finds; for that use "
                    + ('how="objective"' if objective else "AdamW or SGD"),
                )
        if name.endswith((".original1", "weight_v")) and "weight" in name:
            once(
                "direction",
                binding,
                f"{binding.name} acts on the direction of a weight norm, whose length has no "
                f"effect on the output; regularize its length (original0, weight_g) instead",
            )
    for module, norm in _pairs_before_norm(model):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            warn(
                f"Dropout directly before {type(norm).__name__}: the variance that it "
                f"learns while training is not that of evaluation; put the dropout after it"
            )


def warn_of_lost_layers(optimizer: optim.Optimizer, bindings: Sequence[Binding]) -> bool:
    """Warn of tensors of a deep network fully zeroed by a prox in an adaptive metric.

    Early gradients of inner layers are small, so steps in the metric of Adam and its variants are
    large, and a zeroed layer blocks gradients for good. Not reported for fewer than three tensors,
    a uniform gain, or strengths set by a controller.
    """
    own = [b for b in bindings if b.how == "objective"]
    if len(own) < 3 or is_uniform(optimizer):
        return False
    params = [p for b in own for p in b.target.params]
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    for binding in own:
        if isinstance(binding.live.source, Controller) or _has_nonzero_weights(binding):
            continue
        warn(
            f"{binding.name} has made all of {binding.target.name!r} zero: in the metric of "
            f"{type(optimizer).__name__} weights with small gradients move far, and a layer of "
            f"zeros passes no gradient on; lower the strength "
            f"({float(binding.live.value):.3g}), let it rise by tikhon.schedules.WarmUp, use "
            f'how="decoupled", or leave this parameter out'
        )
        return True
    return False


def _has_nonzero_weights(binding: Binding) -> bool:
    """Return whether any weight of the full parameters is non-zero, or there are none."""
    params = binding.target.params
    found = [local(p).count_nonzero() for p in params]
    empty = not any(p.numel() for p in params)
    return empty or any(int(all_reduce_sum(n, p)) for n, p in zip(found, params))


def warn(message: str) -> None:
    """Warn at the line of user code that led here, outside tikhon and torch."""
    depth, frame = 1, sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("tikhon", "torch"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)


def _duplicates(
    bindings: Iterable[Binding], earlier: Sequence[Binding]
) -> Iterator[tuple[Binding, Binding]]:
    """Yield bindings that act twice: the same penalty on a parameter, or another prox."""
    for binding in bindings:
        ours = set(map(id, binding.target.params))
        for other in earlier:
            same = type(other.base) is type(binding.base) or other.route == binding.route == "prox"
            if same and not ours.isdisjoint(map(id, other.target.params)):
                yield binding, other


def _pairs_before_norm(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield modules with the batch or instance norm that directly follows in a container."""
    for container in model.modules():
        for first, second in pairwise(container.children()):
            if isinstance(second, _BATCH_NORMS):
                yield first, second
