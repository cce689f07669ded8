"""Programs of the questions that are asked most, re-created and asked about once."""
