"""A finding: what is wrong, where, how it is known, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tikhon.diagnosis.record import finite
from tikhon.diagnosis.thresholds import MEASURES

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


@dataclass(frozen=True)
class Finding:
    """One finding; `where` are module names, `evidence` the numbers, `cause` another code."""

    code: str
    severity: str
    where: tuple[str, ...] = ()
    evidence: dict[str, float] = field(default_factory=dict)
    why: str = ""
    effect: str = ""
    advice: tuple[str, ...] = ()
    cause: str = ""
    fix: str = ""  # the line of code to change or to write

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `measures` has the unit and the healthy range of each number."""
        known = {name: asdict(MEASURES[name]) for name in self.evidence if name in MEASURES}
        return {**finite(self), "measures": known}
