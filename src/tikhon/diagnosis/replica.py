"""Copies: what is tried on a replica leaves the user's model, optimizer and generators alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.diagnosis.feed import Batch, call
from tikhon.errors import InputError

if TYPE_CHECKING:
    from tikhon.regularizer.regularizer import Regularizer

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Replica:
    """A copy of the model with its own optimizer, its loss and what is added to the loss."""

    model: nn.Module
    loss: Loss
    optimizer: Optimizer | None = None
    penalty: Callable[[nn.Module], Tensor | float] | None = None
    clip: float | None = None
    terms: Any = None  # penalties as for `regularize`; `attach` puts them on the optimizer
    regularizer: Regularizer | None = None
    left_out: frozenset[int] = frozenset()  # ids of parameters that no group holds
    patch: str = ""  # the code that a treatment ran
    finish: Callable[[], Any] | None = None  # what a treatment does after training

    def value(self, batch: Batch) -> Tensor:
        """The data loss on a batch; raises `InputError` where it is not a number."""
        inputs, target = batch
        try:
            value = self.loss(call(self.model, inputs), target)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError) as error:
            raise InputError(explain(error, self.model, batch)) from error
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        if value.ndim and value.numel() != 1:
            raise InputError(
                f"the loss returned shape {tuple(value.shape)}, one number is needed; "
                "use reduction='mean' or take .mean()"
            )
        return value.reshape(())

    def extra(self) -> Tensor | float:
        """What the user's penalty adds to the loss."""
        return self.penalty(self.model) if self.penalty is not None else 0.0

    def attach(self) -> Replica:
        """Put the penalty terms on the optimizer, as the user's own program has them."""
        if self.terms is not None:
            from tikhon.regularizer.regularizer import regularize

            assert self.optimizer is not None
            self.regularizer = regularize(self.model, self.optimizer, self.terms)
        return self


def unwrap(model: nn.Module) -> nn.Module:
    """The eager module behind `torch.compile` and the data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def replicate(
    model: nn.Module,
    loss: Loss,
    optimizer: Any = None,
    *,
    penalty: Any = None,
    clip: float | None = None,
) -> Replica:
    """A replica of a model and of the optimizer bound to it, state and groups included.

    `optimizer` may be an instance bound to the model or a factory called with the parameters.
    """
    model = unwrap(model)
    while hasattr(optimizer, "optimizer") and not isinstance(optimizer, Optimizer):
        optimizer = optimizer.optimizer
    bound = isinstance(optimizer, Optimizer)
    try:
        twin, engine = copy.deepcopy((model, optimizer if bound else None))
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition(".")[0]
        raise InputError(
            f"the model cannot be copied ({reason}); diagnose works on copies, so the model must "
            "survive copy.deepcopy: keep no intermediate tensors of a forward pass on it"
        ) from error
    if bound:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in model.parameters()):
            raise InputError(
                "the optimizer holds none of the model's parameters; build it from "
                "model.parameters(), or pass a factory such as lambda p: torch.optim.Adam(p)"
            )
        assert engine is not None
        engine.zero_grad(set_to_none=True)
    elif optimizer is not None:
        if not callable(optimizer):
            raise InputError(
                "optimizer must be a torch optimizer or a factory called with the parameters, "
                f"received {type(optimizer).__name__}"
            )
        trainable = [p for p in twin.parameters() if p.requires_grad]
        engine = cast(Optimizer, optimizer(trainable)) if trainable else None
    terms = penalty if penalty is not None and not callable(penalty) else None
    if terms is not None and engine is None:
        raise InputError("penalty terms need an optimizer; pass one, or a callable penalty")
    known = {id(p) for g in (engine.param_groups if engine else ()) for p in g["params"]}
    left_out = frozenset(id(p) for p in twin.parameters() if id(p) not in known)
    added: Any = None if terms is not None else penalty
    return Replica(twin, loss, engine, added, clip, terms, left_out=left_out)


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python start from `seed` and are put back afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def undisturbed(model: nn.Module, *, training: bool, seed: int = 0) -> Iterator[None]:
    """A look at a model in the middle of training: buffers, mode, gradients and random numbers

    are as before afterwards.
    """
    buffers = [b.detach().clone() for b in model.buffers()]
    modes = [m.training for m in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.train(training)
        try:
            yield
        finally:
            for module, mode in zip(model.modules(), modes):
                module.training = mode
            with torch.no_grad():
                for now, before in zip(model.buffers(), buffers):
                    if now.shape == before.shape:
                        now.copy_(before)


def explain(error: Exception, model: nn.Module, batch: Batch) -> str:
    """A sentence for an error inside the user's model or loss."""
    from tikhon.diagnosis.feed import tensors

    facts = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(batch[0]))
    target = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(batch[1]))
    text = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    hint = ""
    if "mat1" in text or "bias type" in text:
        hint = "; give the inputs the dtype of the model, with .to(dtype)"
    elif "out of bounds" in text:
        hint = "; classes go from 0 to the number of outputs - 1"
    elif any(word in text.lower() for word in ("dtype", "long", "float", "scalar type")):
        hint = "; check the dtype of the targets (cross entropy: int64 classes, mse: floats)"
    elif "device" in text:
        hint = "; move the model and the data to one device"
    elif "argument" in text:
        hint = "; several inputs are given as a tuple, named ones as a dictionary"
    elif "shape" in text or "size" in text:
        hint = "; compare the shapes of output and target"
    return (
        f"{type(model).__name__} or its loss failed on a batch with inputs {facts} and target "
        f"{target}: {text}{hint}"
    )
