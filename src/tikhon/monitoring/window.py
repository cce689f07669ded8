"""Forward and backward passes between two optimizer steps, and their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tikhon.regularizer.hooks import exclude_from_compile

Probe = tuple[str, Tensor]  # "optimizer" or "model", and a trainable tensor of it
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)  # differ in eval mode


class Window:
    """The passes since the last step, recorded by hooks on a few trainable tensors.

    Just before a backward pass adds to the gradient of a probe, records whether the old one was
    cleared. Exact for every optimizer, and for accumulated micro-batches, of which the first finds
    a cleared gradient.
    """

    def __init__(self, probes: Sequence[Probe], optimizer: Optimizer) -> None:
        self.forwards = 0
        self.unfinished = False  # a forward pass whose backward pass has not run yet
        self.training: bool | None = None  # the mode of the pass that went backward last
        self._mode = True
        self._passes = [0] * len(probes)
        self._owners = [owner for owner, _ in probes]
        self._pending: list[tuple[Tensor, Tensor] | None] = [None] * len(probes)
        self._stale: list[Tensor | None] = [None] * len(probes)
        self._arrived: list[Tensor | None] = [None] * len(probes)
        self._joined: list[Tensor | None] = [None] * len(probes)
        self._last: list[Tensor | None] = [None] * len(probes)  # whether the last pass did
        self._mixed: list[Tensor | None] = [None] * len(probes)
        self._others = 0  # steps of other optimizers
        self._seen = [0] * len(probes)  # those before the last pass
        self.evaluations = 0  # of a closure
        self.attacked = False  # an input of the model has a gradient
        self._kept: list[Tensor] = []  # flags of evaluations of a closure that are over
        self._norms: dict[int, Tensor] = {}

        def stepped(other: Optimizer, args: object, kwargs: object) -> None:
            self._others += other is not optimizer

        self._handles = [register_optimizer_step_post_hook(exclude_from_compile(stepped))]
        for index, (_, parameter) in enumerate(probes):
            self._handles += [
                parameter.register_hook(self._arriving(index, parameter)),
                parameter.register_post_accumulate_grad_hook(self._accumulated(index)),
            ]

    def forward(self, module: nn.Module) -> None:
        """Record a forward pass of the model that builds a graph."""
        self.forwards += 1
        self.unfinished = True
        self._mode = trains(module)

    def evaluation(self) -> None:
        """A closure of the optimizer begins: each of its evaluations clears for itself."""
        self.evaluations += 1
        if any(self._passes):
            self._kept += [flag for flag in self._stale if flag is not None]
            self._stale = [None] * len(self._stale)

    @property
    def norms(self) -> dict[int, Tensor]:
        """Norms of the probes' gradients as the last backward pass left them, by identity."""
        return self._norms

    @property
    def backwards(self) -> int:
        """Backward passes that reached a probe."""
        return max(self._passes, default=0)

    def reached(self, owner: str) -> bool:
        """Whether a backward pass reached a probe of the optimizer or of the model."""
        return any(n for n, whose in zip(self._passes, self._owners) if whose == owner)

    def flags(self) -> list[Tensor]:
        """Of 0 and more: a gradient was never cleared, one was not zero, one was not alone, nor
        was that of the last backward pass, and it is still the one before another's only step.
        """
        stale = self._kept + [flag for flag in self._stale if flag is not None]
        arrived = [flag for flag in self._arrived if flag is not None]
        joined = [flag for flag in self._joined if flag is not None]
        last = [flag for flag in self._last if flag is not None]
        mixed = [f for f in self._mixed if f is not None and self._others == 1]
        return [_any(flags) for flags in (stale, arrived, joined, last, mixed)]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arriving(self, index: int, parameter: Tensor) -> object:
        def hook(gradient: Tensor) -> None:
            old = parameter.grad
            if gradient.layout != torch.strided or torch.compiler.is_compiling():
                return
            kept = _nonzero(old) if old is not None else gradient.new_zeros((), dtype=torch.float)
            self._pending[index] = (kept, _nonzero(gradient))

        return hook

    def _accumulated(self, index: int) -> object:
        def hook(parameter: Tensor) -> None:
            self._passes[index] += 1
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                norm = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32)
                self._norms[id(parameter)] = norm
            self.training, self.unfinished = self._mode, False
            pending, self._pending[index] = self._pending[index], None
            if pending is None:  # sparse gradients tell nothing about the old one
                return
            stale, arrived = self._stale[index], self._arrived[index]
            self._stale[index] = pending[0] if stale is None else stale * pending[0]
            joined = self._joined[index]  # any pass that found an older gradient
            self._joined[index] = pending[0] if joined is None else joined + pending[0]
            self._last[index] = pending[0]
            between = self._passes[index] > 1 and self._others > self._seen[index]
            self._seen[index] = self._others
            self._mixed[index] = pending[0] if between else _both(self._mixed[index], pending[0])
            self._arrived[index] = pending[1] if arrived is None else arrived + pending[1]

        return hook


def trains(model: nn.Module) -> bool:
    """Whether a layer that differs in eval mode is in train mode, or none is meant to be.

    Layers of frozen parts, and those that were put into eval mode one by one (their parent trains
    on), are meant as they are.
    """
    modes = [
        parent.training or layer.training
        for parent in model.modules()
        for layer in parent.children()
        if isinstance(layer, _MODAL) and any(p.requires_grad for p in parent.parameters())
    ]
    return any(modes) or not modes


def probes_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Probe]:
    """A small tensor from the front and the back of the optimizer, and of the model's first layer.

    Sharded tensors are left out: backward passes reach their gathered copies.
    """
    held = [p for g in optimizer.param_groups for p in g["params"] if readable(p)]
    ends = [min(part, key=Tensor.numel) for part in (held[:4], held[-4:]) if part]
    own = [p for p in model.parameters() if readable(p)]
    known = {id(p) for p in own}
    chosen: dict[int, Probe] = {id(p): ("model", p) for p in own[:1]}
    chosen |= {id(p): ("optimizer", p) for p in ends}
    first = ends[0] if ends else None
    if first is not None and id(first) in known:  # a probe of both
        chosen = {k: v for k, v in chosen.items() if v[0] == "optimizer"}
    return list(chosen.values())


def readable(parameter: Tensor) -> bool:
    """Whether gradients arrive at the tensor itself: a trained leaf that is not cut in parts."""
    return parameter.requires_grad and parameter.is_leaf and not hasattr(parameter, "to_local")


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.detach().count_nonzero().clamp(max=1).float()


def _both(known: Tensor | None, flag: Tensor) -> Tensor | None:
    return None if known is None else known * flag


def _any(flags: list[Tensor]) -> Tensor:
    if not flags:
        return torch.zeros(())
    return torch.stack([flag.to(flags[0].device) for flag in flags]).amax()
