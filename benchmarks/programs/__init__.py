"""Programs that do not train, re-created from public reports, and the same programs repaired."""
