"""What a model consists of: its layers, its tensors, and what a layer's operations make while they run."""
