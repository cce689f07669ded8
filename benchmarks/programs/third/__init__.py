"""Programs of domains that the other folders hardly know, re-created and asked about once."""
