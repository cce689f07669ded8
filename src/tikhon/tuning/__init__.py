"""Choosing strengths: trials, searches, populations and paths."""
