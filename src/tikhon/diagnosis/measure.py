"""Measure a model on data as a `Record`: static facts, step 0 and the dry run."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from tikhon.budget import limit_to_share, out_of_time
from tikhon.data.forward import LossFunction
from tikhon.data.nested import Batch, batch_length, take_rows
from tikhon.diagnosis import static
from tikhon.diagnosis.controls import CompletedRun, run_controls
from tikhon.diagnosis.dry_run import DryRun, majority_prediction_share, probe, run_trial, score
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Functions, Options
from tikhon.diagnosis.penalty import separate_penalty
from tikhon.diagnosis.record import Failure, Record
from tikhon.diagnosis.reference import pca_explained
from tikhon.diagnosis.replica import (
    Replica,
    gradients,
    isolated,
    own_loss,
    own_optimizer,
    replicate,
    undisturbed,
)
from tikhon.diagnosis.samples import Samples, check_devices, check_target, samples
from tikhon.diagnosis.wiring import OriginalProgram, wiring_facts
from tikhon.diagnosis.wiring.batch_changes import batch_changes
from tikhon.diagnosis.wiring.collapse import collapse_facts
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

FEW_ROWS = 64  # to measure on, where a loss compares every three rows
CUBIC = 6.0  # largest tensor on all rows / on half of them: 8 for triplets, 4 for pairs
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
        optimizer, is_foreign = _choose_optimizer(optimizer, loss, unwrap(model))
        loss = own_loss if loss is None else unaligned_loss(loss, source.probe[1])
        validation = samples(valid, rows=512, name="valid").probe if valid is not None else None
        check_devices(unwrap(model), source.probe)
        loss, penalty = separate_penalty(unwrap(model), loss, penalty, source)
        make = partial(replicate, model, loss, optimizer, penalty=penalty, clip=clip)
        replica = make().attach()
        source = _with_few_rows_of_triplets(replica, source)
        wiring = _batch_changes(replica, source)
        if not replica.whole:
            _check_rows(unwrap(model), source, validation)
            source = _use_one_batch_if_needed(replica, source)
        size = min(source.batch or batch_size, source.rows)
        data_facts = static.data_facts(source, replica.model)
        has_missing = bool(data_facts["nonfinite"])
        data_facts["left_out"] = _ignores_missing_targets(model, loss, source, data_facts)
        facts = static.model_facts(replica, size) | {"foreign_optimizer": is_foreign}
        if has_missing and not data_facts["left_out"]:
            trial = DryRun(failure=Failure(0, "input", data_facts["nonfinite"][0]))
        else:
            untrained = replace(replicate(model, loss), copies=replica.copies)
            wired, seen = extract_loss(untrained, source)
            trial = _start_trial(replica, source, facts, steps, size, seed, validation)
            facts |= static.forward_facts(wired, seen)
            if not has_missing:  # the wiring tests need finite numbers
                given = OriginalProgram(source, validation, replica.whole, _tensor_ids(optimizer))
                wiring |= wiring_facts(wired, seen, given, sites=trial.sites, batch_size=size)
        facts |= dict.fromkeys(("trivial", "lowest") if wiring.get("candidates") else ())
        wiring |= _input_drift(trial.input_spreads) | _targets_moved(trial.target_levels, source)
        if trial.steps and trial.failure is None and not has_missing and not out_of_time():
            wiring |= _trained_facts(replica, source, wiring, validation)
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
            reference={} if has_missing else _baselines(replica, source, wiring),
            failure=trial.failure,
            wiring=wiring,
        )
        run = CompletedRun(source, trial, record)
        found = run_controls(lambda: replace(make().attach(), copies=replica.copies), run)
        return replace(record, reference={**record.reference, **found})


def _batch_changes(replica: Replica, source: Samples) -> dict[str, Any]:
    """Return what model or loss change in a batch, and whether its rows are stored as given.

    If they change anything, the replica is given copies from here on.
    """
    try:
        found = batch_changes(replica, source.probe)
    except Exception:  # reported where the model is first measured
        return {}
    replica.copies = bool(found)
    fresh = isinstance(source.source, DataLoader)
    return found | {"batch_collated": fresh} if found else {}


class _LargestTensor(Functions):
    """Context that records the entries of the largest tensor that is computed."""

    entries = 0

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the function's own result."""
        output = func(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            self.entries = max(self.entries, output.numel())
        return output


def _with_few_rows_of_triplets(replica: Replica, source: Samples) -> Samples:
    """Measure on fewer rows where the loss compares every three: 256 rows make 17 million."""
    rows = batch_length(source.probe)
    if rows <= FEW_ROWS:
        return source
    sizes: list[int] = []
    parts = [take_rows(source.probe, torch.arange(k)) for k in (FEW_ROWS // 2, FEW_ROWS)]
    with suppress(Exception), torch.no_grad(), undisturbed(replica.model, training=True):
        for part in parts:
            with _LargestTensor() as trace:
                replica.value(part)
            sizes.append(trace.entries)
    is_cubic = len(sizes) == 2 and sizes[1] >= CUBIC * sizes[0]
    return replace(source, probe=parts[1]) if is_cubic else source


def _use_one_batch_if_needed(replica: Replica, source: Samples) -> Samples:
    """Use all rows as one batch if the model fails on fewer, as on the nodes of one graph."""
    if not source.indexed or batch_length(source.probe) == source.rows:
        return source
    all_rows = Samples(source.source, [source.source], source.rows, False, source.rows)
    for candidate in (source, all_rows):
        with suppress(InputError), torch.no_grad(), undisturbed(replica.model, training=False):
            replica.value(candidate.probe)
            return candidate
    return source


def _ignores_missing_targets(
    model: nn.Module, loss: LossFunction | None, source: Samples, facts: dict[str, Any]
) -> bool:
    """Whether only targets are missing, and loss and gradients are finite regardless."""
    if facts["nonfinite"] == [] or "inputs" in facts["nonfinite"]:
        return False
    replica = replicate(model, loss)
    named: list[torch.Tensor] = [p for p in replica.model.parameters() if p.requires_grad]
    try:
        with undisturbed(replica.model, training=True):
            value = replica.value(source.probe)
            found = gradients(value, named, replica.model)
    except InputError:  # some losses refuse NaN
        return False
    numbers = [value, *(g for g in found if g is not None)]
    return len(numbers) > 1 and all(bool(torch.isfinite(n).all()) for n in numbers)


def _baselines(replica: Replica, source: Samples, wiring: dict[str, Any]) -> dict[str, Any]:
    """Return the skill of a constant and of a shallow model, additive curves included.

    Where the targets are the inputs, the shallow model is a PCA as narrow as the narrowest layer.
    """
    known: dict[str, Any] = dict(static.reference(source))
    if "shallow" in known and wiring.get("target_is_input"):
        with suppress(Exception):  # the model, on a few rows
            width = narrowest_width(make_program(replica, source))
            known["shallow"] = pca_explained(static.rows_for_shallow_model(source)[0], width)
        return known
    if "shallow" in known and "constant" in known and wiring.get("amounts"):
        known["shallow"] = max(known["shallow"], wiring.get("explained_bent", -math.inf))
    return known


def _trained_facts(
    replica: Replica, source: Samples, wiring: dict[str, Any], validation: Batch | None
) -> dict[str, object]:
    """Measure the wiring facts that need a trained network."""
    facts: dict[str, object] = {}
    try:
        facts |= reconstruction_facts(make_program(replica, source))
    except Exception as error:  # a loss may call the model with other arguments
        facts["unmeasured"] = wiring["unmeasured"] | {"code": type(error).__name__}
    facts |= static.clamped_score_facts(replica, source.probe)
    try:
        facts |= loss_part_facts(replica, source.probe)
    except Exception as error:  # a loss of the batch as a whole
        facts["parts"] = type(error).__name__
    if wiring.get("embeds") and wiring.get("embedding_spread"):
        facts |= collapse_facts(make_program(replica, source), wiring["embedding_spread"])
    if validation is not None and not replica.whole:
        facts |= renumbering_facts(replica, validation)
    if ROUNDING < wiring.get("rows_apart", 0.0) < DISTINCT:  # may be small before training
        facts |= row_facts(make_program(replica, source))
    if "majority" in wiring:
        facts["answered"] = majority_prediction_share(replica, source.probe)
    if wiring.get("alike") and not equal_output_facts(make_program(replica, source), DISTINCT):
        facts["alike"] = None  # the head was initialised with zeros
    return facts


def _input_drift(input_spreads: list[float]) -> dict[str, Any]:
    """Return the standard deviation of a loader's inputs, last / first tenth of the run."""
    few = max(1, len(input_spreads) // 10)
    first, last = (sum(part) / few for part in (input_spreads[:few], input_spreads[-few:]))
    return {"drift": last / first} if len(input_spreads) >= 20 and first > 0 else {}


def _targets_moved(target_levels: list[tuple[float, float]], source: Samples) -> dict[str, float]:
    """Return the change of the mean target from first to last epoch, in standard deviations.

    Every epoch has the same rows, so only random transforms may differ.
    """
    batches = 0
    if not source.indexed:
        with suppress(TypeError):  # a stream has no length
            batches = len(source.source)  # pyright: ignore[reportArgumentType]
    epochs = len(target_levels) // batches if batches else 0
    if epochs < 2 or not all(math.isfinite(a) and math.isfinite(b) for a, b in target_levels):
        return {}
    means = torch.tensor([mean for mean, _ in target_levels], dtype=torch.float64)
    first, last = means[:batches], means[(epochs - 1) * batches : epochs * batches]
    within = sum(spread**2 for _, spread in target_levels[:batches]) / batches
    deviation = math.sqrt(within + float(first.var(correction=0)))
    return {
        "targets_moved": float((last.mean() - first.mean()).abs()) / deviation
        if deviation
        else 0.0
    }


def _choose_optimizer(optimizer: object, loss: object, model: nn.Module) -> tuple[object, bool]:
    """Return the optimizer of the dry run, and whether the one given trains another model."""
    if loss is None and optimizer is None:
        optimizer = own_optimizer(model)
    optimized, own = _tensor_ids(optimizer), {id(p) for p in model.parameters()}
    is_foreign = bool(optimized and own) and not optimized & own
    return None if is_foreign else optimizer, is_foreign


def _tensor_ids(optimizer: object) -> set[int]:
    """Return the ids of the parameters of the user's optimizer; none for a factory."""
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(p) for group in groups for p in group["params"]}


def _start_trial(
    replica: Replica,
    source: Samples,
    facts: dict[str, Any],
    steps: int,
    size: int,
    seed: int,
    validation: Batch | None,
) -> DryRun:
    trial = DryRun()
    first = probe(replica, source.probe, 0, trial)
    facts["unused"] = find_unused_parameters(replica, source.probe)
    if replica.optimizer is None or steps == 0 or not facts["trainable"]:
        trial.probes.append(first)
        with torch.no_grad():
            trial.points.append(score(replica, source.probe, validation, 0))
        for step in (1, 2):
            # zero-initialised heads and branches block the gradient at step 0 only
            if perturb_weights(replica, source.probe):
                trial.probes.append(probe(replica, source.probe, step, trial))
        return trial
    with limit_to_share(0.5):
        return run_trial(
            replica, source, steps=steps, batch_size=size, seed=seed, valid=validation
        )


def perturb_weights(replica: Replica, batch: Batch) -> bool:
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


def find_unused_parameters(replica: Replica, batch: Batch) -> list[str]:
    """Return the trainable parameters that the loss does not depend on."""
    named = [(n, p) for n, p in replica.model.named_parameters() if p.requires_grad]
    with undisturbed(replica.model, training=True):
        loss = replica.value(batch)
        if not named or not loss.requires_grad:
            return []
        grads = gradients(loss, [p for _, p in named], replica.model)
    found = {n: g for (n, _), g in zip(named, grads)}
    unread = _unread_recurrent_parameters(replica.model, found)
    return [n for n, g in found.items() if g is None or n in unread]


def _unread_recurrent_parameters(
    model: nn.Module, grads: dict[str, torch.Tensor | None]
) -> set[str]:
    """Return parameters of stacked recurrent layers whose output is not read: zero gradients."""
    idle: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            own = {n: g for n, g in grads.items() if n.startswith(f"{name}." if name else "")}
            zero = {n for n, g in own.items() if g is not None and not bool(g.any())}
            idle |= zero if len(zero) < len(own) else set()
    return idle


def _check_rows(model: nn.Module, source: Samples, validation: Batch | None) -> None:
    check_target(source.probe)
    if validation is not None:
        check_model_accepts(model, source.probe[0], validation[0])


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
    optimizer = replica.optimizer
    if optimizer is None:
        return {}
    group = optimizer.param_groups[0]
    numbers: dict[str, object] = {
        k: v
        for k, v in group.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool) and v
    }
    if "betas" in group:
        numbers["betas"] = [float(b) for b in group["betas"]]
    return {"name": type(optimizer).__name__, **numbers, "clip": replica.clip}
