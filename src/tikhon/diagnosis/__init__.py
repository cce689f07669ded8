"""Diagnosis of training: what is wrong, where, why, and what proves to help."""

from tikhon.diagnosis.diagnose import Diagnosis, diagnose, judge
from tikhon.diagnosis.findings import LABELS, Finding
from tikhon.diagnosis.record import Record

__all__ = ["LABELS", "Diagnosis", "Finding", "Record", "diagnose", "judge"]
