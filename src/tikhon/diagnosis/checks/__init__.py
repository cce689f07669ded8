"""What a record says: pure functions of its evidence, of the standard library alone."""
