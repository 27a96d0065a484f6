"""All parameters of a 13B Llama on one RTX 4090: fp32 master weights and moments rest on the SSD, 16 bytes a parameter.

    python examples/rtx4090_full_finetune_13b.py --dry-run [--html FILE]
    python examples/rtx4090_full_finetune_13b.py --smoke
    python examples/rtx4090_full_finetune_13b.py --model ./Llama-2-13B --data chats.jsonl --nvme /mnt/ssd --out run

The runtime does not stream what trains yet: the run ends with what the engine says of it.
"""

import argparse
import sys

from rtx4090 import Demo, run

STEPS = 100


def train(arguments: list[str]) -> int:
    """A loop as a user writes it. Raises what the engine raises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import offload_rt
    from offload_rt.training.batches import Batches
    from offload_rt.training.data import load_examples

    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--nvme", "--out"):
        parser.add_argument(name, required=True)
    for name in ("--device", "--device-memory", "--host-memory"):
        parser.add_argument(name)
    for name, default in (("--seq-len", 4096), ("--batch-size", 1), ("--steps", STEPS)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model), dtype=torch.bfloat16)
    examples, report = load_examples(options.data, tokenizer, seq_len=options.seq_len)
    print(report)
    batches = Batches(examples, batch_size=options.batch_size, seq_len=options.seq_len, pad_token_id=0, seed=0)
    with offload_rt.engine(
        model, checkpoint=options.model, nvme=options.nvme, device=options.device or "auto", lr=1e-5,
        device_memory=options.device_memory, host_memory=options.host_memory, max_grad_norm=1.0,
        batch_size=options.batch_size, seq_len=options.seq_len,
    ) as engine:  # fmt: skip
        print(engine.summary())
        for step in range(options.steps):
            print(f"step {step + 1}: loss {engine.train_batch([next(batches)]):.4f}")
        engine.save_pretrained(options.out)
    return 0


DEMO = Demo(
    doc=__doc__,
    plan=["--model", "llama2-13b", "--full", "--seq-len", "4096", "--batch-size", "8", "--clip"],
    settings=["--seq-len", "4096", "--batch-size", "8"],
    smoke=["--seq-len", "32", "--batch-size", "2", "--steps", "3"],
    train=train,
)

if __name__ == "__main__":
    sys.exit(run(DEMO))
