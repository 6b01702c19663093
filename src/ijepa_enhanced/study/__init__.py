"""Studies: several ways to train, compared at an equal budget over several seeds."""
