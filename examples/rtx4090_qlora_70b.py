"""Llama-70B on one RTX 4090: NF4 weights stream from the SSD, LoRA on every linear trains.

    python examples/rtx4090_qlora_70b.py --dry-run [--html FILE]
    python examples/rtx4090_qlora_70b.py --smoke
    python examples/rtx4090_qlora_70b.py --model ./Llama-3-70B --data chats.jsonl --nvme /mnt/ssd --out run

39 GB of weights in 22 GiB of device memory and 56 GiB of RAM, 8 rows of 4096 tokens a step, one after the other: that
leaves room to keep and swap what layers save of a row. No GPU has run it yet: the times of the dry run are the
planner's.
"""

import sys

from rtx4090 import Demo, run

DEMO = Demo(
    doc=__doc__,
    model="llama3-70b",
    job=[
        "--bits", "4", "--adapters", "lora:r=16", "--seq-len", "4096", "--batch-size", "1",
        "--accumulation-steps", "8",
    ],
    settings=["--lr", "1e-4", "--save-every", "50"],
    smoke=[
        "--seq-len", "32", "--batch-size", "2", "--accumulation-steps", "2", "--steps", "3", "--save-every", "3",
        "--device-memory", "30MiB", "--host-memory", "4MiB",
    ],
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(DEMO))
