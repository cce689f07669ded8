"""Monte-Carlo dropout: predictions with noise, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tikhon.arguments import check_number, is_count, is_one_of
from tikhon.errors import describe, unknown_name
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.sources import noise_sources
from tikhon.wrappers import modes_restored, named_modules

# their fast paths in evaluation would skip the noise of their children
WITH_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


@contextmanager
def montecarlo(model: nn.Module, *, also: str | Sequence[str] = ()) -> Iterator[None]:
    """Inside, every noise source of `model` is in training mode and everything else in evaluation.

    Sources are those of `layers.audit`, attention and recurrent rates included; batch
    normalisation uses its running statistics and does not move them. `also` are globs on the paths
    of modules whose noise cannot be detected, such as a call of `F.dropout`; "" is `model` itself.
    All modes are restored on exit. Raises ValueError if there is no noise. Reference: Gal and
    Ghahramani 2016, https://arxiv.org/abs/1506.02142

    >>> model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))
    >>> with montecarlo(model): model[0].training, model[1].training
    (False, True)
    """
    noisy = [module for _, module in noise_sources(model)]
    modules = list(named_modules(model))
    for pattern in [also] if isinstance(also, str) else _as_globs(also):
        found = [m for path, m in modules if fnmatchcase(path, pattern)]
        if not found:
            raise ValueError(unknown_name("module", pattern, [path for path, _ in modules]))
        noisy += found
    if not noisy:
        raise ValueError(
            f"{type(model).__name__} has no source of noise: nothing would vary. Train with "
            "dropout, or name modules that call F.dropout in `also`"
        )
    noisy += [m for _, m in modules if _reads_a_childs_rate(m)]
    with modes_restored(model):
        for _, module in modules:
            module.training = False
        for module in noisy:
            module.training = True
        yield


def _as_globs(also: object) -> list[str]:
    several = list(also) if isinstance(also, list | tuple | set | frozenset) else [also]
    globs = [one for one in several if isinstance(one, str)]
    if len(globs) < len(several):
        raise TypeError(f"also takes globs on module paths, received {describe(also)}")
    return globs


def _reads_a_childs_rate(module: nn.Module) -> bool:
    """Return whether a module's own mode controls the noise of its children."""
    if isinstance(module, WITH_FAST_PATH):
        return True
    children = [c for c in module.children() if isinstance(c, nn.modules.dropout._DropoutNd)]
    return "Attention" in type(module).__name__ and bool(children)


@dataclass(frozen=True, eq=False)
class Distribution:
    """Predictions under noise: `samples` (S, N, ...) are probabilities, or values of a regression.

    `classes` tells whether the dimension `axis` is a distribution over classes.
    """

    samples: Tensor
    classes: bool
    axis: int = -1

    def __repr__(self) -> str:
        draws, *shape = self.samples.shape
        kind = "probabilities" if self.classes else "values"
        return f"Distribution({draws} samples of {kind}, shape {tuple(shape)})"

    @property
    def mean(self) -> Tensor:
        """The prediction, (N, ...)."""
        return self.samples.mean(0)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance over samples, (N, ...)."""
        return self.samples.var(0)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the mean in nats, (N,): the total uncertainty of a class."""
        return self._entropy(self._probabilities()[None].mean(1))[0]

    @property
    def mutual_information(self) -> Tensor:
        """Entropy of the mean minus mean entropy, (N,): the part that comes from the model."""
        probabilities = self._probabilities()
        return self.entropy - self._entropy(probabilities).mean(0)

    def _probabilities(self) -> Tensor:
        if not self.classes:
            raise ValueError(
                "a regression has no entropy over classes: use the variance, or predict with "
                "output='logits'"
            )
        return self.samples

    def _entropy(self, probabilities: Tensor) -> Tensor:
        return torch.special.entr(probabilities).sum(self.axis)


OUTPUTS = ("logits", "probabilities", "values")


@torch.no_grad()
def predict_distribution(
    model: nn.Module,
    x: Tensor | Iterable[object],
    *,
    samples: int = 50,
    output: str = "logits",
    chunk: int = 16384,
    also: str | Sequence[str] = (),
    axis: int | None = None,
) -> Distribution:
    """Predict `x` (N, ...) `samples` times under fresh noise, in few large forward passes.

    `x` is a tensor, or a loader whose batches are tensors or sequences that begin with one, such
    as (inputs, labels). Its batches are moved to the model's device and kept in order.

    `output` says what the model returns: "logits" (N, classes), which pass through a softmax,
    "probabilities" (N, classes) or "values" (a regression). One logit or probability a row, (N,)
    or (N, 1), is that of class 1, and both classes are returned. With more dimensions `axis` is
    the one that holds the classes: 1 for a segmentation (N, classes, H, W), as in torch's losses,
    -1 for tokens (N, T, classes). If the noise of a row does not depend on the others, samples
    are rows of one batch of at most `chunk` rows; noise shared by a batch (on weights, DropBlock,
    ...) is vectorised by `torch.vmap`, except in recurrent stacks. `also` as in `montecarlo`.
    Raises ValueError for an unknown output, samples < 2, no rows, a model without noise, and more
    dimensions without `axis`; TypeError for other batches and a model that does not return a
    single tensor.
    Reference: Gal and Ghahramani 2016, https://arxiv.org/abs/1506.02142

    >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    >>> spread = predict_distribution(model, torch.ones(2, 4), samples=20)
    >>> spread.mean.shape, spread.mutual_information.shape
    (torch.Size([2, 3]), torch.Size([2]))
    """
    if not is_one_of(output, OUTPUTS):
        raise ValueError(unknown_name("output", output, OUTPUTS))
    name, least = "predict_distribution", "at least 2"
    samples = check_number(name, "samples", samples, least, lambda n: is_count(n, 2), whole=True)
    chunk = check_number(name, "chunk", chunk, "at least 1", is_count, whole=True)
    if axis is not None:
        axis = check_number(name, "axis", axis, "a dimension", math.isfinite, whole=True)
    with montecarlo(model, also=also):
        rowwise = all(_is_rowwise(module) for _, module in noise_sources(model))
        sample = _as_rows if rowwise else _under_vmap
        drawn = [sample(model, batch, samples, chunk) for batch in inputs_of(x, model)]
    if not drawn:
        raise ValueError("x has no batch: nothing to predict")
    drawn = torch.cat(drawn, dim=1)
    if output == "values":
        return Distribution(drawn, classes=False)
    if drawn.ndim == 2 or drawn.shape[2:] == (1,):  # of class 1 only
        drawn = drawn.reshape(*drawn.shape[:2], 1)
        other = torch.zeros_like(drawn) if output == "logits" else 1 - drawn
        drawn = torch.cat([other, drawn], dim=-1)
        axis = None
    where = _class_axis(drawn, axis)
    return Distribution(drawn.softmax(where) if output == "logits" else drawn, True, where)


def _class_axis(drawn: Tensor, axis: int | None) -> int:
    """The dimension of the classes in samples (S, N, ...); `axis` is that in one of them."""
    shape = tuple(drawn.shape[1:])
    if axis is None:
        if len(shape) > 2:
            raise ValueError(
                f"the model returns shape {shape}: give axis=1 where the classes follow the rows, "
                f"as for torch's cross_entropy, or axis=-1 where they come last"
            )
        return -1
    if axis % len(shape) == 0 or not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis is the dimension of the classes, one of {len(shape)} and not that of the rows, "
            f"received {axis} for shape {shape}"
        )
    return axis % len(shape) - len(shape)


def inputs_of(x: Tensor | Iterable[object], model: nn.Module) -> Iterator[Tensor]:
    """Yield a tensor unchanged, or the inputs of a loader's batches on the model's device."""
    if isinstance(x, Tensor) and x.ndim:
        yield x
        return
    if isinstance(x, Tensor) or not isinstance(x, Iterable):
        raise TypeError(f"expected inputs (N, ...) or a loader of them, received {describe(x)}")
    if isinstance(x, tuple):
        raise TypeError("expected a tensor or a loader, received a tuple: give the inputs alone")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in x:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(first, Tensor):
            raise TypeError(
                "expected a tensor, or a loader whose batches are tensors or begin with one; "
                f"received a batch of {type(batch).__name__}"
            )
        yield first.to(device)


def _is_rowwise(module: nn.Module) -> bool:
    if isinstance(module, NoiseLayer):
        return module.rowwise
    return getattr(module, "mode", None) != "batch" and "DropBlock" not in type(module).__name__


def _as_rows(model: nn.Module, x: Tensor, samples: int, chunk: int) -> Tensor:
    each = max(1, chunk // max(1, len(x)))  # samples per pass
    sizes = [min(each, samples - k) for k in range(0, samples, each)]
    passes = [
        _outputs(model, x.repeat(n, *[1] * (x.ndim - 1))).unflatten(0, (n, len(x))) for n in sizes
    ]
    return torch.cat(passes)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"expected a model that returns a tensor, received {type(output).__name__} from "
            f"{type(model).__name__}; put it in a module whose forward returns the part that "
            f"counts, such as its logits"
        )
    return output


def _under_vmap(model: nn.Module, x: Tensor, samples: int, chunk: int) -> Tensor:
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # no batching rule
        return torch.stack([_outputs(model, x) for _ in range(samples)])
    each = max(1, chunk // max(1, len(x)))
    one = torch.vmap(lambda _: _outputs(model, x), randomness="different", chunk_size=each)
    return one(torch.zeros(samples, device=x.device))
