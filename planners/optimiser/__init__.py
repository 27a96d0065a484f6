"""Looks for the fastest legal plan: a linear program with a bound, discrete choices, and what else could be bought."""
