"""The dry run: a short training of a replica, measured on a fixed batch along the way."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.budget import out_of_time
from tikhon.data.nested import Batch, stored_values, tensors
from tikhon.diagnosis.nonfinite import locate_nonfinite
from tikhon.diagnosis.observe import Instruments
from tikhon.diagnosis.record import Failure, Point, Probe, Site, SiteReading
from tikhon.diagnosis.reference import binary
from tikhon.diagnosis.replica import Replica, gradients, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.regularizer.rounding import HALF_TYPES
from tikhon.training.clipping import Clipping
from tikhon.training.measures import class_accuracy
from tikhon.training.step import Step


@dataclass
class DryRun:
    """Measurements of one dry run."""

    sites: tuple[Site, ...] = ()
    probes: list[Probe] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    input_spreads: list[float] = field(default_factory=list)  # std of a loader's inputs by step
    target_levels: list[tuple[float, float]] = field(default_factory=list)  # mean, std of targets
    failure: Failure | None = None
    steps: int = 0
    seconds: float = 0.0


def run_trial(
    replica: Replica,
    samples: Samples,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    valid: Batch | None = None,
    probes: bool = True,
    points: int = 36,
) -> DryRun:
    """Train the replica for `steps` and measure it.

    Stops early at the first non-finite loss, or when the time budget is spent. Probes
    (instrumented passes) are dense at the start, where units tend to die, and sparse later.
    """
    trial = DryRun()
    started = time.process_time()
    probed_steps = probe_steps(steps) if probes else set()
    interval = max(1, steps // points) if points else steps + 1
    stream = samples.stream(batch_size, seed)
    optimizer = replica.optimizer
    assert optimizer is not None
    for step in range(steps + 1):
        if step and out_of_time():
            break
        before = None
        if step in probed_steps:
            trial.probes.append(probe(replica, samples.probe, step, trial))
            before = {p: p.detach().clone() for p in replica.model.parameters()}
            _penalty_shares(replica)  # requests a measurement of the coming step
        if points and (step % interval == 0 or step == steps):
            _append_point(trial, replica, samples.probe, valid, step, step / max(1, steps))
        if step == steps:
            break
        replica.model.train()
        batch = next(stream)
        if not samples.indexed:
            trial.input_spreads += [
                float(t.std(correction=0)) for t in _float_tensors(batch[0])[:1]
            ]
            trial.target_levels += [
                (float(t.mean()), float(t.std(correction=0))) for t in _float_tensors(batch[1])[:1]
            ]
        if not take_step(trial, replica, batch, step):
            break
        trial.steps = step + 1
        if before is not None:
            _add_updates(trial, replica.model, before, _penalty_shares(replica))
    if trial.points and trial.steps < steps and trial.failure is None:  # cut short
        trial.points = [p for p in trial.points if p.step < trial.steps]
        _append_point(trial, replica, samples.probe, valid, trial.steps, 1.0)
    trial.seconds = time.process_time() - started
    return trial


def _append_point(
    trial: DryRun, replica: Replica, batch: Batch, valid: Batch | None, step: int, share: float
) -> None:
    """Append a point to the curve; `share` is the completed part of the run.

    Training mode is evaluated at every point, evaluation mode at every third (in the last third
    of the run, whose medians count, every second), validation data at every third. Where both
    modes have agreed so far, one pass serves both.
    """
    index, evaluated = len(trial.points), [p for p in trial.points if p.eval_loss is not None]
    probe_loss = trial.probes[-1].loss if trial.probes and trial.probes[-1].step == step else None
    if share == 1 or index % (2 if share >= 2 / 3 else 3) == 0:
        modes_agree = evaluated and share < 1 and all(p.loss == p.eval_loss for p in evaluated)
        validation = valid if share == 1 or index % 3 == 0 else None
        point = score(replica, batch, validation, step, probe_loss, training=bool(modes_agree))
    else:
        point = Point(step, training_loss(replica, batch) if probe_loss is None else probe_loss)
    trial.points.append(point)


def _float_tensors(inputs: object) -> list[Tensor]:
    """Return the float tensors with more than one entry."""
    return [stored_values(t) for t in tensors(inputs) if t.is_floating_point() and t.numel() > 1]


def probe_steps(steps: int) -> set[int]:
    """Return the steps at which all sites are measured."""
    shares = (0.02, 0.05, 0.1, 0.15, 0.2, 0.35, 0.6, 0.8, 1.0)
    return {s for s in (0, 1, 2, 5) if s <= steps} | {round(share * steps) for share in shares}


def take_step(trial: DryRun, replica: Replica, batch: Batch, step: int) -> bool:
    """Take one optimizer step; return False where a value is not finite or has no gradient."""
    assert replica.optimizer is not None

    def loss(batch: Batch) -> Tensor:
        value = replica.value(batch)
        trial.losses.append(float(value.detach()))
        if not math.isfinite(trial.losses[-1]):
            raise _NotFiniteError
        total = value + replica.extra()
        if not total.requires_grad:
            trial.gradients.append(0.0)
            raise _NoGradientError
        return total

    def clip(model: nn.Module) -> None:
        size = total_norm([p.grad for p in model.parameters() if p.grad is not None])
        trial.gradients.append(size)
        if not math.isfinite(size):
            raise _NotFiniteError
        Clipping(norm=replica.clip)(model)

    try:
        with warnings.catch_warnings():  # a layer zeroed by penalties becomes a finding
            warnings.filterwarnings("ignore", message=".* has made all of")
            Step(replica.model, replica.optimizer, loss, clip=clip)(batch)
    except _NotFiniteError:
        trial.failure = locate_nonfinite(replica, batch, step)
        return False
    except _NoGradientError:
        return False
    return True


class _NotFiniteError(Exception):
    """The loss or a gradient is not finite: the step is skipped."""


class _NoGradientError(Exception):
    """The loss does not depend on any trained parameter."""


def probe(replica: Replica, batch: Batch, step: int, trial: DryRun) -> Probe:
    """Measure one forward and backward pass in training mode, without side effects."""
    model = replica.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    with undisturbed(model, training=True):
        with Instruments(model) as instruments:
            loss = replica.value(batch)
        wanted = [*parameters, *instruments.leaves]
        grads = gradients(loss, wanted, model)[: len(parameters)]
        instruments.readings()
        by_parameter: dict[Tensor, Tensor | None] = dict(zip(parameters, grads))
        extra = _penalty_gradients(replica, parameters)
        for name, module in instruments.modules.items():
            numbers = instruments.numbers[name]
            numbers |= _gradients(module, by_parameter, extra)
        readings = tuple(SiteReading(**instruments.numbers[n]) for n in instruments.sites)  # type: ignore[arg-type]
    if not trial.sites:
        trial.sites = tuple(instruments.sites.values())
    elif len(readings) != len(trial.sites):
        by_name = dict(zip(instruments.sites, readings))
        readings = tuple(by_name.get(s.name, SiteReading()) for s in trial.sites)
    present = [g for g in grads if g is not None]
    return Probe(step, float(loss.detach()), readings, total_norm(present))


def total_norm(tensors: list[Tensor]) -> float:
    """Return the global norm, in double precision where squares overflow."""
    size = float(nn.utils.get_total_norm(tensors)) if tensors else 0.0
    if math.isfinite(size):
        return size
    return float(nn.utils.get_total_norm([t.double() for t in tensors]))


def _gradients(
    module: nn.Module, grads: dict[Tensor, Tensor | None], extra: dict[Tensor, Tensor | None]
) -> dict[str, float]:
    own = [p for p in module._parameters.values() if p is not None and grads.get(p) is not None]
    if not own:
        return {}
    data = sum(float(grads[p].double().square().sum()) for p in own)  # type: ignore[union-attr]
    found = {"gradient": math.sqrt(data / max(1, sum(p.numel() for p in own)))}
    added = [extra.get(p) for p in own]
    if any(g is not None for g in added):
        share = sum(float(g.double().square().sum()) for g in added if g is not None)
        total = math.sqrt(data) + math.sqrt(share)
        found["penalty"] = math.sqrt(share) / total if total > 0 else 0.0
    return found


def _penalty_gradients(replica: Replica, parameters: list[Any]) -> dict[Tensor, Tensor | None]:
    extra = replica.extra()
    if isinstance(extra, float | int) or not extra.requires_grad or not parameters:
        return {}
    return dict(zip(parameters, torch.autograd.grad(extra, parameters, allow_unused=True)))


def _penalty_shares(replica: Replica) -> dict[str, float]:
    """Return per module the largest share of an update due to a penalty term."""
    found: dict[str, float] = {}
    for term in replica.regularizer.trace() if replica.regularizer is not None else ():
        for name in term.parameter.split("+"):
            module = name.rpartition(".")[0]
            found[module] = max(found.get(module, 0.0), term.share or 0.0)
    return found


def _add_updates(
    trial: DryRun, model: nn.Module, before: dict[Any, Tensor], shares: dict[str, float]
) -> None:
    """Add update / weight ratios and the shares of penalty terms to the last probe."""
    last = trial.probes[-1]
    modules = dict(model.named_modules())
    readings = []
    for site, reading in zip(trial.sites, last.readings):
        module = modules.get(site.name) if site.role != "activation" else None
        held = module._parameters.values() if module is not None else ()
        own = [p for p in held if p is not None and p.requires_grad and p.ndim > 1]
        if own:
            moved = sum(float((p.detach() - before[p]).double().square().sum()) for p in own)
            size = sum(float(before[p].double().square().sum()) for p in own)
            ratio = math.sqrt(moved / size) if size > 0 else (math.inf if moved > 0 else 0.0)
            reading = replace(reading, update=ratio, stuck=_unmoved_share(own, before))
            if site.name in shares:
                reading = replace(reading, penalty=shares[site.name])
        readings.append(reading)
    trial.probes[-1] = Probe(last.step, last.loss, tuple(readings), last.gradient)


def _unmoved_share(own: list[Any], before: dict[Any, Tensor]) -> float | None:
    """Return the share of 16-bit entries with a gradient that the step left unchanged."""
    halves = [p for p in own if p.dtype in HALF_TYPES and p.grad is not None]
    count = sum(int((p.grad != 0).sum()) for p in halves)
    unmoved = sum(int(((p.grad != 0) & (p.detach() == before[p])).sum()) for p in halves)
    return unmoved / count if count else None


@torch.no_grad()
def score(
    replica: Replica,
    batch: Batch,
    valid: Batch | None,
    step: int,
    loss: float | None = None,
    *,
    training: bool = False,
) -> Point:
    """Return losses and metrics on the probe batch and on the validation batch.

    `loss` is the loss in training mode if already known; with `training`, one pass in training
    mode gives both losses.
    """
    if loss is None and not training:
        loss = training_loss(replica, batch)
    with undisturbed(replica.model, training=training):
        output, evaluated = replica.outcome(batch)
    point = Point(step, loss, float(evaluated), metric=skill(output, batch[1]))
    if training:
        point = replace(point, loss=point.eval_loss)
    if valid is None:
        return point
    with undisturbed(replica.model, training=False):
        output, evaluated = replica.outcome(valid)
    return replace(point, valid_loss=float(evaluated), valid_metric=skill(output, valid[1]))


@torch.no_grad()
def training_loss(replica: Replica, batch: Batch) -> float:
    """Return the loss of a batch in training mode."""
    with undisturbed(replica.model, training=True):
        return float(replica.value(batch))


def majority_prediction_share(replica: Replica, batch: Batch) -> float | None:
    """Return the share of the most frequent predicted class; None for other outputs."""
    target = batch[1]
    if replica.whole or not isinstance(target, Tensor):
        return None
    with torch.no_grad(), undisturbed(replica.model, training=False):
        output, _ = replica.outcome(batch)
    if not isinstance(output, Tensor) or len(output) != len(target):
        return None
    scores = output.reshape(len(output), -1)
    if target.reshape(len(target), -1).shape[1] > 1:
        same_shape = output.shape == target.shape
        if not same_shape and (output.ndim != target.ndim + 1 or output.shape[1] < 2):
            return None
        scores = output.reshape(-1, 1) if same_shape else output.movedim(1, -1).flatten(0, -2)
    if scores.shape[1] == 1:
        threshold = 0.5 if bool((scores >= 0).all()) else 0.0
        predictions = (scores[:, 0] > threshold).long()
    else:
        predictions = scores.argmax(1)
    return float(predictions.bincount().max()) / len(predictions)


def skill(output: object, target: object) -> float | None:
    """Return accuracy for classes, R2 for numbers, None for other tasks, NaN if not finite."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return None
    output = output.detach()
    if not bool(torch.isfinite(output).all()):
        return math.nan
    if not target.is_floating_point():
        for axis in (1, -1):  # class axis second, as in torch's losses, or last
            rest = [size for i, size in enumerate(output.shape) if i != axis % output.ndim]
            is_per_class = output.ndim == target.ndim + 1 and rest == list(target.shape) != []
            if is_per_class and output.shape[axis] > 1:
                accuracy = class_accuracy(output.argmax(axis), target)
                if accuracy is not None:
                    return accuracy
        if output.numel() != target.numel():
            return None
    flat, targets = output.flatten().double(), target.flatten().double()
    if flat.shape != targets.shape:
        return None
    is_positive = targets > 0
    if binary(targets):  # logits are cut at 0, probabilities at 0.5
        return max(float(((flat > cut) == is_positive).double().mean()) for cut in (0.0, 0.5))
    spread = float((targets - targets.mean()).square().mean())
    return 1 - float((flat - targets).square().mean()) / spread if spread > 0 else None
