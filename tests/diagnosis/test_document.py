"""The document of a diagnosis has the form that its schema says, whatever was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import wired
from faulty import CE, FAULTY, HEALTHY
from tikhon.diagnosis import diagnose
from tikhon.diagnosis.document import Document, FindingDocument
from tikhon.diagnosis.thresholds import MEASURES

SCHEMA = Path(__file__).parents[2] / "docs" / "diagnosis.schema.json"
FORM = TypeAdapter(Document)
PROGRAMS = [*FAULTY[:4], HEALTHY[0]]


def test_the_published_schema_is_that_of_the_code():
    """After a change: run docs/diagnosis_schema.py; raise SCHEMA_VERSION if a meaning moved."""
    sys.path.insert(0, str(SCHEMA.parent))
    from diagnosis_schema import json_schema

    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema()


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda c: c.name)
def test_every_document_has_the_form(case):
    torch.manual_seed(0)
    found = diagnose(case.build(), case.data(), case.loss, optimizer=case.optimizer, steps=8)
    document = json.loads(found.to_json())
    FORM.validate_json(found.to_json())
    assert document.keys() == set(Document.__annotations__)
    for finding in document["findings"]:
        assert finding.keys() == set(FindingDocument.__annotations__)
        assert finding["measures"].keys() == finding["evidence"].keys(), finding["code"]


def test_a_document_of_another_form_is_refused():
    model = torch.nn.Linear(16, 4)
    document = diagnose(model, wired.classes(), CE).to_dict()
    for change in ({"schema_version": 1}, {"findings": [{"code": "x"}]}, {"worst": "bad"}):
        with pytest.raises(ValidationError):
            FORM.validate_python({**document, **change})


def test_units_are_words_and_ranges_are_ranges():
    for name, measure in MEASURES.items():
        assert measure.unit, name
        if measure.low is not None and measure.high is not None:
            assert measure.low < measure.high, name
