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
from tikhon.diagnosis.dry_run import DryRun, run
from tikhon.diagnosis.evidence import Evidence, lately, number
from tikhon.diagnosis.record import Record
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.thresholds import BALANCED, FEW_PASS, HEAVY, LEARNED, RELATED, SMALL_UPDATE
from tikhon.diagnosis.wiring.program import make_program
from tikhon.diagnosis.wiring.rows import reconstruction_facts
from tikhon.diagnosis.wiring.torch_calls import LeakyActivations
from tikhon.errors import InputError

BEHIND = 0.6  # skill relative to a shallow model
LONG_STEP = 1e-2  # update / weight
USUAL = 0.9  # momentum
USUAL_DECAY = 0.01  # default of AdamW; SGD uses less
LONGER = 3  # times the steps
SHUFFLED = 2  # runs on shuffled targets where no shallow model finds a relation


@dataclass(frozen=True)
class Ran:
    """A finished dry run with its samples and its record."""

    source: Samples
    trial: DryRun
    record: Record

    @property
    def ended(self) -> bool:
        """Whether there was a run, and all its numbers were finite."""
        return self.trial.steps > 0 and self.trial.failure is None

    def again(
        self, replica: Replica, source: Samples, *, points: int = 0, times: int = 1
    ) -> DryRun:
        """Repeat the run with another replica or other samples.

        Raises:
            OutOfTimeError: if it was cut short, so that it cannot be compared.
        """
        trial = run(
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
    asked: Callable[[Evidence, Ran], object]
    change: Callable[[Replica, Ran], None]


def controls(make: Callable[[], Replica], ran: Ran) -> dict[str, object]:
    """Return the `advantage` of true over shuffled targets, and the scores of all `CONTROLS` due.

    Results are incomplete where the time budget runs out.
    """
    found: dict[str, object] = {}
    if ran.ended and not out_of_time():
        with suppress(OutOfTimeError):
            for facts in _asked(make, ran):
                found |= facts
    return found


def _asked(make: Callable[[], Replica], ran: Ran) -> Iterator[dict[str, object]]:
    """Yield the results of each control run that is due."""
    if _doubtful(ran):
        yield {"advantage": _advantage(make, ran)}
    ev = Evidence(ran.record)
    if ev.given_nothing:  # the code may become informative later
        replica = make()
        trial = ran.again(replica, ran.source, times=LONGER)
        later: dict[str, object] = {"given_steps": trial.steps}
        yield later | reconstruction_facts(make_program(replica, ran.source))
    for control in CONTROLS:
        if not control.asked(ev, ran):
            continue
        replica = make()
        control.change(replica, ran)
        over_time = control.name == "steadier"  # one value of an oscillating loss may be lucky
        with LeakyActivations() if control.name == "leaky" else nullcontext():
            points = len(ran.trial.points) if over_time else 1
            try:
                trial = ran.again(replica, ran.source, points=points)
            except InputError:  # a leaky sigmoid gives no probabilities
                continue
        if trial.failure is None:
            end = trial.points[-1]
            scores = lately(trial.points) if over_time else (end.eval_loss, end.metric)
            yield dict(zip((f"{control.name}_loss", f"{control.name}_metric"), scores))


def _doubtful(ran: Ran) -> bool:
    """Whether no shallow model finds a relation, so that the network itself has to be tried."""
    relation = ran.record.wiring.get("relation")
    target = ran.source.source[1] if ran.source.indexed else None
    return relation is not None and relation < RELATED and isinstance(target, torch.Tensor)


def _advantage(make: Callable[[], Replica], ran: Ran) -> float | None:
    """Return the final loss on shuffled minus true targets, relative to the trivial loss.

    Shuffled targets can only be memorised.
    """
    tail = max(1, ran.trial.steps // 4)
    source, ends = ran.source, []
    for seed in range(SHUFFLED):
        order = torch.randperm(source.rows, generator=torch.Generator().manual_seed(seed))
        shuffled = (source.source[0], take_rows(source.source[1], order))
        other = replace(source, source=shuffled, probe=take_rows(shuffled, torch.arange(2)))
        ends.append(sum(ran.again(make(), other).losses[-tail:]) / tail)
    trivial = ran.record.static.get("trivial")
    if not trivial or not ends:
        return None
    return (min(ends) - sum(ran.trial.losses[-tail:]) / tail) / abs(trivial)


def _learns_little(ev: Evidence, ran: Ran) -> bool:
    """Whether some parameters are not trained, and the loss ends above 0.2 of the trivial one."""
    static, end = ev.static, ran.trial.points[-1].eval_loss
    held = static.get("frozen") or static.get("unoptimized")
    return bool(held and ev.trivial) and end is not None and end >= 0.2 * (ev.trivial or 0.0)


def _free(replica: Replica, ran: Ran) -> None:
    assert replica.optimizer is not None
    groups = replica.optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    replica.model.requires_grad_(True)
    groups[0]["params"] += [p for p in replica.model.parameters() if id(p) not in held]


def _steady(replica: Replica, ran: Ran) -> None:
    assert replica.optimizer is not None
    for group in replica.optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (USUAL, *group["betas"][1:])
        else:
            group["momentum"] = USUAL


def _astray(ev: Evidence, ran: Ran) -> bool:
    """Whether steps may be too long.

    The loss oscillates, or skill is low with constant outputs or large updates.
    """
    known, blind = ev.reach is not None, ev.blind and not ev.born_blind
    lost = ev.learned < BEHIND and ((known and not ev.falling) or blind)
    short = ev.learned < LEARNED if known else ev.trivial is not None and ev.learned <= 0
    long = short and not ev.learning and (ev.updates or 0.0) >= LONG_STEP
    return lost or long or ev.swings


def _pace(replica: Replica, ran: Ran, *, times: float) -> None:
    for group in replica.optimizer.param_groups if replica.optimizer is not None else ():
        group["lr"] = group["lr"] * times


def _drops(ev: Evidence, ran: Ran) -> bool:
    """Whether dropout is strong, or there is some in a run with low skill."""
    rates = [rate for rate in (ev.static.get("dropout") or {}).values() if 0 < rate < 1]
    strong = max(rates, default=0.0) >= FEW_PASS and ev.learned < 1
    return strong or (bool(rates) and _behind(ev))


def _behind(ev: Evidence) -> bool:
    return ev.reach is not None and ev.learned < BEHIND


def _undrop(replica: Replica, ran: Ran) -> None:
    for module in replica.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _decays(ev: Evidence, ran: Ran) -> bool:
    """Whether a penalty dominates, or weight decay shrinks weights by 2 %, and skill is low."""
    if ev.penalty_share >= BALANCED:
        return _behind(ev)
    numbers = ran.record.optimizer
    decay, rate = (number(numbers.get(k)) or 0.0 for k in ("weight_decay", "lr"))
    return decay > USUAL_DECAY and rate * decay * ran.trial.steps >= 0.02 and _behind(ev)


def _undecay(replica: Replica, ran: Ran) -> None:
    replica.penalty = None
    if replica.regularizer is not None:
        replica.regularizer.remove()
    for group in replica.optimizer.param_groups if replica.optimizer is not None else ():
        group["weight_decay"] = 0.0


def _unhook(replica: Replica, ran: Ran) -> None:
    for parameter in replica.model.parameters():
        parameter._backward_hooks = None


def _bare(replica: Replica, ran: Ran) -> None:
    for name in Evidence(ran.record).norms_at_end:
        replica.model.set_submodule(name, nn.Identity())


def _go_past(replica: Replica, ran: Ran) -> None:
    """Replace the output of attention by its mean with the query: a residual connection."""

    def past(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return ((output[0] + args[0]) / 2, *output[1:]) if args else output

    for name in ran.record.wiring["nothing_past"]:
        replica.model.get_submodule(name).register_forward_hook(past)


def _as_it_is(replica: Replica, ran: Ran) -> None:
    """Leave the replica unchanged: the context `LeakyActivations` makes the difference."""


def _flat(ev: Evidence, ran: Ran) -> bool:
    """Whether units died or saturated during a run with low skill."""
    dying = ev.dying and not ev.born_dead
    return ev.learned < LEARNED and bool(dying or ev.saturating)


def _off_scale(ev: Evidence, ran: Ran) -> bool:
    """Whether the inputs are one unscaled tensor, in a run with low skill."""
    inputs = ran.source.probe[0]
    single = isinstance(inputs, torch.Tensor) and inputs.ndim > 1
    return single and not ev.wiring.get("whole") and _behind(ev) and ev.off_scale


def _scale(replica: Replica, ran: Ran) -> None:
    """Standardize the inputs per column or channel."""
    inputs = ran.source.probe[0]
    axes = [k for k in range(inputs.ndim) if k != 1]
    mean, spread = inputs.mean(axes, keepdim=True), inputs.std(axes, keepdim=True)

    def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((args[0] - mean) / spread.clamp_min(1e-12), *args[1:])

    replica.model.register_forward_pre_hook(scale)


CONTROLS = (
    Control("unfrozen", _learns_little, _free),  # train all parameters
    Control("steadier", lambda ev, ran: ev.momentum > HEAVY, _steady),  # the usual momentum
    Control("calmer", _astray, partial(_pace, times=0.1)),  # learning rate
    Control(
        "faster",
        lambda ev, ran: ev.falling and ev.learned < LEARNED and (ev.updates or 1.0) < SMALL_UPDATE,
        partial(_pace, times=10.0),
    ),
    Control("undropped", _drops, _undrop),
    Control("undecayed", _decays, _undecay),
    Control("unhooked", lambda ev, ran: ev.harmed and ev.static.get("hooked"), _unhook),
    Control(
        "bared",
        lambda ev, ran: ev.harmed and ev.norms_at_end and not ev.wiring.get("whole"),
        _bare,
    ),
    Control("skipped", lambda ev, ran: ev.harmed and ev.wiring.get("nothing_past"), _go_past),
    Control("leaky", _flat, _as_it_is),  # small slope where activations are flat
    Control("scaled", _off_scale, _scale),
)
