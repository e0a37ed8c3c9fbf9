"""Training: setup, optimizer, step, checkpoints, metrics and the loop that ties them together."""
