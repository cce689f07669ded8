"""Forward and backward passes between two optimizer steps, and their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tikhon.regularizer.hooks import exclude_from_compile

_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)  # differ in eval mode


@dataclass
class GradientProbe:
    """A trainable tensor, and what the backward passes that reached it found.

    The flags are 0-d tensors on its device, above zero for yes; None before the first pass.
    """

    owner: str  # "optimizer" or "model"
    parameter: Tensor
    passes: int = 0
    pending: tuple[Tensor, Tensor] | None = None  # old and new gradient are not zero, in a pass
    uncleared: Tensor | None = None  # every pass found an older gradient
    gradient_arrived: Tensor | None = None  # a new gradient was not zero
    accumulated: Tensor | None = None  # a pass found an older gradient
    last_accumulated: Tensor | None = None  # the last pass did
    mixed_losses: Tensor | None = None  # it is from before the step of another optimizer
    other_steps: int = 0  # steps of other optimizers before the last pass

    def add_pass(self, other_steps: int) -> None:
        """Add the flags of a backward pass that has reached the tensor."""
        self.passes += 1
        if self.pending is None:  # sparse gradients tell nothing about the old one
            return
        (old, new), self.pending = self.pending, None
        self.uncleared = old if self.uncleared is None else self.uncleared * old
        self.accumulated = old if self.accumulated is None else self.accumulated + old
        self.last_accumulated = old
        if self.passes > 1 and other_steps > self.other_steps:
            self.mixed_losses = old
        elif self.mixed_losses is not None:
            self.mixed_losses = self.mixed_losses * old
        self.other_steps = other_steps
        arrived = self.gradient_arrived
        self.gradient_arrived = new if arrived is None else arrived + new


class PassRecorder:
    """The passes since the last step, recorded by hooks on a few trainable tensors.

    Just before a backward pass adds to the gradient of a probe, records whether the old one was
    cleared. Exact for every optimizer, and for accumulated micro-batches, of which the first finds
    a cleared gradient.
    """

    def __init__(self, probes: Sequence[GradientProbe], optimizer: Optimizer) -> None:
        self.forwards = 0
        self.unfinished = False  # a forward pass whose backward pass has not run yet
        self.training: bool | None = None  # the mode of the pass that went backward last
        self.evaluations = 0  # of a closure
        self.input_gradient = False  # an input of the model has a gradient
        self.norms: dict[
            int, Tensor
        ] = {}  # of gradients after the last backward pass, by identity
        self._probes = probes
        self._mode = True
        self.other_steps = 0  # of other optimizers
        self._closure_flags: list[Tensor] = []  # of evaluations of a closure that are over

        def count_step(other: Optimizer, args: object, kwargs: object) -> None:
            self.other_steps += other is not optimizer

        self._handles = [register_optimizer_step_post_hook(exclude_from_compile(count_step))]
        for probe in probes:
            parameter = probe.parameter
            self._handles += [
                parameter.register_hook(self._before_accumulation(probe)),
                parameter.register_post_accumulate_grad_hook(self._after_accumulation(probe)),
            ]

    def forward(self, module: nn.Module) -> None:
        """Record a forward pass of the model that builds a graph."""
        self.forwards += 1
        self.unfinished = True
        self._mode = is_training_mode(module)

    def evaluation(self) -> None:
        """A closure of the optimizer begins: each of its evaluations clears for itself."""
        self.evaluations += 1
        for probe in self._probes:
            if probe.uncleared is not None:
                self._closure_flags.append(probe.uncleared)
                probe.uncleared = None

    @property
    def backwards(self) -> int:
        """Backward passes that reached a probe."""
        return max((probe.passes for probe in self._probes), default=0)

    def reached(self, owner: str) -> bool:
        """Whether a backward pass reached a probe of the optimizer or of the model."""
        return any(probe.passes for probe in self._probes if probe.owner == owner)

    def flags(self) -> dict[str, list[Tensor]]:
        """The flags of all probes by name, each above zero if it is so of any of them."""
        names = (
            "uncleared",
            "gradient_arrived",
            "accumulated",
            "last_accumulated",
            "mixed_losses",
        )
        found = {
            name: [flag for probe in self._probes if (flag := getattr(probe, name)) is not None]
            for name in names
        }
        found["uncleared"] += self._closure_flags
        if self.other_steps != 1:  # alternating optimizers alone are judged
            found["mixed_losses"] = []
        return {name: [_any(flags)] for name, flags in found.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_accumulation(self, probe: GradientProbe) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            old = probe.parameter.grad
            if gradient.layout != torch.strided or torch.compiler.is_compiling():
                return
            nothing = gradient.new_zeros((), dtype=torch.float)
            is_set = _nonzero(old) if old is not None else nothing
            probe.pending = (is_set, _nonzero(gradient))

        return hook

    def _after_accumulation(self, probe: GradientProbe) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                norm = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32)
                self.norms[id(parameter)] = norm
            self.training, self.unfinished = self._mode, False
            probe.add_pass(self.other_steps)

        return hook


def is_training_mode(model: nn.Module) -> bool:
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


def choose_probes(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[GradientProbe]:
    """A small tensor from the front and the back of the optimizer, and of the model's first layer.

    Sharded tensors are left out: backward passes reach their gathered copies.
    """
    optimized = [p for g in optimizer.param_groups for p in g["params"] if receives_gradients(p)]
    ends = [min(part, key=Tensor.numel) for part in (optimized[:4], optimized[-4:]) if part]
    own = [p for p in model.parameters() if receives_gradients(p)]
    shared = bool(ends) and id(ends[0]) in {id(p) for p in own}  # one of both suffices
    chosen = {} if shared else {id(p): GradientProbe("model", p) for p in own[:1]}
    return list((chosen | {id(p): GradientProbe("optimizer", p) for p in ends}).values())


def receives_gradients(parameter: Tensor) -> bool:
    """Whether gradients arrive at the tensor itself: a trained leaf that is not cut in parts."""
    return parameter.requires_grad and parameter.is_leaf and not hasattr(parameter, "to_local")


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.detach().count_nonzero().clamp(max=1).float()


def _any(flags: list[Tensor]) -> Tensor:
    if not flags:
        return torch.zeros(())
    return torch.stack([flag.to(flags[0].device) for flag in flags]).amax()
