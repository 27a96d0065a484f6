"""What the optimiser is asked: a machine, a workload, and what an operation costs."""
