"""The run: loop, optimizer, checkpoints, logs."""
