"""A finding: what is wrong, where, how it is known, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tikhon.diagnosis.codes import treatment_sentence
from tikhon.diagnosis.record import finite
from tikhon.diagnosis.thresholds import MEASURES
from tikhon.languages import Sentence

SEVERITIES = ("info", "warning", "critical")
LABELS = (
    "vanishing_gradient",
    "exploding_gradient",
    "dying_relu",
    "saturated_activation",
    "poor_init",
    "oscillating_loss",
    "slow_convergence",
    "overfitting",
    "underfitting",
)


def worst(findings: Iterable[Finding]) -> str:
    """Return the highest severity among findings; "fine" without any."""
    found = max((SEVERITIES.index(f.severity) for f in findings), default=None)
    return "fine" if found is None else SEVERITIES[found]


@dataclass(frozen=True)
class Finding:
    """One finding; `where` are module names, `evidence` the numbers, `cause` another code."""

    code: str
    severity: str
    where: tuple[str, ...] = ()
    evidence: dict[str, float] = field(default_factory=dict)
    why: Sentence | Literal[""] = ""
    effect: Sentence | Literal[""] = ""
    advice: tuple[str, ...] = ()
    cause: str = ""
    fix: Sentence | str = ""  # the line of code to change or to write

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `measures` holds unit and healthy range of each number.

        `sentences` holds keys and values of `why`, `effect`, `advice` and `fix`, for other
        languages; a `fix` of code alone has none.
        """
        known = {name: asdict(MEASURES[name]) for name in self.evidence if name in MEASURES}
        told = {"why": self.why, "effect": self.effect, "fix": self.fix}
        if self.advice:
            told["advice"] = treatment_sentence("cures", self.code, self.why)
        sentences = {k: v.to_dict() for k, v in told.items() if isinstance(v, Sentence)}
        return {**finite(self), "measures": known, "sentences": sentences}
