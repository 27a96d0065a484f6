"""Drives: blocks that never change, state that is committed, and room for what lives shorter than a step."""
