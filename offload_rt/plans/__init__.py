"""The planners' questions about a model at hand, and their answers as the runtime executes them."""
