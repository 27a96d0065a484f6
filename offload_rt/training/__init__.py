"""What stands around an engine to train: data, batches, the run's folder, the loop of `offload-rt train`."""
