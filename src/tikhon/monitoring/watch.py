"""`watch`: rules and magnitudes of a live loop, from sampled steps with one stacked read each."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.diagnosis.record import finite
from tikhon.errors import InputError
from tikhon.languages import Sentence, sentence
from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, LoopState
from tikhon.monitoring.first_nonfinite import find_first_nonfinite
from tikhon.monitoring.history import StepHistory
from tikhon.monitoring.magnitudes import NonFinite, Row, magnitude_alarms, spike_alarms
from tikhon.monitoring.rules import alarms, unrelated_labels
from tikhon.monitoring.sampling import Sampler
from tikhon.monitoring.spikes import OnSpike, Spike, SpikeGuard
from tikhon.monitoring.step_hooks import LoopHooks
from tikhon.regularizer.audit import warn
from tikhon.regularizer.optimizers import inner_optimizer
from tikhon.runs.files import write_json
from tikhon.wrappers import unwrap


class NonFiniteError(ArithmeticError):
    """A number is not finite; the message names the first such tensor and the step."""


class Watch:
    """Hooks on an optimizer and a model; a context manager. Use `tikhon.watch` to make one.

    Every `every` steps the norms of all gradients, weights and updates (of some rows of large
    tensors) are read at once, and hooks record the passes since the previous step. At every step
    one small gradient of the first layer is checked, as non-finite values propagate to it. `rows`
    holds the readings, newest last; `findings` the rules that the loop violates, and `alarms`
    their sentences by code.
    """

    model: nn.Module
    optimizer: Optimizer
    every: int
    output: Path | None
    stop: bool

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
        self.rows: deque[Row] = deque(maxlen=keep)
        self.failure: NonFinite | None = None
        self._ended = False
        self._warned: set[str] = set()
        self._frozen = frozenset(
            n for n, p in self.model.named_parameters() if not p.requires_grad
        )
        self._history = StepHistory()
        try:
            stepped = inner_optimizer(optimizer)
        except TypeError as error:
            raise InputError(f"not a torch optimizer: {error}") from error
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._sampler = Sampler(self.model, stepped, scaler)
        self._guard = SpikeGuard(stepped, on_spike, keep)
        self._hooks = LoopHooks(
            self.model,
            stepped,
            every,
            sampler=self._sampler,
            guard=self._guard,
            read=self._read,
            fail=self._fail,
        )
        self._monitors = self._hooks.monitors
        self._monitors.saved_states.on_reload = self._warn
        self._monitors.target_networks.on_stale = self._warn

    @property
    def step(self) -> int:
        """Number of optimizer steps."""
        return self._hooks.step

    @property
    def spikes(self) -> deque[Spike]:
        """Latest spikes of the loss and of the gradient norm."""
        return self._guard.spikes

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._ended = kind is None  # nothing can be missing from an interrupted loop
        self.remove()

    def end(self) -> Sentence:
        """End the watch after a complete loop, report what is missing too, return the verdict."""
        self._ended = self._ended or self._hooks.is_active
        self.remove()
        return self.verdict

    def remove(self) -> None:
        """Remove all hooks; readings are kept and written to the run folder."""
        if not self._hooks.is_active:
            return
        self._hooks.close()
        self._monitors.close(self.step, self._hooks.forwards, ended=self._ended)
        self._guard.check(self.step, [float(value) for value in self._guard.pending], None)
        self._warn()
        self._save()
        self._hooks.calls = []  # the last batch

    def loss(self, value: Tensor) -> Tensor:
        """Pass the loss of this step to the watch (optional); read on sampled steps only."""
        is_late = self.step > 0 and not self._hooks.was_called  # passed after its step
        self._guard.record(self.step - is_late, value)
        return value

    @property
    def findings(self) -> tuple[Alarm, ...]:
        """Rules that the loop violates, warnings first, then infos."""
        hooks = self._hooks
        loop = LoopState(
            steps=hooks.step,
            forwards=hooks.forwards,
            backwards=any(p.grad is not None for p in self.model.parameters()),
            steps_without_gradient=hooks.steps_without_gradient,
            frozen=self._frozen,
            ended=self._ended,
            history=self._history,
            repeated_steps=hooks.repeated_steps,
            passes_without_step=hooks.passes_without_step,
            max_passes=hooks.max_passes,
            is_federated=self._monitors.saved_states.federated.is_averaging(ended=self._ended),
            epochs=self._monitors.loaders.epochs,
            has_improved=self._monitors.schedules.has_improved(hooks.step),
        )
        of_monitors = self._monitors.alarms(hooks.step, hooks.forwards, ended=self._ended)
        found = [*alarms(loop), *of_monitors]
        is_wired = not any(a.severity == "warning" for a in found)
        found += spike_alarms(list(self.spikes))
        found += magnitude_alarms(
            list(self.rows),
            self.failure,
            is_wired=is_wired,
            is_summed=loop.is_lasting(self._history.streak("summed_losses")),
            clipping=self._history.clipping,
        )
        if not any(a.severity == "warning" for a in found):
            found += filter(None, [unrelated_labels(loop)])
        return tuple(sorted(found, key=lambda alarm: alarm.severity != "warning"))

    @property
    def verdict(self) -> Sentence:
        """One line: the codes of the warnings, or that there are none, and the steps measured."""
        found, read = ", ".join(self.alarms), self._history.samples
        if found:
            return sentence("told_watch_found", codes=found, steps=self.step)
        if not read:
            return sentence("told_watch_unread", steps=self.step)
        steps, running = self.step, int(self._hooks.is_active)
        if read < MIN_SAMPLES - 1:  # as many as a law needs
            every = self.every
            return sentence("told_watch_few", steps=steps, read=read, running=running, every=every)
        return sentence("told_watch_nothing", steps=steps, read=read, running=running)

    @property
    def alarms(self) -> dict[str, str]:
        """Warnings among the findings: sentences by code."""
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

    def _read(self) -> None:
        """Read this step and issue warnings."""
        pending, weight_writes = self._guard.pending, self._hooks.weight_writes
        others = {
            "losses": pending,
            "writes": [] if self._history.reset_since else weight_writes.fingerprints(),
            **self._monitors.tensors_to_read(),
        }
        loss = self._guard.loss if pending else None
        row, sample, values = self._sampler.read(
            self.step, self._hooks.batch, loss, others, self._hooks.written_after_step
        )
        self._monitors.update(values, sample)
        if row is not None:
            is_finite = row.pop("finite")
            self.rows.append(row)
            if not is_finite:
                self._fail()
        self._history.add(sample)
        reset_since = weight_writes.reset_since(values["writes"])
        self._history.reset_since = self._history.reset_since or reset_since
        gradient, backward_loss = (None, None) if row is None else (row["gradient"], row["loss"])
        self._guard.check(self.step, values["losses"], gradient, backward_loss)
        self._warn()

    def _warn(self) -> None:
        """Warn once per code, at the line of the loop; failures raise or are recorded."""
        for code, message in self.alarms.items():
            if code not in self._warned and self.failure is None:
                self._warned.add(code)
                warn(f"{code}: {message}")

    # failure

    def check(self, loss: Tensor) -> Tensor:
        """Check that a loss is finite before its backward pass; synchronises at every call."""
        if not bool(torch.isfinite(loss.detach()).all()):
            self._guard.loss = loss.detach()
            self._fail()
        return loss

    def _fail(self) -> None:
        step, kept = self._hooks.bad_step, self._sampler.step_tensors
        old = kept.value_before if kept is not None else lambda parameter: parameter
        what, where = find_first_nonfinite(self.model, self._hooks.calls, self._guard.loss, old)
        trail = ", ".join(f"{r['gradient']:.2g}" for r in list(self.rows)[-5:])
        faults = self._history.last.losses.faults if self._history.last is not None else ()
        message = sentence("told_nonfinite", step=step, what=what, where=where, trail=trail or "-")
        if faults:
            shown = ", ".join(sorted(faults))
            message = sentence("told_nonfinite_loss", told=message, faults=shown)
        self.failure = {"step": step, "what": what, "where": where, "message": message}
        self._save()
        if self.stop:
            raise NonFiniteError(message)

    def to_dict(self) -> dict[str, Any]:
        """Return the ring buffer, alarms and failure as plain values."""
        return finite(
            {
                "schema_version": 1,
                "kind": "watch",
                "step": self.step,
                "verdict": self.verdict.with_text(),
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
    """Watch a live loop: rules of a step, sizes of updates, the first non-finite number.

    Warns once, at the latest when the `with` block ends, and in `str`, of: gradients that are
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
        on_spike: what to do when loss and gradient norm rise far above the previous ones (robust
            z-scores). "warn" checks the losses passed to `loss`, and gradients of sampled steps;
            "skip" skips such a step; a function gets the `Spike` and may return "skip". The last
            two read loss and gradient norm in every step: one synchronisation.

    Raises:
        InputError: if `optimizer` is no optimizer, or a number is out of range.

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
