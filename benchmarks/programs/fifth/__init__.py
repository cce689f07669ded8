"""Programs of public reports as the searches gave them, re-created and asked about once."""
