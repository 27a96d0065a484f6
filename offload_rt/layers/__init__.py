"""A model's layers: found, shown their weights when it is their turn, and recomputed in backward."""
