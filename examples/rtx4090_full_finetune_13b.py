"""All parameters of a 13B Llama on one RTX 4090: fp32 master weights and moments rest on the SSD, 12 bytes a parameter.

    python examples/rtx4090_full_finetune_13b.py --dry-run [--html FILE]
    python examples/rtx4090_full_finetune_13b.py --smoke
    python examples/rtx4090_full_finetune_13b.py --model ./Llama-2-13B --data chats.jsonl --nvme /mnt/ssd --out run

A layer's gradients leave the GPU while it computes the next layer's; the CPU steps them with state that was read ahead,
and writes it back. 8 rows of 4096 tokens go through a layer at once, so that it is fetched once for all of them. As
`--batch-size 1 --accumulation-steps 8` they go through the layers together, too, but sums of all gradients wait in RAM
in float32. No GPU has run it yet: the times of the dry run are the planner's.
"""

import sys

from rtx4090 import Demo, run

DEMO = Demo(
    doc=__doc__,
    model="llama2-13b",
    job=["--full", "--seq-len", "4096", "--batch-size", "8"],
    plan=["--commit-every", "1"],
    settings=["--lr", "1e-5"],
    smoke=[
        "--seq-len", "32", "--batch-size", "2", "--accumulation-steps", "2", "--steps", "3",
        "--device-memory", "12MiB", "--host-memory", "4MiB",
    ],
    smoke_width=64,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(DEMO))
