"""Calibration of predicted probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.arguments import check_number, is_count, is_positive
from tikhon.errors import describe
from tikhon.wrappers import modes_restored


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, in [0, 1].

    sum over bins of n_b / n * |accuracy_b - confidence_b|; `probabilities` (N, classes), or (N,)
    and (N, 1) of class 1, `labels` (N,) of class indices. With more dimensions, as for a
    segmentation (N, classes, H, W) or tokens (N, T, classes), the shape of the labels tells which
    one holds the classes. Raises ValueError for shapes that do not fit, no rows, labels that are
    not classes and numbers that are not probabilities. Reference: Guo et al. 2017,
    https://arxiv.org/abs/1706.04599

    `scale_temperature` lowers it.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    >>> round(expected_calibration_error(probabilities, torch.tensor([0, 1])), 3)
    0.4
    """
    bins = check_number(
        "expected_calibration_error", "bins", bins, "at least 1", is_count, whole=True
    )
    scores, labels = _by_row(probabilities, labels, "probabilities")
    both = torch.cat([1 - scores, scores], dim=1) if scores.shape[1] == 1 else scores
    if not (both >= 0).all() or not (both.sum(1) - 1).abs().max() < 1e-2:
        raise ValueError(
            "expected probabilities, >= 0 and of sum 1 over the classes; logits go through "
            "softmax first"
        )
    confidence, predicted = both.max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    bin_of = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)  # (lower, upper]
    gap = (predicted == labels).double() - confidence
    total = gap.new_zeros(bins).index_add(0, bin_of, gap).abs().sum()
    return (total / len(labels)).item()


def accuracy_rejection(
    uncertainty: Tensor, correct: Tensor, rejected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Accuracy on the rows that remain when the most uncertain share is rejected.

    `uncertainty` and `correct` are (N,); `rejected` are shares in [0, 1), by default 0 to 0.9 in
    steps of 0.1. Returns (rejected, accuracy). Raises ValueError for shapes that differ, no rows
    and other shares. Reference: Nadeem et al. 2009,
    https://proceedings.mlr.press/v8/nadeem10a.html

    >>> accuracy_rejection(torch.tensor([0.1, 0.9]), torch.tensor([1, 0]), torch.tensor([0, 0.5]))
    (tensor([0.0000, 0.5000]), tensor([0.5000, 1.0000]))
    """
    rejected = torch.arange(10) / 10 if rejected is None else rejected
    given = {"uncertainty": uncertainty, "correct": correct, "rejected": rejected}
    for name, one in given.items():
        if not isinstance(one, Tensor) or one.is_complex():
            raise TypeError(f"{name} must be a real tensor, received {describe(one)}")
    if uncertainty.shape != correct.shape or uncertainty.ndim != 1 or not len(correct):
        raise ValueError(
            f"expected uncertainty and correct of one length (N,), received "
            f"{tuple(uncertainty.shape)} and {tuple(correct.shape)}"
        )
    if uncertainty.isnan().any() or not ((rejected >= 0) & (rejected < 1)).all():
        raise ValueError("expected uncertainties without NaN, and rejected shares in [0, 1)")
    order = uncertainty.argsort(stable=True)
    running = correct[order].float().cumsum(0) / torch.arange(1, len(order) + 1)
    kept = ((1 - rejected) * len(order)).round().long().clamp(1, len(order))
    return rejected, running[kept - 1]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 whose softmax(logits / T) has the lowest log-loss on these rows.

    `logits` are (N, classes), or (N,) and (N, 1) of one logit for class 1; `labels` (N,) class
    indices of rows that the model was not trained on; with more dimensions as in
    `expected_calibration_error`. The loss is convex in 1 / T, so Newton's method finds its only
    minimum. Raises ValueError if there is none: every row is right (T = 0), or the logits of the
    right classes are no higher than the others (T infinite). Raises TypeError for a model: use
    `scale_temperature`.
    Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599

    >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 4 / log(3)
    3.641
    """
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        raise TypeError(
            f"fit_temperature takes the logits and the labels of rows, received "
            f"{type(logits).__name__} and {type(labels).__name__}; a model and its data go to "
            "scale_temperature(model, data)"
        )
    z, labels = _by_row(logits.detach(), labels, "logits")
    z = torch.cat([torch.zeros_like(z), z], dim=1) if z.shape[1] == 1 else z
    own = z.gather(1, labels.unsqueeze(1))
    z = z - own  # shift the correct class to 0: avoids overflow, same loss
    if not float(z.amax(1).mean()) > 0:
        raise ValueError("every row is right, so no temperature above 0 is best: take more rows")
    if not float(z.mean()) < 0:
        raise ValueError("the right classes have no higher logits than the others: nothing to fit")
    inverse, low, high = 1 / float(z.std()), 0.0, float("inf")
    for _ in range(200):
        p = (inverse * z).softmax(1)
        mean = (p * z).sum(1)
        slope, curvature = float(mean.mean()), float(((p * z * z).sum(1) - mean**2).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else high
        halfway = 2 * inverse if high == float("inf") else (low + high) / 2
        following = newton if low < newton < high else halfway
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1 / inverse


def _by_row(scores: Tensor, labels: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return scores (rows, classes) in float64 and labels (rows,)."""
    for one in (scores, labels):
        if not isinstance(one, Tensor):
            raise TypeError(
                f"expected {what} and labels as tensors, received {describe(scores)} and "
                f"{describe(labels)}"
            )
    shapes = f"received {what} {tuple(scores.shape)} and labels {tuple(labels.shape)}"
    wide = scores.unsqueeze(1) if scores.ndim == 1 and labels.ndim == 1 else scores
    fits = [
        d
        for d in {1, wide.ndim - 1}
        if 0 < d < wide.ndim and wide.shape[:d] + wide.shape[d + 1 :] == labels.shape
    ]
    if not fits or not labels.numel() or scores.is_complex():
        raise ValueError(
            f"expected {what} (N, classes) and labels (N,) of at least one row, or (N, classes, "
            f"...) or (N, ..., classes) and labels (N, ...), {shapes}"
        )
    if len(fits) > 1:
        raise ValueError(f"either of two dimensions may hold the classes, {shapes}; flatten both")
    rows = wide.double().movedim(fits[0], -1).flatten(0, -2)
    numbers = labels.to(rows.device).flatten()
    most = max(rows.shape[1], 2)
    if not ((numbers >= 0) & (numbers < most) & (numbers == numbers.long())).all():
        raise ValueError(
            f"labels are class numbers from 0 to {most - 1}, received {numbers.min().item():g} to "
            f"{numbers.max().item():g}; leave out rows that are to be ignored"
        )
    if not rows.isfinite().all():
        raise ValueError(f"{what} must be finite, received NaN or infinite ones")
    return rows, numbers.long()


class TemperatureScaled(nn.Module):
    """`model` with its logits divided by `temperature` (> 0); predicted classes do not change.

    Shapes: those of `model`. Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599

    >>> TemperatureScaled(nn.Identity(), 2.0)(torch.tensor([4.0]))
    tensor([2.])
    """

    temperature: Tensor

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"TemperatureScaled: expected a module, received {describe(model)}")
        temperature = check_number(
            "TemperatureScaled", "the temperature", temperature, "finite and > 0", is_positive
        )
        self.model = model
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return the model's logits divided by the temperature."""
        return self.model(*args, **kwargs) / self.temperature

    def extra_repr(self) -> str:
        """Return the temperature."""
        return f"temperature={self.temperature.item():.4g}"


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of a batch."""
    pair = batch if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise TypeError(
            f"scale_temperature: data is (inputs, labels) or a loader of such pairs of tensors, "
            f"received a batch of {describe(batch)}"
        )
    return pair[0], pair[1]


@torch.no_grad()
def scale_temperature(
    model: nn.Module, data: tuple[Tensor, Tensor] | Iterable[Any]
) -> TemperatureScaled:
    """`model` with the temperature fitted to held-out rows, in evaluation mode.

    `data` is (inputs, labels), or a loader of such batches, of rows that were not trained on. The
    model itself is not changed; after more training the temperature has to be fitted again.
    Raises ValueError as `fit_temperature` does.

    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] + 0.3 * x[:, 1] > 0).long()
    >>> confident = nn.Linear(3, 2)
    >>> _ = nn.init.zeros_(confident.weight); confident.weight.data[1, 0] = 100.0
    >>> scaled = scale_temperature(confident, (x, y))
    >>> bool(scaled.temperature > 5)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"scale_temperature: expected a module, received {describe(model)}")
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"scale_temperature: data is (inputs, labels) or a loader, received {describe(data)}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
    batches: Iterable[Any] = [data] if whole else data
    with modes_restored(model):
        model.eval()
        found = [(model(x.to(device)), y.to(device)) for x, y in map(_pair, batches)]
    if not found:
        raise ValueError("data has no batch: nothing to fit a temperature on")
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return TemperatureScaled(model, fit_temperature(logits, labels)).to(device)
