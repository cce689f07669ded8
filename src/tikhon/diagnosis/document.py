"""Format of a diagnosis in `to_dict`, `--json` and `result.json`.

`docs/diagnosis_schema.py` generates `docs/diagnosis.schema.json` from these types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tikhon.diagnosis.record import Record

SCHEMA_VERSION = 2  # 2: findings have a fix, and the unit and healthy range of their evidence


@dataclass(frozen=True)
class MeasureDocument:
    """Unit and healthy range of one number of evidence; null means no bound."""

    unit: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SentenceDocument:
    """A translatable sentence: its key, and its values, which may be sentences themselves."""

    key: str
    values: dict[str, str | float | SentenceDocument]


@dataclass(frozen=True)
class FindingDocument:
    """One finding; `cause` is the code of the finding that it follows from, or empty."""

    code: str
    severity: Literal["info", "warning", "critical"]
    where: list[str]
    evidence: dict[str, float | None]
    measures: dict[str, MeasureDocument]
    sentences: dict[str, SentenceDocument]
    why: str
    effect: str
    advice: list[str]
    fix: str
    cause: str


@dataclass(frozen=True)
class Document:
    """A diagnosis: findings, causes first, and the record that they are derived from.

    `nothing_learned`: the loss of the dry run did not fall, whatever was found;
    `far_behind`: skill is below half of that of a shallow model on the same rows.
    """

    schema_version: Literal[2]
    kind: Literal["diagnosis"]
    ok: bool
    worst: Literal["fine", "info", "warning", "critical"]
    nothing_learned: bool
    far_behind: bool
    labels: list[str]
    findings: list[FindingDocument]
    record: Record
