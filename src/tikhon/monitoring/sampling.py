"""One sampled step: hooks for the time before it, copies of the weights, and one stacked read."""

from __future__ import annotations

import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.data.nested import stored_values, tensors
from tikhon.diagnosis.observe import role_of
from tikhon.diagnosis.thresholds import VANISHED
from tikhon.monitoring import reading
from tikhon.monitoring.history import SUMMED, Sample, TensorReading
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.reading import Kept
from tikhon.monitoring.roots import Roots
from tikhon.monitoring.sizes import Row
from tikhon.monitoring.window import Window, probes_of
from tikhon.regularizer.targets import local

PRINTS = 8  # batches of a step whose fingerprints are taken
GRAPHS = 20  # sampled steps whose graphs are followed


class Flags(NamedTuple):
    """Numbers of every reading that stand before those of single tensors; yes is above zero."""

    stale: float
    arrived: float
    joined: float
    last_joined: float
    mixed: float
    old_print: float  # the fingerprint of the batch of the step before, two numbers
    old_print_2: float
    print: float  # and of the batch of this one
    print_2: float
    factor: float
    late: float


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
    flags: Flags  # what no other process has
    beside: list[float]  # the same of single tensors: norms, fingerprints, told losses

    @property
    def ratio(self) -> float | None:
        """The signal at the first layer over that at the last; None where there is none."""
        ends = self.signals
        return ends[0] / ends[-1] if ends and ends[-1] else None


class Handed(NamedTuple):
    """A tensor that a model was given: the object, and the memory that torch did not allocate."""

    tensor: weakref.ref[Tensor]
    outside: int | None  # of a NumPy array

    @classmethod
    def of(cls, tensor: Tensor) -> Handed:
        """Remembers without keeping."""
        return cls(weakref.ref(tensor), _outside(tensor))

    def again(self, tensor: Tensor) -> bool:
        """Whether it is the same object, or the same array wrapped anew."""
        where = self.outside
        return self.tensor() is tensor or (where is not None and where == _outside(tensor))


class Sampler:
    """Hooks from the end of one step to the end of the next, and what they read.

    The first step listens to every layer, later ones to the first and the last that were called.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scaler: Any) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.sharded = any(hasattr(p, "to_local") for p in model.parameters())
        self.found: Any = None  # a scaler that the loop holds, where none was given
        self.kept: Kept | None = None
        self.roots = Roots()
        self._modules = list(model.named_modules())
        self._layers = {n: m for n, m in self._modules if role_of(m) is not None}
        self._ends: list[str] = []  # the first and the last layer, once they are known
        self._order: dict[str, Tensor | None] = {}  # signals of layers, as they are called
        self._prints: list[Tensor] = []  # fingerprints of the model's batches in this step
        self._printed: object = None  # the keyword arguments of the last: each call has its own
        self._newest: weakref.ref[Any] | None = None  # of this step's graph
        self._graphs: deque[weakref.ref[Any]] = deque(maxlen=GRAPHS)  # of steps before
        self._taps: list[RemovableHandle] = []
        self._window: Window | None = None
        self._earlier: dict[int, Tensor] = {}  # rows at the end of the step before
        self._batch: tuple[Tensor, list[Handed]] | None = None  # of the step before

    def listen(self, batch: object, *, first: bool = False) -> None:
        """Hook the outputs of the layers and some tensors for the coming step."""
        for name in self._ends or self._layers:
            self._taps.append(self._layers[name].register_forward_hook(Hook(self._tap(name))))
        self.roots.open()
        self._window = Window(probes_of(self.model, self.optimizer), self.optimizer)
        self._order, self._prints = {}, []
        self._earlier = {} if first else reading.copies(self.optimizer)
        handed = [Handed.of(t) for t in tensors(batch)]
        self._batch = (reading.fingerprint(batch), handed) if handed else None

    def forward(self, module: nn.Module, inputs: Sequence[object]) -> None:
        """The model was called, with a graph."""
        if self._window is not None:
            self._window.forward(module)
            if len(self._prints) < PRINTS:
                self._prints.append(reading.fingerprint(inputs))
                self._printed = inputs[1]
            attacked = any(t.requires_grad and t.is_leaf for t in tensors(inputs))
            self._window.attacked = self._window.attacked or attacked

    def evaluation(self) -> None:
        """The optimizer evaluates its closure."""
        if self._window is not None:
            self._window.evaluation()

    def look(self) -> None:
        """Keep the gradients and copies of the weights before the optimizer moves them."""
        if self._window is not None and self.kept is None:
            self.kept = reading.keep(self.optimizer)

    def close(self) -> None:
        """Take the hooks off and let the copies go."""
        if self._window is None:
            return
        for tap in self._taps:
            tap.remove()
        self._taps.clear()
        self.roots.close()
        self._window.close()
        self._window, self.kept, self._earlier, self._batch = None, None, {}, None
        self._printed = None

    def _tap(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            for part in tensors(output)[:1]:
                if part.requires_grad and not torch.compiler.is_compiling():
                    self._order.setdefault(name)
                    collect = partial(self._collect, name)
                    part.register_hook(collect)
                    self._newest = weakref.ref(collect)  # lives as long as the graph

        return hook

    def _collect(self, name: str, grad: Tensor) -> None:
        # of a whole sample: a mean over pixels or steps makes each of their shares small
        size = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32).square()
        if name in self._order:  # accumulated micro-batches add up
            before = self._order[name]
            self._order[name] = size if before is None else before + size

    @torch.no_grad()
    def read(
        self,
        step: int,
        batch: list[Any],
        loss: Tensor | None,
        more: Sequence[Tensor],
        late: Tensor | None = None,
    ) -> tuple[Row | None, Sample, list[float]]:
        """The row of this step if anything had a gradient, what it showed, what `more` held."""
        assert self._window is not None
        assert self.kept is not None
        own = dict(self.model.named_parameters())
        still = reading.stuck(self.kept)
        others = reading.elsewhere(own, self.optimizer)
        first = [p for p in own.values() if p.requires_grad][:1]
        place = {id(p): k for k, p in enumerate(self.kept.parameters)}
        left = {place[key]: norm for key, norm in self._window.norms.items() if key in place}
        known = bool(batch) and batch[0][1] is self._printed
        beside = [
            *self._window.flags(),
            self._batch[0] if self._batch is not None else torch.full((2,), torch.nan),
            self._prints[-1] if known else reading.fingerprint(batch),
            self.roots.factor if self.roots.factor is not None else torch.ones(()),
            late if late is not None else torch.zeros(()),
            *reading.norms([*first, *others.values()]),
            *still.values(),
            *left.values(),
            *self._prints,
            *more,
        ]
        signals = self._signals()
        heard = None if loss is not None else self._heard()
        numbers = self._numbers(self.kept, loss if loss is not None else heard, signals, beside)
        row = _row(step, numbers, self.kept, loss is not None) if self.kept.gradients else None
        if row is not None and heard is not None and math.isfinite(numbers.loss):
            row["loss"] = numbers.loss / (numbers.scale or 1.0)  # scaled ones may overflow
        tail = iter(numbers.beside[len(first) :])
        strangers = dict(zip(others, tail))
        shares = {key: next(tail) for key in still}
        norms = {k: next(tail) for k in left}
        prints = [(next(tail), next(tail)) for _ in self._prints]
        shrunk = [n / math.sqrt(g) for k, n in norms.items() if (g := numbers.gradients[k]) > 0]
        sample = replace(
            self._sample(step, batch, numbers, own, shares),
            strangers=strangers,
            shrunk=min(shrunk, default=None),
            graphs=sum(ref() is not None for ref in self._graphs),
            prints=((numbers.flags.print, numbers.flags.print_2), *prints),
        )
        if self._newest is not None:
            self._graphs.append(self._newest)
        return row, sample, list(tail)

    def _heard(self) -> Tensor | None:
        """The losses that went backward: their sum, or the mean of micro-batches."""
        values = self.roots.values
        if not values:
            return None
        total = torch.stack([v.float().to(values[0].device) for v in values]).sum()
        return total / len(values) if self.roots.equal and len(values) >= SUMMED else total

    def _signals(self) -> list[Tensor]:
        """Those of the layers as they were called; the next step listens to the ends of them."""
        heard = {name: size for name, size in self._order.items() if size is not None}
        known, self._ends = self._ends, []
        if known and len(heard) < len(known):  # this step went another way: nothing is known
            self._order = {}
            return []
        if len(heard) > 1:
            names = list(heard)
            self._ends = [names[0], names[-1]]
        return list(heard.values())

    def _numbers(
        self, kept: Kept, loss: Tensor | None, signals: list[Tensor], beside: list[Tensor]
    ) -> SampledNumbers:
        """Everything in one read; with several processes one all-reduce before it."""
        count, cut = len(kept.gradients), len(signals)
        device = kept.gradients[0].device if count else beside[0].device
        size = loss if loss is not None else torch.tensor(math.nan)
        scale = self._scale(device)
        flat = mean = _stacked([*signals, size, *([] if scale is None else [scale])], device)
        if count:
            flat = torch.cat([reading.squares(kept, self._earlier), flat])
            mean = reading.reduced(flat, 4 * count, self.sharded)
        apart = (flat - mean)[count : 2 * count].abs().sum() / mean[count : 2 * count].sum()
        values = torch.cat([mean, apart.reshape(1), _stacked(beside, device)]).tolist()
        parts = [values[k * count : (k + 1) * count] for k in range(4)]
        rest = values[4 * count :]
        read = rest.pop(cut + 1) if scale is not None else None
        end = cut + 2 + len(Flags._fields)
        return SampledNumbers(
            *parts,
            signals=[math.sqrt(v) for v in rest[:cut]],
            loss=rest[cut],
            scale=read,
            apart=0.0 if self.sharded or not count else rest[cut + 1] / 2,
            flags=Flags(*rest[cut + 2 : end]),
            beside=rest[end:],
        )

    def _scale(self, device: torch.device) -> Tensor | None:
        """The loss scale; of a scaler that was found, only where it is used."""
        if self.scaler is not None:
            return self.scaler.scale(torch.ones(1, device=device)).reshape(())
        known = getattr(self.found, "_scale", None)
        return known if isinstance(known, Tensor) else None

    def _sample(
        self,
        step: int,
        batch: list[Any],
        numbers: SampledNumbers,
        own: Mapping[str, Tensor],
        stuck: Mapping[int, float],
    ) -> Sample:
        window, ratio, flags = self._window, numbers.ratio, numbers.flags
        assert window is not None
        held = [id(p) for g in self.optimizer.param_groups for p in g["params"]]
        known = {id(p) for p in own.values()}
        shared = len(known.intersection(held))
        names = reading.named(own, self.optimizer)
        repeated, handed = self._compared(batch, flags)
        trained = any(p.requires_grad for p in own.values())
        return Sample(
            step=step,
            forwards=window.forwards,
            backwards=window.backwards,
            unfinished=window.unfinished,
            training=window.training,
            stale=flags.stale > 0,
            arrived=flags.arrived > 0,
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
            doubled=tuple(names[key] for key, count in Counter(held).items() if count > 1),
            strangers={},
            own=numbers.beside[0] if trained and not shared else None,
            repeated=repeated,
            handed=handed,
            apart=numbers.apart,
            factor=flags.factor,
            scale=numbers.scale,
            equal=self.roots.equal and len(self.roots.values) == window.backwards,
            joined=flags.joined > 0,
            last_joined=flags.last_joined > 0,
            mixed=flags.mixed > 0,
            share=self.roots.share,
            evaluations=window.evaluations,
            attacked=window.attacked,
            late=flags.late > 0,
            called_frozen=self._called_frozen(),
            rows=_rows(batch),
        )

    def _called_frozen(self) -> tuple[str, ...]:
        """Modules whose attribute says that they are frozen, with tensors that have gradients."""
        return tuple(
            name
            for name, module in self._modules
            if module.__dict__.get("requires_grad") is False
            and any(p.requires_grad and p.grad is not None for p in module.parameters())
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
                    frozen=not p.requires_grad,
                )
        return found

    def _compared(self, batch: object, flags: Flags) -> tuple[bool, bool]:
        """Whether the batch of the step before came again, and whether in the same tensors.

        Tensors of one value (the first state of a recurrent net) may be made anew.
        """
        old, now = (flags.old_print, flags.old_print_2), (flags.print, flags.print_2)
        if self._batch is None or old != now or not any(now):
            return False, False
        rows = max(1, self._window.forwards if self._window is not None else 1) * _rows(batch)
        new = [
            t
            for t in tensors(batch)
            if not (any(part.again(t) for part in self._batch[1]) or _whole(t, rows))
        ]
        return True, len(new) < len(self._batch[1]) and all(_uniform(t) for t in new)


def _outside(tensor: Tensor) -> int | None:
    """The address of memory that torch did not allocate, such as a NumPy array's."""
    plain = (
        type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided
    )
    if not plain or tensor.untyped_storage().resizable():
        return None
    return tensor.data_ptr()


def _whole(tensor: Tensor, rows: int) -> bool:
    """Whether it is a view of a tensor with no more rows than a step sees."""
    base = tensor._base
    return base is not None and base.ndim > 0 and len(base) <= rows


def _uniform(tensor: Tensor) -> bool:
    values = stored_values(local(tensor)).reshape(-1)
    return bool((values == values[:1]).all())


def _rows(batch: object) -> int:
    first = next(iter(tensors(batch)), None)
    return len(first) if first is not None and first.ndim else 1


def _stacked(values: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([v.float().reshape(-1).to(device) for v in values])


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
