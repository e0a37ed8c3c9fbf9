"""Estimate a run's cost on hardware you do not have: memory, FLOPs, time."""
