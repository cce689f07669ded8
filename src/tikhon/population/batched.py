"""Run one forward pass for K models; parameters have a leading member axis.

`Batched` runs Linear as one bmm (the first as one shared GEMM) and convolutions as grouped ones,
`Vectorised` runs any other module through torch.func, `Plain` calls the module of a population of
one.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tikhon.data.forward import call_model
from tikhon.layers import Dropout
from tikhon.layers.masks import inverse_keep
from tikhon.layers.noise import NoiseLayer
from tikhon.models.spline import Spline

Blocks = Mapping[str, Tensor]

_ACTIVATIONS = (
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.SiLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.Softplus,
    nn.Identity,
    nn.Mish,
    nn.Hardtanh,
    nn.SELU,
)
_FUNCTIONS = (
    torch.relu,
    F.relu,
    torch.tanh,
    F.gelu,
    F.silu,
    torch.sigmoid,
    operator.add,
    operator.mul,
)
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_POOLING = (F.max_pool1d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)


class Unsupported(Exception):
    """The model is not supported by this route; the message says why."""


class Forward(ABC):
    """(blocks, buffers, x) -> outputs (members, rows, ...)."""

    name: str

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.training: bool | None = None

    @abstractmethod
    def __call__(self, blocks: Blocks, buffers: Blocks, x: Tensor, *, shared: bool) -> Tensor:
        """Outputs of all members; `x` is (rows, ...) if shared, else (members, rows, ...)."""

    def train(self, training: bool) -> None:
        """Set training or evaluation mode."""
        if self.training is not training:  # walking all modules costs more than the check
            self.training = training
            self.model.train(training)


class Plain(Forward):
    """The module itself, for one member; its parameters are views of the blocks."""

    name = "plain"

    def __call__(self, blocks: Blocks, buffers: Blocks, x: Tensor, *, shared: bool) -> Tensor:
        """Return outputs with a member axis of size one."""
        return call_model(self.model, x if shared else x[0]).unsqueeze(0)


class Vectorised(Forward):
    """Any module without data-dependent control flow, by `torch.func`; noise is shared."""

    name = "vmap"

    def __call__(self, blocks: Blocks, buffers: Blocks, x: Tensor, *, shared: bool) -> Tensor:
        """Return the outputs of all members."""

        def single(parameters, states, inputs):
            return torch.func.functional_call(self.model, (parameters, states), (inputs,))

        mapped = torch.func.vmap(single, in_dims=(0, 0, None if shared else 0), randomness="same")
        return mapped(dict(blocks), dict(buffers), x)


class Batched(Forward):
    """Batched layers, activations and dropout, following the traced graph of the model."""

    name = "batched"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        try:
            graph = _Tracer().trace(model)
        except Exception as error:
            raise Unsupported(
                f"the forward pass cannot be traced: {_first_line(error)}"
            ) from error
        modules = dict(model.named_modules())
        steps = [_step(node, modules) for node in graph.nodes]
        self.steps = [(*step, [i for i in step[2] if isinstance(i, _Name)]) for step in steps]

    def __call__(self, blocks: Blocks, buffers: Blocks, x: Tensor, *, shared: bool) -> Tensor:
        """Return the outputs of all members."""
        values: dict[str, Tensor] = {}
        common: set[str] = set()  # values without member axis, shared by all
        batch = _Batch(blocks, buffers)
        out = x
        for name, run, inputs, named in self.steps:
            is_common = common.issuperset(named) if named else shared
            arguments = [values[i] if isinstance(i, _Name) else i for i in inputs] or [x]
            out, is_common = run(batch, is_common, *arguments)
            values[name] = out
            if is_common:
                common.add(name)
        if self.steps[-1][0] in common:
            out = out.expand(batch.members, *out.shape)
        return out


class _Name(str):
    """Name of a value computed by an earlier step."""


class _Batch:
    """Context of a step besides its inputs."""

    def __init__(self, blocks: Blocks, buffers: Blocks) -> None:
        self.blocks, self.buffers = blocks, buffers
        self.members = next(iter(blocks.values())).shape[0]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NoiseLayer | Spline) or super().is_leaf_module(
            m, module_qualified_name
        )


# (batch, whether inputs lack the member axis, *inputs) -> (value, whether it lacks the axis)
Run = Callable[..., tuple[Tensor, bool]]


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[str, Run, list[object]]:
    inputs: list[object] = [_Name(a.name) if isinstance(a, fx.Node) else a for a in node.args]
    if node.op == "placeholder":
        return node.name, _elementwise(lambda x: x), []
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node):
            raise Unsupported("the model returns something else than one tensor")
        return node.name, _elementwise(lambda x: x), inputs
    if node.op == "call_module":
        path = str(node.target)
        return node.name, _module(path, modules[path]), inputs
    if node.op == "call_function" and node.target in (*_FUNCTIONS, *_POOLING):
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()) or node.kwargs.get("inplace"):
            raise Unsupported(f"{node.target} has no batched form with {dict(node.kwargs)}")
        function = partial(cast(Callable[..., Tensor], node.target), **node.kwargs)
        batched = _by_channel if node.target in _POOLING else _elementwise
        return node.name, batched(function), inputs
    flattens = node.op == "call_method" and node.target == "flatten"
    if (flattens or node.target is torch.flatten) and inputs[1:] == [1] and not node.kwargs:
        return node.name, _flatten, inputs[:1]
    raise Unsupported(f"{node.target} has no batched form")


def _elementwise(function: Callable[..., Tensor]) -> Run:
    return lambda batch, shared, *inputs: (function(*inputs), shared)


def _flatten(batch: _Batch, shared: bool, x: Tensor) -> tuple[Tensor, bool]:
    return x.flatten(1 if shared else 2), shared


def _module(path: str, module: nn.Module) -> Run:
    prefix = f"{path}." if path else ""
    if type(module) is nn.Linear:
        bias = f"{prefix}bias" if module.bias is not None else None
        return _linear(f"{prefix}weight", bias)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return _layer_norm(prefix, module)
    if type(module) is Dropout:
        return _dropout(f"{prefix}rate", module)
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return _flatten
    if isinstance(module, (*_ACTIVATIONS, Spline)):
        return _elementwise(module)
    if type(module) in _POOLS:
        return _by_channel(module)
    if type(module) in _CONVOLUTIONS:
        return _convolution(prefix, cast(nn.Conv2d, module))
    if type(module) in _NORMS:
        return _batch_norm(prefix, cast(nn.BatchNorm2d, module))
    raise Unsupported(f"{type(module).__name__} ({path}) has no batched form")


def _linear(weight: str, bias: str | None) -> Run:
    def run(batch: _Batch, shared: bool, x: Tensor) -> tuple[Tensor, bool]:
        w = batch.blocks[weight]
        members, outputs, features = w.shape
        if x.ndim != (2 if shared else 3):
            raise Unsupported("a batched Linear takes rows of features without further axes")
        if shared:  # one GEMM for all members
            b = None if bias is None else batch.blocks[bias].view(-1)
            z = F.linear(x, w.view(members * outputs, features), b)
            return z.view(len(x), members, outputs).transpose(0, 1), False
        w = w.transpose(1, 2)
        if bias is None:
            return torch.bmm(x, w), False
        return torch.baddbmm(batch.blocks[bias].unsqueeze(1), x, w), False

    return run


def _members_as_channels(x: Tensor) -> Tensor:
    """Reshape (members, rows, channels, ...) to (rows, members * channels, ...), a view."""
    return x.transpose(0, 1).flatten(1, 2)


def _channels_as_members(x: Tensor, members: int) -> Tensor:
    """Invert `_members_as_channels`."""
    return x.unflatten(1, (members, -1)).transpose(0, 1)


def _by_channel(function: Callable[..., Tensor]) -> Run:
    """Batch a function that treats each channel separately."""

    def run(batch: _Batch, shared: bool, x: Tensor, *more: object) -> tuple[Tensor, bool]:
        if shared:
            return function(x, *more), True
        return _channels_as_members(function(_members_as_channels(x), *more), batch.members), False

    return run


def _convolution(prefix: str, module: nn.Conv2d) -> Run:
    """Run one convolution grouped by member; for shared inputs, one with all channels."""
    function = _CONVOLUTIONS[type(module)]
    if module.padding_mode != "zeros" or module.groups > 1:
        raise Unsupported(f"{module} has no batched form")

    def run(batch: _Batch, shared: bool, x: Tensor) -> tuple[Tensor, bool]:
        weight = batch.blocks[f"{prefix}weight"].flatten(0, 1)
        bias = None if module.bias is None else batch.blocks[f"{prefix}bias"].flatten()
        options = module.stride, module.padding, module.dilation, 1 if shared else batch.members
        z = function(x if shared else _members_as_channels(x), weight, bias, *options)
        return _channels_as_members(z, batch.members), False

    return run


def _batch_norm(prefix: str, module: nn.BatchNorm2d) -> Run:
    if module.momentum is None or module.running_mean is None or not module.affine:
        raise Unsupported(f"{module} has no batched form")

    def run(batch: _Batch, shared: bool, x: Tensor) -> tuple[Tensor, bool]:
        mean, var = (batch.buffers[f"{prefix}running_{n}"].view(-1) for n in ("mean", "var"))
        weight, bias = (batch.blocks[f"{prefix}{n}"].flatten() for n in ("weight", "bias"))
        if module.training:
            batch.buffers[f"{prefix}num_batches_tracked"].add_(1)
        wide = _members_as_channels(x.expand(batch.members, *x.shape) if shared else x)
        options = module.training, cast(float, module.momentum), module.eps
        z = F.batch_norm(wide, mean, var, weight, bias, *options)
        return _channels_as_members(z, batch.members), False

    return run


def _layer_norm(prefix: str, module: nn.LayerNorm) -> Run:
    def run(batch: _Batch, shared: bool, x: Tensor) -> tuple[Tensor, bool]:
        z = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if not module.elementwise_affine:
            return z, shared
        z = z * batch.blocks[f"{prefix}weight"].unsqueeze(1)
        if module.bias is not None:
            z = z + batch.blocks[f"{prefix}bias"].unsqueeze(1)
        return z, False

    return run


def _dropout(rate: str, module: Dropout) -> Run:
    def run(batch: _Batch, shared: bool, x: Tensor) -> tuple[Tensor, bool]:
        if not module.training:
            return x, shared
        rows = x.shape if shared else x.shape[1:]
        rates = batch.buffers[rate].view(-1, *[1] * len(rows))
        uniforms = torch.rand(rows, device=x.device, generator=module.generator)
        scale = uniforms.new_empty(len(rates), *rows)
        torch.ge(uniforms, rates, out=scale)  # three times faster than bool times float
        scale.mul_(inverse_keep(rates, scale.dtype))
        return x * scale, False

    return run


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def choose_forward(
    model: nn.Module, members: int, probe: Callable[[Forward], None]
) -> tuple[Forward, str]:
    """Return the fastest working route, and why faster ones fail; `probe` runs a forward pass."""
    if members == 1:
        return Plain(model), ""
    reasons = []
    for route in (Batched, Vectorised):
        try:
            forward = route(model)
            probe(forward)
            return forward, "; ".join(reasons)
        except Unsupported as error:
            reasons.append(str(error))
        except Exception as error:
            reasons.append(f"{route.__name__.lower()}: {_first_line(error)}")
    raise Unsupported("; ".join(reasons))
