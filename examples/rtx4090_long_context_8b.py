"""Llama-8B with rows of 131072 tokens on one RTX 4090: activations, not weights, are what does not fit.

    python examples/rtx4090_long_context_8b.py --dry-run [--html FILE]
    python examples/rtx4090_long_context_8b.py --smoke
    python examples/rtx4090_long_context_8b.py --model ./Llama-3-8B --data books.jsonl --nvme /mnt/ssd --out run

The dry run keeps, swaps or recomputes each layer's activations by chunks of tokens. So does the run where the GPU was
measured (`offload-rt calibrate`, which it begins with) and that is expected to be faster than the fixed rule's plan,
which computes all chunks again. No GPU has run it yet: the times of the dry run are the planner's.
"""

import sys

from rtx4090 import Demo, run

DEMO = Demo(
    doc=__doc__,
    model="llama3-8b",
    job=["--bits", "4", "--adapters", "lora:r=16", "--seq-len", "131072"],
    settings=["--packing", "--lr", "1e-4"],
    smoke=["--seq-len", "128", "--steps", "3", "--device-memory", "35MiB", "--host-memory", "4MiB"],
)

if __name__ == "__main__":
    sys.exit(run(DEMO))
