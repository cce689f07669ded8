"""Run folders: one writer, states that resume, signals that end a run in good order."""
