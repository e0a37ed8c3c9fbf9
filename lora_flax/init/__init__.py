"""Initialization of A and B."""
