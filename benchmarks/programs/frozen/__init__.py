"""Programs that no threshold was set with: run on the doctor once, at the end."""
