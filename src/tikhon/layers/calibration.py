"""How far predicted probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, in [0, 1].

    sum over bins of n_b / n * |accuracy_b - confidence_b|; `probabilities` (N, classes), `labels`
    (N,) of class numbers. Raises ValueError for lengths that differ or no rows. Reference: Guo et
    al. 2017, https://arxiv.org/abs/1706.04599

    `scale_temperature` lowers it.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    >>> round(expected_calibration_error(probabilities, torch.tensor([0, 1])), 3)
    0.4
    """
    if len(probabilities) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"expected as many labels as rows and at least one, received {len(labels)} labels for "
            f"{len(probabilities)} rows"
        )
    confidence, predicted = probabilities.double().max(1)
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
    steps of 0.1. Returns (rejected, accuracy). Reference: Nadeem et al. 2009,
    https://proceedings.mlr.press/v8/nadeem10a.html

    >>> accuracy_rejection(torch.tensor([0.1, 0.9]), torch.tensor([1, 0]), torch.tensor([0, 0.5]))
    (tensor([0.0000, 0.5000]), tensor([0.5000, 1.0000]))
    """
    rejected = torch.arange(10) / 10 if rejected is None else rejected
    order = uncertainty.argsort(stable=True)
    running = correct[order].float().cumsum(0) / torch.arange(1, len(order) + 1)
    kept = ((1 - rejected) * len(order)).round().long().clamp(1, len(order))
    return rejected, running[kept - 1]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 whose softmax(logits / T) has the lowest log-loss on these rows.

    `logits` are (N, classes), or (N,) and (N, 1) of one logit for class 1; `labels` (N,) class
    numbers of rows that the model was not trained on. The loss is convex in 1 / T: Newton's
    method finds its only minimum. Raises ValueError where there is none: every row is right
    (T = 0), or the logits of the right classes are no higher than the others (T infinite), and
    TypeError for a model, which `scale_temperature` takes.
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
    z = logits.detach().double()
    z = z.unsqueeze(1) if z.ndim == 1 else z
    z = torch.cat([torch.zeros_like(z), z], dim=1) if z.shape[1] == 1 else z
    if z.ndim != 2 or labels.shape != z.shape[:1] or len(z) == 0:
        raise ValueError(
            f"expected logits (N, classes) and labels (N,) of at least one row, received "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    own = z.gather(1, labels.long().to(z.device).unsqueeze(1))
    z = z - own  # the right class at 0: nothing overflows and the loss is unchanged
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


class TemperatureScaled(nn.Module):
    """`model` whose logits are divided by `temperature` (> 0); its classes stay as they are.

    Shapes: those of `model`. Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599

    >>> TemperatureScaled(nn.Identity(), 2.0)(torch.tensor([4.0]))
    tensor([2.])
    """

    temperature: Tensor

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature must be finite and > 0, received {temperature!r}")
        self.model = model
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The model's logits over the temperature."""
        return self.model(*args, **kwargs) / self.temperature

    def extra_repr(self) -> str:
        """The temperature."""
        return f"temperature={self.temperature.item():.4g}"


@torch.no_grad()
def scale_temperature(
    model: nn.Module, data: tuple[Tensor, Tensor] | Iterable[Any]
) -> TemperatureScaled:
    """`model` with the temperature that fits held-out rows, in evaluation mode.

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
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        batches = [data] if whole else data
        found = [(model(x.to(device)), y.to(device)) for x, y in batches]
    finally:
        for module, mode in modes:
            module.training = mode
    if not found:
        raise ValueError("data has no batch: nothing to fit a temperature on")
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return TemperatureScaled(model, fit_temperature(logits, labels)).to(device)
