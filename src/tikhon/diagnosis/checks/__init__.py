"""Checks: pure functions from the evidence of a record to findings; standard library only."""
