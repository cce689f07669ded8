"""Measure a model on data as a `Record`: static facts, step 0 and the dry run."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tikhon.budget import limit_to_share, out_of_time
from tikhon.data.forward import LossFunction
from tikhon.data.nested import Batch, batch_length
from tikhon.diagnosis import static
from tikhon.diagnosis.controls import Ran, controls
from tikhon.diagnosis.dry_run import DryRun, commonest, probe, run, score
from tikhon.diagnosis.penalty import separate_penalty
from tikhon.diagnosis.record import Failure, Record
from tikhon.diagnosis.reference import compressed
from tikhon.diagnosis.replica import (
    Replica,
    gradients,
    isolated,
    own_loss,
    own_optimizer,
    replicate,
    undisturbed,
)
from tikhon.diagnosis.samples import Samples, check_fit, check_target, samples
from tikhon.diagnosis.wiring import OriginalProgram, wiring_facts
from tikhon.diagnosis.wiring.loss_extraction import extract_loss
from tikhon.diagnosis.wiring.loss_parts import loss_part_facts
from tikhon.diagnosis.wiring.program import make_program
from tikhon.diagnosis.wiring.rows import (
    DISTINCT,
    equal_output_facts,
    narrowest_width,
    reconstruction_facts,
    row_facts,
)
from tikhon.diagnosis.wiring.split import renumbering_facts
from tikhon.errors import InputError
from tikhon.training.input_check import check_model_accepts
from tikhon.training.losses import unaligned_loss
from tikhon.wrappers import unwrap

ROUNDING = 1e-5  # relative change of outputs due to rounding


def measure(
    model: nn.Module,
    data: object,
    loss: str | LossFunction | None,
    *,
    optimizer: object = None,
    valid: object = None,
    steps: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    penalty: object = None,
    clip: float | None = None,
) -> Record:
    """Measure a copy of the model and train it for `steps`; arguments as for `diagnose`."""
    _check(model, steps, batch_size, clip)
    with isolated(unwrap(model), seed):
        source = samples(data)
        optimizer, foreign = _trained_by(optimizer, loss, unwrap(model))
        loss = None if loss is None else unaligned_loss(loss, source.probe[1])
        judge = samples(valid, rows=512, name="valid").probe if valid is not None else None
        check_fit(unwrap(model), source.probe)
        loss = own_loss if loss is None else loss
        loss, penalty = separate_penalty(unwrap(model), loss, penalty, source)
        replica = replicate(model, loss, optimizer, penalty=penalty, clip=clip).attach()
        if not replica.whole:
            _check_rows(unwrap(model), source, judge)
            source = _together(replica, source)
        size = min(source.batch or batch_size, source.rows)
        data_facts = static.data_facts(source, replica.model)
        holes = bool(data_facts["nonfinite"])
        data_facts["left_out"] = holes and _leaves_out(replicate(model, loss), source, data_facts)
        facts = static.model_facts(replica, size) | {"foreign_optimizer": foreign}
        trial, wiring = DryRun(), dict[str, Any]()
        if holes and not data_facts["left_out"]:
            trial.failure = Failure(0, "input", data_facts["nonfinite"][0])
        else:
            wired, seen = extract_loss(replicate(model, loss), source)  # an untrained copy
            trial = _trial(replica, source, facts, steps, size, seed, judge)
            facts |= static.forward_facts(wired, seen)
            if not holes:  # the wiring tests need finite numbers
                given = OriginalProgram(source, judge, replica.whole, _held(optimizer))
                wiring = wiring_facts(wired, seen, given, sites=trial.sites, batch_size=size)
        facts |= dict.fromkeys(("trivial", "lowest") if wiring.get("candidates") else ())
        wiring |= _drift(trial.spreads) | _targets_moved(trial.levels, source)
        if trial.steps and trial.failure is None and not holes and not out_of_time():
            wiring |= _afterwards(replica, source, wiring, judge)
        record = Record(
            model=type(unwrap(model)).__name__,
            parameters=sum(p.numel() for p in replica.model.parameters()),
            trainable=sum(p.numel() for p in replica.model.parameters() if p.requires_grad),
            batch_size=size,
            steps=trial.steps,
            seed=seed,
            loss=getattr(replica.loss, "__name__", type(loss).__name__),
            optimizer=_optimizer(replica),
            data=data_facts,
            static=facts,
            sites=trial.sites,
            probes=tuple(trial.probes),
            points=tuple(trial.points),
            losses=tuple(trial.losses),
            gradients=tuple(trial.gradients),
            reference={} if holes else _yardsticks(replica, source, wiring),
            failure=trial.failure,
            wiring=wiring,
        )

        def again() -> Replica:
            return replicate(model, loss, optimizer, penalty=penalty, clip=clip).attach()

        found = controls(again, Ran(source, trial, record))
        return replace(record, reference={**record.reference, **found})


def _together(replica: Replica, source: Samples) -> Samples:
    """Use all rows as one batch if the model fails on fewer, as on the nodes of one graph."""
    if not source.indexed or batch_length(source.probe) == source.rows:
        return source
    every = Samples(source.source, [source.source], source.rows, False, source.rows)
    for tried in (source, every):
        with suppress(InputError), torch.no_grad(), undisturbed(replica.model, training=False):
            replica.value(tried.probe)
            return tried
    return source


def _leaves_out(replica: Replica, source: Samples, facts: dict[str, Any]) -> bool:
    """Whether only targets are missing, and loss and gradients are finite regardless."""
    if "inputs" in facts["nonfinite"]:
        return False
    named: list[torch.Tensor] = [p for p in replica.model.parameters() if p.requires_grad]
    try:
        with undisturbed(replica.model, training=True):
            loss = replica.value(source.probe)
            found = gradients(loss, named, replica.model)
    except InputError:  # some losses refuse NaN
        return False
    numbers = [loss, *(g for g in found if g is not None)]
    return len(numbers) > 1 and all(bool(torch.isfinite(n).all()) for n in numbers)


def _yardsticks(replica: Replica, source: Samples, wiring: dict[str, Any]) -> dict[str, Any]:
    """Return the skill of a constant and of a shallow model, additive curves included.

    Where the targets are the inputs, the shallow model is a PCA as narrow as the narrowest layer.
    """
    known: dict[str, Any] = dict(static.reference(source))
    if "shallow" in known and wiring.get("target_is_input"):
        with suppress(Exception):  # the model, on a few rows
            width = narrowest_width(make_program(replica, source))
            known["shallow"] = compressed(static.many(source)[0], width)
        return known
    if "shallow" in known and "constant" in known and wiring.get("amounts"):
        known["shallow"] = max(known["shallow"], wiring.get("explained_bent", -math.inf))
    return known


def _afterwards(
    replica: Replica, source: Samples, wiring: dict[str, Any], judge: Batch | None
) -> dict[str, object]:
    """Measure the wiring facts that need a trained network."""
    facts: dict[str, object] = {}
    try:
        facts |= reconstruction_facts(make_program(replica, source))
    except Exception as error:  # a loss may call the model with other arguments
        facts["unmeasured"] = wiring["unmeasured"] | {"code": type(error).__name__}
    facts |= static.own_score_zero(replica, source.probe)
    try:
        facts |= loss_part_facts(replica, source.probe)
    except Exception as error:  # a loss of the batch as a whole
        facts["parts"] = type(error).__name__
    if judge is not None and not replica.whole:
        facts |= renumbering_facts(replica, judge)
    if ROUNDING < wiring.get("rows_apart", 0.0) < DISTINCT:  # may be small before training
        facts |= row_facts(make_program(replica, source))
    if "majority" in wiring:
        facts["answered"] = commonest(replica, source.probe)
    if wiring.get("alike") and not equal_output_facts(make_program(replica, source)):
        facts["alike"] = None  # the head was initialised with zeros
    return facts


def _drift(spreads: list[float]) -> dict[str, Any]:
    """Return the standard deviation of a loader's inputs, last / first tenth of the run."""
    few = max(1, len(spreads) // 10)
    first, last = (sum(part) / few for part in (spreads[:few], spreads[-few:]))
    return {"drift": last / first} if len(spreads) >= 20 and first > 0 else {}


def _targets_moved(levels: list[tuple[float, float]], source: Samples) -> dict[str, float]:
    """Return the change of the mean target from first to last epoch, in standard deviations.

    Every epoch has the same rows, so only random transforms may differ.
    """
    if source.indexed or not hasattr(source.source, "__len__"):
        return {}
    batches = len(source.source)
    epochs = len(levels) // batches if batches else 0
    if epochs < 2 or not all(math.isfinite(a) and math.isfinite(b) for a, b in levels):
        return {}
    means = torch.tensor([mean for mean, _ in levels], dtype=torch.float64)
    first, last = means[:batches], means[(epochs - 1) * batches : epochs * batches]
    within = sum(spread**2 for _, spread in levels[:batches]) / batches
    deviation = math.sqrt(within + float(first.var(correction=0)))
    return {
        "targets_moved": float((last.mean() - first.mean()).abs()) / deviation
        if deviation
        else 0.0
    }


def _trained_by(optimizer: object, loss: object, model: nn.Module) -> tuple[object, bool]:
    """Return the optimizer of the dry run, and whether the one given trains another model."""
    if loss is None and optimizer is None:
        optimizer = own_optimizer(model)
    foreign = holds_nothing(optimizer, model)
    return None if foreign else optimizer, foreign


def _held(optimizer: object) -> set[int]:
    """Return the ids of the parameters of the user's optimizer; none for a factory."""
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(p) for group in groups for p in group["params"]}


def _trial(
    replica: Replica,
    source: Samples,
    facts: dict[str, Any],
    steps: int,
    size: int,
    seed: int,
    judge: Batch | None,
) -> DryRun:
    trial = DryRun()
    first = probe(replica, source.probe, 0, trial)
    facts["unused"] = unused(replica, source.probe)
    if replica.optimizer is None or steps == 0 or not facts["trainable"]:
        trial.probes.append(first)
        with torch.no_grad():
            trial.points.append(score(replica, source.probe, judge, 0))
        for step in (1, 2):
            # zero-initialised heads and branches block the gradient at step 0 only
            if nudge(replica, source.probe):
                trial.probes.append(probe(replica, source.probe, step, trial))
        return trial
    with limit_to_share(0.5):
        return run(replica, source, steps=steps, batch_size=size, seed=seed, valid=judge)


def nudge(replica: Replica, batch: Batch) -> bool:
    """Move each tensor against its gradient by a tenth of its rms; False without a gradient."""
    parameters = [p for p in replica.model.parameters() if p.requires_grad]
    with undisturbed(replica.model, training=True):
        loss = replica.value(batch)
        if not parameters or not loss.requires_grad:
            return False
        grads = gradients(loss, list(parameters), replica.model)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads):
            if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
                continue
            rms = (
                parameter.square()
                .mean()
                .sqrt()
                .clamp_min((parameter.shape[-1] if parameter.ndim else 1) ** -0.5)
            )
            direction = grad / grad.abs().max()  # the square of a vanished gradient underflows
            parameter -= 0.1 * rms * direction / direction.square().mean().sqrt()
    return True


def unused(replica: Replica, batch: Batch) -> list[str]:
    """Return the trainable parameters that the loss does not depend on."""
    named = [(n, p) for n, p in replica.model.named_parameters() if p.requires_grad]
    with undisturbed(replica.model, training=True):
        loss = replica.value(batch)
        if not named or not loss.requires_grad:
            return []
        grads = gradients(loss, [p for _, p in named], replica.model)
    found = {n: g for (n, _), g in zip(named, grads)}
    return [n for n, g in found.items() if g is None or n in _idle_layers(replica.model, found)]


def _idle_layers(model: nn.Module, grads: dict[str, torch.Tensor | None]) -> set[str]:
    """Return parameters of stacked recurrent layers whose output is not read: zero gradients."""
    idle: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            own = {n: g for n, g in grads.items() if n.startswith(f"{name}." if name else "")}
            zero = {n for n, g in own.items() if g is not None and not bool(g.any())}
            idle |= zero if len(zero) < len(own) else set()
    return idle


def holds_nothing(optimizer: object, model: nn.Module) -> bool:
    """Whether the optimizer has parameters, but none of the model."""
    held, own = _held(optimizer), {id(p) for p in model.parameters()}
    return bool(held and own) and not held & own


def _check_rows(model: nn.Module, source: Samples, judge: Batch | None) -> None:
    check_target(source.probe)
    if judge is not None:
        check_model_accepts(model, source.probe[0], judge[0])


def _check(model: object, steps: int, batch_size: int, clip: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch module, received {type(model).__name__}")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has lazy layers without weights; call the model once on a "
            "batch before it is diagnosed"
        )
    if steps < 0 or batch_size < 1:
        raise InputError(
            f"steps must be >= 0 and batch_size >= 1, received {steps} and {batch_size}"
        )
    if clip is not None and not clip > 0:
        raise InputError(f"clip must be positive, received {clip}")


def _optimizer(replica: Replica) -> dict[str, object]:
    engine = replica.optimizer
    if engine is None:
        return {}
    group = engine.param_groups[0]
    numbers: dict[str, object] = {
        k: v
        for k, v in group.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool) and v
    }
    if "betas" in group:
        numbers["betas"] = [float(b) for b in group["betas"]]
    return {"name": type(engine).__name__, **numbers, "clip": replica.clip}
