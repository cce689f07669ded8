"""One sampled step: hooks for the time before it, copies of the weights, and one stacked read."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.data.rows import tensors
from tikhon.diagnosis.observe import role_of
from tikhon.diagnosis.thresholds import VANISHED
from tikhon.monitoring import reading
from tikhon.monitoring.history import Sample, TensorReading
from tikhon.monitoring.reading import Kept
from tikhon.monitoring.sizes import Row
from tikhon.monitoring.window import Window, probes_of
from tikhon.regularizer.targets import local


@dataclass(frozen=True)
class SampledNumbers:
    """What one stacked read brought to the host; the squares are by tensor."""

    gradients: list[float]
    weights: list[float]
    moves: list[float]
    outside: list[float]
    signals: list[float]
    loss: float
    scale: float | None
    apart: float
    beside: list[float]  # what no other process has: flags, fingerprints, norms, told losses

    @property
    def ratio(self) -> float | None:
        """The signal at the first layer over that at the last; None where there is none."""
        ends = self.signals
        return ends[0] / ends[-1] if ends and ends[-1] else None


class Sampler:
    """Hooks from the end of one step to the end of the next, and what they read."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, scaler: Any) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.sharded = any(hasattr(p, "to_local") for p in model.parameters())
        self.kept: Kept | None = None
        self._layers = [(n, m) for n, m in model.named_modules() if role_of(m) is not None]
        self._signals: dict[str, Tensor] = {}
        self._order: dict[str, None] = {}  # layers as the forward pass calls them
        self._taps: list[RemovableHandle] = []
        self._window: Window | None = None
        self._earlier: dict[int, Tensor] = {}  # rows at the end of the step before
        self._batch: tuple[list[Tensor], Any] | None = None  # of the step before

    def listen(self, batch: object, *, first: bool = False) -> None:
        """Hook the outputs of the layers and some tensors for the coming step."""
        for name, module in self._layers:
            self._taps.append(module.register_forward_hook(self._tap(name)))
        self._window = Window(probes_of(self.model, self.optimizer))
        self._order.clear()
        self._signals.clear()
        self._earlier = {} if first else reading.copies(self.optimizer)
        handed = next(iter(tensors(batch)), None)
        self._batch = None
        if handed is not None:
            self._batch = (reading.fingerprint(batch), weakref.ref(handed))

    @property
    def listening(self) -> bool:
        """Whether the coming step is a sampled one."""
        return self._window is not None

    def forward(self, module: nn.Module) -> None:
        """The model was called, with a graph."""
        if self._window is not None:
            self._window.forward(module)

    def look(self) -> None:
        """Keep the gradients and copies of the weights before the optimizer moves them."""
        if self.listening and self.kept is None:
            self.kept = reading.keep(self.optimizer)

    def close(self) -> None:
        """Take the hooks off and let the copies go."""
        for tap in self._taps:
            tap.remove()
        self._taps.clear()
        if self._window is not None:
            self._window.close()
        self._window, self.kept, self._earlier, self._batch = None, None, {}, None

    def _tap(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            for part in tensors(output)[:1]:
                if part.requires_grad and not torch.compiler.is_compiling():
                    self._order.setdefault(name)
                    part.register_hook(lambda grad: self._collect(name, grad))

        return hook

    def _collect(self, name: str, grad: Tensor) -> None:
        # of a whole sample: a mean over pixels or steps makes each of their shares small
        size = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32).square()
        # accumulated micro-batches add up
        self._signals[name] = self._signals[name] + size if name in self._signals else size

    def read(
        self, step: int, batch: Any, loss: Tensor | None, more: Sequence[Tensor]
    ) -> tuple[Row | None, Sample, list[float]]:
        """The row of this step if anything had a gradient, what it showed, what `more` held."""
        assert self._window is not None
        assert self.kept is not None
        still = reading.stuck(self.kept)
        others = reading.trainable_elsewhere(self.model, self.optimizer)
        own = [p for p in self.model.parameters() if p.requires_grad][:1]
        prints = self._batch[0] if self._batch is not None else [torch.tensor(torch.nan)] * 2
        beside = [
            *self._window.flags(),
            *prints,
            *reading.fingerprint(batch),
            *reading.norms([*own, *others.values()]),
            *still.values(),
            *more,
        ]
        numbers = self._numbers(self.kept, loss, beside)
        row = _row(step, numbers, self.kept, loss is not None) if self.kept.gradients else None
        tail = numbers.beside[6 + len(own) :]
        strangers = dict(zip(others, tail))
        shares = dict(zip(still, tail[len(others) :]))
        sample = self._sample(step, batch, numbers, strangers, shares, bool(own))
        return row, sample, tail[len(others) + len(still) :]

    def _numbers(self, kept: Kept, loss: Tensor | None, beside: list[Tensor]) -> SampledNumbers:
        """Everything in one read; with several processes one all-reduce before it."""
        count = len(kept.gradients)
        device = kept.gradients[0].device if count else beside[0].device
        size = loss if loss is not None else torch.tensor(math.nan)
        last = (
            [size]
            if self.scaler is None
            else [size, self.scaler.scale(torch.ones(1, device=device)).reshape(())]
        )
        signals = [self._signals[n] for n in self._order if n in self._signals]
        flat = _stacked([*signals, *last], device)
        if count:
            flat = torch.cat([reading.squares(kept, self._earlier), flat])
            mean = reading.reduced(flat, 4 * count, self.sharded)
        else:
            mean = flat
        apart = (flat - mean)[count : 2 * count].abs().sum() / mean[count : 2 * count].sum()
        values = torch.cat([mean, apart.reshape(1), _stacked(beside, device)]).tolist()
        parts = [values[k * count : (k + 1) * count] for k in range(4)]
        rest = values[4 * count :]
        scale = rest.pop(len(signals) + 1) if self.scaler is not None else None
        cut = len(signals)
        return SampledNumbers(
            *parts,
            signals=[math.sqrt(v) for v in rest[:cut]],
            loss=rest[cut],
            scale=scale,
            apart=0.0 if self.sharded or not count else rest[cut + 1] / 2,
            beside=rest[cut + 2 :],
        )

    def _sample(
        self,
        step: int,
        batch: object,
        numbers: SampledNumbers,
        strangers: dict[str, float],
        stuck: dict[int, float],
        owned: bool,
    ) -> Sample:
        window, kept, ratio = self._window, self.kept, numbers.ratio
        assert window is not None
        assert kept is not None
        held = [p for g in self.optimizer.param_groups for p in g["params"]]
        known = {id(p) for p in self.model.parameters()}
        shared = len({id(p) for p in held} & known)
        repeated, handed = self._compared(batch, numbers.beside[2:6])
        names = reading.named(self.model, self.optimizer)
        twice = (
            [names[id(p)] for k, p in enumerate(held) if any(p is q for q in held[:k])]
            if (len({id(p) for p in held}) < len(held))
            else []
        )
        return Sample(
            step=step,
            forwards=window.forwards,
            backwards=window.backwards,
            unfinished=window.unfinished,
            training=window.training,
            stale=numbers.beside[0] > 0,
            arrived=numbers.beside[1] > 0,
            reached={owner: window.reached(owner) for owner in ("optimizer", "model")},
            listening=not self.sharded,
            tapped=bool(self._order),
            signal=any(numbers.signals),
            faded=ratio is not None and ratio < VANISHED,
            rates=tuple(
                float(g["lr"]) for g in self.optimizer.param_groups if g.get("lr") is not None
            ),
            tensors=self._tensors(numbers, names, known, stuck),
            held=len(held),
            shared=shared,
            doubled=tuple(twice),
            strangers=strangers,
            own=numbers.beside[6] if owned and not shared else None,
            repeated=repeated,
            handed=handed,
            apart=numbers.apart,
        )

    def _tensors(
        self,
        numbers: SampledNumbers,
        names: Mapping[int, str],
        known: set[int],
        stuck: Mapping[int, float],
    ) -> dict[str, TensorReading]:
        """Readings by name; those without a gradient have None."""
        assert self.kept is not None
        place = {id(p): k for k, p in enumerate(self.kept.parameters)}
        found = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                k = place.get(id(p))
                if k is None and not p.requires_grad:
                    continue
                squares = (numbers.gradients, numbers.weights, numbers.moves, numbers.outside)
                sizes = [math.sqrt(part[k]) for part in squares] if k is not None else [0.0] * 4
                found[names[id(p)]] = TensorReading(
                    sizes[0] if k is not None else None,
                    *sizes[1:],
                    rate=float(group.get("lr", 1.0)),
                    whole=k is not None and self.kept.before[k].numel() == p.numel(),
                    kind=str(p.dtype).removeprefix("torch."),
                    vector=p.ndim < 2,
                    foreign=id(p) not in known,
                    stuck=stuck.get(id(p), 0.0),
                )
        return found

    def _compared(self, batch: object, prints: list[float]) -> tuple[bool, bool]:
        """Whether the batch of the step before came again, and whether in the same tensor."""
        first = next(iter(tensors(batch)), None)
        if self._batch is None or first is None or prints[:2] != prints[2:]:
            return False, False
        base = first._base
        whole = base is not None and base.shape[:1] == first.shape[:1]
        return True, self._batch[1]() is first or whole


def _stacked(values: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([v.detach().float().reshape(1).to(device) for v in values])


def _row(step: int, numbers: SampledNumbers, kept: Kept, told: bool) -> Row:
    """One row of sizes: of gradients, weights and updates, the signal, the loss and its scale."""
    shares = [
        local(p).numel() / max(1, old.numel()) for p, old in zip(kept.parameters, kept.before)
    ]
    ratios = sorted(
        math.sqrt(m / w)
        for m, w in zip(numbers.moves, numbers.weights)
        if w > 0 and math.isfinite(m)
    )
    return {
        "step": step,
        "loss": numbers.loss if told else None,
        "gradient": math.sqrt(sum(numbers.gradients)),  # fused optimizers unscale them in place
        "weight": math.sqrt(sum(w * share for w, share in zip(numbers.weights, shares))),
        "update": ratios[len(ratios) // 2] if ratios else None,
        "signal_ratio": numbers.ratio,
        "scale": numbers.scale,
        "finite": all(math.isfinite(v) for v in (*numbers.gradients, *numbers.moves))
        and not (told and not math.isfinite(numbers.loss)),
    }
