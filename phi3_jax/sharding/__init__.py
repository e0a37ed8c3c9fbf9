"""The device mesh, the sharding of every array, and the processes of a run."""
