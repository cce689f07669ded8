"""Programs of public reports from a sixth search, re-created and asked about once."""
