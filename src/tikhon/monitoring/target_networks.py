"""Networks that should follow the model: target networks, teachers, weight averages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from tikhon.data.nested import tensors
from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, alarm
from tikhon.monitoring.history import Sample
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.tensor_readings import fingerprint, row_norms, rows, tensor_norms

MAX_NETWORKS = 4  # followers that are read
MIN_STEPS = 100  # steps after which a follower that never moved counts as forgotten
COPY_DISTANCE = 0.1  # distance to the model / its last update: an average of few steps is farther
PASSES_OF_BOTH = 1.8  # per step, of a model that is its own target network (convention)
MAX_LAG = 0.9  # of the way that the model has gone (convention)
MIN_DISTANCE = 0.01  # relative distance from the model
# parts of names of networks that are fixed on purpose, and of followers
FIXED_NAMES = "teacher ref old prev frozen pretrain initial base anchor start".split()
FOLLOWING_NAMES = "target ema momentum average avg slow shadow swa".split()


@dataclass
class TargetNetwork:
    """One network with the model's parameter shapes, and its readings in sampled steps."""

    name: str
    module: nn.Module
    source: nn.Module  # the model, or its part with these shapes
    first_norms: Tensor  # of its tensors when it was found
    first_rows: Tensor  # of its largest tensor
    began_equal: bool  # it was equal to the model then
    is_trainable: bool  # all its tensors require a gradient
    first_means: list[Tensor]  # of its normalisation layers, copied when it was found
    total_calls: int = 0
    calls: int = 0  # since the last reading began
    inputs: Tensor | None = None  # fingerprint of its last inputs
    input_rows: int = 0
    shares_inputs: bool = False  # called with the model's: a reference, or a fixed teacher
    own_inputs: int = 0  # successive sampled steps that called it with other inputs than the model
    copied: int = 0  # successive sampled steps that found it close to the model
    since: int = 0  # the first of these
    has_moved: bool = False
    distance: float = 0.0  # to the model, relative to its size
    lag: float = 0.0  # of the model's way from the first weights, what it has still to go
    tested: int = -1  # the last step in which its statistics were compared
    stale: int | None = None  # the step in which it was used with statistics of another model

    @property
    def is_far_behind(self) -> bool:
        """Whether an average that is not used while the model learns is near its start."""
        is_average = self.has_moved and self.began_equal and not self.total_calls
        return is_average and self.lag > MAX_LAG and self.distance > MIN_DISTANCE

    def has_stale_norms(self) -> bool:
        """Whether its weights have moved and its norms have not, while those of the model have."""
        if not self.began_equal or not _is_equal(_running_means(self.module), self.first_means):
            return False
        if _is_equal(_running_means(self.source), self.first_means):
            return False
        return not torch.equal(_norms(self.module), self.first_norms)


class TargetNetworks:
    """Finds target networks, records their calls, and measures their distance to the model."""

    def __init__(self, model: nn.Module, step: Callable[[], int]) -> None:
        self._model, self._step = model, step
        self.on_stale: Callable[[], None] | None = None
        self._is_closed = False
        self._networks: dict[int, TargetNetwork] = {}
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        self._sampling = False
        self._measured: list[Tensor] = []
        self._names_of_model: set[str] = set()  # of a target network, and it is the model
        self.passes_without_graph = 0  # of the model

    def find(self, modules: Mapping[str, nn.Module], optimizers: Iterable[Optimizer]) -> None:
        """Search the variables of the loop and the parts of the model."""
        optimized = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        parts = [(n, m) for n, m in self._model.named_modules() if n]
        upper = [(n, m) for n, m in parts if n.count(".") < 2]
        sources = [
            (shapes, m)
            for m in (self._model, *(m for _, m in upper))
            if len(shapes := _shapes(m)) > 1 and _is_trained(m, optimized)
        ]
        own = {self._model, *(m for _, m in parts)}
        for name, module in [*((n, m) for n, m in modules.items() if m not in own), *upper]:
            if module in self._seen or len(self._networks) >= MAX_NETWORKS:
                continue
            self._seen.add(module)
            shapes = _shapes(module)
            source = next((m for s, m in sources if s == shapes), None)
            if source is not None and source is not module and not _is_trained(module, optimized):
                self._add(name, module, source)

    def find_model(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Look for a target network that is the model itself, or a shallow copy of it.

        The model must be known under another name too, which may be a part's.
        """
        if not any("target" in name.lower() for name, _ in modules):
            return
        parts = {self._model, *self._model.children()}
        sources = [(m, [id(p) for p in m.parameters()]) for m in parts]
        named: dict[nn.Module, set[str]] = {}
        for name, module in modules:
            own = [id(p) for p in module.parameters()]
            same = (m for m, ids in sources if own and ids == own and type(m) is type(module))
            if (source := next(same, None)) is not None:
                named.setdefault(source, set()).add(name)
        for names in named.values():
            targets = {name for name in names if "target" in name.lower()}
            self._names_of_model |= targets if targets < names else set()

    def _add(self, name: str, module: nn.Module, source: nn.Module) -> None:
        network = self._networks[id(module)] = TargetNetwork(
            name,
            module,
            source,
            first_norms=(norms := _norms(module)),
            first_rows=_largest(module).clone(),
            began_equal=torch.equal(norms, _norms(source)),
            is_trainable=all(p.requires_grad for p in module.parameters()),
            first_means=[mean.clone() for mean in _running_means(module)],
        )

        def record_call(module: nn.Module, args: object, kwargs: object) -> None:
            if network.first_means and not module.training:
                self._test_norms(network)
            if self._is_closed:
                return
            network.calls += 1
            network.total_calls += 1
            if not self._sampling:
                return
            inputs = [t for t in tensors([args, kwargs]) if t.numel()]
            if inputs and not torch.compiler.is_compiling():
                network.inputs = fingerprint([args, kwargs])
                network.input_rows = len(inputs[0]) if inputs[0].ndim else 1

        handle = module.register_forward_pre_hook(Hook(record_call), with_kwargs=True)
        self._handles.append(handle)

    def _test_norms(self, network: TargetNetwork) -> None:
        """Test the statistics of a network in use, once per step; once after the watch."""
        if network.stale is None and network.tested != self._step():
            network.tested = self._step()
            if network.has_stale_norms():
                network.stale = network.tested
                if self._is_closed and self.on_stale is not None:
                    self.on_stale()
        if self._is_closed:
            self._remove_hooks()

    def begin_sample(self) -> None:
        """Begin a sampled step."""
        self._sampling = True
        for network in self._networks.values():
            network.calls, network.inputs = 0, None

    def tensors_to_read(self) -> list[Tensor]:
        """Return the results of `measure`, six numbers per network."""
        return self._measured

    def measure(self) -> None:
        """Measure inputs, distance to the model and change, just before the step."""
        self._measured = []
        for network in self._networks.values():
            pairs = zip(network.module.parameters(), network.source.parameters())
            differences = [rows(a.detach()) - rows(b.detach()) for a, b in pairs]
            norms = _norms(network.module)
            no_inputs = torch.full((2,), torch.nan, device=norms.device)
            inputs = network.inputs.to(norms.device) if network.inputs is not None else no_inputs
            distance = torch.stack(tensor_norms(differences)).norm()
            has_moved = (norms != network.first_norms).any().float()
            source = _largest(network.source)
            ahead, way = source - _largest(network.module), source - network.first_rows
            lag = ahead.norm() / way.norm().clamp(min=1e-12)
            self._measured += [*inputs, distance, _norms(network.source).norm(), has_moved, lag]

    def update(self, values: Sequence[float], sample: Sample) -> None:
        """Process the readings of a sampled step."""
        self._sampling = False
        for network, k in zip(self._networks.values(), range(0, len(values), 6)):
            first, second, distance, size, has_moved, network.lag = values[k : k + 6]
            is_called = network.calls > 0
            is_model_batch = (first, second) in sample.fingerprints
            network.shares_inputs = network.shares_inputs or (is_called and is_model_batch)
            has_own_inputs = is_called and not is_model_batch
            network.own_inputs = network.own_inputs + 1 if has_own_inputs else 0
            network.has_moved = network.has_moved or has_moved > 0
            network.distance = distance / size if size else 0.0
            called_alike = network.calls == sample.forwards and network.input_rows == sample.rows
            is_near = sample.update > 0 and distance <= COPY_DISTANCE * sample.update
            is_copied = has_own_inputs and called_alike and is_near
            network.since = network.since if network.copied and is_copied else sample.step
            network.copied = network.copied + 1 if is_copied else 0

    def close(self) -> None:
        """Remove the hooks; averages with norms are often used once training is over."""
        self._is_closed = True
        for network in self._networks.values():
            network.tested = -1
        if not any(n.first_means and n.stale is None for n in self._networks.values()):
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def stale_alarms(self) -> list[Alarm]:
        """Report averages that were used with the statistics that they began with."""
        return [
            alarm("average_norms_stale", n.stale, where=(n.name,))
            for n in self._networks.values()
            if n.stale is not None
        ]

    def alarms(self, steps: int, forwards: int, *, ended: bool) -> Iterator[Alarm]:
        """Report networks that never move, and those that are the model in every step."""
        passes = forwards + self.passes_without_graph
        if self._names_of_model and steps >= MIN_STEPS and passes >= PASSES_OF_BOTH * steps:
            names = sorted(self._names_of_model)
            yield alarm("target_always_copied", key="target_is_model", where=names)
        for network in self._networks.values():
            names = (network.name,)
            stayed = not network.has_moved and network.distance > MIN_DISTANCE
            if ended and steps >= MIN_STEPS and stayed and _should_move(network):
                severity = "info" if _has_word(network.name, FIXED_NAMES) else "warning"
                far = {"steps": steps, "distance": network.distance}
                yield alarm("target_never_updated", where=names, severity=severity, **far)
            elif ended and steps >= MIN_STEPS and network.is_far_behind:
                yield alarm("average_lags", where=names, steps=steps, lag=network.lag)
            elif network.copied > MIN_SAMPLES + 2 and not network.has_moved:
                yield alarm(
                    "weights_overwritten", network.since, key="model_set_back", where=names
                )
            elif network.copied > MIN_SAMPLES + 2:
                yield alarm("target_always_copied", network.since, where=names)


def _should_move(network: TargetNetwork) -> bool:
    """Whether such a network was meant to move: a teacher or a reference sees the same inputs."""
    if isinstance(network.module, AveragedModel):
        return True
    if network.own_inputs > MIN_SAMPLES + 2:
        return network.began_equal or network.is_trainable
    is_called = network.total_calls > 0 and not network.shares_inputs
    return is_called and network.began_equal and _has_word(network.name, FOLLOWING_NAMES)


def _has_word(name: str, words: Iterable[str]) -> bool:
    return any(word in name.lower() for word in words)


def _shapes(module: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(p.shape for p in module.parameters())


def _is_trained(module: nn.Module, optimized: set[int]) -> bool:
    return any(id(p) in optimized for p in module.parameters())


def _largest(module: nn.Module) -> Tensor:
    return rows(max(module.parameters(), key=Tensor.numel).detach())


def _running_means(module: nn.Module) -> list[Tensor]:
    means = (getattr(part, "running_mean", None) for part in module.modules())
    return [mean for mean in means if isinstance(mean, Tensor)]


def _is_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _norms(module: nn.Module) -> Tensor:
    return torch.stack(row_norms([p.detach() for p in module.parameters()]))
