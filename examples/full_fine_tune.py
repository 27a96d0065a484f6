"""Trains all parameters of a real model in less memory than its optimizer state takes, and goes on where it stopped.

    python examples/full_fine_tune.py [--model FOLDER] [--work DIR] [--device-memory 900MiB] [--steps 6]

SmolLM2-135M-Instruct, on the puzzles of the demo: masters and moments rest on the drive and come by when their layer's
gradients are there. Called again with more steps it continues from the last commit. What it leaves in DIR/model,
transformers loads.
"""

from __future__ import annotations

import quiet  # noqa: F401 - first: it silences what is imported below

# isort: split

import argparse
import json
from pathlib import Path

import aiw_task
import torch
import transformers
from processes import run_child

import offload_rt
from offload_rt.training.batches import Batches
from offload_rt.training.data import load_examples
from planners.errors import format_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of safetensors (default: SmolLM2, converted once)")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="model, state and result, on an SSD")
    parser.add_argument("--device-memory", default="900MiB", help="the engine's budget (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="in all, those of an earlier call included")
    arguments = parser.parse_args()
    folder = arguments.model or arguments.work / "smollm2"
    nvme = arguments.work / "full"
    nvme.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        run_child("convert_smollm2.py", folder)

    lines = [
        json.dumps({"messages": aiw_task.messages(example, with_answer=True)}) + "\n"
        for example in aiw_task.make_examples("train", 64, seed=0)
    ]
    (arguments.work / "puzzles.jsonl").write_text("".join(lines))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    examples, _ = load_examples(arguments.work / "puzzles.jsonl", tokenizer, seq_len=512)
    seq_len = max(map(len, examples))
    batches = Batches(examples, batch_size=4, seq_len=seq_len, seed=0, pad_token_id=tokenizer.pad_token_id)

    with torch.device("meta"):  # no weights in memory
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder, use_cache=False), dtype=torch.bfloat16
        )
    with offload_rt.engine(
        model, checkpoint=folder, device_memory=arguments.device_memory, nvme=nvme, batch_size=4, seq_len=seq_len,
        max_grad_norm=1.0, lr=1e-5,
    ) as engine:  # fmt: skip
        print(engine.summary())
        engine.track("batches", batches)
        if engine.committed["step"]:
            engine.load_checkpoint(engine.commit_folder)
            print(f"going on from step {engine.step_number}")
        engine.model.train()
        while engine.step_number < arguments.steps:
            loss = engine(**next(batches)).loss
            engine.backward(loss)
            engine.step()  # and the step is committed: a kill or a power cut from here on loses nothing of it
            print(f"step {engine.step_number}: loss {loss.item():.3f}")
        report = engine.report()
        engine.save_pretrained(arguments.work / "model")
    tokenizer.save_pretrained(arguments.work / "model")

    state, written = report["training"]["state_bytes"], report["bytes_written_per_step"]
    peak = report["peak_resident_bytes"] - report["base_bytes"]
    print(
        f"masters and moments {format_bytes(state)}, memory {format_bytes(peak)} at its peak, above the imports; "
        f"{format_bytes(written)} a step to the drive; the model is in {arguments.work / 'model'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
