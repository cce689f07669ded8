"""Diagnosis of training: what is wrong, where and why."""

from tikhon.diagnosis.diagnose import Diagnosis, diagnose, judge
from tikhon.diagnosis.findings import LABELS, Finding
from tikhon.diagnosis.record import Record

__all__ = ["LABELS", "Diagnosis", "Finding", "Record", "diagnose", "judge"]
