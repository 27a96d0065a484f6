"""The demo's counterpart in plain transformers and peft, in a process of its own. Prints one JSON object.

    python plain_peft.py RUN plain              a few steps of the same training, for its speed and peak memory
    python plain_peft.py RUN plain_recompute    the same with gradient checkpointing
    python plain_peft.py RUN same_outputs       does the adapter give the same outputs without offload_rt?

Each of the first two wants a process of its own, whose memory is fresh; the third may follow one of them. RUN is the
folder that `smollm2_qlora.py` wrote: recipe.json, train.jsonl, adapter/, outputs.safetensors.
"""

from __future__ import annotations

import quiet  # noqa: F401 - first: it silences what is imported below

# isort: split

import argparse
import json
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from aiw_task import make_examples
from evaluation import keep_head_input_contiguous, sample_outputs
from processes import Meter
from safetensors.torch import load_file

from offload_rt.quantized import codec
from offload_rt.training.batches import Batches
from offload_rt.training.data import load_examples


def train(run: Path, recipe: dict[str, Any], *, recompute: bool) -> dict[str, Any]:
    """bf16 weights in memory, the same adapters, batches and optimizer. `recompute`: with gradient checkpointing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe["model"])
    examples, _ = load_examples(run / "train.jsonl", tokenizer, seq_len=recipe["seq_len"])
    batches = Batches(
        examples,
        batch_size=recipe["batch_size"],
        seq_len=recipe["seq_len"],
        seed=recipe["seed"],
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe["seed"])
    meter = Meter()
    with meter.phase("loading"):
        base = transformers.AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.bfloat16)
        base.config.use_cache = False
        model = peft.get_peft_model(base, peft.LoraConfig(**recipe["lora"]))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    model.train()
    losses, tokens, seconds = [], 0, 0.0
    with meter.phase("training"):
        for step in range(recipe["compared_steps"]):
            batch, begin = next(batches), time.monotonic()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if step:  # the first one also sets things up
                tokens += int(batch["attention_mask"].sum())
                seconds += time.monotonic() - begin
    return {**meter.facts(), "losses": losses, "tokens_per_second": tokens / seconds if tokens else None}


def check(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Loads the adapter with peft, on a model with the same NF4 values in its layers, and compares its outputs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe["model"])
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.bfloat16)
    with torch.no_grad():
        for module in base.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                blob = codec.encode(module.weight)
                module.weight.copy_(codec.decode(blob, module.weight.shape, module.weight.dtype))
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    keep_head_input_contiguous(model)
    expected = load_file(run / "outputs.safetensors")
    outputs = sample_outputs(model, tokenizer, make_examples("test", recipe["num_test"], 0))
    difference = (outputs["logits"].double() - expected["logits"].double()).abs().max()
    return {
        "num_prompts": len(expected["tokens"]),
        "same_tokens": torch.equal(outputs["tokens"], expected["tokens"]),
        "same_logits": torch.equal(outputs["logits"], expected["logits"]),
        "largest_difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("what", nargs="+", choices=("plain", "plain_recompute", "same_outputs"))
    arguments = parser.parse_args()
    recipe = json.loads((arguments.run / "recipe.json").read_text())
    found = {}
    for what in arguments.what:
        if what == "same_outputs":
            found[what] = check(arguments.run, recipe)
        else:
            found[what] = train(arguments.run, recipe, recompute=what == "plain_recompute")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
