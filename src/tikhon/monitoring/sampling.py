"""One sampled step: hooks for the time before it, copies of the weights, and one stacked read."""

from __future__ import annotations

import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.data.nested import stored_values, tensors
from tikhon.diagnosis.observe import CELLS, role_of
from tikhon.diagnosis.thresholds import VANISHED
from tikhon.monitoring import tensor_readings
from tikhon.monitoring.backward_calls import BackwardCalls
from tikhon.monitoring.history import MIN_SUMMED_PASSES, Sample, TensorReading
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.magnitudes import Row
from tikhon.monitoring.passes import PassRecorder, choose_probes
from tikhon.monitoring.tensor_readings import StepTensors
from tikhon.regularizer.targets import local

MAX_FINGERPRINTS = 8  # batches of a step whose fingerprints are taken
MIN_UNUSED = 4  # passes of a step, of which the loss takes a quarter or less
MAX_GRAPHS = 20  # sampled steps whose graphs are followed

NORMS = ("gradients", "weights", "updates", "changes")  # squared, one a tensor
Values = Mapping[str, list[float]]  # what one stacked read brought to the host, by name


class BatchTensor(NamedTuple):
    """A tensor that a model was given: the object, and the memory that torch did not allocate."""

    tensor: weakref.ref[Tensor]
    address: int | None  # of a NumPy array

    @classmethod
    def of(cls, tensor: Tensor) -> BatchTensor:
        """Remembers without keeping."""
        return cls(weakref.ref(tensor), _foreign_address(tensor))

    def is_same(self, tensor: Tensor) -> bool:
        """Whether it is the same object, or the same array in a new tensor."""
        address = self.address
        return self.tensor() is tensor or (
            address is not None and address == _foreign_address(tensor)
        )


class Sampler:
    """Hooks from the end of one step to the end of the next, and what they read.

    The first step listens to every layer, later ones to the first and the last that were called.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scaler: Any) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.is_sharded = any(hasattr(p, "to_local") for p in model.parameters())
        self.found_scaler: Any = None  # one that the loop holds, where none was given
        self.step_tensors: StepTensors | None = None  # of a sampled step, while it is made
        self.backward_calls = BackwardCalls()
        self._modules = list(model.named_modules())
        self._cells = [m for _, m in self._modules if isinstance(m, CELLS)]
        self._states: dict[int, Tensor] = {}  # of the cells as they left them, by identity
        self._state_calls = Counter[bool]()  # that went on from such a state, by its graph
        self._layers = {n: m for n, m in self._modules if role_of(m) is not None}
        self._ends: list[str] = []  # the first and the last layer, once they are known
        self._signals: dict[str, Tensor | None] = {}  # of layers, in the order of their calls
        self._outputs = Counter[str]()  # of layers in this step
        self._received = Counter[str]()  # those that got a gradient
        self.trained_inputs: set[int] = set()  # leaves that the model was given, by identity
        self._base: tuple[weakref.ref[Tensor], int] | None = None  # of a batch, and its version
        self._is_rewritten = False  # it was written to since the last sampled step
        self._spreads: list[Tensor] = []  # of the entries of this step's batch
        self._rows: set[int] = set()  # of the model's batches in this step
        self._fingerprints: list[Tensor] = []  # of the model's batches in this step
        self._last_kwargs: object = None  # of the last of these: each call has its own
        self._graph: weakref.ref[Any] | None = None  # of this step
        self._graphs: deque[weakref.ref[Any]] = deque(maxlen=MAX_GRAPHS)  # of earlier ones
        self._output_hooks: list[RemovableHandle] = []
        self._recorder: PassRecorder | None = None
        self._earlier: dict[int, Tensor] = {}  # rows at the end of the step before
        self._last_batch: tuple[Tensor, list[BatchTensor]] | None = None  # of the step before

    def begin(self, batch: object, *, first: bool = False) -> None:
        """Hook the outputs of the layers and some tensors for the coming step."""
        for name in self._ends or self._layers:
            hook = Hook(self._output_hook(name))
            self._output_hooks.append(self._layers[name].register_forward_hook(hook))
        for cell in self._cells:
            self._output_hooks.append(cell.register_forward_hook(Hook(self._follow_state)))
        self._states, self._state_calls = {}, Counter()
        self.backward_calls.start(self.optimizer)
        probes = choose_probes(self.model, self.optimizer)
        self._recorder = PassRecorder(probes, self.optimizer)
        self._signals, self._fingerprints = {}, []
        self._outputs, self._received, self._rows = Counter(), Counter(), set()
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad]
        copied = () if first else params
        self._earlier = {id(p): tensor_readings.rows(p.detach()).clone() for p in copied}
        given = [BatchTensor.of(t) for t in tensors(batch)]
        self._last_batch = (tensor_readings.fingerprint(batch), given) if given else None

    def forward(self, module: nn.Module, inputs: Sequence[object]) -> None:
        """The model was called, with a graph."""
        if self._recorder is not None:
            self._recorder.forward(module)
            self._rows.add(_row_count(inputs))
            if self._recorder.forwards == 1:
                self._look_at_base(inputs)
            if len(self._fingerprints) < MAX_FINGERPRINTS:
                self._fingerprints.append(tensor_readings.fingerprint(inputs))
                self._last_kwargs = inputs[1]
            leaves = {id(t) for t in tensors(inputs) if t.requires_grad and t.is_leaf}
            self._recorder.input_gradient = self._recorder.input_gradient or bool(leaves)
            self.trained_inputs |= leaves

    @torch.no_grad()
    def _look_at_base(self, inputs: Sequence[object]) -> None:
        """Read how rows spread that are a part of a larger tensor, which may be written to."""
        batch = next((t for t in tensors(inputs) if t.is_floating_point()), None)
        base = batch._base if batch is not None and batch.layout == torch.strided else None
        known, self._base, self._is_rewritten, self._spreads = self._base, None, False, []
        if (
            batch is not None
            and base is not None
            and base.numel() > batch.numel()
            and len(batch) > 1
        ):
            self._base = (weakref.ref(base), base._version)
            is_same = known is not None and known[0]() is base
            self._is_rewritten = is_same and known is not None and known[1] < base._version
            step = batch.numel() // tensor_readings.FINGERPRINT_ENTRIES + 1
            rows = batch.detach().reshape(len(batch), -1)[:, ::step]
            self._spreads = [rows.float().std(0).mean()]

    def evaluation(self) -> None:
        """The optimizer evaluates its closure."""
        if self._recorder is not None:
            self._recorder.evaluation()

    def before_step(self) -> None:
        """Keep the gradients and copies of the weights before the optimizer moves them."""
        if self._recorder is not None and self.step_tensors is None:
            self.step_tensors = tensor_readings.copy_step_tensors(self.optimizer)

    def close(self) -> None:
        """Take the hooks off and let the copies go."""
        if self._recorder is None:
            return
        for hook in self._output_hooks:
            hook.remove()
        self._output_hooks.clear()
        self.backward_calls.stop()
        self._recorder.close()
        self._recorder, self.step_tensors, self._earlier, self._last_batch = None, None, {}, None
        self._last_kwargs, self._states = None, {}

    def _follow_state(self, cell: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Record whether a cell goes on from its own last state, and with the graph of that."""
        given = next(iter(tensors(args[1:])), None)
        last = self._states.get(id(cell))
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if given is not None and last is not None and given.data_ptr() == last.data_ptr():
            self._state_calls[given.requires_grad] += 1
        self._states[id(cell)] = tensors(output)[0].detach()

    def _output_hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            for part in tensors(output)[:1]:
                if part.requires_grad and not torch.compiler.is_compiling():
                    self._signals.setdefault(name)
                    self._outputs[name] += 1
                    add_signal = partial(self._add_signal, name)
                    part.register_hook(add_signal)
                    self._graph = weakref.ref(add_signal)  # lives as long as the graph

        return hook

    def _add_signal(self, name: str, grad: Tensor) -> None:
        # of a whole sample: a mean over pixels or steps makes each of their shares small
        self._received[name] += 1
        size = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32).square()
        if name in self._signals:  # accumulated micro-batches add up
            before = self._signals[name]
            self._signals[name] = size if before is None else before + size

    @torch.no_grad()
    def read(
        self,
        step: int,
        batch: list[Any],
        loss: Tensor | None,
        others: Mapping[str, Sequence[Tensor]],
        written_after_step: Tensor | None = None,
    ) -> tuple[Row | None, Sample, Values]:
        """Return the row, if there are gradients, the sample, and all values with the `others`."""
        recorder, kept = self._recorder, self.step_tensors
        assert recorder is not None
        assert kept is not None
        own = dict(self.model.named_parameters())
        unmoved = tensor_readings.unmoved_shares(kept)
        unoptimized = tensor_readings.unoptimized_parameters(own, self.optimizer)
        first = [p for p in own.values() if p.requires_grad][:1]
        place = {id(p): k for k, p in enumerate(kept.parameters)}
        left = {place[key]: norm for key, norm in recorder.norms.items() if key in place}
        is_known = bool(batch) and batch[0][1] is self._last_kwargs
        last = self._last_batch
        parts = {
            **recorder.flags(),
            "last_fingerprint": [last[0] if last is not None else torch.full((2,), torch.nan)],
            "fingerprint": [
                self._fingerprints[-1] if is_known else tensor_readings.fingerprint(batch)
            ],
            "written_after_step": [] if written_after_step is None else [written_after_step],
            "model_norm": tensor_readings.row_norms(first),
            "unoptimized": tensor_readings.row_norms(list(unoptimized.values())),
            "unmoved": list(unmoved.values()),
            "backward_norms": list(left.values()),
            "fingerprints": self._fingerprints,
            **self.backward_calls.tensors_to_read(),
            "spread": self._spreads if self._is_rewritten else [],
            **others,
        }
        sent = loss if loss is not None else self._backward_loss()
        values = self._read_at_once(kept, sent, parts)
        row = _row(step, values, kept, loss is not None) if kept.gradients else None
        if row is not None and loss is None and sent is not None and _is_finite(values["loss"]):
            row["loss"] = values["loss"][0] / (row["scale"] or 1.0)  # scaled ones may overflow
        is_bad = sent is not None and not _is_finite(values["loss"]) and not values["scale"]
        gradients = [values["gradients"][k] for k in left]
        ratios = [n / math.sqrt(g) for n, g in zip(values["backward_norms"], gradients) if g > 0]
        sample = self._sample(
            step,
            batch,
            values,
            own,
            tensors=self._tensor_readings(values, own, dict(zip(unmoved, values["unmoved"]))),
            unoptimized=dict(zip(unoptimized, values["unoptimized"])),
            shrinkage=min(ratios, default=None),
            nonfinite_loss=is_bad and row is not None and row["finite"],
        )
        if self._graph is not None:
            self._graphs.append(self._graph)
        return row, sample, values

    def _backward_loss(self) -> Tensor | None:
        """The losses that went backward: their sum, or the mean of micro-batches."""
        losses = self.backward_calls.losses
        if not losses:
            return None
        total = torch.stack([v.float().to(losses[0].device) for v in losses]).sum()
        is_mean = self.backward_calls.has_equal_losses and len(losses) >= MIN_SUMMED_PASSES
        return total / len(losses) if is_mean else total

    def _unused_passes(self) -> int:
        """Passes with as many rows each, none of which is in the loss, if these are the most.

        A generator makes rows for the steps of a critic: those of other optimizers are asked for.
        """
        name = next(reversed(self._outputs), "")
        unused = self._outputs[name] - self._received[name]
        recorder, is_alike = self._recorder, len(self._rows) == 1 and self._rows != {1}
        if recorder is None or recorder.other_steps or not is_alike:
            return 0
        is_most = recorder.forwards >= MIN_UNUSED and unused >= 0.75 * self._outputs[name]
        return unused if is_most else 0

    def _layer_signals(self) -> list[Tensor]:
        """Those of the layers as they were called; the next step listens to the ends of them."""
        signals = {name: size for name, size in self._signals.items() if size is not None}
        known, self._ends = self._ends, []
        if known and len(signals) < len(known):  # this step went another way: nothing is known
            self._signals = {}
            return []
        if len(signals) > 1:
            names = list(signals)
            self._ends = [names[0], names[-1]]
        return list(signals.values())

    def _read_at_once(
        self, kept: StepTensors, loss: Tensor | None, parts: Mapping[str, Sequence[Tensor]]
    ) -> Values:
        """Everything in one read; with several processes one all-reduce before it."""
        count = len(kept.gradients)
        squares = tensor_readings.squared_norms(kept, self._earlier)
        device = squares.device if count else parts["uncleared"][0].device
        scale = self._scale(device)
        averaged = {
            **{name: [row] for name, row in zip(NORMS, squares)},
            "signals": self._layer_signals(),
            "loss": [loss if loss is not None else torch.tensor(math.nan)],
            "scale": [] if scale is None else [scale],
        }
        flat = tensor_readings.flatten(averaged, device)
        mean = tensor_readings.all_reduce(flat, 4 * count, self.is_sharded) if count else flat
        weights = slice(count, 2 * count)
        distance = (flat - mean)[weights].abs().sum() / mean[weights].sum() / 2
        alone = {"replica_distance": [distance], **parts}
        values = torch.cat([mean, tensor_readings.flatten(alone, device)]).tolist()
        return tensor_readings.split(values, averaged | alone)

    def _scale(self, device: torch.device) -> Tensor | None:
        """The loss scale; of a scaler that was found, only where it is used."""
        if self.scaler is not None:
            return self.scaler.scale(torch.ones(1, device=device)).reshape(())
        known = getattr(self.found_scaler, "_scale", None)
        return known if isinstance(known, Tensor) else None

    def _sample(
        self,
        step: int,
        batch: list[Any],
        values: Values,
        own: Mapping[str, Tensor],
        *,
        tensors: Mapping[str, TensorReading],
        unoptimized: Mapping[str, float],
        shrinkage: float | None,
        nonfinite_loss: bool,
    ) -> Sample:
        recorder = self._recorder
        assert recorder is not None
        optimized = [id(p) for g in self.optimizer.param_groups for p in g["params"]]
        shared = {id(p) for p in own.values()}.intersection(optimized)
        names = tensor_readings.parameter_names(own, self.optimizer)
        repeated, same_tensor = self._compare_batches(batch, values)
        ratio = _signal_ratio(values)
        fingerprints = values["fingerprint"] + values["fingerprints"]
        is_compared = bool(values["gradients"]) and not self.is_sharded
        is_alone = not recorder.other_steps and 2 * len(shared) > len(own)
        return Sample(
            step=step,
            forwards=recorder.forwards,
            backwards=recorder.backwards,
            unfinished=recorder.unfinished,
            training=recorder.training,
            uncleared=values["uncleared"][0] > 0,
            gradient_arrived=values["gradient_arrived"][0] > 0,
            reached={owner: recorder.reached(owner) for owner in ("optimizer", "model")},
            listening=not self.is_sharded,
            has_layer_outputs=bool(self._signals),
            has_signal=any(values["signals"]),
            vanished=ratio is not None and ratio < VANISHED,
            learning_rates=tuple(
                float(g["lr"]) for g in self.optimizer.param_groups if g.get("lr") is not None
            ),
            tensors=tensors,
            optimizer_count=len(optimized),
            shared_count=len(shared),
            duplicates=tuple(names[key] for key, n in Counter(optimized).items() if n > 1),
            unoptimized=unoptimized,
            model_norm=values["model_norm"][0] if values["model_norm"] and not shared else None,
            repeated_batch=repeated,
            same_tensor=same_tensor,
            replica_distance=values["replica_distance"][0] if is_compared else 0.0,
            shrinkage=shrinkage,
            scale=next(iter(values["scale"]), None),
            fingerprints=tuple(zip(fingerprints[::2], fingerprints[1::2])),
            rows=_row_count(batch),
            accumulated=values["accumulated"][0] > 0,
            last_accumulated=values["last_accumulated"][0] > 0,
            mixed_losses=values["mixed_losses"][0] > 0,
            evaluations=recorder.evaluations,
            input_gradient=recorder.input_gradient,
            written_after_step=any(values["written_after_step"]),
            live_graphs=sum(ref() is not None for ref in self._graphs),
            frozen_by_attribute=self._frozen_by_attribute(),
            losses=self.backward_calls.reading(values, recorder.backwards, judges_sign=is_alone),
            unused_passes=self._unused_passes(),
            nonfinite_loss=nonfinite_loss,
            state_cut_off=self._state_calls[False] > 1 and not self._state_calls[True],
            seed=self.backward_calls.used_seed,
            spread=next(iter(values["spread"]), None),
            decay=max(map(_decay, self.optimizer.param_groups), default=0.0),
        )

    def _frozen_by_attribute(self) -> tuple[str, ...]:
        """Modules whose attribute says that they are frozen, with tensors that have gradients."""
        return tuple(
            name
            for name, module in self._modules
            if module.__dict__.get("requires_grad") is False
            and any(p.requires_grad and p.grad is not None for p in module.parameters())
        )

    def _tensor_readings(
        self, values: Values, own: Mapping[str, Tensor], unmoved: Mapping[int, float]
    ) -> dict[str, TensorReading]:
        """Readings by name; those without a gradient have None."""
        kept = self.step_tensors
        assert kept is not None
        place = {id(p): k for k, p in enumerate(kept.parameters)}
        names = tensor_readings.parameter_names(own, self.optimizer)
        known = {id(p) for p in own.values()}
        found = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                k = place.get(id(p))
                if k is None and not p.requires_grad:
                    continue
                gradient, weight, update, change = (
                    math.sqrt(values[name][k]) if k is not None else 0.0 for name in NORMS
                )
                found[names[id(p)]] = TensorReading(
                    gradient=gradient if k is not None else None,
                    weight=weight,
                    update=update,
                    external_change=change,
                    learning_rate=float(group.get("lr", 1.0)),
                    is_complete=k is not None and kept.before[k].numel() == p.numel(),
                    kind=str(p.dtype).removeprefix("torch."),
                    is_vector=p.ndim < 2,
                    foreign=id(p) not in known,
                    stuck_share=unmoved.get(id(p), 0.0),
                    frozen=not p.requires_grad,
                )
        return found

    def _compare_batches(self, batch: object, values: Values) -> tuple[bool, bool]:
        """Whether the batch of the step before came again, and whether in the same tensors.

        Tensors of one value (the first state of a recurrent net) may be made anew.
        """
        old, now = values["last_fingerprint"], values["fingerprint"]
        if self._last_batch is None or old != now or not any(now):
            return False, False
        forwards = self._recorder.forwards if self._recorder is not None else 1
        rows, given = max(1, forwards) * _row_count(batch), self._last_batch[1]
        new = [
            t
            for t in tensors(batch)
            if not any(part.is_same(t) for part in given)
            and not (t._base is not None and 0 < t._base.ndim and len(t._base) <= rows)
        ]  # nor views of tensors with no more rows than a step sees
        known = (stored_values(local(t)).reshape(-1) for t in new)
        return True, len(new) < len(given) and all(bool((v == v[:1]).all()) for v in known)


def _foreign_address(tensor: Tensor) -> int | None:
    """The address of memory that torch did not allocate, such as a NumPy array's."""
    plain = (
        type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided
    )
    if not plain or tensor.untyped_storage().resizable():
        return None
    return tensor.data_ptr()


def _decay(group: Mapping[str, Any]) -> float:
    """The part of the weights that decay takes in a step; of scaled gradients it is not known."""
    is_plain = group.get("decoupled_weight_decay", "momentum" in group and "alpha" not in group)
    if not is_plain or not group.get("weight_decay"):
        return 0.0
    return float(group["lr"]) * group["weight_decay"] / (1 - group.get("momentum", 0.0))


def _row_count(batch: object) -> int:
    first = next(iter(tensors(batch)), None)
    return len(first) if first is not None and first.ndim else 1


def _is_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def _signal_ratio(values: Values) -> float | None:
    """The signal at the first layer over that at the last; None where there is none."""
    signals = [math.sqrt(square) for square in values["signals"]]
    return signals[0] / signals[-1] if signals and signals[-1] else None


def _row(step: int, values: Values, kept: StepTensors, has_loss: bool) -> Row:
    """One row of sizes: of gradients, weights and updates, the signal, the loss and its scale."""
    sizes = [
        local(p).numel() / max(1, old.numel()) for p, old in zip(kept.parameters, kept.before)
    ]
    pairs = zip(values["updates"], values["weights"])
    ratios = sorted(math.sqrt(u / w) for u, w in pairs if w > 0 and math.isfinite(u))
    needed = [*values["gradients"], *values["updates"], *(values["loss"] if has_loss else ())]
    return {
        "step": step,
        "loss": values["loss"][0] if has_loss else None,
        "gradient": math.sqrt(sum(values["gradients"])),  # fused optimizers unscale them in place
        "weight": math.sqrt(sum(w * size for w, size in zip(values["weights"], sizes))),
        "update": ratios[len(ratios) // 2] if ratios else None,
        "signal_ratio": _signal_ratio(values),
        "scale": next(iter(values["scale"]), None),
        "finite": _is_finite(needed),
    }
