"""Programs re-created after the checks were made, and asked about once."""
