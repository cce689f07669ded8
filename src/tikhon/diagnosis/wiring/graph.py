"""The autograd graph: trainable tensors outside of the model, parameters that it cannot reach."""

from __future__ import annotations

from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.copying import leaves
from tikhon.data.rows import tensors
from tikhon.diagnosis.modes import LOSS
from tikhon.diagnosis.replica import gradients, undisturbed
from tikhon.diagnosis.wiring.program import Subject
from tikhon.diagnosis.wiring.torch_calls import Calls, Joined
from tikhon.errors import InputError

MAKERS = ("kaiming_uniform", "empty", "randn", "rand", "zeros", "ones")
FLAT = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside")  # derivative 0
WEIGHTS = 8  # maximum size of a parameter that weights the parts of a loss
DEEP = 4  # nesting depth of containers searched for a tensor


def graph_facts(subject: Subject, held: set[int]) -> dict[str, object]:
    """Find trainable tensors outside of the model, and parameters cut off from the loss.

    `held` are the ids of the parameters of the user's optimizer.
    """
    model = subject.model
    facts: dict[str, object] = {}
    first, tape, found = _pass(subject)
    second, _, _ = _pass(subject)
    facts["connected"] = any(g is not None for g in found)
    if facts["connected"]:
        facts |= _strangers(subject, first, second, held, slopes=bool(tape.named("grad")))
        if held and facts["outside"]:
            facts["judge"] = _judge(subject, held)
        made = [c.line for c in tape.named(*MAKERS) if c.line and c.module != LOSS]
        facts["made_place"] = made[0] if made and facts["made_in_forward"] else ""
    flat = [c for c in tape.named(*FLAT) if c.attached]
    names = [n for n, _ in _trainable(model)]
    reached = [n for n, g in zip(names, found) if g is not None and bool(g.any())]
    if facts["connected"] and flat and not reached:  # it leaves every gradient zero
        facts["flat"] = {"name": flat[0].name, "place": flat[0].place}
    level = [n for n, g in zip(names, found) if g is not None and not bool(g.any())]
    without = [n for n, g in zip(names, found) if g is None]
    if without:
        facts |= _cut(subject, without, tape)
    if reached and flat and level and not facts.get("detached") and _moves(subject, level):
        cut = {"name": flat[0].name, "place": flat[0].place}
        facts |= {"without_gradient": [*without, *level], "detached": level, "cuts": [cut]}
    return facts


def _moves(subject: Subject, names: list[str]) -> bool:
    """Whether the loss depends on parameters, tested by changing and restoring them."""
    model = subject.model
    params = [p for n, p in model.named_parameters() if n in set(names)]
    kept = [p.detach().clone() for p in params]
    losses = []
    try:
        for changed in (False, True):
            with torch.no_grad(), undisturbed(model, training=True):
                for p, before in zip(params, kept):
                    p.copy_(before.flip(0) * -2 + 0.5 if changed else before)
                losses.append(float(subject.replica.value(subject.batch)))
    finally:
        with torch.no_grad():
            for p, before in zip(params, kept):
                p.copy_(before)
    return losses[0] != losses[1]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _pass(subject: Subject) -> tuple[Tensor, Calls, list[Tensor | None]]:
    model = subject.model
    with undisturbed(model, training=True):
        with Calls(model) as tape:
            loss = subject.replica.value(subject.batch)
        return loss, tape, gradients(loss, [p for _, p in _trainable(model)], model)


def _strangers(
    subject: Subject, first: Tensor, second: Tensor, held: set[int], *, slopes: bool
) -> dict[str, object]:
    """Find trainable tensors of two passes that neither model nor optimizer holds.

    If the program differentiates itself (`slopes`), tensors that are no parameters are its
    variables: inputs of a differential equation, positions of a force. Views of the inputs that
    require a gradient, as activation checkpointing needs, are excluded as well.
    """
    own = {id(p) for p in subject.model.parameters()}
    named = list(_loose(subject.model))
    given = {t.data_ptr() for t in tensors(subject.batch) if t.layout == torch.strided}
    strange = [t for t in leaves(first) if id(t) not in own | held and t.data_ptr() not in given]
    if slopes:
        strange = [t for t in strange if isinstance(t, nn.Parameter)]
    lasting = {id(t) for t in leaves(second)}
    known = [(t, next((n for n, other in named if other is t), "")) for t in strange]
    small = [t for t, n in known if not n and isinstance(t, nn.Parameter) and id(t) in lasting]
    own_weights = held and small and all(t.numel() <= WEIGHTS for t, n in known if not n)
    return {
        "weights_of_loss": len(small) if own_weights else 0,
        "unregistered": [n for _, n in known if n],
        "made_in_forward": sum(id(t) not in lasting for t, n in known if not n),
        "outside": sum(id(t) in lasting for t, n in known if not n),
    }


def _judge(subject: Subject, held: set[int]) -> str:
    """Return the type of an untrained layer of the loss that gets the targets, else ""."""
    goals = [t.flatten() for t in tensors(subject.batch[1])]
    own, found = set(subject.model.modules()), []

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        given = [t.flatten() for t in tensors(args)]
        told = any(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            for a in given
            for b in goals
        )
        params = [p for p in module.parameters() if p.requires_grad]
        if told and module not in own and params and not any(id(p) in held for p in params):
            found.append(type(module).__name__)

    handle = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        with torch.no_grad(), undisturbed(subject.model, training=True):
            subject.replica.value(subject.batch)
    finally:
        handle.remove()
    return found[0] if found else ""


def _loose(model: nn.Module, seen: set[int] | None = None) -> Any:
    """Yield (name, tensor) of unregistered attributes of modules, each module once."""
    seen = set() if seen is None else seen
    seen.update(id(module) for module in model.modules())
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_modules", "_buffers"):
                yield from _search(value, f"{prefix}.{key}".lstrip("."), DEEP, seen)


def _search(value: object, name: str, deep: int, seen: set[int]) -> Any:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module) and id(value) not in seen:
        yield from ((f"{name}.{n}", p) for n, p in value.named_parameters())
        for inner, tensor in _loose(value, seen):
            yield f"{name}.{inner}", tensor
    elif isinstance(value, list | tuple) and deep:
        for k, part in enumerate(value):
            yield from _search(part, f"{name}[{k}]", deep - 1, seen)
    elif isinstance(value, dict) and deep:
        for k, part in value.items():
            yield from _search(part, f"{name}[{k!r}]", deep - 1, seen)
    elif isinstance(value, FunctionType) and deep:
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # of an empty cell
                yield from _search(cell.cell_contents, f"{name}(closure)", deep - 1, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and deep:
        inside = f"{name}({type(value).__name__})"
        for k, part in list(vars(value).items()):
            yield from _search(part, f"{inside}.{k}", deep - 1, seen)


def _cut(subject: Subject, without: list[str], tape: Calls) -> dict[str, object]:
    """Find the calls that keep gradients from parameters.

    They are the cause if the parameters get a gradient with `.detach()`, `.data` and `no_grad`
    disabled.
    """
    model = subject.model
    lost = [(n, p) for n, p in _trainable(model) if n in set(without)]
    try:
        with undisturbed(model, training=True):
            with Joined():
                joined = subject.replica.value(subject.batch)
            again = gradients(joined, [p for _, p in lost], model)
        detached = [n for (n, _), g in zip(lost, again) if g is not None]
    except InputError as error:
        # numpy rejects attached tensors, which proves that the conversion cuts the graph
        partly = len(without) < len(_trainable(model))
        detached = without if partly and "numpy" in str(error) else []
    cuts = [c for c in tape.calls if c.cut or c.silent] or [c for c in tape.calls if c.parts]
    partly = len(without) < len(_trainable(model))
    if partly and not detached and cuts and _moves(subject, without):
        detached = without
    elif detached:
        cuts = [c for c in cuts if c.silent or c.name in ("detach", "data")] or cuts
    distinct = {(c.name, c.place): c for c in cuts}.values()
    return {
        "without_gradient": without,
        "detached": detached,
        "cuts": [{"name": "no_grad" if c.silent else c.name, "place": c.place} for c in distinct][
            :3
        ],
    }
