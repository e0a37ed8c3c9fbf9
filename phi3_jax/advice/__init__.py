"""What published work and the data themselves say about a run's settings."""
