"""The one table of losses: names, torch's functions and modules, callables; shapes agree here."""

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

from tikhon.data.rows import Batch, LossFunction, call, graded, takes_model, whole
from tikhon.errors import InputError, misplaced, unknown

Kind = Literal["classes", "binary", "numbers", "custom", "whole"]


@dataclass(frozen=True)
class Link:
    """How outputs are read: `answer` gives them the unit of the targets, `output` undoes that."""

    answer: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]


LOG = Link(torch.exp, lambda answer: answer.clamp_min(1e-6).log())  # of counts


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss of (output, target) whose shapes are made to agree before they are compared.

    A column (rows, 1) and (rows,) are the same numbers: torch would broadcast them to a table of
    rows x rows. Other shapes that differ are refused. `kind` tells how a model is scored:
    "classes" (outputs (rows, classes), targets of class numbers), "binary" (logits of 0 and 1),
    "numbers", "custom", which is judged by its targets, or "whole": `loss(model, batch)`, a step
    of the user's own that calls the model itself.

    `entries`, where there is one, is the loss of every entry (of classes: of every class number),
    of which `function` is the mean. `link`, where outputs are not in the unit of the targets, is
    how they are read.
    """

    name: str
    function: LossFunction
    kind: Kind = "custom"
    entries: LossFunction | None = None
    link: Link | None = None
    _broadcasting: dict[bool, bool] = field(default_factory=dict, repr=False)

    @property
    def given(self) -> LossFunction:
        """What strengths call: of (output, target), shapes made to agree, or of (model, batch)."""
        return self.function if self.kind == "whole" else self

    def on(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a model on a batch (inputs, target), 0-d, forward pass included."""
        if self.kind != "whole":
            return self(call(model, batch[0]), batch[1])
        return self._number(graded(lambda: self.function(model, whole(batch))))

    def __call__(self, output: object, target: object) -> Tensor:
        """The mean loss of a batch, 0-d.

        Raises `InputError` for shapes that do not agree, and for outputs that are no tensor.
        """
        output, target = self.agreed(output, target)
        try:
            value = self.function(output, target)
        except (IndexError, TypeError) as error:
            raise self._told(error, output, target) from error
        return self._number(value)

    def _number(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(
                f"the loss {self.name} returned {type(value).__name__}, one number is needed, as "
                "a tensor that gradients flow through"
            )
        if value.ndim:
            raise InputError(
                f"the loss {self.name} returned shape {tuple(value.shape)}, one number is needed; "
                "use reduction='mean' or take .mean()"
            )
        return value

    def rows(self, output: Any, target: Any) -> Tensor:
        """The loss of every row, (rows,): of a loss that is a mean over rows, what it is of."""
        if self.entries is None:
            pairs = zip(output.split(1), target.split(1))
            return torch.stack([self(o, t) for o, t in pairs])
        output, target = self.agreed(output, target)
        try:
            return self.entries(output, target).reshape(len(output), -1).mean(1)
        except IndexError as error:
            raise self._told(error, output, target) from error

    def _told(self, error: Exception, output: Any, target: Any) -> Exception:
        """Torch's "Target -1 is out of bounds", and what a loss of another form stumbles over,
        with what to do; other errors as they are.
        """
        if "'Tensor' object is not callable" in str(error):
            return InputError(f"the loss {self.name} calls its output ({error}): {STEP}")
        if self.kind != "classes" or target.is_floating_point():
            return error
        found = f"{int(target.min())} to {int(target.max())}"
        return InputError(
            f"{self.name} needs classes numbered 0 to {output.shape[1] - 1}, one for each output, "
            f"received classes {found}: number them anew, such as by "
            "y = torch.unique(y, return_inverse=True)[1]"
        )

    def targets(self, y: Tensor) -> Tensor:
        """The targets as what they are to this loss: whole numbers are no classes to "numbers"."""
        if self.kind == "numbers" and not y.is_floating_point():
            return y.to(torch.get_default_dtype())
        if self.kind == "classes" and y.ndim > 2 and y.numel() == len(y):
            return y.reshape(-1)  # one class a row, however many axes of 1 it has
        return y

    def answers(self, output: Tensor) -> Tensor:
        """Outputs in the unit of the targets: of logarithms of rates, the rates."""
        return output if self.link is None else self.link.answer(output)

    def outputs(self, answer: Tensor) -> Tensor:
        """The outputs that give these answers."""
        return answer if self.link is None else self.link.output(answer)

    def agreed(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Output and target in the shapes and types that the loss compares."""
        if self.kind != "custom" and not isinstance(output, Tensor):
            raise InputError(
                f"{self.name} needs a model that returns one tensor, it returned "
                f"{type(output).__name__}: give a loss of your own that picks what is compared, "
                "such as lambda output, y: F.cross_entropy(output[0], y)"
            )
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            return output, target
        if self.kind == "classes":
            return output, _class_numbers(self.name, output, target)
        if self.kind in ("numbers", "binary"):
            return _same_shape(self.name, output, target), target.to(output.dtype)
        if output.shape != target.shape and _alike(output, target):
            column = output.ndim > target.ndim
            if column not in self._broadcasting:
                self._broadcasting[column] = broadcasts(self.function, column=column)
            if self._broadcasting[column]:
                return output.reshape(target.shape), target
        return output, target


def _each(function: Callable[..., Tensor]) -> LossFunction:
    return partial(function, reduction="none")


def _half_mse(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """1/(2m) * sum((y - yhat)**2): the loss of the textbooks' lasso and ridge."""
    return 0.5 * F.mse_loss(output, target, reduction=reduction)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", F.cross_entropy, "classes", _each(F.cross_entropy)),
        Loss("nll", F.nll_loss, "classes", _each(F.nll_loss)),
        Loss(
            "bce",
            F.binary_cross_entropy_with_logits,
            "binary",
            _each(F.binary_cross_entropy_with_logits),
        ),
        Loss("mse", F.mse_loss, "numbers", _each(F.mse_loss)),
        Loss("half_mse", _half_mse, "numbers", _each(_half_mse)),
        Loss("mae", F.l1_loss, "numbers", _each(F.l1_loss)),
        Loss("huber", F.huber_loss, "numbers", _each(F.huber_loss)),
    )
}
NAMES = tuple(LOSSES)
STEP = "a loss takes (output, target), a step of your own that calls the model (model, batch)"
_ALSO = {"bce_with_logits": "bce", "squared": "mse", "l1": "mae"}
_ALSO |= {
    cast(Any, loss.function).__name__: loss.name for loss in LOSSES.values()
}  # torch's names
_ALSO |= dict.fromkeys(("smooth_l1", "smooth_l1_loss"), "huber")  # which it is at its own beta
_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll",
    nn.BCEWithLogitsLoss: "bce",
    nn.MSELoss: "mse",
    nn.L1Loss: "mae",
    nn.HuberLoss: "huber",
}
_ENTRYWISE = (nn.SmoothL1Loss, nn.PoissonNLLLoss)  # outputs and targets of one shape
_ENTRYWISE_FUNCTIONS = (F.smooth_l1_loss, F.poisson_nll_loss)


def loss_of(loss: object, y: Tensor | None = None) -> Loss:
    """The `Loss` behind a name, a function or module of torch, or a callable.

    That is of (output, target), or of (model, batch) where its first parameter is called model or
    its second batch.

    "auto" is mean squares for targets of floats and cross-entropy for class numbers `y`. A mean
    of torch's is the same loss however it is given.

    Raises `InputError` for another name, closest names first, for what cannot be called, and
    where "auto" meets one-hot targets.

    >>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])
    >>> [float(loss_of(loss)(x, y)) for loss in ("mse", F.mse_loss, nn.MSELoss(), "half_mse")]
    [2.0, 2.0, 2.0, 1.0]
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        auto = "mse" if y is not None and y.is_floating_point() else "cross_entropy"
        if loss == "auto" and y is not None and _one_hot(y):
            raise InputError(
                f"every row of the targets, of shape {tuple(y.shape)}, holds one 1 and zeros: for "
                "classes give their numbers, y.argmax(1); to train on them as numbers give "
                "loss='mse'"
            )
        return LOSSES[auto if loss == "auto" else known_name(loss)]
    if not callable(loss):
        raise InputError(
            f"loss must be a name ({', '.join(NAMES)}) or a callable of (output, target) or of "
            f"(model, batch) that gives one number, received {misplaced(loss)}"
        )
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise InputError(f"loss is the class {loss.__name__}, give an object: {loss.__name__}()")
    if isinstance(loss, nn.Module):
        return _of_module(loss)
    for entry in LOSSES.values():
        if loss is entry.function:
            return entry
    if not _takes_two(loss):
        raise InputError(f"the loss {name_of(loss)} does not take two arguments: {STEP}")
    if takes_model(loss):
        return Loss(name_of(loss), cast(LossFunction, loss), "whole")
    kind: Kind = "numbers" if loss in _ENTRYWISE_FUNCTIONS else "custom"
    link = LOG if loss is F.poisson_nll_loss else None
    return Loss(name_of(loss), cast(LossFunction, loss), kind, link=link)


def _one_hot(y: Tensor) -> bool:
    if y.ndim != 2 or y.shape[1] < 2 or not y.is_floating_point():
        return False
    return bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def known_name(name: str) -> str:
    """The table's name; another one raises `InputError`, closest names first."""
    name = _ALSO.get(name, name)
    if name not in LOSSES:
        raise InputError(unknown("loss", name, (*NAMES, "auto")))
    return name


def _takes_two(function: Callable[..., object]) -> bool:
    """Whether a function may be called with two arguments; True where nobody can know."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def name_of(loss: object) -> str:
    """What a run calls its loss."""
    if isinstance(loss, str):
        return loss
    return getattr(loss, "name", None) or getattr(loss, "__name__", type(loss).__name__)


def _of_module(module: nn.Module) -> Loss:
    name = _MODULES.get(type(module))
    if name is None:
        kind: Kind = "numbers" if isinstance(module, _ENTRYWISE) else "custom"
        counts = isinstance(module, nn.PoissonNLLLoss) and module.log_input
        return Loss(type(module).__name__, module, kind, link=LOG if counts else None)
    settings, usual = (
        {k: v for k, v in vars(m).items() if not k.startswith("_") and k != "training"}
        for m in (module, type(module)())
    )
    buffers = any(buffer is not None for buffer in module.buffers())
    if settings == usual and not buffers:
        return LOSSES[name]
    return Loss(type(module).__name__, module, LOSSES[name].kind)


def _class_numbers(name: str, output: Tensor, target: Tensor) -> Tensor:
    """Targets for outputs (rows, classes, ...): class numbers, or probabilities of that shape."""
    if output.ndim < 2 or output.shape[1] == 1:
        raise InputError(
            f"{name} needs one output for each class, received outputs of shape "
            f"{tuple(output.shape)}; one logit of two classes goes with loss='bce', numbers with "
            "'mse'"
        )
    if target.is_floating_point():
        if target.shape == output.shape:
            return target
        raise InputError(
            f"{name} needs class numbers (integers) or probabilities of the outputs' shape "
            f"{tuple(output.shape)}, received {target.dtype} targets of shape "
            f"{tuple(target.shape)}; numbers go with loss='mse'"
        )
    if output.ndim == 2 and target.numel() == len(target):
        target = target.reshape(-1)
    elif target.ndim == output.ndim and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.shape == output.shape:
        if not bool((target.sum(1) == 1).all()):
            raise InputError(
                f"{name} is for one class a row, and rows of the targets {tuple(target.shape)} "
                "hold several ones or none: labels that do not exclude each other go with "
                "loss='bce'"
            )
        return target.to(output.dtype)
    return target.long()


def _same_shape(name: str, output: Tensor, target: Tensor) -> Tensor:
    if output.shape == target.shape:
        return output
    if not _alike(output, target):
        raise InputError(
            f"{name} compares outputs with targets entry by entry, received outputs of shape "
            f"{tuple(output.shape)} and targets of shape {tuple(target.shape)}; only a column "
            "(rows, 1) counts as (rows,)"
        )
    return output.reshape(target.shape)


def _alike(output: Tensor, target: Tensor) -> bool:
    """Whether two shapes hold the same numbers for each row: they differ by axes of 1 alone."""
    if not (output.ndim and target.ndim) or len(output) != len(target):
        return False
    return [n for n in output.shape[1:] if n > 1] == [n for n in target.shape[1:] if n > 1]


def broadcasts(loss: LossFunction, *, column: bool = True) -> bool:
    """Whether a loss, given outputs (rows, 1) and targets (rows,), compares rows x rows.

    It is asked on two rows: then it is neither the mean nor the sum of the losses of its rows,
    but would be if both came as (rows,). With `column=False` the targets are the column.

    >>> broadcasts(lambda output, target: (output - target).square().mean())
    True
    >>> broadcasts(lambda output, target: (output[:, 0] - target).square().mean())
    False
    """
    output, target = torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.9])
    wide = (output[:, None], target) if column else (output, target[:, None])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about broadcasting
        rows = [_value(loss, output[i : i + 1], target[i : i + 1]) for i in range(2)]
        given, flat = _value(loss, *wide), _value(loss, output, target)
    return not _joins(given, rows) and _joins(flat, rows)


def _value(loss: LossFunction, output: Tensor, target: Tensor) -> float:
    """NaN where the loss cannot read such outputs."""
    try:
        return float(loss(output, target))
    except Exception:
        return math.nan


def _joins(value: float, rows: list[float]) -> bool:
    return any(math.isclose(value, sum(rows) / n, rel_tol=1e-5) for n in (1, len(rows)))


def in_a_loop(loss: object, target: object = None) -> LossFunction:
    """What a loop of the user's own calls by that name: torch's function, shapes as they come.

    Whoever measures such a loop must not hide that it broadcasts.
    """
    if not isinstance(loss, str):
        return cast(LossFunction, loss) if callable(loss) else loss_of(loss)  # which refuses it
    return loss_of(loss, target if isinstance(target, Tensor) else None).function
