"""The autograd graph: trainable tensors outside of the model, parameters that it cannot reach."""

from __future__ import annotations

from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.copying import gradient_leaves
from tikhon.data.nested import tensors
from tikhon.diagnosis.modes import LOSS
from tikhon.diagnosis.replica import gradients, undisturbed
from tikhon.diagnosis.wiring.program import Facts, Program, restored
from tikhon.diagnosis.wiring.torch_calls import CallTrace, WithoutDetach
from tikhon.errors import InputError

INITIALISERS = ("kaiming_uniform", "empty", "randn", "rand", "zeros", "ones")
ZERO_DERIVATIVE = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside")
MAX_WEIGHTS = 8  # maximum size of a parameter that weights the parts of a loss
MAX_DEPTH = 4  # nesting depth of containers searched for a tensor


def graph_facts(program: Program, optimizer_ids: set[int]) -> Facts:
    """Find trainable tensors outside of the model, and parameters cut off from the loss.

    `optimizer_ids` are the ids of the parameters of the user's optimizer.
    """
    model = program.model
    facts: Facts = {}
    first, trace, found = _training_pass(program)
    second, _, _ = _training_pass(program)
    facts["connected"] = any(g is not None for g in found)
    if facts["connected"]:
        slopes = bool(trace.named("grad"))
        facts |= _foreign_tensors(program, first, second, optimizer_ids, slopes=slopes)
        if optimizer_ids and facts["outside"]:
            facts["judge"] = _untrained_loss_layer(program, optimizer_ids)
        made = [c.line for c in trace.named(*INITIALISERS) if c.line and c.module != LOSS]
        facts["made_place"] = made[0] if made and facts["made_in_forward"] else ""
    flat = [c for c in trace.named(*ZERO_DERIVATIVE) if c.attached]
    names = [n for n, _ in _trainable(model)]
    reached = [n for n, g in zip(names, found) if g is not None and bool(g.any())]
    if facts["connected"] and flat and not reached:  # it leaves every gradient zero
        facts["flat"] = {"name": flat[0].name, "place": flat[0].place}
    stuck = [n for n, g in zip(names, found) if g is not None and not bool(g.any())]
    without = [n for n, g in zip(names, found) if g is None]
    if without:
        facts |= _find_cuts(program, without, trace)
    partly = reached and flat and stuck and not facts.get("detached")
    if partly and _changes_loss(program, stuck):
        cut = {"name": flat[0].name, "place": flat[0].place}
        facts |= {"without_gradient": [*without, *stuck], "detached": stuck, "cuts": [cut]}
    return facts


def _changes_loss(program: Program, names: list[str]) -> bool:
    """Whether the loss depends on parameters, tested by changing and restoring them."""
    model = program.model
    params = [p for n, p in model.named_parameters() if n in set(names)]
    losses = []
    with torch.no_grad(), restored(params):
        for changed in (False, True):
            with undisturbed(model, training=True):
                for p in params if changed else ():
                    p.copy_(p.flip(0) * -2 + 0.5)
                losses.append(float(program.replica.value(program.batch)))
    return losses[0] != losses[1]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _training_pass(program: Program) -> tuple[Tensor, CallTrace, list[Tensor | None]]:
    model = program.model
    with undisturbed(model, training=True):
        with CallTrace(model) as trace:
            loss = program.replica.value(program.batch)
        return loss, trace, gradients(loss, [p for _, p in _trainable(model)], model)


def _foreign_tensors(
    program: Program, first: Tensor, second: Tensor, optimizer_ids: set[int], *, slopes: bool
) -> Facts:
    """Find trainable tensors of two passes that neither model nor optimizer holds.

    If the program differentiates itself (`slopes`), tensors that are no parameters are its
    variables: inputs of a differential equation, positions of a force. Views of the inputs that
    require a gradient, as activation checkpointing needs, are excluded as well.
    """
    own = {id(p) for p in program.model.parameters()}
    named = list(_unregistered_tensors(program.model))
    given = {t.data_ptr() for t in tensors(program.batch) if t.layout == torch.strided}
    held = own | optimizer_ids
    loose = [t for t in gradient_leaves(first) if id(t) not in held]
    foreign = [t for t in loose if t.data_ptr() not in given]
    if slopes:
        foreign = [t for t in foreign if isinstance(t, nn.Parameter)]
    second_ids = {id(t) for t in gradient_leaves(second)}
    known = [(t, next((n for n, other in named if other is t), "")) for t in foreign]
    small = [t for t, n in known if not n and isinstance(t, nn.Parameter) and id(t) in second_ids]
    own_weights = optimizer_ids and all(t.numel() <= MAX_WEIGHTS for t, n in known if not n)
    return {
        "weights_of_loss": len(small) if own_weights else 0,
        "unregistered": [n for _, n in known if n],
        "made_in_forward": sum(id(t) not in second_ids for t, n in known if not n),
        "outside": sum(id(t) in second_ids for t, n in known if not n),
    }


def _untrained_loss_layer(program: Program, optimizer_ids: set[int]) -> str:
    """Return the type of an untrained layer of the loss that gets the targets, else ""."""
    goals = [t.flatten() for t in tensors(program.batch[1])]
    own, found = set(program.model.modules()), []

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        given = [t.flatten() for t in tensors(args)]
        pairs = [(a, b) for a in given for b in goals if a.shape == b.shape and a.dtype == b.dtype]
        has_targets = any(torch.equal(a, b) for a, b in pairs)
        params = [p for p in module.parameters() if p.requires_grad]
        untrained = bool(params) and not any(id(p) in optimizer_ids for p in params)
        if has_targets and module not in own and untrained:
            found.append(type(module).__name__)

    with torch.no_grad(), undisturbed(program.model, training=True):
        with nn.modules.module.register_module_forward_pre_hook(enter):
            program.replica.value(program.batch)
    return found[0] if found else ""


def _unregistered_tensors(model: nn.Module, seen: set[int] | None = None) -> Any:
    """Yield (name, tensor) of unregistered attributes of modules, each module once."""
    seen = set() if seen is None else seen
    seen.update(id(module) for module in model.modules())
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_modules", "_buffers"):
                yield from _search_tensors(value, f"{prefix}.{key}".lstrip("."), MAX_DEPTH, seen)


def _search_tensors(value: object, name: str, depth: int, seen: set[int]) -> Any:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module) and id(value) not in seen:
        yield from ((f"{name}.{n}", p) for n, p in value.named_parameters())
        for inner, tensor in _unregistered_tensors(value, seen):
            yield f"{name}.{inner}", tensor
    elif isinstance(value, list | tuple) and depth:
        for k, part in enumerate(value):
            yield from _search_tensors(part, f"{name}[{k}]", depth - 1, seen)
    elif isinstance(value, dict) and depth:
        for k, part in value.items():
            yield from _search_tensors(part, f"{name}[{k!r}]", depth - 1, seen)
    elif isinstance(value, FunctionType) and depth:
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # of an empty cell
                yield from _search_tensors(cell.cell_contents, f"{name}(closure)", depth - 1, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and depth:
        inside = f"{name}({type(value).__name__})"
        for k, part in list(vars(value).items()):
            yield from _search_tensors(part, f"{inside}.{k}", depth - 1, seen)


def _find_cuts(program: Program, without: list[str], trace: CallTrace) -> Facts:
    """Find the calls that keep gradients from parameters.

    They are the cause if the parameters get a gradient with `.detach()`, `.data` and `no_grad`
    disabled.
    """
    model = program.model
    unreached = [(n, p) for n, p in _trainable(model) if n in set(without)]
    try:
        with undisturbed(model, training=True):
            with WithoutDetach():
                joined = program.replica.value(program.batch)
            again = gradients(joined, [p for _, p in unreached], model)
        detached = [n for (n, _), g in zip(unreached, again) if g is not None]
    except InputError as error:
        # numpy rejects attached tensors, which proves that the conversion cuts the graph
        partly = len(without) < len(_trainable(model))
        detached = without if partly and "numpy" in str(error) else []
    cuts = [c for c in trace.calls if c.cut or c.silent] or [c for c in trace.calls if c.parts]
    partly = len(without) < len(_trainable(model))
    if partly and not detached and cuts and _changes_loss(program, without):
        detached = without
    elif detached:
        cuts = [c for c in cuts if c.silent or c.name in ("detach", "data")] or cuts
    distinct = {(c.name, c.place): c for c in cuts}.values()
    cuts = [{"name": "no_grad" if c.silent else c.name, "place": c.place} for c in distinct]
    return {"without_gradient": without, "detached": detached, "cuts": cuts[:3]}
