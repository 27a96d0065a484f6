"""Memory that is leased, locked, counted and given back."""
