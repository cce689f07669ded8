"""The result of a run: scores, verdict, and the commands to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tikhon import notebook, plotting
from tikhon.options import (
    STRENGTHS,
    command_for,
    format_penalty,
    remove_options,
    rerun_command,
    split_command,
)
from tikhon.runs.documents import SavedPenalty
from tikhon.sparsity import Sparsity
from tikhon.training import measures
from tikhon.training.measures import Epoch
from tikhon.training.recipe import Recipe
from tikhon.training.verdict import Scores, Statement, describe_sparsity, judge_run

_LENGTH_FACTOR = 5  # factor on the epochs of a run that was still improving
_BASELINE_NAMES = {"constant": "always the same answer", "linear": "a linear model"}


@dataclass(frozen=True, eq=False)
class Run:
    """A finished or stopped training run.

    `penalties` holds value, strength, mode (`how`) and zeros of each term at the end and, for
    adapted strengths, the `slope` of the validation loss with its `verdict` (`implicit_slopes`).
    `history` has one dict for each epoch, keys as in `history.jsonl`; `ended` is "epochs",
    "early stopping", "budget" or "stopped"; `best_epoch` counts from 1. `assessment` has the
    scores, their standard errors and baselines; None if stopped.
    `found` is the recipe with adapted strengths as numbers, one penalty for each parameter;
    training with it gives weights of similar size. `sparsity` is the result of `sparsify`.
    """

    model: nn.Module
    recipe: Recipe
    history: tuple[Epoch, ...]
    ended: str
    best_epoch: int
    seconds: float
    path: str | None = None
    metrics: Mapping[str, float] | None = None
    penalties: Mapping[str, SavedPenalty] | None = None
    command: tuple[str, ...] = ()
    assessment: Scores | None = None
    found: Recipe | None = None
    sparsity: Sparsity | None = None

    def __repr__(self) -> str:
        metrics = self.metrics or {}
        part = next((p for p in ("test", "valid", "train") if f"{p}/loss" in metrics), "")
        known = [f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith(f"{part}/")]
        scores = f", {', '.join(known[:3])}" if part else ""
        return f"Run({type(self.model).__name__}, {len(self.history)} epochs{scores})"

    def _repr_html_(self) -> str:
        key, curves = self._curves()
        baselines = self.assessment.baselines.items() if self.assessment is not None else ()
        scores = {"this model": self.metrics or {}} | {_BASELINE_NAMES[k]: v for k, v in baselines}
        rows = [(name, k, v) for name, found in scores.items() for k, v in found.items()]
        rows = [row for row in rows if "/loss" not in row[1]]
        chart = notebook.svg_lines(curves, "epoch", key)
        return notebook.html_card(repr(self), [str(self)], ("", "score", "value"), rows, chart)

    def plot(self, *, ax: plotting.Axes | None = None) -> plotting.Display:
        """Plot training and validation accuracy or loss by epoch, with the baselines.

        Args:
            ax: matplotlib axes to draw on; a new figure if None.

        Raises:
            InputError: if matplotlib is not installed.
        """
        display = plotting.canvas(ax)
        key, curves = self._curves()
        names = {"train": "training rows", "valid": "validation rows"}
        series = {names[part]: line for part, line in curves.items()}
        plotting.lines(display.ax_, series, x="epoch", y=key)
        baselines = self.assessment.baselines if self.assessment is not None else {}
        for baseline_name, label in _BASELINE_NAMES.items():
            score = baselines.get(baseline_name, {}).get(f"valid/{key}")
            if score is not None:
                plotting.level(display.ax_, score, label)
        display.ax_.set_title(type(self.model).__name__)
        return display

    def _curves(self) -> tuple[str, dict[str, notebook.Line]]:
        """Return "accuracy" or "loss" and its curve on each part where it was recorded."""
        key = "accuracy" if "train/accuracy" in (self.metrics or {}) else "loss"
        epochs = [float(row["epoch"]) for row in self.history]
        return key, {
            part: (epochs, [row.get(f"{part}/{key}") for row in self.history])
            for part in ("train", "valid")
            if any(f"{part}/{key}" in row for row in self.history)
        }

    def __str__(self) -> str:
        return " ".join(map(str, statements(self)))


def result_document(run: Run, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `result.json` of a fit; `classes` are the class names."""
    found = statements(run, classes)
    scores = run_scores(run, classes)
    return {
        "kind": "fit",
        "verdict": " ".join(map(str, found)),
        "statements": [statement.to_dict() for statement in found],
        "metrics": dict(run.metrics or {}),
        "rows": dict(scores.rows),
        "score_errors": dict(scores.errors),
        "answer": scores.most_frequent,
        "yardsticks": {name: dict(baselines) for name, baselines in scores.baselines.items()},
        "margins": {name: dict(baselines) for name, baselines in scores.margins.items()},
        "by_row": dict(scores.by_row) if scores.part == "valid" else {},
        "penalties": dict(run.penalties or {}),
        **({} if run.found is None else {"found": run.found.to_dict()}),
        **({} if run.sparsity is None else {"sparsity": run.sparsity.to_dict()}),
        "weights": measures.weight_summaries(run.model),
        "best_epoch": run.best_epoch,
        "epochs": len(run.history),
        "ended": run.ended,
        "seconds": run.seconds,
        "next": next_commands(run, found),
    }


def statements(run: Run, classes: Sequence[str] = ()) -> tuple[Statement, ...]:
    """Return the sentences of the verdict, most important first."""
    sentences = judge_run(run_scores(run, classes), run.history, run.ended)
    return sentences if run.sparsity is None else (*sentences, describe_sparsity(run.sparsity))


def run_scores(run: Run, classes: Sequence[str] = ()) -> Scores:
    """Return the scores that the verdict of a run is based on."""
    found = run.assessment
    if found is None:
        return Scores(run.metrics or {})
    weights = [p for p in run.model.parameters() if p.ndim > 1]
    return replace(
        found, most_frequent=class_name(found.most_frequent, classes), linear=len(weights) == 1
    )


def class_name(answer: int | str | None, classes: Sequence[str]) -> str | None:
    """Return the constant prediction as the sentences name it.

    >>> class_name(1, ("no", "yes")), class_name(1, ()), class_name(None, ())
    ("'yes'", 'class 1', None)
    """
    if not isinstance(answer, int):
        return answer
    return repr(str(classes[answer])) if answer < len(classes) else f"class {answer}"


def next_commands(run: Run, found: Sequence[Statement]) -> list[str]:
    """Return commands that act on the findings."""
    if run.path is None or not run.command:
        return []
    arguments = rerun_command(run.command)
    codes = {statement.code.removesuffix("_ratio") for statement in found}
    repeat = [shlex.join(_command_with_found(run, arguments))] if run.found is not None else []
    if "exploded" in codes:
        lower_lr = [] if any(a.split("=")[0] == "--lr" for a in arguments) else ["--lr", "1e-4"]
        return [shlex.join([*remove_options(arguments, "--lr"), *lower_lr]), *repeat]
    if codes & {"improving", "one_epoch"}:
        return [shlex.join(_longer_command(run, arguments)), *repeat]
    commands = []
    if "overfits" in codes and not {"--l2", "--weight-decay"} & set(arguments):
        commands.append(shlex.join([*arguments, "--weight-decay", "auto"]))
    if "rising" in codes and "--early-stopping" not in arguments:
        commands.append(shlex.join([*arguments, "--early-stopping", "5"]))
    if codes & {"no_better_class", "no_better_mean", "linear_better"} and not commands:
        return [shlex.join(command_for("tune", arguments))]
    if not commands:  # compare draws its own splits
        names = {name for name, _ in split_command(arguments)}
        verb = "tune" if {"--time", "--group", "--loss"} & names else "compare"
        commands = [shlex.join(command_for(verb, arguments))]
    return [*commands, *repeat]


def _command_with_found(run: Run, arguments: Sequence[str]) -> list[str]:
    """Return the command with the strengths found, in their modes, in place of "auto"."""
    assert run.found is not None
    strengths = (f"--{name.replace('_', '-')}" for name in STRENGTHS)
    remaining = remove_options(arguments, "--penalty", "--how", "--epochs", *strengths)
    entries = run.found.to_dict()["penalties"]
    penalties = [part for entry in entries for part in ("--penalty", format_penalty(entry))]
    return [*remaining, "--epochs", str(len(run.history)), *penalties]


def _longer_command(run: Run, arguments: Sequence[str]) -> list[str]:
    """Return the command with a longer budget or more epochs."""
    needs_length = (
        run.recipe.averaging == "swa" or run.sparsity or {"--schedule", "--refit"} & set(arguments)
    )
    if run.ended == "budget":
        minutes = max(2, -(-_LENGTH_FACTOR * round(run.seconds) // 60))
        return [*remove_options(arguments, "--budget"), "--budget", f"{minutes}m"]
    known = run.found is not None or needs_length  # these need a fixed length
    if any(a.split("=")[0] == "--epochs" for a in arguments) and not known:
        return remove_options(arguments, "--epochs")  # then early stopping sets the length
    remaining = remove_options(arguments, "--epochs")
    return [*remaining, "--epochs", str(_LENGTH_FACTOR * len(run.history))]
