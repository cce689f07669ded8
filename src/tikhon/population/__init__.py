"""Train K models of one architecture at once, each with its own hyperparameters."""
