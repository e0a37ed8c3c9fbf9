"""Training: config, loss, optimizer, step, checkpoints, metrics and the loop that joins them."""
