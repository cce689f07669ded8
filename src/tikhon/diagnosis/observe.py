"""Instruments: measure the forward and backward pass of a copy of the model.

Layers are measured by forward hooks, activations by a function mode, which sees `F.relu(x)` as
well as `nn.ReLU`. Gradients come from tensor hooks on outputs, not from full backward hooks, which
cost ten times as much and break in-place operations.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tikhon.data.nested import tensors
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Located, Options
from tikhon.diagnosis.record import Site, SiteReading
from tikhon.regularizer.targets import NORMS

# maximum derivative of the activations that saturate on both sides
BOUNDED = {"sigmoid": 0.25, "tanh": 1.0, "hardtanh": 1.0, "softsign": 1.0, "hardsigmoid": 1 / 6}
RECTIFIERS = {"relu", "relu6", "threshold"}
ELEMENTWISE = {
    *BOUNDED,
    *RECTIFIERS,
    *("leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish"),
    *("hardshrink", "softshrink", "tanhshrink", "logsigmoid", "log_sigmoid"),
}
SOFTMAXES = {"softmax", "log_softmax"}
WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


class Instruments(Located):
    """Context that measures one forward and one backward pass of `model`."""

    outside = ""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sites: dict[str, Site] = {}
        self.numbers: dict[str, dict[str, float]] = {}
        self.modules: dict[str, nn.Module] = {}
        self._signals: dict[str, list[list[Tensor]]] = {}  # by site: gradients of each output
        self._profiles: dict[str, Tensor] = {}
        self.leaves: list[Tensor] = []  # inputs of recurrent layers, also to be differentiated
        self._seen: dict[str, int] = {}
        self._channels_first = False
        self._named = dict(model.named_modules())

    def readings(self) -> tuple[SiteReading, ...]:
        """Return one reading per site in forward order; call after the backward pass."""
        for name, outputs in self._signals.items():
            # first output that the loss depends on: of a recurrent layer possibly the last state
            grads = next((found for found in outputs if found), [])
            size = sum(g.numel() for g in grads)
            if size:
                total = math.hypot(*(norm(g.detach()) for g in grads))
                self.numbers[name]["signal"] = total / math.sqrt(size)
        for name, profile in self._profiles.items():
            self.numbers[name]["time_ratio"] = _time_ratio(profile)
        return tuple(SiteReading(**self.numbers[name]) for name in self.sites)  # type: ignore[arg-type]

    # hooks

    def enter(
        self, name: str, module: nn.Module, args: Args, kwargs: dict[str, Any]
    ) -> tuple[Args, dict[str, Any]] | None:
        """Record the gradient per time step at the input of recurrent layers."""
        super().enter(name, module, args, kwargs)
        if isinstance(module, RECURRENT) and args and isinstance(args[0], Tensor):
            return (self._measure_time_steps(name, module, args[0]), *args[1:]), kwargs
        return None

    def leave(self, name: str, module: nn.Module, args: Args, output: object) -> None:
        """Measure a layer after its forward pass."""
        super().leave(name, module, args, output)
        role = role_of(module)
        outputs = [t for t in tensors(output) if t.is_floating_point()]
        if role is None or not outputs:
            return
        with torch._C.DisableTorchFunction():
            self._measure_layer(name, role, module, outputs)

    def _measure_layer(
        self, name: str, role: str, module: nn.Module, outputs: list[Tensor]
    ) -> None:
        output = outputs[0]
        if name not in self.sites:
            self.sites[name] = replace(
                site_of(name, role, module), places=count_positions(module, output)
            )
            self.modules[name] = module
            self.numbers[name] = weights(module)
        self.numbers[name] |= _spread(output)
        if role in ("weight", "recurrent"):
            self._channels_first = isinstance(module, nn.modules.conv._ConvNd)
        if isinstance(module, nn.RNN) and module.nonlinearity == "tanh":
            low = 1 - output.detach().square() < 0.05
            self.numbers[name]["saturated"] = float(low.double().mean())
        self._record_gradient(name, outputs)

    def _measure_time_steps(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return the input of a recurrent layer with a hook that records its gradient by step."""
        if inputs.ndim != 3 or not torch.is_grad_enabled():
            return inputs
        if not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()
            self.leaves.append(inputs)
        axis = 1 if getattr(module, "batch_first", False) else 0

        def record(grad: Tensor) -> None:
            rest = [d for d in range(3) if d != axis]
            self._profiles[name] = grad.detach().double().square().mean(rest).sqrt()

        inputs.register_hook(record)
        return inputs

    def _record_gradient(self, name: str, outputs: list[Tensor]) -> None:
        reached = self._signals.setdefault(name, [])
        for place, output in enumerate(outputs):
            if place == len(reached):
                reached.append([])
            if output.requires_grad:
                output.register_hook(reached[place].append)

    # activations

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Measure an activation and return its result."""
        label = getattr(func, "__name__", "").rstrip("_")
        if label == "multi_head_attention_forward":
            return self._measure_attention(func, args, kwargs)
        known = label in ELEMENTWISE or label in SOFTMAXES
        inputs = args[0] if args else kwargs.get("input")
        if not known or not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            return func(*args, **kwargs)
        found = self._measure_activation(label, func, inputs, args[1:], kwargs)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self._add_activation(label, found, output)
        return output

    def _measure_activation(
        self, label: str, func: Function, inputs: Tensor, rest: Args, kwargs: Options
    ) -> dict[str, float]:
        if label in SOFTMAXES:
            return {}
        options = {k: v for k, v in kwargs.items() if k not in ("input", "inplace")}
        if func in (torch.nn.functional.relu, torch.nn.functional.hardtanh):
            rest = rest if label == "hardtanh" else ()
        if rest and isinstance(rest[-1], bool):  # `inplace`
            rest = rest[:-1]
        slope = _slope(label, func, inputs.detach(), rest, options)
        if slope is None or not slope.numel():
            return {}
        found = {"slope": root_mean_square(slope)}
        largest = slope.amax(self._rows(slope))
        if (
            label in RECTIFIERS and largest.numel() < slope.numel()
        ):  # one value of each says nothing
            found["dead"] = float((largest == 0).double().mean())
        if label in BOUNDED:
            low = slope < 0.05 * BOUNDED[label]
            found["saturated"] = float(low.double().mean())
        return found

    def _rows(self, values: Tensor) -> list[int]:
        """Return all axes but that of units, which is the second after a convolution."""
        unit = 1 if self._channels_first and values.ndim > 2 else max(1, values.ndim - 1)
        return [axis for axis in range(values.ndim) if axis != unit]

    def _add_activation(self, label: str, found: dict[str, float], output: Tensor) -> None:
        where = self.stack[-1]
        module = self._named.get(where) if where else None
        own = module is not None and not any(True for _ in module.children())
        name = where if own and not list(module.parameters()) else f"{where}.{label}()"  # type: ignore[union-attr]
        name = name.lstrip(".")
        key = f"{'.'.join(self.stack)}:{name}"
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] > 1 and not own:
            name = f"{name}#{self._seen[key]}"
        if name not in self.sites:
            self.sites[name] = Site(name, label, "activation", trainable=False)
            self.numbers[name] = {}
        self.numbers[name] |= found | _spread(output)
        self._record_gradient(name, [output])

    def _measure_attention(self, func: Function, args: Args, kwargs: Options) -> object:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
            asked["training"] = False
            try:
                attention = func(*args, **asked)[1]
            except (TypeError, RuntimeError):
                attention = None
        if attention is not None and attention.shape[-1] > 1:
            share = attention.clamp_min(1e-12)
            entropy = -(share * share.log()).sum(-1).mean() / math.log(attention.shape[-1])
            self._add_entropy(float(entropy))
        return func(*args, **kwargs)

    def _add_entropy(self, value: float) -> None:
        name = f"{self.stack[-1]}.attention".lstrip(".")
        if name not in self.sites:
            self.sites[name] = Site(name, "attention", "attention", trainable=False)
        self.numbers.setdefault(name, {})["entropy"] = value


def role_of(module: nn.Module) -> str | None:
    """Return the role of a module's site; None for modules that are not measured."""
    if isinstance(module, WEIGHTED):
        return "weight"
    if isinstance(module, RECURRENT + CELLS):
        return "recurrent"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    return "norm" if isinstance(module, NORMS) else None


def site_of(name: str, role: str, module: nn.Module) -> Site:
    """Return the site of a layer."""
    kind = type(module).__name__.removeprefix("NonDynamicallyQuantizable")
    trainable = any(p.requires_grad for p in module.parameters())
    if role == "weight":
        weight = cast(Tensor, module.weight)
        if not weight.numel():
            return Site(name, kind, role, trainable=False)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        fan_out, fan_in = weight.shape[0], weight[0].numel()
        spatial = weight[0, 0].numel() if weight.ndim > 2 else 1
        channels = weight.shape[1] if weight.ndim > 1 else 1
        shape = f" {channels}>{fan_out}" if not transposed else f" {fan_out}>{channels}"
        size = f" k{'x'.join(map(str, weight.shape[2:]))}" if weight.ndim > 2 else ""
        fan_out = fan_out * spatial if not transposed else channels * spatial
        return Site(name, kind + shape + size, role, int(fan_in), int(fan_out), trainable)
    if role == "recurrent":
        sizes = (int(module.input_size), int(module.hidden_size))  # type: ignore[arg-type]
        return Site(name, f"{kind} {sizes[0]}>{sizes[1]}", role, *sizes, trainable)
    return Site(name, kind, role, trainable=trainable)


def count_positions(module: nn.Module, output: Tensor) -> int:
    """Return the number of positions per row and channel of an output."""
    if output.ndim < 3:
        return 1
    maps = isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase)
    return max(1, math.prod(output.shape[2:] if maps else output.shape[1:-1]))


def weights(module: nn.Module) -> dict[str, float]:
    """Return the scale of a layer's own weights."""
    weight = getattr(module, "weight", None)
    if isinstance(module, RECURRENT + CELLS):
        weight = next(p for n, p in module.named_parameters() if n.startswith("weight_hh"))
        size = root_mean_square(weight.detach())
        return {"weight_rms": size, "weight_factor": size * math.sqrt(weight.shape[1])}
    if weight is None or not isinstance(module, WEIGHTED) or not weight.numel():
        return {}
    values = weight.detach()
    size = root_mean_square(values)
    fan_out = site_of("", "weight", module).fan_out
    found: dict[str, float] = {"weight_rms": size, "weight_factor": size * math.sqrt(fan_out)}
    found["constant"] = bool(values.numel() > 1 and (values == values.flatten()[0]).all())
    bias = getattr(module, "bias", None)
    if bias is not None:
        found["bias"] = root_mean_square(bias.detach())
    return found


def norm(values: Tensor) -> float:
    """Return the Euclidean norm, in double precision where single over- or underflows."""
    is_half_precision = values.dtype not in (torch.float32, torch.float64)
    found = float(torch.linalg.vector_norm(values.float() if is_half_precision else values))
    return found if 1e-15 < found < math.inf else float(torch.linalg.vector_norm(values.double()))


def root_mean_square(values: Tensor) -> float:
    """Return the root mean square of a tensor."""
    return norm(values) / math.sqrt(values.numel())


def _slope(label: str, func: Function, inputs: Tensor, rest: Args, options: Any) -> Tensor | None:
    """Return the absolute derivative of an activation; None if it cannot be evaluated."""
    if label == "relu":
        return (inputs > 0).to(inputs.dtype)
    with torch.enable_grad(), saved_tensors_hooks(_identity, _identity):  # override a checkpoint's
        try:
            z = inputs.clone().requires_grad_()
            (slope,) = torch.autograd.grad(func(z.clone(), *rest, **options).sum(), z)
        except (TypeError, RuntimeError):
            return None
    return slope.abs()


def _spread(output: Tensor) -> dict[str, float]:
    values = output.detach()
    if not values.is_floating_point() or not values.numel():
        return {}
    size = root_mean_square(values)
    if values.ndim == 0 or len(values) < 2 or not math.isfinite(size):
        return {"rms": size}
    spread = root_mean_square(values - values.mean(0)) * math.sqrt(len(values) / (len(values) - 1))
    return {"rms": size, "diversity": spread / size if size > 0 else 0.0}


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _time_ratio(profile: Tensor) -> float:
    """Return log10 of the gradient in the first / last tenth of the time steps.

    Steps without a gradient at the end count as padding.
    """
    reached = profile.nonzero().flatten()
    if not len(reached):
        return math.nan
    profile = profile[: int(reached[-1]) + 1]
    width = max(1, len(profile) // 10)
    first, last = float(profile[:width].mean()), float(profile[-width:].mean())
    if last == 0 or not math.isfinite(first) or not math.isfinite(last):
        return 400.0
    return math.log10(first / last) if first > 0 else -400.0
