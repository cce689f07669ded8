"""Where the parts of a model stand, in the order in which a forward pass calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tikhon.cures.patch import Line, address
from tikhon.data.rows import Batch, call
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


class Places:
    """The modules of a model by their address, in the order in which a forward pass calls them."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        self.address = {m: address(model, path) for path, m in model.named_modules()}
        self.order: list[nn.Module] = []
        self.steps = 0  # time steps that a recurrent layer reads
        # torch's own blocks read the weights of their parts: nothing may be put around these
        self.sealed = {
            part for m in model.modules() if isinstance(m, BLOCKS) for part in m.modules()
        }
        kinds = (*WEIGHTED, *ACTIVATIONS, *NORMS, *RECURRENT)
        chosen = [m for m in model.modules() if isinstance(m, kinds)]
        handles = [m.register_forward_hook(self._note) for m in chosen]
        try:
            with torch.no_grad(), undisturbed(model, training=model.training):
                call(model, batch[0])
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if module not in self.order:
            self.order.append(module)
        if isinstance(module, RECURRENT) and args and isinstance(args[0], Tensor):
            self.steps = max(self.steps, args[0].shape[1 if module.batch_first else 0])

    def line(self, module: nn.Module, code: str) -> Line:
        """Code about a module at its place."""
        return Line(self.address[module], code)

    def followers(self) -> dict[Any, nn.Module | None]:
        """The activation behind each layer with weights; None for the head."""
        found: dict[nn.Module, nn.Module | None] = {}
        last: nn.Module | None = None
        for module in self.order:
            if isinstance(module, WEIGHTED):
                found[module] = None
                last = module
            elif isinstance(module, ACTIVATIONS) and last is not None:
                found[last] = found[last] or module
        return found

    def hidden(self) -> list[nn.Module]:
        """The activations before the last layer."""
        last = max((i for i, m in enumerate(self.order) if isinstance(m, WEIGHTED)), default=-1)
        return [m for m in self.order[:last] if isinstance(m, ACTIVATIONS)]
