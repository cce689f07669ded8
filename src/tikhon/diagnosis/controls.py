"""Control runs: repeat the dry run with one thing changed, where a measurement calls for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tikhon.budget import OutOfTimeError, out_of_time
from tikhon.data.nested import take_rows
from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.dry_run import DryRun, run_trial
from tikhon.diagnosis.evidence import Evidence, late_scores, number
from tikhon.diagnosis.record import Record
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.collapse import collapse_facts
from tikhon.diagnosis.wiring.program import make_program
from tikhon.diagnosis.wiring.rows import reconstruction_facts
from tikhon.diagnosis.wiring.torch_calls import LeakyActivations
from tikhon.errors import InputError

LOW_SKILL = 0.6  # skill relative to a shallow model
LONG_STEP = 1e-2  # update / weight
DEFAULT_MOMENTUM = 0.9  # momentum
DEFAULT_WEIGHT_DECAY = 0.01  # default of AdamW; SGD uses less
LONGER_RUN = 3  # times the steps
CONTROL_ROWS = 4096  # of a loader that are read for runs on shuffled targets
SHUFFLED_RUNS = 2  # runs on shuffled targets where no shallow model finds a relation


@dataclass(frozen=True)
class CompletedRun:
    """A finished dry run with its samples and its record."""

    source: Samples
    trial: DryRun
    record: Record

    @property
    def is_complete(self) -> bool:
        """Whether there was a run, and all its numbers were finite."""
        return self.trial.steps > 0 and self.trial.failure is None

    def repeat(
        self, replica: Replica, source: Samples, *, points: int = 0, times: int = 1
    ) -> DryRun:
        """Repeat the run with another replica or other samples.

        Raises:
            OutOfTimeError: if it was cut short, so that it cannot be compared.
        """
        trial = run_trial(
            replica,
            source,
            steps=times * self.trial.steps,
            batch_size=self.record.batch_size,
            seed=self.record.seed,
            probes=False,
            points=points,
        )
        if out_of_time():
            raise OutOfTimeError
        return trial


@dataclass(frozen=True)
class Control:
    """One change to the dry run, and the condition under which it is tried."""

    name: str
    is_due: Callable[[Evidence, CompletedRun], object]
    change: Callable[[Replica, CompletedRun], None]


def run_controls(make: Callable[[], Replica], run: CompletedRun) -> dict[str, object]:
    """Return the `advantage` of true over shuffled targets, and the scores of all `CONTROLS` due.

    Results are incomplete where the time budget runs out.
    """
    results: dict[str, object] = {}
    if run.is_complete and not out_of_time():
        with suppress(OutOfTimeError):
            for facts in _run_due_controls(make, run):
                results |= facts
    return results


def _run_due_controls(
    make: Callable[[], Replica], run: CompletedRun
) -> Iterator[dict[str, object]]:
    """Yield the results of each control run that is due."""
    relation = number(run.record.wiring.get("relation"))
    if relation is not None and relation < e.RELATED:  # no shallow model finds one
        yield {"advantage": _advantage(make, run)}
    ev = Evidence(run.record)
    if ev.ignores_code:  # the code may become informative later
        replica = make()
        trial = run.repeat(replica, run.source, times=LONGER_RUN)
        later: dict[str, object] = {"given_steps": trial.steps}
        yield later | reconstruction_facts(make_program(replica, run.source))
    if (ev.fact("embeddings_left") or 1.0) < e.COLLAPSED:  # hard triplets may part them later
        replica = make()
        run.repeat(replica, run.source, times=LONGER_RUN)
        before = run.record.wiring["embedding_spread"]
        yield collapse_facts(make_program(replica, run.source), before)
    for control in CONTROLS:
        if not control.is_due(ev, run):
            continue
        replica = make()
        control.change(replica, run)
        over_time = control.name == "steadier"  # one value of an oscillating loss may be lucky
        with LeakyActivations() if control.name == "leaky" else nullcontext():
            points = len(run.trial.points) if over_time else 1
            try:
                trial = run.repeat(replica, run.source, points=points)
            except InputError:  # a leaky sigmoid gives no probabilities
                continue
        if trial.failure is None:
            end = trial.points[-1]
            scores = late_scores(trial.points) if over_time else (end.eval_loss, end.metric)
            yield dict(zip((f"{control.name}_loss", f"{control.name}_metric"), scores))


def _advantage(make: Callable[[], Replica], run: CompletedRun) -> float | None:
    """Return the final loss on shuffled minus true targets, relative to the trivial loss.

    Shuffled targets can only be memorised; the rows of a loader are read to have both.
    """
    source = run.source.with_rows(CONTROL_ROWS)
    trivial = run.record.static.get("trivial")
    if source is None or not trivial or not isinstance(source.source[1], torch.Tensor):
        return None
    last_steps = max(1, run.trial.steps // 4)

    def final_loss(trial: DryRun) -> float:
        return sum(trial.losses[-last_steps:]) / last_steps

    own_loss = final_loss(run.trial if run.source.indexed else run.repeat(make(), source))
    shuffled_losses = []
    for seed in range(SHUFFLED_RUNS):
        order = torch.randperm(source.rows, generator=torch.Generator().manual_seed(seed))
        shuffled = (source.source[0], take_rows(source.source[1], order))
        other = replace(source, source=shuffled, probe=take_rows(shuffled, torch.arange(2)))
        shuffled_losses.append(final_loss(run.repeat(make(), other)))
    return (min(shuffled_losses) - own_loss) / abs(trivial)


def _has_untrained_parts(ev: Evidence, run: CompletedRun) -> bool:
    """Whether some parameters are not trained, and the loss ends above 0.2 of the trivial one."""
    static, end = ev.static, run.trial.points[-1].eval_loss
    held = static.get("frozen") or static.get("unoptimized")
    return bool(held and ev.trivial) and end is not None and end >= 0.2 * (ev.trivial or 0.0)


def _unfreeze(replica: Replica, run: CompletedRun) -> None:
    assert replica.optimizer is not None
    groups = replica.optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    replica.model.requires_grad_(True)
    groups[0]["params"] += [p for p in replica.model.parameters() if id(p) not in held]


def _use_default_momentum(replica: Replica, run: CompletedRun) -> None:
    assert replica.optimizer is not None
    for group in replica.optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (DEFAULT_MOMENTUM, *group["betas"][1:])
        else:
            group["momentum"] = DEFAULT_MOMENTUM


def _may_step_too_far(ev: Evidence, run: CompletedRun) -> bool:
    """Whether steps may be too long.

    The loss oscillates, or skill is low with constant outputs or large updates.
    """
    has_reference, skill = ev.shallow_gain is not None, ev.final_skill
    became_constant = ev.has_constant_output and not ev.is_constant(ev.first)
    lost = skill < LOW_SKILL and ((has_reference and not ev.falls_smoothly) or became_constant)
    lacks_skill = skill < e.LEARNED if has_reference else ev.trivial is not None and skill <= 0
    has_long_steps = not ev.falls_fast and (ev.median_update or 0.0) >= LONG_STEP
    return lost or (lacks_skill and has_long_steps) or ev.oscillates


def _may_step_too_little(ev: Evidence, run: CompletedRun) -> bool:
    is_slow = ev.falls_smoothly and (ev.median_update or 1.0) < e.SMALL_UPDATE
    return is_slow and ev.final_skill < e.LEARNED


def _scale_learning_rate(replica: Replica, run: CompletedRun, *, times: float) -> None:
    for group in replica.optimizer.param_groups if replica.optimizer is not None else ():
        group["lr"] = group["lr"] * times


def _has_harmful_dropout(ev: Evidence, run: CompletedRun) -> bool:
    """Whether dropout is strong, or there is some in a run with low skill."""
    rates = [rate for rate in (ev.static.get("dropout") or {}).values() if 0 < rate < 1]
    is_strong = max(rates, default=0.0) >= e.FEW_PASS and ev.final_skill < 1
    return is_strong or (bool(rates) and _has_low_skill(ev))


def _has_low_skill(ev: Evidence) -> bool:
    return ev.shallow_gain is not None and ev.final_skill < LOW_SKILL


def _disable_dropout(replica: Replica, run: CompletedRun) -> None:
    for module in replica.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _has_strong_weight_decay(ev: Evidence, run: CompletedRun) -> bool:
    """Whether a penalty dominates or decay shrinks weights by 2 %, and little was learned."""
    is_low = _has_low_skill(ev) or ev.loss_at_chance
    if ev.penalty_share >= e.BALANCED:
        return is_low or (ev.lacks_yardstick and ev.final_skill < e.RESTRAINED)
    numbers = run.record.optimizer
    decay, rate = (number(numbers.get(k)) or 0.0 for k in ("weight_decay", "lr"))
    shrinks = rate * decay * run.trial.steps >= 0.02
    return decay > DEFAULT_WEIGHT_DECAY and shrinks and is_low


def _disable_weight_decay(replica: Replica, run: CompletedRun) -> None:
    replica.penalty = None
    if replica.regularizer is not None:
        replica.regularizer.remove()
    for group in replica.optimizer.param_groups if replica.optimizer is not None else ():
        group["weight_decay"] = 0.0


def _remove_gradient_hooks(replica: Replica, run: CompletedRun) -> None:
    for parameter in replica.model.parameters():
        parameter._backward_hooks = None


def _remove_final_norms(replica: Replica, run: CompletedRun) -> None:
    for name in Evidence(run.record).norms_at_end:
        replica.model.set_submodule(name, nn.Identity())


def _add_residual_connection(replica: Replica, run: CompletedRun) -> None:
    """Replace the output of attention by its mean with the query: a residual connection."""

    def add_query(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return ((output[0] + args[0]) / 2, *output[1:]) if args else output

    for name in run.record.wiring["nothing_past"]:
        replica.model.get_submodule(name).register_forward_hook(add_query)


def _has_flat_units(ev: Evidence, run: CompletedRun) -> bool:
    """Whether units died or saturated during a run with low skill."""
    dead, first = ev.dead_rectifiers, ev.first
    was_dead = first is not None and any((first.readings[i].dead or 0) >= e.DEAD for i in dead)
    dying = bool(dead) and not was_dead
    return ev.final_skill < e.LEARNED and (dying or bool(ev.saturated_activations))


def _has_unscaled_inputs(ev: Evidence, run: CompletedRun) -> bool:
    """Whether the inputs are one unscaled tensor, in a run with low skill."""
    inputs = run.source.probe[0]
    is_one_tensor = isinstance(inputs, torch.Tensor) and inputs.ndim > 1
    size = run.record.data.get("inputs") or {}
    spread, mean = number(size.get("std")), number(size.get("mean"))
    if not is_one_tensor or ev.wiring.get("whole") or not _has_low_skill(ev):
        return False
    if not spread or mean is None or run.record.data.get("normalised_inside"):
        return False
    return not 0.1 <= spread <= 10 or abs(mean) > 3 * spread


def _standardize_inputs(replica: Replica, run: CompletedRun) -> None:
    """Standardize the inputs per column or channel."""
    inputs = run.source.probe[0]
    axes = [k for k in range(inputs.ndim) if k != 1]
    mean, spread = inputs.mean(axes, keepdim=True), inputs.std(axes, keepdim=True)

    def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((args[0] - mean) / spread.clamp_min(1e-12), *args[1:])

    replica.model.register_forward_pre_hook(scale)


def _lacks_bias(ev: Evidence, run: CompletedRun) -> bool:
    """Whether the last layer has no bias and amounts far from zero are not reached."""
    size, first = run.record.data.get("target") or {}, ev.first
    mean, spread = number(size.get("mean")), number(size.get("std"))
    if mean is None or not spread or abs(mean) < spread or not ev.chain or first is None:
        return False
    is_last = ev.site(ev.chain[-1]).role == "weight" and ev.activation_after(ev.chain[-1]) is None
    has_none = first.readings[ev.chain[-1]].bias is None
    return is_last and has_none and ev.may_be_harmed and not ev.wiring.get("whole")


def _add_target_mean(replica: Replica, run: CompletedRun) -> None:
    mean = run.record.data["target"]["mean"]
    replica.model.register_forward_hook(lambda module, args, output: output + mean)


CONTROLS = (
    Control("unfrozen", _has_untrained_parts, _unfreeze),  # train all parameters
    Control("steadier", lambda ev, run: ev.momentum > e.HEAVY, _use_default_momentum),
    Control("calmer", _may_step_too_far, partial(_scale_learning_rate, times=0.1)),
    Control("faster", _may_step_too_little, partial(_scale_learning_rate, times=10.0)),
    Control("undropped", _has_harmful_dropout, _disable_dropout),
    Control("undecayed", _has_strong_weight_decay, _disable_weight_decay),
    Control(
        "unhooked",
        lambda ev, run: ev.may_be_harmed and ev.static.get("hooked"),
        _remove_gradient_hooks,
    ),
    Control(
        "bared",
        lambda ev, run: ev.may_be_harmed and ev.norms_at_end and not ev.wiring.get("whole"),
        _remove_final_norms,
    ),
    Control(
        "skipped",
        lambda ev, run: ev.may_be_harmed and ev.wiring.get("nothing_past"),
        _add_residual_connection,
    ),
    Control("leaky", _has_flat_units, lambda replica, run: None),  # `LeakyActivations` does it
    Control("scaled", _has_unscaled_inputs, _standardize_inputs),
    Control("shifted", _lacks_bias, _add_target_mean),
)
