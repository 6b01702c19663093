"""Training: the loop, its state, checkpoints, logs and monitoring."""
