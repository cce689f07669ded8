"""The verdict on a training run: pure functions of scores and history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tikhon.languages import fill
from tikhon.numbers import Z_95, format_number
from tikhon.sparsity import Sparsity

GAP = 0.03  # train minus validation accuracy that counts as overfitting
RATIO = 1.25  # the same as a ratio of root mean squared errors
RISE = 1.1  # last validation loss over its lowest that counts as rising
FALL = 0.02  # relative fall over the last quarter of the epochs that counts as improving
FLOOR = 1e-3  # of the first validation loss: smaller falls are ignored once half of it is gone
SHARE = 0.1  # or the share of the whole fall in the last quarter, for slow runs
_EXPLODED = 100.0  # factor on the loss of a constant prediction: no trained model exceeds it
_CLEARLY_LOWER = 0.8  # of the RMSE of the mean: where that is not measurable, few rows decide it

LEVELS = {
    "no_better_class": "bad",
    "no_better_mean": "bad",
    "unsure_mean": "watch",
    "only_probabilities": "watch",
    "improving": "watch",
    "exploded": "bad",
    "one_epoch": "watch",
    "overfits": "bad",
    "overfits_ratio": "bad",
    "unsure": "plain",
    "unsure_ratio": "plain",
    "rising": "watch",
    "linear_better": "watch",
    "linear_equal": "plain",
    "linear_unsure": "plain",
    "linear_unsure_rmse": "plain",
    "unjudged": "plain",
    "sparse": "plain",
    "not_sparse": "watch",
    "cheaper": "plain",
}


@dataclass(frozen=True)
class Statement:
    """One sentence: its code and its formatted numbers."""

    code: str
    values: Mapping[str, str]

    @property
    def level(self) -> str:
        """Level of the finding: good, plain, watch or bad."""
        return LEVELS.get(self.code, "good")

    def __str__(self) -> str:
        return fill("en", f"verdict_{self.code}", self.values)

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        return {"code": self.code, "level": self.level, **self.values}


@dataclass(frozen=True)
class Scores:
    """Scores of a trained model with their standard errors and baselines.

    `metrics` holds the scores of each part ("valid/accuracy"), `rows` the row counts, `errors` the
    standard errors (for an rmse, that of its logarithm). `baselines` has the scores of "constant"
    (the most frequent class, or the mean) and "linear", keys as in `metrics`; `margins` the
    improvement over each in accuracy, squared error or cross-entropy on the rows of `part`, with
    the standard error of the paired difference. `by_row` allows pairing with another run: a
    fingerprint of the rows of `part` ("rows"), and "1" for each correct prediction in "accuracy"
    or the squared errors in "rmse". `most_frequent` is the class of
    "constant", index or name, None for the mean; `linear` tells whether the model is linear.
    """

    metrics: Mapping[str, float]
    rows: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    part: str = ""
    most_frequent: int | str | None = None
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    margins: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    linear: bool = False
    by_row: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The main score: "accuracy" or "rmse"."""
        return "accuracy" if f"{self.part or 'train'}/accuracy" in self.metrics else "rmse"


def judge_run(
    scores: Scores, history: Sequence[Mapping[str, float]] = (), ended: str = ""
) -> tuple[Statement, ...]:
    """Return the sentences of a run, most important first.

    A model that learned nothing and a run that was cut short come first, so that neither is
    praised.

    >>> metrics = {"train/accuracy": 1.0, "valid/accuracy": 0.8}
    >>> errors = {"train/accuracy": 0.01, "valid/accuracy": 0.04}
    >>> [found] = judge_run(Scores(metrics, {"train": 300, "valid": 100}, errors))
    >>> found.code, found.values["low"], found.values["high"]
    ('overfits', '0.119', '0.281')
    """
    found = [
        *_compare_with_constant(scores),
        *(_check_divergence(scores) or _check_length(history, ended)),
    ]
    cut_short = bool(found)
    gap = _check_gap(scores)
    if gap is not None and not (cut_short and gap.level == "good"):
        found.append(gap)
    found += _check_rise(scores, history)
    if not scores.linear and not any(s.code.startswith("no_better") for s in found):
        found += _compare_with_linear(scores)
    return tuple(found)


def describe_sparsity(found: Sparsity) -> Statement:
    """Compare the sparsity achieved by `sparsify` with what was requested."""
    values = {
        "share": f"{found.share:.2%}",
        "asked": f"{found.asked:.2%}",
        "units": found.of,
        "step": f"{found.step:,}",
        "end": f"{found.end:,}",
        "saved": f"{found.saved or 0:.2%}",
        "cost": found.cost or "",
    }
    if found.step < found.end:
        return Statement("not_sparse", values)
    return Statement("sparse" if found.saved is None else "cheaper", values)


def _compare_with_constant(scores: Scores) -> list[Statement]:
    """Report a model no better than a constant prediction."""
    margins = scores.margins.get("constant")
    if not margins:
        return []
    baseline = scores.baselines["constant"]
    at = f"{scores.part}/{scores.key}"
    values = {
        "answer": str(scores.most_frequent),
        "rows": f"{scores.rows[scores.part]:,}",
        "part": _PARTS[scores.part],
        "score": format_number(scores.metrics[at]),
        "baseline": format_number(baseline[at]),
    }
    if _is_better(margins[scores.key]):
        return []
    if scores.key == "rmse":
        is_lower = scores.metrics[at] < _CLEARLY_LOWER * baseline[at]
        return [Statement("unsure_mean" if is_lower else "no_better_mean", values)]
    if not _is_better(margins["loss"]):
        return [Statement("no_better_class", values)]
    loss = f"{scores.part}/loss"
    losses = {
        "loss": format_number(scores.metrics[loss]),
        "baseline_loss": format_number(baseline[loss]),
    }
    return [Statement("only_probabilities", values | losses)]


_PARTS = {"train": "training", "valid": "validation", "test": "test"}


def _is_better(margin: Sequence[float]) -> bool:
    mean, error = margin
    return mean > Z_95 * error


def _is_equal(key: str, linear: float, margin: Sequence[float]) -> bool:
    """Return whether the model's advantage is negligible at the upper end of its interval.

    A margin of errors is in squared units, hence compared with squared errors.
    """
    upper = margin[0] + Z_95 * margin[1]
    if key == "accuracy":
        return upper <= GAP
    return linear**2 <= RATIO**2 * (linear**2 - upper)


def _check_divergence(scores: Scores) -> list[Statement]:
    """Report a loss so far above a constant prediction's that more training cannot help."""
    at = f"{scores.part}/loss"
    baseline = scores.baselines.get("constant", {}).get(at, 0.0)
    loss = scores.metrics.get(at, 0.0)
    if not 0 < _EXPLODED * baseline < loss:
        return []
    values = {"loss": format_number(loss), "baseline_loss": format_number(baseline)}
    return [Statement("exploded", values | {"answer": str(scores.most_frequent or "the mean")})]


def _check_length(history: Sequence[Mapping[str, float]], ended: str) -> list[Statement]:
    if ended == "early stopping" or not history:
        return []
    if len(history) == 1:
        return [Statement("one_epoch", {})]
    if is_improving(history):
        return [Statement("improving", {"epochs": f"{len(history):,}"})]
    return []


def is_improving(history: Sequence[Mapping[str, float]]) -> bool:
    """Return whether the validation loss was at its lowest and still falling at the end.

    True if its minimum is in the last tenth of the epochs and it fell over the last quarter by
    more than 2 %, or by more than a tenth of its total fall (for small learning rates). Once it
    has halved, falls below a thousandth of its first value are ignored: the loss of a solved task
    keeps falling slightly. False without validation rows.

    >>> is_improving([{"valid/loss": 1 / epoch} for epoch in range(1, 21)])
    True
    """
    losses = [row["valid/loss"] for row in history if "valid/loss" in row]
    if len(losses) < 2 or len(losses) < len(history):
        return False
    before, last = losses[-1 - max(1, len(losses) // 4)], losses[-1]
    if losses.index(min(losses)) < len(losses) - max(1, len(losses) // 10):
        return False
    fall, whole = before - last, losses[0] - last
    if last < losses[0] / 2 and fall < FLOOR * losses[0]:
        return False
    return fall > FALL * abs(before) or fall > SHARE * whole > 0


def gap_interval(scores: Scores) -> tuple[float, float, float] | None:
    """Return the gap between training and validation rows with its 95 % interval.

    A difference of accuracies or a ratio of errors. The two parts share no rows, so their
    variances add. None unless both scores and their errors are known.
    """
    key = scores.key
    names = [f"{part}/{key}" for part in ("train", "valid")]
    if any(name not in scores.metrics or name not in scores.errors for name in names):
        return None
    train, valid = (scores.metrics[name] for name in names)
    half = Z_95 * math.hypot(*(scores.errors[name] for name in names))
    if key == "accuracy":
        return train - valid, train - valid - half, train - valid + half
    if not train > 0:
        return None
    return valid / train, valid / train * math.exp(-half), valid / train * math.exp(half)


def _check_gap(scores: Scores) -> Statement | None:
    found = gap_interval(scores)
    if found is None:
        scored = any(name.startswith("valid/") for name in scores.metrics)
        return None if scored else Statement("unjudged", {})
    gap, low, high = found
    zero_gap, limit = (0.0, GAP) if scores.key == "accuracy" else (1.0, RATIO)
    code = "unsure"
    if low > zero_gap and gap > limit:
        code = "overfits"
    elif low > zero_gap or high <= limit:
        code = "even"
    values = {
        "rows": f"{scores.rows['valid']:,}",
        "train": format_number(scores.metrics[f"train/{scores.key}"]),
        "valid": format_number(scores.metrics[f"valid/{scores.key}"]),
        **{name: format_number(value) for name, value in zip(("gap", "low", "high"), found)},
    }
    return Statement(code if scores.key == "accuracy" else f"{code}_ratio", values)


def best_epoch(history: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """Return the epoch with the lowest validation loss."""
    return min(
        (row for row in history if "valid/loss" in row),
        key=lambda row: row["valid/loss"],
        default=None,
    )


def epochs_at_final_sparsity(
    history: Sequence[Mapping[str, float]],
) -> Sequence[Mapping[str, float]]:
    """Return the epochs with at least the final share of zero weights."""
    zero_shares = [row.get("sparsity/zeros", 0.0) for row in history]
    return [row for row, share in zip(history, zero_shares) if share >= zero_shares[-1]]


def has_risen(metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> bool:
    """Return whether the validation loss of the model is well above its lowest value."""
    history = epochs_at_final_sparsity(history)
    low = best_epoch(history)
    last = metrics.get("valid/loss")  # absent after a refit, which trains on these rows
    if low is None or last is None:
        return False
    first = next(abs(row["valid/loss"]) for row in history if "valid/loss" in row)
    return last - low["valid/loss"] > max((RISE - 1) * low["valid/loss"], FLOOR * first)


def _check_rise(scores: Scores, history: Sequence[Mapping[str, float]]) -> list[Statement]:
    if not has_risen(scores.metrics, history):
        return []
    low = best_epoch(epochs_at_final_sparsity(history)) or {}
    return [
        Statement(
            "rising",
            {
                "lowest": format_number(low["valid/loss"]),
                "epoch": str(low["epoch"]),
                "last": format_number(scores.metrics["valid/loss"]),
            },
        )
    ]


def _compare_with_linear(scores: Scores) -> list[Statement]:
    margins = scores.margins.get("linear")
    if not margins:
        return []
    key = f"{scores.part}/{scores.key}"
    linear = scores.baselines["linear"]
    values = {
        "rows": f"{scores.rows[scores.part]:,}",
        "part": _PARTS[scores.part],
        "score": format_number(linear[key]),
        "own": format_number(scores.metrics[key]),
    }
    mean, error = margins[scores.key]
    if _is_better((mean, error)):
        return []
    if _is_better((-mean, error)):
        return [Statement("linear_better", values)]
    if _is_equal(scores.key, linear[key], (mean, error)):
        return [Statement("linear_equal", values)]
    return [Statement("linear_unsure_rmse" if scores.key == "rmse" else "linear_unsure", values)]
