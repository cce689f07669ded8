"""`watch`: laws and sizes of a live loop, cheaply: sampled steps, one stacked read each."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.diagnosis.record import finite
from tikhon.errors import InputError
from tikhon.monitoring.company import Company
from tikhon.monitoring.first_bad import Call, first_bad
from tikhon.monitoring.history import StepHistory
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.laws import ENOUGH, Alarm, Loop, alarms
from tikhon.monitoring.pace import Pace
from tikhon.monitoring.rounds import Rounds
from tikhon.monitoring.sampling import Sampler
from tikhon.monitoring.sizes import NonFinite, Row, of_rows, of_spikes
from tikhon.monitoring.spikes import OnSpike, Spike, SpikeGuard
from tikhon.monitoring.touches import Touches
from tikhon.regularizer.audit import warn
from tikhon.regularizer.hooks import with_closure
from tikhon.regularizer.optimizers import stepping
from tikhon.regularizer.targets import local
from tikhon.runs.files import write_json
from tikhon.wrappers import unwrap

CHECKED = (
    "order of passes and steps, gradients, tensors of the optimizer, updates, signals, losses, "
    "batches, modes, learning rates"
)


class NonFiniteError(ArithmeticError):
    """A number is not finite any more; the message names the first bad tensor and the step."""


class Watch:
    """Hooks on an optimizer and a model; a context manager. Use `tikhon.watch` to make one.

    Every `every` steps the norms of all gradients, weights and updates (of large tensors, of some
    rows) are read in one go, and hooks see the forward and backward passes since the step before.
    On every step one small gradient of the first layer is looked at: whatever goes wrong on the
    way there or back ends in it. `rows` holds what was read, newest last; `findings` the laws of
    a step that the loop breaks, and `alarms` their sentences by code.
    """

    model: nn.Module
    optimizer: Optimizer
    every: int
    output: Path | None
    stop: bool
    step: int

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int,
        keep: int,
        output: Path | None,
        stop: bool,
        scaler: Any = None,
        on_spike: OnSpike = "warn",
    ) -> None:
        self.model, self.optimizer = unwrap(model), optimizer
        self.every, self.output, self.stop = every, output, stop
        self.step = 0
        self.rows: deque[Row] = deque(maxlen=keep)
        self.spikes: deque[Spike] = deque(maxlen=keep)
        self.failure: NonFinite | None = None
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._inner = _stepping(optimizer)
        self._sampler = Sampler(self.model, self._inner, scaler)
        self._guard = SpikeGuard(self._inner, on_spike)
        self._history = StepHistory()
        self._touches = Touches(self._inner)
        self._rounds = Rounds(self.model)
        self._pace = Pace(self.model, self._inner)
        self._company = Company(self.model, self._inner, lambda: self.step)
        self._company.states.told = self._warn
        self._forwards = self._empty = 0
        self._graded = self._ended = self._called = False
        self._warned: set[str] = set()
        self._frozen = frozenset(
            n for n, p in self.model.named_parameters() if not p.requires_grad
        )
        self._loss: Tensor | None = None
        self._told: deque[tuple[int, Tensor]] = deque(maxlen=1024)  # since the last reading
        self._calls: list[Call] = []  # what this step's forward began with
        self._sentinel = _sentinel(self.model)
        self._latch: Tensor | None = None
        self._handles = [
            self.model.register_forward_pre_hook(Hook(self._remember), with_kwargs=True),
            self._inner.register_step_pre_hook(self._before_step),
            self._inner.register_step_post_hook(self._after_step),
        ]
        self._sampler.listen((), first=True)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._ended = kind is None  # a loop that broke off proves nothing by what is missing
        self.remove()

    def end(self) -> str:
        """The loop is over as it should be: judge what is missing, too, and give the verdict."""
        self._ended = self._ended or bool(self._handles)
        self.remove()
        return self.verdict

    def remove(self) -> None:
        """Take all hooks off; what was read stays, and goes to the run folder."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sampler.close()
        self._company.close(self.step, self._forwards, ended=self._ended)
        self._pace.close()
        self._rounds.close()
        self._judge_told([float(value) for _, value in self._told])
        self._warn()
        self._save()
        self._calls = []  # the last batch

    def loss(self, value: Tensor) -> Tensor:
        """Optional: tell the watch the loss of this step; it is read on sampled steps only."""
        self._loss = value.detach()
        made = self.step > 0 and not self._called  # told after the step that it belongs to
        self._told.append((self.step - made, self._loss.mean()))
        return value

    @property
    def findings(self) -> tuple[Alarm, ...]:
        """The laws of a step that the loop breaks, warnings first, and what is good to know."""
        loop = Loop(
            steps=self.step,
            forwards=self._forwards,
            backwards=any(p.grad is not None for p in self.model.parameters()),
            empty=self._empty,
            frozen=self._frozen,
            ended=self._ended,
            history=self._history,
            again=self._pace.again,
            unstepped=self._pace.unstepped,
            usual=self._pace.usual,
            rounds=self._rounds.meant(ended=self._ended),
            learned=self._company.schedules.learned(self.step),
        )
        beside = self._company.alarms(self.step, self._forwards, ended=self._ended)
        found = [*alarms(loop), *beside, *of_spikes(list(self.spikes))]
        wired = not any(a.severity == "warning" for a in found)
        found += of_rows(list(self.rows), self.failure, wired=wired, summed=loop.summed)
        return tuple(sorted(found, key=lambda alarm: alarm.severity != "warning"))

    @property
    def verdict(self) -> str:
        """One line: the codes of the warnings, or that there are none, and what was looked at."""
        found = list(self.alarms)
        if found:
            return (
                f"tikhon watch: {', '.join(found)} in {self.step} steps; print the watch for more"
            )
        read = self._history.samples
        if not read:
            return f"tikhon watch: {self.step} steps, of which none was read"
        so_far = " so far" if self._handles else ""
        if read < ENOUGH - 1:  # as many as a law needs
            return (
                f"tikhon watch: {read} of {self.step} steps read{so_far}, too few to judge "
                f"(every {self.every} steps; a smaller `every` reads more)"
            )
        return (
            f"tikhon watch: no problem found{so_far} in {self.step} steps, {read} of them read: "
            f"{CHECKED}"
        )

    @property
    def alarms(self) -> dict[str, str]:
        """The warnings among the findings: a sentence by code."""
        return {a.code: str(a) for a in self.findings if a.severity == "warning"}

    def __str__(self) -> str:
        last = self.rows[-1] if self.rows else None
        if last is None:
            shown = f"step {self.step}, nothing read yet (every {self.every} steps)"
        else:
            sizes = [f"{k} {v:.2g}" for k, v in last.items() if isinstance(v, float)]
            shown = f"step {last['step']}, {', '.join(sizes)}"
        lines = [f"tikhon watch: {shown}"]
        lines += [
            f" {a.code}: {a}" if a.severity == "warning" else f" note: {a}" for a in self.findings
        ]
        if self._history.samples and not self.alarms:
            lines.append(f" {self.verdict.removeprefix('tikhon watch: ')}")
        return "\n".join(lines)

    # hooks

    def _remember(self, module: nn.Module, args: object, kwargs: object) -> None:
        if module is self.model or any(module is called for called, _, _ in self._calls):
            self._calls = []
        self._calls.append((module, args, kwargs))
        begins, self._called = not self._called, True  # since the last step
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if graph and (module is self.model or begins):
            self._pace.forward()
            self._touches.before_forward(self.step)
        if graph and module is self.model:
            self._forwards += 1
            self._sampler.forward(module, [args, kwargs])

    @property
    def _batch(self) -> Any:
        """The arguments of the last forward pass."""
        return [call[1:] for call in self._calls[:1]]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._pace.before_step(called=self._called)
        self._company.before_step()
        if self._sampler.listening and not torch.compiler.is_compiling():
            self._company.find(sys._getframe(1), self._forwards)
            self._sampler.found = self._company.scaler
        changed = with_closure(args, kwargs, self._looking)
        if changed is None:
            self._look()
            spike = self._guard.before(self.step, self._loss)
            self._spiked(spike)
        return changed

    def _looking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with a look at its gradients: LBFGS and Lightning go backward inside."""

        def evaluate() -> Any:
            self._sampler.evaluation()
            loss = closure()
            self._look()
            return loss

        return evaluate

    def _look(self) -> None:
        """At the sentinel, and at the weights before the optimizer moves them."""
        grad = self._sentinel.grad if self._sentinel is not None else None
        if grad is not None and not _skipped(self._inner):
            self._check_sentinel(local(grad) if self._sampler.sharded else grad)
        groups = self._inner.param_groups
        self._graded = any(p.grad is not None for g in groups for p in g["params"])
        self._sampler.look()

    def _check_sentinel(self, gradient: Tensor) -> None:
        """Read it at once on a CPU; elsewhere latch it until the next reading."""
        if gradient.is_cpu:
            if not math.isfinite(gradient.sum().item()):
                self._fail()
            return
        bad = ~torch.isfinite(gradient.sum())
        now = torch.where(bad, self.step, torch.inf)
        self._latch = now if self._latch is None else torch.minimum(self._latch, now)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._guard.after()
        self._pace.after_step()
        self._touches.after_step()
        self._empty = 0 if self._graded else self._empty + 1
        self._graded = self._called = False
        if self._sampler.kept is not None and not _skipped(self._inner):
            self._read()
            self._pace.hold()
        self.step += 1
        if self.step == 1 and not self._calls:  # the loop calls parts, as Lightning modules do
            self._handles += [
                part.register_forward_pre_hook(Hook(self._remember), with_kwargs=True)
                for part in self.model.children()
            ]
        self._sampler.close()
        if self.step % self.every == 0:
            self._sampler.listen(self._batch)
            self._company.followers.listen()

    def _read(self) -> None:
        """Read this step, and warn of what it shows."""
        told = [value for _, value in self._told]
        prints = [] if self._history.set_back else self._touches.prints()
        company = self._company.numbers()
        loss = self._loss if told else None
        row, sample, beside = self._sampler.read(
            self.step, self._batch, loss, [*told, *prints, *company], self._pace.late
        )
        self._pace.late = None
        cut = len(told) + len(prints)
        losses, written, read = beside[: len(told)], beside[len(told) : cut], beside[cut:]
        self._company.take(read, sample)
        if row is not None:
            fine = row.pop("finite")
            self.rows.append(row)
            if not fine:
                self._fail()
        self._history.add(sample)
        self._history.set_back = self._history.set_back or self._touches.set_back(written)
        if row is not None:
            self._judge_told(losses, row["gradient"], row["loss"])
        else:
            self._judge_told(losses)
        self._warn()

    # spikes, warnings

    def _judge_told(
        self, losses: list[float], gradient: float | None = None, heard: float | None = None
    ) -> None:
        """The losses since the last reading; the last of them has the gradient norm beside it.

        `heard` is the one that went backward, where none was told.
        """
        for (step, _), loss in zip(self._told, losses):
            beside = gradient if step == self.step else None
            self._spiked(self._guard.judge(step, loss, beside))
        if not losses and gradient is not None:
            self._spiked(self._guard.judge(self.step, heard, gradient, heard=True))
        self._told.clear()

    def _spiked(self, spike: Spike | None) -> None:
        if spike is not None:
            self.spikes.append(spike)

    def _warn(self) -> None:
        """Each code once, at the line of the loop; a failure raises or is asked for."""
        for code, sentence in self.alarms.items():
            if code not in self._warned and self.failure is None:
                self._warned.add(code)
                warn(f"{code}: {sentence}")

    # failure

    def check(self, loss: Tensor) -> Tensor:
        """Stop at once if this loss is not finite, before its backward pass; one read a call."""
        if not bool(torch.isfinite(loss.detach()).all()):
            self._loss = loss.detach()
            self._fail()
        return loss

    def _fail(self) -> None:
        step = self.step
        if self._latch is not None and math.isfinite(float(self._latch)):
            step = int(self._latch)
        what, where = first_bad(self.model, self._calls, self._loss, self._old)
        trail = ", ".join(f"{r['gradient']:.2g}" for r in list(self.rows)[-5:])
        message = (
            f"step {step}: the first non-finite tensor is {what} {where}; "
            f"gradient norms before: {trail or 'none read'}"
        )
        self.failure = {"step": step, "what": what, "where": where, "message": message}
        self._save()
        if self.stop:
            raise NonFiniteError(message)

    def _old(self, parameter: Tensor) -> Tensor:
        kept = self._sampler.kept
        return kept.old(parameter) if kept is not None else parameter

    def to_dict(self) -> dict[str, Any]:
        """The ring buffer, alarms and failure as plain values."""
        return finite(
            {
                "schema_version": 1,
                "kind": "watch",
                "step": self.step,
                "rows": list(self.rows),
                "alarms": self.alarms,
                "findings": [alarm.to_dict() for alarm in self.findings],
                "spikes": [spike.__dict__ for spike in self.spikes],
                "failure": self.failure,
            }
        )

    def _save(self) -> None:
        if self.output is None:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / "watch.json", self.to_dict())


def _stepping(optimizer: object) -> Optimizer:
    try:
        return stepping(optimizer)
    except TypeError as error:
        raise InputError(f"not a torch optimizer: {error}") from error


def _sentinel(model: nn.Module) -> Tensor | None:
    """The smallest trainable tensor of the first layer that has one."""
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            return min(own, key=lambda p: p.numel())
    return None


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under GradScaler leaves this step out: inf is expected there."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def watch(
    model: nn.Module,
    optimizer: Any,
    *,
    every: int = 50,
    keep: int = 200,
    output: str | Path | None = None,
    stop: bool = True,
    scaler: object = None,
    on_spike: OnSpike = "warn",
) -> Watch:
    """Watch a live loop: the laws of a step, sizes of updates, the first non-finite number.

    Said once by a warning, at the latest when the `with` ends, and in `str`: gradients that are
    not cleared, or cleared too early; tensors that never move; an optimizer of another model; a
    step before its backward pass, or none; a loss that is not the model's; the same batch again
    and again; weights set from outside; training in eval mode; a collapsed learning rate;
    processes that differ; spikes.

    The loop stays as it is; the watch hangs on the optimizer's step and, on sampled steps, on
    tensor hooks of the layers' outputs. Skipped steps of a `GradScaler` are not counted, scaled
    gradients of fused optimizers are unscaled, accumulated micro-batches add up.

    Args:
        model: the module (compiled, data-parallel and sharded ones are unwrapped).
        optimizer: the optimizer whose steps are watched.
        every: steps between two readings, >= 1.
        keep: readings in the ring buffer, >= 1.
        output: the run folder; `watch.json` is written there at the end and on failure.
        stop: raise `NonFiniteError` at the first non-finite number; otherwise record it.
        scaler: the `GradScaler` of the loop; its scale is read with the rest.
        on_spike: what to do where loss and gradient norm jump far above the last ones (robust
            z-scores). "warn" judges the losses that `loss` was told, and gradients of sampled
            steps; "skip" leaves such a step out; a function gets the `Spike` and may return
            "skip". The last two read loss and gradient norm in every step: one synchronisation.

    Raises:
        InputError: something that is not an optimizer, or numbers out of range.

    >>> net = nn.Linear(4, 1)
    >>> engine = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with watch(net, engine, every=1) as health:
    ...     for _ in range(3):
    ...         engine.zero_grad()
    ...         net(torch.ones(8, 4)).square().mean().backward()
    ...         engine.step()
    >>> len(health.rows), health.alarms
    (3, {})
    """
    if every < 1 or keep < 1:
        raise InputError(f"every and keep must be >= 1, received {every} and {keep}")
    if on_spike not in ("warn", "skip") and not callable(on_spike):
        raise InputError(f"on_spike must be 'warn', 'skip' or a function, received {on_spike!r}")
    return Watch(
        model,
        optimizer,
        every=every,
        keep=keep,
        output=Path(output) if output else None,
        stop=stop,
        scaler=scaler,
        on_spike=on_spike,
    )
