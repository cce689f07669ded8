"""The document of a diagnosis, as `to_dict`, `--json` and `result.json` give it.

`docs/diagnosis.schema.json` is made from these types by `docs/diagnosis_schema.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tikhon.diagnosis.record import Record

SCHEMA_VERSION = 2  # 2: findings have a fix, and the unit and healthy range of their evidence


@dataclass(frozen=True)
class MeasureDocument:
    """What a number of evidence counts, and where healthy programs have it; null is no bound."""

    unit: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SentenceDocument:
    """What gives a sentence in any language: its key, and values that may be sentences again."""

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
    """A whole diagnosis: findings in the order of causes, and the record that gives them.

    `nothing_learned` is whether the loss of the dry run did not fall, whatever was found;
    `far_behind` whether it learned less than half of what a shallow model does on the same rows.
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
