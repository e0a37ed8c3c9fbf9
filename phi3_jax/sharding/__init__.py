"""The device mesh, array shardings, and multi-process runs."""
