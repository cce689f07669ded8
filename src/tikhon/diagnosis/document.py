"""The document of a diagnosis, as `to_dict`, `--json` and `result.json` give it; its JSON Schema.

Standard library only, but for `json_schema`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tikhon.diagnosis.record import Record

SCHEMA_VERSION = 2  # 2: findings have a fix, and the unit and healthy range of their evidence
ADDRESS = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class MeasureDocument:
    """What a number of evidence counts, and where healthy programs have it; null is no bound."""

    unit: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class FindingDocument:
    """One finding; `cause` is the code of the finding that it follows from, or empty."""

    code: str
    severity: Literal["info", "warning", "critical"]
    where: list[str]
    evidence: dict[str, float | None]
    measures: dict[str, MeasureDocument]
    why: str
    effect: str
    advice: list[str]
    fix: str
    cause: str


@dataclass(frozen=True)
class Document:
    """A whole diagnosis: findings in the order of causes, and the record that gives them."""

    schema_version: Literal[2]
    kind: Literal["diagnosis"]
    ok: bool
    worst: Literal["fine", "info", "warning", "critical"]
    labels: list[str]
    findings: list[FindingDocument]
    record: Record


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the document; `docs/diagnosis.schema.json` holds the same."""
    from pydantic import TypeAdapter

    return {
        "$schema": ADDRESS,
        **TypeAdapter(Document).json_schema(),
        "title": f"tikhon diagnosis {SCHEMA_VERSION}",
    }
