"""When: penalties on the user's own optimizer, through its step hooks."""
