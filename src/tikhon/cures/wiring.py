"""Edits of a model's structure: registered and shared layers, positions, frozen parameters.

As in `surgery.py`, each function returns the lines that change the model, or [].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tikhon.cures.called_modules import CalledModules
from tikhon.cures.patch import Line, address
from tikhon.data.forward import call_model
from tikhon.data.nested import Batch
from tikhon.diagnosis.replica import undisturbed
from tikhon.regularizer.rounding import HALF_TYPES


def add_nonlinearity(model: nn.Module, batch: Batch) -> list[Line]:
    """Add ReLU after every hidden layer without an activation, with He initialisation."""
    places = CalledModules(model, batch)
    after = places.activations_after()
    layers = [m for m in after if m not in places.fused_parts]
    bare = [m for m in layers[:-1] if after[m] is None]
    return [
        places.line(
            m,
            "{at} = nn.Sequential({at}, nn.ReLU())\n"
            'nn.init.kaiming_normal_({at}[0].weight, nonlinearity="relu")',
        )
        for m in bare
        if m.weight.requires_grad and m.weight.ndim > 1
    ]


def forward_direction_only(model: nn.Module, batch: Batch) -> list[Line]:
    """Zero the outputs of the backward direction of bidirectional recurrent layers."""
    places = CalledModules(model, batch)
    code = (
        "def forwards(layer, args, answer):\n"
        "    output, state = answer\n"
        "    first, second = output.chunk(2, -1)\n"
        "    return torch.cat([first, 0 * second], -1), state\n\n\n"
        "{at}.register_forward_hook(forwards)"
    )
    found = [m for m in model.modules() if isinstance(m, nn.RNNBase) and m.bidirectional]
    return [places.line(m, code) for m in found] if all(m.num_layers == 1 for m in found) else []


def unshare_layers(model: nn.Module, batch: Batch) -> list[Line]:
    """Copy a layer that is used in several places, one copy for each."""
    seen: set[int] = set()
    lines, copied = [], "."
    for path, module in model.named_modules(remove_duplicate=False):
        weights = any(True for _ in module.parameters())
        if id(module) in seen and weights and not path.startswith(copied):
            lines.append(Line(address(model, path), "{at} = copy.deepcopy({at})"))
            copied = f"{path}."
        seen.add(id(module))
    return lines


def larger_groups(model: nn.Module, batch: Batch) -> list[Line]:
    """Use groups of four channels or more in GroupNorms of one channel per group."""
    places = CalledModules(model, batch)
    found = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    return [
        places.line(
            m,
            f"{{at}} = nn.GroupNorm({math.gcd(m.num_channels // 4, m.num_channels)}, "
            f"{m.num_channels})",
        )
        for m in found
        if m.num_groups == m.num_channels >= 8
    ]


def spread_embeddings(model: nn.Module, batch: Batch) -> list[Line]:
    """Standardise embeddings over the batch, so that rows cannot all be given one point."""
    with torch.no_grad(), undisturbed(model, training=False):
        output = call_model(model, batch[0])
    if not isinstance(output, Tensor) or output.ndim != 2:
        return []
    code = f"{{at}} = nn.Sequential({{at}}, nn.BatchNorm1d({output.shape[1]}, affine=False))"
    return [Line("model", code)]


def inputs_requiring_grad(model: nn.Module, batch: Batch) -> list[Line]:
    """Make inputs require gradients, as a reentrant checkpoint needs one that does."""
    inputs = batch[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return []
    code = (
        "def with_gradients(layer, args):\n"
        "    return tuple(x.detach().requires_grad_(torch.is_grad_enabled()) for x in args)\n\n\n"
        "{at}.register_forward_pre_hook(with_gradients)"
    )
    return [Line("model", code)]


def add_positions(model: nn.Module, batch: Batch) -> list[Line]:
    """Add a sinusoidal positional encoding before the first attention.

    Reference: Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762
    """
    places = CalledModules(model, batch)
    kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    if first is None:
        return []
    inner = next(m for m in first.modules() if isinstance(m, nn.MultiheadAttention))
    time = 1 if inner.batch_first else 0
    reads = "args" if isinstance(first, nn.MultiheadAttention) else "args[:1]"
    rest = "" if isinstance(first, nn.MultiheadAttention) else " + args[1:]"
    code = (
        "def with_places(layer, args):\n"
        f"    steps, width = args[0].shape[{time}], args[0].shape[-1]\n"
        "    pace = torch.exp(-torch.arange(0, width, 2) * math.log(2 * steps) / width)\n"
        "    angle = torch.arange(steps)[:, None] * pace\n"
        "    wave = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]\n"
        f"    wave = wave.to(args[0]){'[:, None]' if time == 0 else ''}\n"
        f"    return tuple(x + wave for x in {reads}){rest}\n\n\n"
        "{at}.register_forward_pre_hook(with_places)"
    )
    return [places.line(first, code)]


def keep_created_layers(model: nn.Module, batch: Batch) -> list[Line]:
    """Keep the layers that the first forward pass creates."""
    known = set(model.modules())
    made: list[nn.Module] = []
    recorded = nn.modules.module.register_module_forward_pre_hook(lambda m, args: made.append(m))
    with torch.no_grad(), undisturbed(model, training=model.training), recorded:
        call_model(model, batch[0])
    if known >= set(made):
        return []
    star = "**" if isinstance(batch[0], dict) else "*" if isinstance(batch[0], tuple) else ""
    code = f"""\
class MadeOnce(type(model)):
    def forward(self, *args, **kwargs):
        place = iter(range(1000))

        def keep(layer, inputs):
            if layer not in set(self.modules()):
                at = next(place)
                if at == len(self.made_once):
                    self.made_once.append(layer)
                layer.__dict__ = self.made_once[at].__dict__

        handle = nn.modules.module.register_module_forward_pre_hook(keep)
        try:
            return super().forward(*args, **kwargs)
        finally:
            handle.remove()


model.__class__, model.made_once = MadeOnce, nn.ModuleList()
with torch.no_grad():
    model({star}x)  # x: a batch of inputs"""
    return [Line("", code)]


def register_layers(model: nn.Module, batch: Batch) -> list[Line]:
    """Register layers and parameters held in lists, dictionaries or plain attributes."""
    lines = []
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            container = _container(value) if not name.startswith("_") else ""
            if container:
                code = f"{{at}}.{name} = nn.{container}({{at}}.{name})"
                lines.append(Line(address(model, path), code))
    return lines


def _container(value: object) -> str:
    """Return the class in `nn` that registers a value, or ""."""
    if isinstance(value, Tensor):
        return "Parameter" if value.requires_grad and value.is_leaf else ""
    kind = "Dict" if isinstance(value, dict) else "List"
    parts = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(parts, list | tuple) or not parts:
        return ""
    if all(isinstance(part, nn.Module) for part in parts):
        return f"Module{kind}"
    return f"Parameter{kind}" if all(isinstance(p, nn.Parameter) for p in parts) else ""


def remove_final_dropout(model: nn.Module, batch: Batch) -> list[Line]:
    """Remove dropout whose output is the model's output."""
    dropped: list[tuple[nn.Module, object]] = []
    recorded = nn.modules.module.register_module_forward_hook(
        lambda m, args, output: dropped.append((m, output))
    )
    with torch.no_grad(), undisturbed(model, training=True), recorded:
        answer = call_model(model, batch[0])
    places = CalledModules(model, batch)
    return [
        places.line(m, "{at} = nn.Identity()")
        for m, output in dropped
        if isinstance(m, nn.modules.dropout._DropoutNd) and output is answer
    ]


def to_float32(model: nn.Module, batch: Batch) -> list[Line]:
    """Convert 16-bit weights to float32."""
    half = any(p.dtype in HALF_TYPES for p in model.parameters())
    return [Line("model", "{at} = {at}.float()  # 16 bits in torch.autocast only")] if half else []


def unfreeze(model: nn.Module, batch: Batch) -> list[Line]:
    """Unfreeze all parameters."""
    frozen = any(not p.requires_grad for p in model.parameters())
    return [Line("model", "{at}.requires_grad_(True)")] if frozen else []


def remove_gradient_hooks(model: nn.Module, batch: Batch) -> list[Line]:
    """Remove hooks that change the gradients of parameters."""
    hooked = any(p._backward_hooks for p in model.parameters())
    code = "for p in {at}.parameters():\n    p._backward_hooks = None  # leave register_hook out"
    return [Line("model", code)] if hooked else []
