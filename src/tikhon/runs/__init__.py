"""Run folders: writing, resumable states, and graceful interruption."""
