"""How A and B start."""
