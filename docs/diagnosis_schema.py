"""Write the JSON Schema of a diagnosis: python docs/diagnosis_schema.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tikhon.diagnosis.document import SCHEMA_VERSION, Document

FILE = Path(__file__).with_name("diagnosis.schema.json")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(Document).json_schema(),
        "title": f"tikhon diagnosis {SCHEMA_VERSION}",
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
