"""What a run costs on a device that is not present: memory, FLOPs, time."""
