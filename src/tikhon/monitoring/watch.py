"""`watch`: the same questions in a live loop, cheaply: sampled steps, one stacked read each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.data.rows import tensors
from tikhon.diagnosis.evidence import EXPLODED, SLOW_UPDATE, VANISHED
from tikhon.diagnosis.observe import role_of
from tikhon.diagnosis.record import finite
from tikhon.errors import InputError
from tikhon.monitoring.first_bad import Call, first_bad
from tikhon.regularizer.plan import closure_of
from tikhon.regularizer.targets import local
from tikhon.runs.files import write_json
from tikhon.wrappers import unwrap

MOVED_SCALE = 2.0**10  # a loss scale that moved that far from its start (convention)
SAMPLE = 2**14  # entries of a tensor from which its update is read, about


class NonFiniteError(ArithmeticError):
    """A number is not finite any more; the message names the first bad tensor and the step."""


class Watch:
    """Hooks on an optimizer and a model; a context manager. Use `tikhon.watch` to make one.

    Every `every` steps the norms of all gradients, weights and updates (of large tensors, of some
    rows) are read in one go, and tensor hooks on the outputs of the layers read the backward
    signal. On every step one small gradient of the first layer is looked at: whatever goes wrong
    on the way there or back ends in it. `rows` holds what was read, newest last.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, every: int, keep: int, output: Path | None,
        stop: bool, scaler: Any = None,
    ) -> None:  # fmt: skip
        self.model, self.optimizer = unwrap(model), optimizer
        self.every, self.output, self.stop = every, output, stop
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.step = 0
        self.rows: deque[dict[str, Any]] = deque(maxlen=keep)
        self.failure: dict[str, Any] | None = None
        self._inner = _unwrap_optimizer(optimizer)
        self._layers = [(n, m) for n, m in self.model.named_modules() if role_of(m) is not None]
        self._signals: dict[str, Tensor] = {}
        self._order: dict[str, None] = {}  # layers as the forward pass calls them
        self._taps: list[Any] = []
        self._before: list[Tensor] | None = None  # of large tensors, some rows
        self._loss: Tensor | None = None
        self._calls: list[Call] = []  # what this step's forward began with
        self._canary = _canary(self.model)
        self._sharded = any(hasattr(p, "to_local") for p in self.model.parameters())
        self._latch: Tensor | None = None
        self._handles = [
            self.model.register_forward_pre_hook(self._remember, with_kwargs=True),
            self._inner.register_step_pre_hook(self._before_step),
            self._inner.register_step_post_hook(self._after_step),
        ]
        self._listen()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take all hooks off; what was read stays, and goes to the run folder."""
        for handle in [*self._handles, *self._taps]:
            handle.remove()
        self._handles, self._taps = [], []
        self._save()

    def loss(self, value: Tensor) -> Tensor:
        """Optional: tell the watch the loss of this step; it is read on sampled steps only."""
        self._loss = value.detach()
        return value

    @property
    def alarms(self) -> dict[str, str]:
        """Codes that the last readings call for, each with its numbers in words."""
        found: dict[str, str] = {}
        recent = [r for r in self.rows][-3:]
        if self.failure is not None:
            found["exploding_gradient"] = self.failure["message"]
        ratios = [r["signal_ratio"] for r in recent if r.get("signal_ratio") is not None]
        if len(ratios) >= 2 and max(ratios) < VANISHED:
            found["vanishing_gradient"] = f"signal of the first / last layer {ratios[-1]:.0e}"
        if len(ratios) >= 2 and min(ratios) > EXPLODED:
            found.setdefault("exploding_gradient", f"signal ratio {ratios[-1]:.0e}")
        updates = [r["update"] for r in recent if r.get("update") is not None]
        if len(updates) >= 2 and max(updates) < SLOW_UPDATE:
            found["slow_convergence"] = (
                f"a step moves the weights by {updates[-1]:.0e} of their size"
            )
        return found | self._scale_alarms()

    def _scale_alarms(self) -> dict[str, str]:
        """A loss scale far below its start says overflow, far above it underflow."""
        scales = [r["scale"] for r in self.rows if r.get("scale") is not None]
        if len(scales) < 2 or MOVED_SCALE > scales[-1] / scales[0] > 1 / MOVED_SCALE:
            return {}
        way = "fell" if scales[-1] < scales[0] else "grew"
        cause = "gradients overflow at every larger one" if way == "fell" else "gradients are tiny"
        return {
            "unstable_loss_scale": f"it {way} from {scales[0]:.2g} to {scales[-1]:.2g}: {cause}"
        }

    def __str__(self) -> str:
        if not self.rows:
            return f"tikhon watch: step {self.step}, nothing read yet (every {self.every} steps)"
        last = self.rows[-1]
        shown = [f"{k} {v:.2g}" for k, v in last.items() if isinstance(v, float) and k != "step"]
        lines = [f"tikhon watch: step {last['step']}, {', '.join(shown)}"]
        lines += [f" {code}: {text}" for code, text in self.alarms.items()]
        return "\n".join(lines)

    # sampled steps

    def _listen(self) -> None:
        """Tap the outputs of the layers for the coming step; taps come off after it."""
        for name, module in self._layers:
            self._taps.append(module.register_forward_hook(self._tap(name)))

    def _tap(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._order.setdefault(name)
            for part in tensors(output)[:1]:
                if part.requires_grad and not torch.compiler.is_compiling():
                    part.register_hook(lambda grad: self._hear(name, grad))

        return hook

    def _hear(self, name: str, grad: Tensor) -> None:
        norm = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)
        size = norm.square() / grad.numel()
        # accumulated micro-batches add up
        self._signals[name] = self._signals[name] + size if name in self._signals else size

    def _remember(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self.model or any(module is called for called, _, _ in self._calls):
            self._calls = []
        self._calls.append((module, args, kwargs))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = closure_of(args, kwargs)
        if closure is None:
            self._look()
            return None
        return (args[0], self._looking(closure)), {}

    def _looking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with a look at its gradients: LBFGS and Lightning go backward inside."""

        def evaluate() -> Any:
            loss = closure()
            self._look()
            return loss

        return evaluate

    def _look(self) -> None:
        """At the canary, and at the weights before the optimizer moves them."""
        grad = self._canary.grad if self._canary is not None else None
        if grad is not None and not _skipped(self._inner):
            self._sing(local(grad) if self._sharded else grad)
        if self.step % self.every == 0 and self._before is None:
            self._before = [_rows(p).clone() for p in self._parameters()]

    def _sing(self, canary: Tensor) -> None:
        """Read the canary at once on a CPU; elsewhere latch it until the next reading."""
        if canary.is_cpu:
            if not math.isfinite(canary.sum().item()):
                self._fail()
            return
        bad = ~torch.isfinite(canary.sum())
        now = torch.where(bad, self.step, torch.inf)
        self._latch = now if self._latch is None else torch.minimum(self._latch, now)

    def _parameters(self) -> list[Tensor]:
        groups = self._inner.param_groups
        return [p for g in groups for p in g["params"] if p.grad is not None]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._before is not None:
            self._read(self._before)
            self._before = None
        self.step += 1
        if self.step == 1 and not self._calls:  # the loop calls parts, as Lightning modules do
            self._handles += [
                part.register_forward_pre_hook(self._remember, with_kwargs=True)
                for part in self.model.children()
            ]
        for tap in self._taps:
            tap.remove()
        self._taps.clear()
        self._signals.clear()
        if self.step % self.every == 0:
            self._listen()

    def _read(self, before: list[Tensor]) -> None:
        """Stack every number of this step and read them with one synchronisation."""
        if _skipped(self._inner):
            return
        parameters = self._parameters()
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        now = [_rows(p) for p in parameters]
        if not grads:
            return
        moved = torch._foreach_sub(now, before)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
        norms = [norm(part) for part in (grads, before, moved)]
        heard = [name for name in self._order if name in self._signals]
        device = norms[0][0].device
        loss = self._loss if self._loss is not None else torch.tensor(math.nan)
        stack = [
            torch.stack([n.float() for group in norms for n in group]),
            *[self._signals[name].reshape(1).to(device) for name in heard],
            loss.float().reshape(1).to(device),
        ]
        if self.scaler is not None:
            stack.append(self.scaler.scale(torch.ones(1, device=device)))
        flat = torch.cat([stack[0].square(), *stack[1:]])
        values = _reduce(flat, 3 * len(grads), self._sharded).tolist()
        shares = [local(p).numel() / max(1, part.numel()) for p, part in zip(parameters, now)]
        self._keep(values, shares)

    def _keep(self, values: list[float], shares: list[float]) -> None:
        """One row: squares of gradients, weights and moves, then signals, loss and loss scale."""
        loss_scale, count = values.pop() if self.scaler is not None else None, len(shares)
        grads, weights, moves = (values[i * count : (i + 1) * count] for i in range(3))
        signals = [math.sqrt(v) for v in values[3 * count : -1]]
        ratios = sorted(
            math.sqrt(m / w) for m, w in zip(moves, weights) if w > 0 and math.isfinite(m)
        )
        row: dict[str, Any] = {
            "step": self.step,
            "loss": values[-1] if self._loss is not None else None,
            "gradient": math.sqrt(sum(grads)),  # fused optimizers unscale them in place
            "weight": math.sqrt(sum(w * share for w, share in zip(weights, shares))),
            "update": ratios[len(ratios) // 2] if ratios else None,
            "signal_ratio": signals[0] / signals[-1] if signals and signals[-1] else None,
            "scale": loss_scale,
        }
        self.rows.append(row)
        if not all(math.isfinite(v) for v in (*grads, *moves)) or (
            self._loss is not None and not math.isfinite(values[-1])
        ):
            self._fail()

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
        """What was kept of it from before this step: a bad gradient makes it bad after."""
        for kept, current in zip(self._before or (), self._parameters()):
            if current is parameter:
                return kept
        return parameter

    def to_dict(self) -> dict[str, Any]:
        """The ring buffer, alarms and failure as plain values."""
        return finite(
            {
                "schema_version": 1,
                "kind": "watch",
                "step": self.step,
                "rows": list(self.rows),
                "alarms": self.alarms,
                "failure": self.failure,
            }
        )

    def _save(self) -> None:
        if self.output is None:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / "watch.json", self.to_dict())


def _unwrap_optimizer(optimizer: Any) -> Optimizer:
    while not isinstance(optimizer, Optimizer) or not hasattr(
        optimizer, "_optimizer_step_pre_hooks"
    ):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise InputError(f"not a torch optimizer: {type(optimizer).__name__}")
        optimizer = inner
    return optimizer


def _rows(parameter: Tensor) -> Tensor:
    """The local part; of a large one, evenly spaced rows."""
    own = local(parameter)
    return own[:: own.numel() // SAMPLE + 1] if own.numel() > SAMPLE else own


def _canary(model: nn.Module) -> Tensor | None:
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


def _reduce(flat: Tensor, squares: int, sharded: bool) -> Tensor:
    """One all-reduce: squares of shards add up, copies and what batches read are averaged."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not together or torch.distributed.get_world_size() == 1:
        return flat
    torch.distributed.all_reduce(flat)
    mean = flat / torch.distributed.get_world_size()
    return torch.cat([flat[:squares], mean[squares:]]) if sharded else mean


def watch(
    model: nn.Module,
    optimizer: Any,
    *,
    every: int = 50,
    keep: int = 200,
    output: str | Path | None = None,
    stop: bool = True,
    scaler: Any = None,
) -> Watch:
    """Watch a live loop: signal, gradient and update sizes, and the first non-finite number.

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
    return Watch(model, optimizer, every, keep, Path(output) if output else None, stop, scaler)
