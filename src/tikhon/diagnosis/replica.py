"""Copies, which leave the user's model, optimizer and random generators untouched."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.copying import copy_with_model
from tikhon.data.forward import (
    LossFunction,
    call_model,
    call_with_gradients,
    forward,
    loss_takes_model,
)
from tikhon.data.nested import Batch, join_batch, map_tensors, tensors
from tikhon.errors import InputError
from tikhon.regularizer.optimizers import inner_optimizer, wrapped_optimizers
from tikhon.regularizer.regularizer import regularize
from tikhon.training.step import backward, backward_failed
from tikhon.wrappers import modes_restored, unwrap

if TYPE_CHECKING:
    from tikhon.diagnosis.samples import Samples
    from tikhon.regularizer.regularizer import Regularizer


@dataclass
class Replica:
    """A copy of the model with its optimizer, loss and penalties."""

    model: nn.Module
    loss: LossFunction
    optimizer: Optimizer | None = None
    penalty: Callable[[nn.Module], Tensor | float] | None = None
    clip: float | None = None
    terms: Any = None  # penalties as for `regularize`; `attach` puts them on the optimizer
    regularizer: Regularizer | None = None
    left_out: frozenset[int] = frozenset()  # ids of parameters not in the optimizer
    patch: str = ""  # the code that a treatment ran
    source: Samples | None = None  # set by treatments that change the rows
    copies: bool = False  # model or loss change their batches in place
    finish: Callable[[], Any] | None = None  # called after training

    @property
    def whole(self) -> bool:
        """Whether the loss calls the model itself: `loss(model, batch)`, or the model's own."""
        return loss_takes_model(self.loss)

    def given(self, batch: Batch) -> Batch:
        """Return what model and loss are given: a copy of the batch where they change it."""
        return map_tensors(batch, torch.clone) if self.copies else batch

    def value(self, batch: Batch) -> Tensor:
        """Return the data loss on a batch; raise `InputError` if it fails or is no scalar."""
        batch = self.given(batch)
        try:
            if self.whole:
                return scalar_loss(
                    call_with_gradients(lambda: self.loss(self.model, join_batch(batch)))
                )
            return scalar_loss(self.loss(call_model(self.model, batch[0]), batch[1]))
        except InputError:
            raise
        except Exception as error:  # the user's model and loss may raise anything
            raise InputError(explain(error, self.model, batch)) from error

    def outcome(self, batch: Batch) -> tuple[Any, Tensor]:
        """Return (output, loss) on a batch; output is None if the loss calls the model itself."""
        if self.whole:
            return None, self.value(batch)
        batch = self.given(batch)
        output = call_model(self.model, batch[0])
        return output, scalar_loss(self.loss(output, batch[1]))

    def extra(self) -> Tensor | float:
        """Return the user's penalty."""
        return self.penalty(self.model) if self.penalty is not None else 0.0

    def attach(self) -> Replica:
        """Attach the penalty terms to the optimizer, as the user's program does."""
        if self.terms is not None:
            assert self.optimizer is not None
            self.regularizer = regularize(self.model, self.optimizer, self.terms)
        return self


def scalar_loss(value: object) -> Tensor:
    """Return the loss as a 0-d tensor; raise `InputError` if it is not one number."""
    if value is None:
        raise InputError("the loss returned None, one number is needed; does it lack a `return`?")
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if value.numel() != 1:
        raise InputError(
            f"the loss returned shape {tuple(value.shape)}, one number is needed; "
            "use reduction='mean' or take .mean()"
        )
    return value.reshape(())


def own_loss(model: nn.Module, batch: object) -> Tensor:
    """Return the loss that a model computes itself: `training_step`, or `.loss` of its output.

    Used for `loss=None`, with a Lightning module or a Hugging Face model.
    """
    step = getattr(model, "training_step", None)
    try:
        result = step(batch, 0) if callable(step) else forward(model, batch)
    except TypeError as error:
        raise InputError(_without_loss(model, f"it cannot take the batch: {error}")) from error
    if isinstance(result, Mapping):
        result = result.get("loss")
    elif not isinstance(result, Tensor):
        result = getattr(result, "loss", None)
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise InputError(_without_loss(model, "neither training_step nor .loss of its output"))
    return result


def own_optimizer(model: nn.Module) -> Optimizer | None:
    """Return the optimizer of `configure_optimizers` of a Lightning module.

    None if there is none, it needs a trainer, or there are several, each with its own loss.
    """
    configure = getattr(model, "configure_optimizers", None)
    if not callable(configure):
        return None
    try:
        given = configure()
    except Exception:
        return None
    if isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], Sequence):
        given = given[0]  # and their schedules
    if isinstance(given, Sequence):
        given = given[0] if len(given) == 1 else None
    if isinstance(given, Mapping):
        given = given.get("optimizer")
    return given if isinstance(given, Optimizer) else None


def _without_loss(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} gives no loss of its own ({reason}); "
        "pass loss(output, target) or loss(model, batch)"
    )


def gradients(loss: Tensor, wanted: list[Tensor], model: nn.Module) -> list[Tensor | None]:
    """Return gradients of a loss; None for tensors that it does not depend on.

    Reentrant checkpoints reject `torch.autograd.grad`; there, runs a full backward pass and
    restores `.grad`. Raises `InputError` if the backward pass of the user's model fails.
    """
    if not loss.requires_grad or not wanted:
        return [None] * len(wanted)
    try:
        return list(torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True))
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise InputError(backward_failed(error, model)) from error
    kept = [w.grad for w in wanted]
    try:
        for w in wanted:
            w.grad = None
        backward(loss, model)
        return [w.grad for w in wanted]
    finally:
        for w, before in zip(wanted, kept):
            w.grad = before


def replicate(
    model: nn.Module,
    loss: LossFunction | None,
    optimizer: Any = None,
    *,
    penalty: Any = None,
    clip: float | None = None,
) -> Replica:
    """Copy a model and the optimizer bound to it, with state and groups.

    `optimizer` may be an instance bound to the model or a factory called with the parameters.
    """
    model = unwrap(model)
    loss = own_loss if loss is None else loss
    if not isinstance(optimizer, Optimizer) and wrapped_optimizers(optimizer):
        optimizer = inner_optimizer(optimizer)
    bound = isinstance(optimizer, Optimizer)
    try:
        twin, engine = copy_with_model(model, (model, optimizer if bound else None))
        copy_gradient_hooks(model, twin)
    except Exception as error:  # locks, files, tensors of a graph: anything a model may hold
        reason = str(error).partition(".")[0] or type(error).__name__
        raise InputError(
            f"the model cannot be copied ({reason}); diagnose works on copies, so the model must "
            "survive copy.deepcopy"
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


def copy_gradient_hooks(model: nn.Module, twin: nn.Module) -> None:
    """Copy the user's gradient hooks on parameters, which deepcopy loses."""
    for own, other in zip(model.parameters(), twin.parameters()):
        for hook in (own._backward_hooks or {}).values():
            module = getattr(getattr(hook, "func", hook), "__module__", "") or ""
            if not module.startswith("tikhon.") and other.requires_grad:
                other.register_hook(hook)


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python, and restore their states afterwards."""
    devices = _gpus(model)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), warnings.catch_warnings():
        # reported once, as a finding
        warnings.filterwarnings("ignore", message="Using a target size")
        _seed(seed, devices)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _gpus(model: nn.Module) -> list[int]:
    """Return the indices of the GPUs that hold parameters."""
    if not torch.cuda.is_initialized():
        return []
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _seed(seed: int, devices: Sequence[int]) -> None:
    """Seed the CPU and these GPUs only: `torch.manual_seed` also seeds generators not forked here.

    It also stores the call stack for each device type not yet in use, which is slow.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(seed)


@contextmanager
def undisturbed(model: nn.Module, *, training: bool, seed: int = 0) -> Iterator[None]:
    """Evaluate a model during training; restore buffers, modes and random states afterwards."""
    buffers = [b.detach().clone() for b in model.buffers()]
    devices = _gpus(model)
    state = random.getstate()
    forked = torch.random.fork_rng(devices=devices)
    with forked, _numpy_seeded(seed), modes_restored(model):
        _seed(seed, devices)
        random.seed(seed)
        model.train(training)
        try:
            yield
        finally:
            random.setstate(state)
            with torch.no_grad():
                for now, before in zip(model.buffers(), buffers):
                    if now.shape == before.shape:
                        now.copy_(before)


_IDLE: list[np.random.BitGenerator] = []


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Swap the generator behind `np.random`, which is far cheaper than to copy its state.

    A cached second normal draw is lost; `isolated` restores the user's.
    """
    own = np.random.mtrand.get_bit_generator()
    other = _IDLE.pop() if _IDLE else np.random.MT19937()
    np.random.mtrand.set_bit_generator(other)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.mtrand.set_bit_generator(own)
        _IDLE.append(other)


# (parts of torch's error messages in lower case, hint); the first match is used
HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("shapes cannot be multiplied",),
        "the first layer is made for rows of another width, or the inputs lack a flatten",
    ),
    (("mat1", "bias type"), "give the inputs the dtype of the model, with .to(dtype)"),
    (("out of bounds",), "classes go from 0 to the number of outputs - 1"),
    (
        ("var has negative",),
        "gaussian_nll_loss is for variances: F.softplus(output), or output.exp() of a logarithm",
    ),
    (
        ("more than 1 value per channel",),
        "BatchNorm cannot train on one row: drop_last=True in the loader",
    ),
    (
        ("multi-target not supported", "class probabilities, got long"),
        "the target is one class number a row: y.argmax(1) of one-hot rows, y.squeeze(1)",
    ),
    (
        ("between 0 and 1",),
        "binary_cross_entropy wants probabilities: use binary_cross_entropy_with_logits",
    ),
    (
        ("the same as input size", "must be the same as the input"),
        "give target and output one shape, as with target.view_as(output)",
    ),
    (
        ("dtype", "long", "float", "scalar type"),
        "check the dtype of the targets (cross entropy: int64 classes, mse: floats)",
    ),
    (
        ("object is not callable",),
        "a loss that calls the model is a function whose first parameter is named model",
    ),
    (("device",), "move the model and the data to one device"),
    (("argument",), "several inputs are given as a tuple, named ones as a dictionary"),
    (("shape", "size"), "compare the shapes of output and target"),
)


# error messages about outputs and targets of different length
OTHER_ROWS = (
    r"batch_size \((?P<out>\d+)\) to match target batch_size \((?P<rows>\d+)\)",
    r"Target size \(\D*(?P<rows>\d+).* input size \(\D*(?P<out>\d+)",
    r"tensor a \((?P<out>\d+)\) .* tensor b \((?P<rows>\d+)\) at non-singleton dimension 0",
)


def _first_axis(text: str, model: nn.Module, batch: Batch) -> str:
    """Return a hint for a model with one output per time step instead of per row."""
    counts = next((found for form in OTHER_ROWS if (found := re.search(form, text))), None)
    steps = {t.shape[1] for t in tensors(batch[0]) if t.ndim > 1}
    rows = {len(t) for t in tensors(batch[1]) if t.ndim}
    if counts is None or int(counts["out"]) not in steps - rows or int(counts["rows"]) not in rows:
        return ""
    kinds = nn.RNNBase | nn.MultiheadAttention
    timed = [m for m in model.modules() if isinstance(m, kinds) and not m.batch_first]
    if timed:
        kind = type(timed[0]).__name__
        return f"{kind} takes the first axis for the time: nn.{kind}(..., batch_first=True)"
    return "out[-1] is the last row of the batch, the last step is out[:, -1]"


def _odd_shares(text: str, target: object) -> str:
    """Return a hint for binary targets outside 0 to 1."""
    if "between 0 and 1" not in text or not isinstance(target, Tensor):
        return ""
    low, high = float(target.min()), float(target.max())
    return (
        "" if 0 <= low <= high <= 1 else f"the targets go from {low:g} to {high:g}: give 0 and 1"
    )


def explain(error: Exception, model: nn.Module, batch: Batch) -> str:
    """Explain an error inside the user's model or loss."""
    facts = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(batch[0]))
    target = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(batch[1]))
    text = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    lower = text.lower()
    hint = _first_axis(text, model, batch) or _odd_shares(lower, batch[1])
    hint = hint or next((then for words, then in HINTS if any(w in lower for w in words)), "")
    return (
        f"{type(model).__name__} or its loss failed on a batch with inputs {facts} and target "
        f"{target}: {text}" + (f"; {hint}" if hint else "")
    )
