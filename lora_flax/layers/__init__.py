"""What stands in the place of a layer: a frozen base, its low-rank updates, DoRA, probes."""
