"""Apply penalties in the step hooks of the user's own optimizer."""
