"""The `phi3-jax` command."""
