"""Diagnosis of training: what is wrong, where, why, and what proves to help."""

from tikhon.diagnosis.cure import Cure, cure
from tikhon.diagnosis.diagnose import Diagnosis, diagnose, judge
from tikhon.diagnosis.findings import LABELS, Finding
from tikhon.diagnosis.record import Record
from tikhon.diagnosis.watch import NonFiniteError, Watch, watch

__all__ = [
    "LABELS", "Cure", "Diagnosis", "Finding", "NonFiniteError", "Record", "Watch", "cure",
    "diagnose", "judge", "watch",
]  # fmt: skip
