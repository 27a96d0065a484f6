"""A run, step by step: rehearsed, measured, held against its plan, planned again."""
