"""Optimizers that see each layer's matrix where Flax stores a stack of them."""
