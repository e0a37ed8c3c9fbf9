"""The layers that replace a model's own: a frozen base with low-rank updates, DoRA, and probes."""
