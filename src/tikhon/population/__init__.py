"""K models of one architecture trained at once, each with its own hyperparameters."""
