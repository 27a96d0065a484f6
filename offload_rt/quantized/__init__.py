"""Weights in 4 bits: their bytes, how they are encoded and decoded, and products with them."""
