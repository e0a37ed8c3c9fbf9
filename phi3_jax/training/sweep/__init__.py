"""A sweep: several adapters trained at once over one base."""
