"""The modules of a model in the order of a forward pass, with their addresses as code."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.cures.patch import Line, address
from tikhon.data.forward import call_model
from tikhon.data.nested import Batch
from tikhon.diagnosis.observe import NORMS, RECURRENT, WEIGHTED
from tikhon.diagnosis.replica import undisturbed

BOUNDED = (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Softsign, nn.Hardsigmoid)
ACTIVATIONS = (
    *BOUNDED,
    nn.Softmax,
    nn.LogSoftmax,
    nn.Softplus,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
)
BLOCKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class CalledModules:
    """Modules with weights, norms and activations, in the order in which they are called."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        self.address = {m: address(model, path) for path, m in model.named_modules()}
        self.order: list[nn.Module] = []
        self.steps = 0  # the longest sequence of a recurrent layer
        # parts of torch's fused blocks, which read their weights directly: not to be wrapped
        self.fused_parts = {
            part for m in model.modules() if isinstance(m, BLOCKS) for part in m.modules()
        }
        kinds = (*WEIGHTED, *ACTIVATIONS, *NORMS, *RECURRENT)
        with torch.no_grad(), undisturbed(model, training=model.training), ExitStack() as hooks:
            for module in model.modules():
                if isinstance(module, kinds):
                    hooks.enter_context(module.register_forward_hook(self._record))
            call_model(model, batch[0])

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self.order:
            self.order.append(module)
        if isinstance(module, RECURRENT) and args and isinstance(args[0], Tensor):
            self.steps = max(self.steps, args[0].shape[1 if module.batch_first else 0])

    def line(self, module: nn.Module, code: str) -> Line:
        """Return code about a module, with its address."""
        return Line(self.address[module], code)

    def activations_after(self) -> dict[Any, nn.Module | None]:
        """Return the activation after each layer with weights, or None."""
        found: dict[nn.Module, nn.Module | None] = {}
        last: nn.Module | None = None
        for module in self.order:
            if isinstance(module, WEIGHTED):
                found[module] = None
                last = module
            elif isinstance(module, ACTIVATIONS) and last is not None:
                found[last] = found[last] or module
        return found

    def hidden_activations(self) -> list[nn.Module]:
        """Return the activations before the last layer with weights."""
        last = max((i for i, m in enumerate(self.order) if isinstance(m, WEIGHTED)), default=-1)
        return [m for m in self.order[:last] if isinstance(m, ACTIVATIONS)]
