"""The table of losses by name, torch function, torch module or callable; aligns shapes."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.data.forward import LossFunction, call_model, call_with_gradients, loss_takes_model
from tikhon.data.nested import Batch, join_batch
from tikhon.errors import InputError, describe_misplaced, unknown_name

Kind = Literal["classes", "binary", "numbers", "custom", "whole"]


@dataclass(frozen=True)
class Link:
    """Map outputs to the unit of the targets (`to_targets`) and back (`to_outputs`)."""

    to_targets: Callable[[Tensor], Tensor]
    to_outputs: Callable[[Tensor], Tensor]


LOG = Link(torch.exp, lambda answer: answer.clamp_min(1e-6).log())  # for predicted counts
PROBABILITY = Link(lambda output: output.logit(1e-6), torch.sigmoid)  # scored by the logits
IGNORED = -100  # class index that a torch loss leaves out by default


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss of (output, target) that aligns their shapes before comparing them.

    (rows, 1) counts as (rows,), which torch would broadcast to rows x rows. Other mismatches
    raise. `kind` decides how a model is scored: "classes" (outputs (rows, classes), targets of
    class indices), "binary" (logits for targets 0 and 1), "numbers", "custom" (decided by the
    targets), or "whole" (a user's own `loss(model, batch)` that calls the model itself).

    `entries`, if any, is the elementwise loss (for classes: one value for each class index) whose
    mean is `function`. `link`, if any, maps outputs to the unit of the targets.
    """

    name: str
    function: LossFunction
    kind: Kind = "custom"
    entries: LossFunction | None = None
    link: Link | None = None
    _broadcasting: dict[bool, bool] = field(default_factory=dict, repr=False)

    @property
    def ignored(self) -> int:
        """Class index of targets that the loss leaves out: torch's `ignore_index`."""
        return getattr(self.function, "ignore_index", IGNORED)

    @property
    def for_strengths(self) -> LossFunction:
        """The loss for adaptive strengths: of (output, target); (model, batch) if "whole"."""
        return self.function if self.kind == "whole" else self

    def on(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the forward pass on a batch (inputs, target); return its mean loss, 0-d."""
        if self.kind != "whole":
            return self(call_model(model, batch[0]), batch[1])
        return self._check_scalar(
            call_with_gradients(lambda: self.function(model, join_batch(batch)))
        )

    def __call__(self, output: object, target: object) -> Tensor:
        """Return the mean loss of a batch, 0-d.

        Raises `InputError` for mismatched shapes and for outputs that are not a tensor.
        """
        output, target = self.align(output, target)
        try:
            value = self.function(output, target)
        except (IndexError, TypeError, RuntimeError) as error:
            raise self._explain(error, output, target) from error
        return self._check_scalar(value)

    def _check_scalar(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(
                f"the loss {self.name} returned {type(value).__name__}, and one number is needed, "
                "as a tensor with gradients"
            )
        if value.ndim:
            raise InputError(
                f"the loss {self.name} returned shape {tuple(value.shape)}, not one number; "
                "use reduction='mean' or take .mean()"
            )
        return value

    def rows(self, output: Any, target: Any) -> Tensor:
        """Return the loss of each row, (rows,), of a loss that is a mean over rows."""
        if self.entries is None:
            pairs = zip(output.split(1), target.split(1))
            return torch.stack([self(o, t) for o, t in pairs])
        output, target = self.align(output, target)
        try:
            return self.entries(output, target).reshape(len(output), -1).mean(1)
        except IndexError as error:
            raise self._explain(error, output, target) from error

    def _explain(self, error: Exception, output: Any, target: Any) -> Exception:
        """Explain an out-of-range class index or a wrong signature by an `InputError`.

        Returns other errors unchanged.
        """
        if "'Tensor' object is not callable" in str(error):
            return InputError(f"the loss {self.name} calls its output ({error}): {SIGNATURES}")
        if "between 0 and 1" in str(error) and self.link is PROBABILITY:
            least, most = float(output.min()), float(output.max())
            return InputError(
                f"{self.name} needs probabilities, received outputs from {least:.3g} to {most:.3g}"
                ": end the model in a sigmoid, or use BCEWithLogitsLoss"
            )
        is_index = isinstance(error, IndexError) and self.kind == "classes"
        if not is_index or target.is_floating_point():
            return error
        given_range = f"{int(target.min())} to {int(target.max())}"
        return InputError(
            f"{self.name} needs classes numbered 0 to {output.shape[1] - 1}, one for each output, "
            f"received classes {given_range}: renumber them, for example with "
            "y = torch.unique(y, return_inverse=True)[1]"
        )

    def targets(self, y: Tensor) -> Tensor:
        """Convert targets to the type of this loss: for "numbers", integers become floats."""
        if self.kind == "numbers" and not y.is_floating_point():
            return y.to(torch.get_default_dtype())
        if self.kind == "classes" and y.ndim > 2 and y.numel() == len(y):
            return y.reshape(-1)  # one class index for each row, despite extra axes of size 1
        return y

    def predictions(self, output: Tensor) -> Tensor:
        """Map outputs to the unit of the targets, such as log rates to rates."""
        return output if self.link is None else self.link.to_targets(output)

    def outputs(self, answer: Tensor) -> Tensor:
        """Map predictions in the unit of the targets back to outputs."""
        return answer if self.link is None else self.link.to_outputs(answer)

    def align(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Return output and target in the shapes and types the loss compares."""
        if self.kind != "custom" and not isinstance(output, Tensor):
            raise InputError(
                f"{self.name} needs a model that returns one tensor, it returned "
                f"{type(output).__name__}: give a loss of your own that picks what is compared, "
                "such as lambda output, y: F.cross_entropy(output[0], y)"
            )
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return output, target
        if self.kind == "classes":
            return output, _align_classes(self.name, output, target)
        if self.kind in ("numbers", "binary"):
            return _align_numbers(self.name, output, target), target.to(output.dtype)
        if output.shape != target.shape and _same_but_unit_axes(output, target):
            column = output.ndim > target.ndim
            if column not in self._broadcasting:
                self._broadcasting[column] = broadcasts(self.function, column=column)
            if self._broadcasting[column]:
                return output.reshape(target.shape), target
        return output, target


def _per_row(function: Callable[..., Tensor]) -> LossFunction:
    return partial(function, reduction="none")


def _half_mse(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """1/(2m) * sum((y - yhat)**2): the loss in textbook lasso and ridge."""
    return 0.5 * F.mse_loss(output, target, reduction=reduction)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", F.cross_entropy, "classes", _per_row(F.cross_entropy)),
        Loss("nll", F.nll_loss, "classes", _per_row(F.nll_loss)),
        Loss(
            "bce",
            F.binary_cross_entropy_with_logits,
            "binary",
            _per_row(F.binary_cross_entropy_with_logits),
        ),
        Loss("mse", F.mse_loss, "numbers", _per_row(F.mse_loss)),
        Loss("half_mse", _half_mse, "numbers", _per_row(_half_mse)),
        Loss("mae", F.l1_loss, "numbers", _per_row(F.l1_loss)),
        Loss("huber", F.huber_loss, "numbers", _per_row(F.huber_loss)),
    )
}
NAMES = tuple(LOSSES)
SIGNATURES = (
    "a loss takes (output, target), a step of your own that calls the model (model, batch)"
)
_ALIASES = {"bce_with_logits": "bce", "squared": "mse", "l1": "mae"}
_ALIASES |= {
    cast(Any, loss.function).__name__: loss.name for loss in LOSSES.values()
}  # names of torch functions
_ALIASES |= dict.fromkeys(("smooth_l1", "smooth_l1_loss"), "huber")  # equal at the default beta
_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll",
    nn.BCEWithLogitsLoss: "bce",
    nn.MSELoss: "mse",
    nn.L1Loss: "mae",
    nn.HuberLoss: "huber",
}
_ENTRYWISE = (nn.SmoothL1Loss, nn.PoissonNLLLoss)  # output and target have the same shape
_ENTRYWISE_FUNCTIONS = (F.smooth_l1_loss, F.poisson_nll_loss)


def loss_of(loss: object, y: Tensor | None = None) -> Loss:
    """Return the `Loss` for a name, a torch function or module, or a callable.

    A callable takes (model, batch) if its first parameter is named model or its second batch, and
    (output, target) otherwise. "auto" is mean squared error for float targets `y` and
    cross-entropy for class indices. A torch loss with mean reduction gives the same `Loss` in any
    form.

    Raises `InputError` for an unknown name (suggesting the closest), for what cannot be called,
    and for "auto" with one-hot targets.

    >>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])
    >>> [float(loss_of(loss)(x, y)) for loss in ("mse", F.mse_loss, nn.MSELoss(), "half_mse")]
    [2.0, 2.0, 2.0, 1.0]
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        auto = "mse" if y is not None and y.is_floating_point() else "cross_entropy"
        if loss == "auto" and y is not None and _is_one_hot(y):
            raise InputError(
                f"every row of the targets, of shape {tuple(y.shape)}, holds one 1 and zeros: for "
                "classes give their numbers, y.argmax(1); to train on them as numbers give "
                "loss='mse'"
            )
        return LOSSES[auto if loss == "auto" else canonical_name(loss)]
    if not callable(loss):
        raise InputError(
            f"loss must be a name ({', '.join(NAMES)}) or a callable of (output, target) or of "
            f"(model, batch) that gives one number, received {describe_misplaced(loss)}"
        )
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise InputError(f"loss is the class {loss.__name__}, give an object: {loss.__name__}()")
    if isinstance(loss, nn.Module):
        return _of_module(loss)
    for entry in LOSSES.values():
        if loss is entry.function:
            return entry
    if not _takes_two_arguments(loss):
        raise InputError(f"the loss {loss_name(loss)} does not take two arguments: {SIGNATURES}")
    if loss_takes_model(loss):
        return Loss(loss_name(loss), cast(LossFunction, loss), "whole")
    kind, link = _comparison(loss)
    return Loss(loss_name(loss), cast(LossFunction, loss), kind, link=link)


def _comparison(loss: object) -> tuple[Kind, Link | None]:
    """Return the kind and the link of a loss that is not in the table."""
    if loss is F.binary_cross_entropy or isinstance(loss, nn.BCELoss):
        return "binary", PROBABILITY
    is_entrywise = loss in _ENTRYWISE_FUNCTIONS or isinstance(loss, _ENTRYWISE)
    counts = isinstance(loss, nn.PoissonNLLLoss) and loss.log_input
    link = LOG if loss is F.poisson_nll_loss or counts else None
    return "numbers" if is_entrywise else "custom", link


def _is_one_hot(y: Tensor) -> bool:
    if y.ndim != 2 or y.shape[1] < 2 or not y.is_floating_point():
        return False
    return bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def canonical_name(name: str) -> str:
    """Return the canonical name of a loss; raise `InputError` if it is unknown."""
    name = _ALIASES.get(name, name)
    if name not in LOSSES:
        raise InputError(unknown_name("loss", name, (*NAMES, "auto")))
    return name


def _takes_two_arguments(function: Callable[..., object]) -> bool:
    """Return whether a function accepts two arguments; True if its signature is unknown."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def loss_name(loss: object) -> str:
    """Name of a loss, as recorded by a run."""
    if isinstance(loss, str):
        return loss
    return getattr(loss, "name", None) or getattr(loss, "__name__", type(loss).__name__)


def _of_module(module: nn.Module) -> Loss:
    name = _MODULES.get(type(module))
    if name is None:
        kind, link = _comparison(module)
        return Loss(type(module).__name__, module, kind, link=link)
    settings, usual = (
        {k: v for k, v in vars(m).items() if not k.startswith("_") and k != "training"}
        for m in (module, type(module)())
    )
    buffers = any(buffer is not None for buffer in module.buffers())
    if settings == usual and not buffers:
        return LOSSES[name]
    return Loss(type(module).__name__, module, LOSSES[name].kind)


def _align_classes(name: str, output: Tensor, target: Tensor) -> Tensor:
    """Return targets for outputs (rows, classes, ...): class indices, or probabilities alike."""
    if output.ndim < 2 or output.shape[1] == 1:
        raise InputError(
            f"{name} needs one output for each class, received outputs of shape "
            f"{tuple(output.shape)}; use loss='bce' for one logit of two classes, 'mse' for "
            "numbers"
        )
    if target.is_floating_point():
        if target.shape == output.shape:
            return target
        raise InputError(
            f"{name} needs class numbers (integers) or probabilities of the outputs' shape "
            f"{tuple(output.shape)}, received {target.dtype} targets of shape "
            f"{tuple(target.shape)}; use loss='mse' for numbers"
        )
    if output.ndim == 2 and target.numel() == len(target):
        target = target.reshape(-1)
    elif target.ndim == output.ndim and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.shape == output.shape:
        if not bool((target.sum(1) == 1).all()):
            raise InputError(
                f"{name} is for one class a row, and rows of the targets {tuple(target.shape)} "
                "hold several ones or none: use loss='bce' for labels that do not "
                "exclude each other"
            )
        return target.to(output.dtype)
    return target.long()


def _align_numbers(name: str, output: Tensor, target: Tensor) -> Tensor:
    if output.shape == target.shape:
        return output
    if not _same_but_unit_axes(output, target):
        raise InputError(
            f"{name} compares outputs with targets entry by entry, received outputs of shape "
            f"{tuple(output.shape)} and targets of shape {tuple(target.shape)}; only a column "
            "(rows, 1) counts as (rows,)"
        )
    return output.reshape(target.shape)


def _same_but_unit_axes(output: Tensor, target: Tensor) -> bool:
    """Return whether two shapes with equal row counts differ only by axes of size 1."""
    if not (output.ndim and target.ndim) or len(output) != len(target):
        return False
    return [n for n in output.shape[1:] if n > 1] == [n for n in target.shape[1:] if n > 1]


def broadcasts(loss: LossFunction, *, column: bool = True) -> bool:
    """Return whether a loss broadcasts outputs (rows, 1) and targets (rows,) to rows x rows.

    Tested on two rows: such a loss is neither the mean nor the sum of its rows' losses, but would
    be for shapes (rows,). With `column=False` the targets have shape (rows, 1).

    >>> broadcasts(lambda output, target: (output - target).square().mean())
    True
    >>> broadcasts(lambda output, target: (output[:, 0] - target).square().mean())
    False
    """
    output, target = torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.9])
    column_case = (output[:, None], target) if column else (output, target[:, None])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about broadcasting
        rows = [_value(loss, output[i : i + 1], target[i : i + 1]) for i in range(2)]
        column_value, flat_value = _value(loss, *column_case), _value(loss, output, target)
    return not _is_mean_or_sum(column_value, rows) and _is_mean_or_sum(flat_value, rows)


def _value(loss: LossFunction, output: Tensor, target: Tensor) -> float:
    """Return the loss as a float, NaN where it raises."""
    try:
        return float(loss(output, target))
    except Exception:
        return math.nan


def _is_mean_or_sum(value: float, rows: list[float]) -> bool:
    return any(math.isclose(value, sum(rows) / n, rel_tol=1e-5) for n in (1, len(rows)))


def unaligned_loss(loss: object, target: object = None) -> LossFunction:
    """Return the loss as a user's own loop calls it, without aligning shapes.

    Measurements of such a loss must not hide that it broadcasts.
    """
    if not isinstance(loss, str):
        return cast(LossFunction, loss) if callable(loss) else loss_of(loss)  # which refuses it
    return loss_of(loss, target if isinstance(target, Tensor) else None).function
