"""`diagnose`: what is wrong with a model's training, where, why, and what to do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tikhon import plotting
from tikhon.data.forward import LossFunction
from tikhon.diagnosis import picture
from tikhon.diagnosis.checks import (
    data as data_checks,
    loss as loss_checks,
    operations,
    static,
    wiring,
)
from tikhon.diagnosis.checks.symptoms import symptoms
from tikhon.diagnosis.codes import CONSEQUENCES, treatment_sentence
from tikhon.diagnosis.document import SCHEMA_VERSION
from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.findings import LABELS, SEVERITIES, Finding, worst
from tikhon.diagnosis.measure import measure
from tikhon.diagnosis.record import Record, finite
from tikhon.diagnosis.save import save
from tikhon.diagnosis.text import format_screen, html_page
from tikhon.errors import InputError
from tikhon.languages import sentence

# faults of the program itself, causes before consequences
WIRING = (*wiring.CHECKS, *operations.CHECKS, *loss_checks.CHECKS, *data_checks.CHECKS)
# critical only where a control run, or the lowest loss the head can reach, proves them causes
PROVEN = {"frozen_parameters", "missing_from_optimizer", "head_mismatch"}
# evidence by a control run, which proves a cause
CONTROLS = set("calmer faster steadier undropped undecayed unhooked bared skipped scaled".split())
DRAWS = 5  # initialisations of a factory


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`: a record of measurements and the findings derived from it."""

    record: Record
    findings: tuple[Finding, ...]

    @cached_property
    def labels(self) -> set[str]:
        """Codes of the findings that are warnings or worse, consequences included."""
        return {f.code for f in self.findings if f.severity != "info"}

    @property
    def ok(self) -> bool:
        """Whether nothing needs attention."""
        return not self.labels

    def __bool__(self) -> bool:
        return self.ok

    def worst(self) -> str:
        """Return the highest severity: "fine", "info", "warning" or "critical"."""
        return worst(self.findings)

    def __repr__(self) -> str:
        codes = ", ".join(f.code for f in self.findings) or "nothing found"
        return f"Diagnosis({self.record.model}, {self.worst()}: {codes})"

    def __str__(self) -> str:
        return format_screen(self.record, self.findings)

    def _repr_html_(self) -> str:
        return html_page(self.record, self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return verdict, labels, findings and record as plain values without NaN.

        The format is versioned: `tikhon.diagnosis.document`.
        """
        evidence = Evidence(self.record)
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "diagnosis",
            "ok": self.ok,
            "worst": self.worst(),
            "nothing_learned": evidence.learned_nothing,
            "far_behind": evidence.far_behind,
            "labels": sorted(self.labels),
            "findings": [f.to_dict() for f in self.findings],
            "record": finite(self.record.to_dict()),
        }

    def to_json(self) -> str:
        """Return `to_dict` as a JSON string."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save as a run folder for `tikhon report`; `result.json` holds `to_dict`."""
        save(self.to_dict(), path, overwrite=overwrite)

    def plot(self, *, ax: Sequence[plotting.Axes] | None = None) -> plotting.Display:
        """Plot gradient and output scale per layer, updates and loss, as far as measured.

        Args:
            ax: as many matplotlib axes to draw on; a new figure if None.

        Raises:
            InputError: if matplotlib is not installed.
        """
        return picture.plot(self.record, ax)


def diagnose(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    loss: str | LossFunction | None,
    *,
    optimizer: Any = None,
    valid: Any = None,
    steps: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    penalty: Any = None,
    clip: float | None = None,
) -> Diagnosis:
    """Find out why a model does not train, from the model, its data and its loss.

    Inspects model and data, runs one forward and backward pass and, with an optimizer, a dry run.
    Works on copies: parameters, gradients, buffers, mode, hooks and random states of the caller
    stay bit for bit the same.

    Args:
        model: the module, or a factory of it; a factory is called five times and every model runs
            in full, as some symptoms depend on the initialisation: "in 3 of 5 inits".
        data: a pair (inputs, target) of tensors or arrays (inputs may be a tuple or a
            dictionary for models with several inputs), a loader of such batches, one batch,
            or a path or source name.
        loss: `loss(output, target)` returning a scalar: a function or module as your loop calls
            it, or a loss name as for `fit`. A function whose first parameter is named `model` is
            called with the model and the batch as the data yields it. None uses the model's own:
            `training_step` of a Lightning module, or `.loss` of a Hugging Face output.
        optimizer: the optimizer bound to the model (copied with groups and state), or a factory
            called with the parameters. Without it there is no dry run, except for a Lightning
            module with `loss=None`, where `configure_optimizers` provides it.
        valid: validation data, like `data`; needed to detect overfitting.
        steps: length of the dry run, >= 0.
        batch_size: rows per batch, >= 1; a loader has its own.
        seed: seed of batches, dropout and the models of a factory.
        penalty: added to the loss: a callable(model), or terms as for `regularize`.
        clip: maximum global gradient norm, > 0; None for no clipping.

    Raises:
        InputError: if the model or the loss fails on a batch, the loss is not a scalar, model and
            data are on different devices, or an argument is out of range.
        DataError: if there are no rows, or inputs and targets differ in number.

    References:
        Glorot and Bengio, 2010, https://proceedings.mlr.press/v9/glorot10a.html;
        Schoenholz et al., Deep information propagation, 2017, https://arxiv.org/abs/1611.01232

    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(128, 8), torch.arange(128) % 3
    >>> layers = [m for _ in range(25) for m in (nn.Linear(8, 8), nn.Sigmoid())]
    >>> found = diagnose(nn.Sequential(*layers, nn.Linear(8, 3)), (x, y), nn.CrossEntropyLoss())
    >>> sorted(found.labels)
    ['vanishing_gradient']
    """
    options: dict[str, Any] = dict(
        optimizer=optimizer,
        valid=valid,
        steps=steps,
        batch_size=batch_size,
        penalty=penalty,
        clip=clip,
    )
    if isinstance(model, nn.Module) or not callable(model):
        return judge(measure(model, data, loss, seed=seed, **options))
    options["optimizer"] = rebuilder(optimizer)
    draws = [
        measure(draw(model, seed + k), data, loss, seed=seed + k, **options) for k in range(DRAWS)
    ]
    found = [tuple(sorted({f.code for f in symptoms(Evidence(record))})) for record in draws]
    return judge(replace(draws[0], inits=tuple(found)))


def rebuilder(optimizer: object) -> object:
    """Return a factory of the same optimizer for another model."""
    if not isinstance(optimizer, Optimizer):
        return optimizer
    kind, settings = type(optimizer), dict(optimizer.defaults)
    return lambda parameters: kind(parameters, **settings)


def draw(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model from a factory under a seed."""
    if not callable(build):
        raise InputError(
            f"model must be a torch module or a factory of one, received {type(build).__name__}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = build()
        except Exception as error:
            kind = type(error).__name__
            raise InputError(f"the factory of the model failed: {kind}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"the factory must return a module, it returned {type(model).__name__}")
    return model


def judge(record: Record) -> Diagnosis:
    """Derive the findings of a record, deterministically.

    >>> judge(diagnose(nn.Linear(2, 2), (torch.randn(64, 2), torch.arange(64) % 2),
    ...                nn.CrossEntropyLoss()).record).ok
    True
    """
    ev = Evidence(record)
    wired = [finding for check in WIRING for finding in check(ev)]
    untrained = [finding for check in static.CHECKS for finding in check(ev)]
    found = [*wired, *untrained, *symptoms(ev)]
    found += _in_other_inits(record, {f.code for f in found})
    codes = {f.code for f in found if f.severity != "info"}
    if record.failure is not None and record.failure.what == "input":
        found = [f for f in found if f.code not in LABELS]
    dressed = [_dress(f, codes, record) for f in found]
    causes = {f.code for f in wired}
    causes |= {f.code for f in found if f.severity == "critical" and f.code in PROVEN}
    causes |= {f.code for f in found if CONTROLS & f.evidence.keys()}
    dressed.sort(key=lambda f: _rank(f, causes))
    return Diagnosis(record, tuple(dressed))


def _rank(finding: Finding, causes: set[str]) -> tuple[bool, bool, bool, int]:
    """Sort key: faults of the program, symptoms by severity, consequences, info."""
    info = finding.severity == "info"
    return (
        info,
        bool(finding.cause),
        finding.code not in causes,
        -SEVERITIES.index(finding.severity),
    )


def _in_other_inits(record: Record, known: set[str]) -> list[Finding]:
    """Return symptoms that occur only in later models of a factory."""
    counts = Counter(code for labels in record.inits for code in labels)
    return [
        Finding(code, "warning", (), {"inits": count}, sentence("why_not_first"))
        for code, count in counts.items()
        if code not in known
    ]


def _dress(finding: Finding, codes: set[str], record: Record) -> Finding:
    """Add effect, advice, cause and the number of inits that show it to a finding."""
    causes = [c for c in CONSEQUENCES.get(finding.code, ()) if c in codes]
    why = finding.why
    if record.inits:
        count = Counter(code for labels in record.inits for code in labels)[finding.code]
        if count:
            why = sentence("why_inits", why=why, count=count, all=len(record.inits))
    return replace(
        finding,
        why=why,
        effect=treatment_sentence("effect", finding.code, finding.why),
        advice=tuple(treatment_sentence("cures", finding.code, finding.why).split("; ")),
        cause=causes[0] if causes and "steadier" not in finding.evidence else "",
    )


__all__ = ["LABELS", "Diagnosis", "Finding", "diagnose", "judge"]
