"""Refusals: of what would train another model, in silence."""
