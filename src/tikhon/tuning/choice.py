"""Choose a member, and estimate the error of the choice, from losses of single rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tikhon.tuning.metric import Metric
from tikhon.tuning.space import Choice, Space, simplifies
from tikhon.tuning.trials import Value, finite_or_none

_DRAWS = 500  # bootstrap samples for the noise of a choice
_CLEAR = 2.0  # standard errors of a significant difference


@dataclass(frozen=True)
class SearchAudit:
    """Quantified uncertainties of a search's choice.

    `noise` is the expected excess of the chosen score over the best candidate's, due to few
    validation rows (bootstrapped). `edges` names hyperparameters chosen at an end of their range.
    `default_score` is the score of the untuned configuration after `default_epoch` epochs, its
    best on the same rows (NaN if time was over by then, or if it diverged, after 0 epochs);
    `gain` is the improvement over it, and `gain_error` its standard error.
    Scores have the `metric`'s own sign: higher is better for a maximised one.
    """

    candidates: int
    failed: int
    best_score: float
    chosen_score: float
    noise: float
    edges: tuple[str, ...]
    default_score: float
    gain: float
    gain_error: float
    default_epoch: int = 0
    metric: str = "loss"
    maximised: bool = False

    @property
    def worth_it(self) -> bool:
        """Whether the chosen configuration beats the default by two standard errors."""
        return self.gain > _CLEAR * self.gain_error

    @property
    def only_default(self) -> bool:
        """Whether all trials of the space failed, so that only the default is left."""
        return self.candidates == 1 and self.failed > 0 and math.isfinite(self.default_score)

    def lines(self) -> list[str]:
        """Return the audit as sentences."""
        if self.only_default:
            return [
                f"all {self.failed} trials of the space diverged; only the default is left "
                f"({self.default_score:.4f}): lower the learning rates of the space"
            ]
        share = f"{self.noise / abs(self.chosen_score):.1%}" if self.chosen_score else "0%"
        sentences = [
            f"{self.candidates} candidates compared, {self.failed} trials diverged",
            f"expected gap to the best candidate from selection noise: {self.noise:.4f} "
            f"({share} of the chosen {self.metric}, {self.chosen_score:.4f})",
        ]
        if self.edges:
            sentences.append(
                f"the choice lies at the edge of the space in {', '.join(self.edges)}: widen it"
            )
        if not math.isfinite(self.default_score):
            sentences.append(
                f"not compared with the default, which had time for {self._epochs} only"
                if self.default_epoch
                else "the default configuration diverged"
            )
        elif self.worth_it:
            sentences.append(
                f"better than the default ({self._default}) by {self.gain:.4f}, standard error "
                f"{self.gain_error:.4f}"
            )
        else:
            sentences.append(
                f"the default would have done as well: {self._default}, a difference of "
                f"{self.gain:.4f}, standard error {self.gain_error:.4f}"
            )
        return sentences

    @property
    def _epochs(self) -> str:
        return "1 epoch" if self.default_epoch == 1 else f"{self.default_epoch} epochs"

    @property
    def _default(self) -> str:
        return f"{self.default_score:.4f} after {self._epochs}, where it was best"

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        fields = {**self.__dict__, "edges": list(self.edges), "worth_it": self.worth_it}
        return {k: finite_or_none(v) if isinstance(v, float) else v for k, v in fields.items()}


def choose(
    rows: Tensor, weights: Sequence[float], models: Sequence[Hashable] | None = None
) -> int:
    """Return the most strongly regularized candidate within one standard error of the best.

    `rows` (candidates, rows) are validation losses; `weights` measure regularization, compared
    only among candidates of the same one of `models`. The error is that of the paired difference
    to the best candidate over rows.
    """
    near = near_best(rows, errors=1.0)
    kinds = list(models or [None] * len(rows))
    return max((k for k in near if kinds[k] == kinds[near[0]]), key=lambda k: weights[k])


def near_best(rows: Tensor, *, errors: float = _CLEAR) -> list[int]:
    """Return candidates within `errors` standard errors of the best, best first.

    Rows and errors as in `choose`. Significantly worse ones would degrade an average of few.
    """
    means = rows.mean(1)
    difference = rows - rows[int(means.argmin())]
    error = difference.std(1) / math.sqrt(rows.shape[1])
    near = (difference.mean(1) <= errors * error).tolist()
    return [k for k in means.argsort(stable=True).tolist() if near[k]]


def blend(
    outputs: Sequence[Tensor],
    score: Callable[[Tensor], float],
    first: int,
    count: int,
    *,
    probabilities: bool,
) -> list[int]:
    """Select up to `count` candidates greedily, with repetition, to minimise the mean's score.

    Starts from `first`. Logits are averaged as probabilities, as in `Average`.

    Reference: Caruana et al., "Ensemble selection from libraries of models", 2004,
    https://doi.org/10.1145/1015330.1015432
    """
    parts = [out.double().softmax(-1) if probabilities else out.double() for out in outputs]
    selected, total = [first], parts[first]
    best, length = math.inf, 1
    while len(selected) < count:
        means = [(total + part) / (len(selected) + 1) for part in parts]
        scores = [score(mean.log() if probabilities else mean) for mean in means]
        k = min(range(len(parts)), key=scores.__getitem__)
        selected, total = [*selected, k], total + parts[k]
        if scores[k] < best:
            best, length = scores[k], len(selected)
    return selected[:length]


def selection_noise(rows: Tensor) -> float:
    """Expected excess loss over the best candidate when choosing on as many random rows."""
    generator = torch.Generator().manual_seed(0)
    count = rows.shape[1]
    means = rows.double().mean(1)
    drawn = torch.randint(count, (_DRAWS, count), generator=generator)
    resampled = torch.stack([rows[:, sample].mean(1) for sample in drawn])
    return float((means[resampled.argmin(1)] - means.min()).mean())


def at_edges(space: Space, config: Mapping[str, Value], trials: int) -> list[str]:
    """Return hyperparameters within half a grid cell of an end of their range.

    Natural limits (a rate or strength of 0) do not count.
    """
    found = []
    margin = 0.5 / max(trials, 2)
    for name in space.varying:
        entry = space.range(name)
        if name not in config:
            continue
        if isinstance(entry, Choice):
            if entry.ordered and config[name] in (entry.values[0], entry.values[-1]):
                found.append(name)
            continue
        unit = entry.unit(config[name])
        is_natural_end = simplifies(name) and entry.at(0.0) == 0
        if unit > 1 - margin or (unit < margin and not is_natural_end):
            found.append(name)
    return found


def audit(
    space: Space,
    configs: Sequence[Mapping[str, Value]],
    rows: Tensor,
    chosen: int,
    default: int | None,
    failed: int,
    metric: Metric | None = None,
    *,
    default_epoch: int = 0,
) -> SearchAudit:
    """Audit a choice; `default` is the index of the untuned candidate, None if it diverged.

    `default_epoch` is the number of epochs it was trained for; with `default` None, those that it
    had time for.
    """
    signed = float if metric is None else metric.signed
    means = rows.mean(1)
    gain, error, score = math.nan, math.nan, math.nan
    if default is not None:
        difference = rows[default] - rows[chosen]
        gain, score = float(difference.mean()), float(means[default])
        error = float(difference.std() / math.sqrt(rows.shape[1]))
    tuned = chosen != default
    return SearchAudit(
        candidates=len(rows),
        failed=failed,
        best_score=signed(float(means.min())),
        chosen_score=signed(float(means[chosen])),
        noise=selection_noise(rows),
        edges=tuple(at_edges(space, configs[chosen], len(configs))) if tuned else (),
        default_score=signed(score),
        gain=gain,
        gain_error=error,
        default_epoch=default_epoch,
        metric="loss" if metric is None else metric.name,
        maximised=metric is not None and metric.maximised,
    )
