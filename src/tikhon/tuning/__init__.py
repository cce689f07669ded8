"""Tune strengths: trials, searches, populations and paths."""
