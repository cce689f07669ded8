"""Control runs: the same dry run with one thing changed, where a measurement asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tikhon.budget import OutOfTimeError, out_of_time
from tikhon.data.rows import take
from tikhon.diagnosis.dry_run import DryRun, run
from tikhon.diagnosis.evidence import Evidence, lately
from tikhon.diagnosis.record import Record
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.thresholds import FEW_PASS, HEAVY, LEARNED, RELATED, SMALL_UPDATE
from tikhon.diagnosis.wiring.calls import Leaky

BEHIND = 0.6  # of what the yardstick learns
LONG_STEP = 1e-2  # of the weights
USUAL = 0.9  # momentum
SHUFFLED = 2  # runs on shuffled targets where nothing shallow relates them to the inputs


@dataclass(frozen=True)
class Ran:
    """A dry run with what was measured around it."""

    source: Samples
    trial: DryRun
    record: Record

    @property
    def ended(self) -> bool:
        """Whether there was a run, and it ended with numbers."""
        return self.trial.steps > 0 and self.trial.failure is None

    def again(self, replica: Replica, source: Samples, *, points: int = 0) -> DryRun:
        """The same run of another replica or on other samples; one cut short compares nothing."""
        trial = run(
            replica,
            source,
            steps=self.trial.steps,
            batch_size=self.record.batch_size,
            seed=self.record.seed,
            probes=False,
            points=points,
        )
        if out_of_time():
            raise OutOfTimeError
        return trial


def controls(make: Callable[[], Replica], ran: Ran) -> dict[str, object]:
    """What the control runs found.

    `advantage` of true targets over shuffled ones, and the scores of a run in which everything is
    trained (`unfrozen`), of one on scaled inputs (`scaled`), of one whose flat ends leak
    (`leaky`), of one with a tenth of the learning rate (`calmer`) or ten times it
    (`faster`), of one with the usual momentum (`steadier`), of one without dropout
    (`undropped`), hooks (`unhooked`) or a norm of the answers (`bared`), and of one in which
    something goes past attention (`skipped`).
    """
    found: dict[str, object] = {}
    if ran.ended and not out_of_time():
        with suppress(OutOfTimeError):
            for facts in _asked(make, ran):
                found |= facts
    return found


def _asked(make: Callable[[], Replica], ran: Ran) -> Iterator[dict[str, object]]:
    """What each control run that a measurement asks for has found."""
    static, ev = ran.record.static, Evidence(ran.record)
    if _doubtful(ran):
        yield {"advantage": _advantage(make, ran)}
    if static.get("frozen") or static.get("unoptimized"):
        yield _unfrozen(make(), ran)
    if ev.momentum > HEAVY:
        yield _steadier(make(), ran)
    if _lost(ev) or _hasty(ev) or ev.swings:
        yield _paced("calmer", 0.1, make(), ran)
    if ev.falling and ev.learned < LEARNED and (ev.updates or 1.0) < SMALL_UPDATE:
        yield _paced("faster", 10.0, make(), ran)
    rates = [rate for rate in (static.get("dropout") or {}).values() if 0 < rate < 1]
    behind = ev.reach is not None and ev.learned < BEHIND
    if rates and (behind or (max(rates) >= FEW_PASS and ev.learned < 1)):
        yield _undropped(make(), ran)
    if ev.learned < LEARNED:
        yield _without(make, ran, ev)
        if (ev.dying and not ev.born_dead) or ev.saturating:
            with Leaky():
                leaky = ran.again(make(), ran.source, points=1)
            yield _scores("leaky", leaky)
    if behind and ev.off_scale:
        yield _scaled(make(), ran)


def _without(make: Callable[[], Replica], ran: Ran, ev: Evidence) -> dict[str, object]:
    """The scores of runs without what stands in the way: hooks on gradients, a norm of the

    answers, attention that nothing goes past.
    """
    found: dict[str, object] = {}
    if ran.record.static.get("hooked"):
        replica = make()
        for parameter in replica.model.parameters():
            parameter._backward_hooks = None
        found |= _scores("unhooked", ran.again(replica, ran.source, points=1))
    norms = ev.norms_at_end
    if norms and not make().whole:
        replica = make()
        for name in norms:
            replica.model.set_submodule(name, nn.Identity())
        found |= _scores("bared", ran.again(replica, ran.source, points=1))
    if layers := ran.record.wiring.get("nothing_past"):
        replica = make()
        for name in layers:
            replica.model.get_submodule(name).register_forward_hook(_past)
        found |= _scores("skipped", ran.again(replica, ran.source, points=1))
    return found


def _past(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The mean of what attention answers and what it was asked with."""
    return ((output[0] + args[0]) / 2, *output[1:]) if args else output


def _doubtful(ran: Ran) -> bool:
    """Whether no shallow model finds a relation, so that the network is asked itself."""
    relation = ran.record.wiring.get("relation")
    target = ran.source.source[1] if ran.source.indexed else None
    return relation is not None and relation < RELATED and isinstance(target, torch.Tensor)


def _advantage(make: Callable[[], Replica], ran: Ran) -> float | None:
    """How much lower the loss ends on the true targets than on shuffled ones, as a share of a

    constant's loss: the same run with the targets in another order is what chance can learn.
    """
    tail = max(1, ran.trial.steps // 4)
    source, ends = ran.source, []
    for number in range(SHUFFLED):
        order = torch.randperm(source.rows, generator=torch.Generator().manual_seed(number))
        shuffled = (source.source[0], take(source.source[1], order))
        other = replace(source, source=shuffled, probe=take(shuffled, torch.arange(2)))
        ends.append(sum(ran.again(make(), other).losses[-tail:]) / tail)
    trivial = ran.record.static.get("trivial")
    if not trivial or not ends:
        return None
    return (min(ends) - sum(ran.trial.losses[-tail:]) / tail) / abs(trivial)


def _unfrozen(replica: Replica, ran: Ran) -> dict[str, Any]:
    """The scores of the same run in which every parameter is trained."""
    engine = replica.optimizer
    trivial, end = ran.record.static.get("trivial"), ran.trial.points[-1].eval_loss
    if engine is None or not trivial or end is None or end < 0.2 * trivial:
        return {}  # it learns well enough with what is trained
    held = {id(p) for group in engine.param_groups for p in group["params"]}
    replica.model.requires_grad_(True)
    engine.param_groups[0]["params"] += [
        p for p in replica.model.parameters() if id(p) not in held
    ]
    return _scores("unfrozen", ran.again(replica, ran.source, points=1))


def _lost(ev: Evidence) -> bool:
    """Whether the run ends behind its yardstick, or with one answer for all rows."""
    behind = ev.reach is not None and ev.learned < BEHIND and not ev.falling
    return behind or (ev.blind and not ev.born_blind and ev.learned < BEHIND)


def _hasty(ev: Evidence) -> bool:
    """Whether a run of long steps, beside the weights, ends short of its yardstick."""
    short = ev.reach is not None and ev.learned < LEARNED and not ev.learning
    return short and (ev.updates or 0.0) >= LONG_STEP


def _paced(name: str, pace: float, replica: Replica, ran: Ran) -> dict[str, object]:
    """The scores of the same run with that many times the learning rate."""
    if replica.optimizer is None:
        return {}
    for group in replica.optimizer.param_groups:
        group["lr"] = group["lr"] * pace
    return _scores(name, ran.again(replica, ran.source, points=1))


def _undropped(replica: Replica, ran: Ran) -> dict[str, object]:
    """The scores of the same run without dropout."""
    for module in replica.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return _scores("undropped", ran.again(replica, ran.source, points=1))


def _scaled(replica: Replica, ran: Ran) -> dict[str, object]:
    """The scores of the same run on inputs of mean 0 and deviation 1, by column or channel."""
    inputs = ran.source.probe[0]
    if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2 or replica.whole:
        return {}
    axes = [k for k in range(inputs.ndim) if k != 1]
    mean, spread = inputs.mean(axes, keepdim=True), inputs.std(axes, keepdim=True)

    def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((args[0] - mean) / spread.clamp_min(1e-12), *args[1:])

    replica.model.register_forward_pre_hook(scale)
    return _scores("scaled", ran.again(replica, ran.source, points=1))


def _steadier(replica: Replica, ran: Ran) -> dict[str, Any]:
    """The scores of the same run with a momentum of 0.9."""
    assert replica.optimizer is not None
    for group in replica.optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (USUAL, *group["betas"][1:])
        else:
            group["momentum"] = USUAL
    trial = ran.again(replica, ran.source, points=len(ran.trial.points))
    if trial.failure is not None:
        return {}
    loss, metric = lately(trial.points)
    return {"steadier_loss": loss, "steadier_metric": metric}


def _scores(name: str, trial: DryRun) -> dict[str, object]:
    if trial.failure is not None:
        return {}
    return {f"{name}_loss": trial.points[-1].eval_loss, f"{name}_metric": trial.points[-1].metric}
