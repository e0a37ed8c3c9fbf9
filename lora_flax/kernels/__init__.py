"""Pallas kernels, and the choice between them and XLA."""
