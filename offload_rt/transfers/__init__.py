"""Asynchronous copies between tiers: the only streams, events and rings."""
