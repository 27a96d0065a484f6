"""What a plan's step does and takes: operations on resources, memory at each moment, and the checker of both."""
