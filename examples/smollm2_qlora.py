"""Fine-tunes a real 4-bit Llama whose layers stay on NVMe, at most three of thirty in memory, and shows that it worked.

    make demo        or        python examples/smollm2_qlora.py [--seed N] [--work DIR] [--steps N] [--quick]

SmolLM2-135M-Instruct learns small family puzzles (aiw_task.py): NF4 weights, LoRA adapters, 50 steps of 8 examples.
Steps: convert the model (once) | answer held-out questions | train | answer them again | write the adapter | train a
few steps of the same in plain transformers and peft | load the adapter in plain peft and compare its outputs | table.

The exit code is 0 only if the gain is clear (McNemar p < 0.001) and everything in the table's last part holds.
"""

from __future__ import annotations

import quiet  # noqa: F401 - first: it silences what is imported below

# isort: split

import argparse
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import aiw_task
import peft
import torch
import transformers
from demo_table import checks, show
from evaluation import answers, prompt_ids, sample_outputs
from processes import Meter, cpu_seconds_of_all, run_child
from rich.console import Console
from safetensors.torch import save_file

import offload_rt
from offload_rt.training.batches import Batches
from offload_rt.training.data import load_examples
from offload_rt.training.loop import train
from offload_rt.training.options import TrainingOptions
from offload_rt.wiring.runtime_options import RuntimeOptions

LORA = {
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RECIPE = {"lr": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.1, "max_grad_norm": 1.0, "batch_size": 8, "lora": LORA}
NUM_TRAIN, NUM_TEST = 400, 160
COMPARED_STEPS = 5
"""What plain peft takes for the comparison of memory and speed. The first batch is the largest of the run."""
QUICK = {"num_train": 24, "num_test": 12, "steps": 3}


def main() -> int:
    arguments = parse_arguments()
    begin, console = time.monotonic(), Console()
    model_folder = arguments.model or converted_model(arguments.work, console)
    run = arguments.work / f"seed-{arguments.seed}"
    shutil.rmtree(run, ignore_errors=True)  # an earlier demo's results
    run.mkdir(parents=True)

    facts: dict[str, Any] = {"seed": arguments.seed, "quick": arguments.quick, "run": str(run)}
    facts |= train_with_engine(arguments, model_folder, run, console)
    console.print("now a few steps of the same in plain transformers and peft, and the adapter in plain peft")
    facts |= run_child("plain_peft.py", run, "plain", "same_outputs")
    facts |= run_child("plain_peft.py", run, "plain_recompute")

    facts["wall_seconds"] = time.monotonic() - begin
    facts["cpu_seconds"] = cpu_seconds_of_all()
    facts["checks"] = checks(facts)
    show(facts, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(facts["checks"].values()) else 1


def converted_model(work: Path, console: Console) -> Path:
    """The model as a folder of safetensors; made once, by a child process."""
    folder = work / "smollm2"
    if not folder.exists():
        console.print(f"converting SmolLM2-135M-Instruct into {folder}")
        work.mkdir(parents=True, exist_ok=True)
        run_child("convert_smollm2.py", folder)
    return folder


def train_with_engine(arguments: argparse.Namespace, model_folder: Path, run: Path, console: Console) -> dict[str, Any]:
    """The whole job: evaluation, training, evaluation, adapter. Returns what was counted on the way."""
    # Data: chats in, token ids out; the loss is on the answers.
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    train_set = aiw_task.make_examples("train", arguments.num_train, arguments.seed)
    test_set = aiw_task.make_examples("test", arguments.num_test, 0)
    lines = [json.dumps({"messages": aiw_task.messages(example, with_answer=True)}) + "\n" for example in train_set]
    (run / "train.jsonl").write_text("".join(lines))
    examples, data_report = load_examples(run / "train.jsonl", tokenizer, seq_len=2048)
    longest_prompt = max(len(prompt_ids(tokenizer, example)) for example in test_set)
    seq_len = max(*map(len, examples), longest_prompt + aiw_task.MAX_NEW_TOKENS)
    batches = MeteredBatches(
        examples,
        batch_size=RECIPE["batch_size"],
        seq_len=seq_len,
        seed=arguments.seed,
        pad_token_id=tokenizer.pad_token_id,
    )
    options = TrainingOptions(
        out=run / "training",
        steps=arguments.steps or batches.num_batches(0),
        lr=RECIPE["lr"],
        warmup_ratio=RECIPE["warmup_ratio"],
        schedule="linear",
    )
    # For plain_peft.py, which does the same without offload_rt.
    recipe = RECIPE | {
        "model": str(model_folder), "seed": arguments.seed, "seq_len": seq_len, "num_test": arguments.num_test,
        "compared_steps": min(COMPARED_STEPS, options.steps),
    }  # fmt: skip
    (run / "recipe.json").write_text(json.dumps(recipe, indent=1))
    console.print(f"training: {data_report}; held out: {len(test_set)} questions", soft_wrap=True)

    # Model: a shape without weights. They go from the files to NVMe, as NF4, and come by when they are needed.
    nvme = arguments.work / "nvme"
    nvme.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    batches.meter = meter = Meter()
    with meter.phase("store and engine"):
        config = transformers.AutoConfig.from_pretrained(model_folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        engine = offload_rt.Engine(
            model,
            checkpoint=model_folder,
            bits=4,
            adapters=peft.LoraConfig(**LORA),
            device="cpu",
            device_memory=arguments.device_memory,
            nvme=nvme,
            batch_size=RECIPE["batch_size"],
            seq_len=seq_len,
            max_grad_norm=RECIPE["max_grad_norm"],
            optimizer=functools.partial(torch.optim.AdamW, lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"]),
            # All of so small a model would rest in memory; its layers stream as those of a large one have to.
            options=RuntimeOptions(fill=False),
        )
    with engine:
        console.print(engine.summary(), markup=False, highlight=False, soft_wrap=True)
        if not engine.report()["direct_io"]:
            console.print(f"note: {nvme} is on a file system without O_DIRECT: reads go through the page cache")
        engine.model.eval()
        with meter.phase("evaluation before"):
            answers_before = answers(engine.model, tokenizer, test_set)

        engine.model.train()
        at_start = engine.report()
        with meter.phase("training"):
            result = train(engine, batches, options, console=console)
        at_end = engine.report()
        if result.interrupted is not None:
            raise SystemExit(128 + result.interrupted)

        engine.model.eval()
        with meter.phase("evaluation after"):
            answers_after = answers(engine.model, tokenizer, test_set)
        engine.save_pretrained(run / "adapter")
        save_file(sample_outputs(engine.model, tokenizer, test_set), run / "outputs.safetensors")

        ring = next(ring for ring in engine.plan.rings if ring.name == "layers")
        counted = ("bytes_read", "bytes_written", "stall_seconds", "fetches", "scheduled_fetches", "prefetch_misses")
        return {
            "accuracy": accuracy(test_set, answers_before, answers_after),
            "engine": {
                **meter.facts(),
                **{name: at_end[name] - at_start[name] for name in counted},
                "compared_steps": recipe["compared_steps"],
                "compared_peak_bytes": batches.compared_peak_bytes or meter.phases["training"]["peak_bytes"],
                "steps": result.step,
                "loss": result.loss,
                "tokens": result.tokens,
                "tokens_per_second": result.tokens / result.seconds,
                "training_seconds": result.seconds,
                "num_layers": config.num_hidden_layers,
                "layers_resident": len(set(engine.plan.resident) & set(ring.blocks)),
                # Not the plan's word: the memory that was taken for streamed layers, in layers.
                "layers_at_a_time": at_end["holdings"]["device"]["ring of layers"] / ring.slot_bytes,
                "layer_bytes": ring.slot_bytes,
                "layers_on_nvme": len(ring.blocks) if ring.rest == "nvme" else 0,
                "direct_io": at_end["direct_io"],
                "io": at_end["io"],
                "nf4": at_end["nf4"],
                "managed_bytes": at_end["memory"],
            },
            "adapter": str(run / "adapter"),
        }


class MeteredBatches(Batches):
    """Reads the meter when the steps that plain peft takes too are over."""

    meter: Meter
    compared_peak_bytes: int | None = None

    def __next__(self) -> dict[str, Any]:
        if (self.epoch, self.position) == (0, COMPARED_STEPS):
            self.compared_peak_bytes = self.meter.peak_bytes()
        return super().__next__()


def accuracy(test_set: list[dict[str, Any]], before: list[str], after: list[str]) -> dict[str, Any]:
    """Paired results on the held-out questions, and what can be had without reading them."""
    right_before = [aiw_task.is_right(e, text) for e, text in zip(test_set, before, strict=True)]
    right_after = [aiw_task.is_right(e, text) for e, text in zip(test_set, after, strict=True)]
    lenient = [aiw_task.is_right(e, aiw_task.first_number(text)) for e, text in zip(test_set, before, strict=True)]
    rule, right_by_rule = aiw_task.best_fixed_rule(test_set)
    return {
        "num_questions": len(test_set),
        "right_before": sum(right_before),
        "right_before_first_number": sum(lenient),
        "right_after": sum(right_after),
        "mcnemar_p": aiw_task.mcnemar_exact(right_before, right_after),
        "best_fixed_rule": rule,
        "right_by_rule": sum(right_by_rule),
        "mcnemar_p_against_rule": aiw_task.mcnemar_exact(right_by_rule, right_after),
        "examples": list(zip(before[:3], after[:3], (e["completion"] for e in test_set[:3]), strict=True)),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of training data, their order and the adapters")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="model, weights and results, on an SSD")
    parser.add_argument("--steps", type=int, help="default: one pass over the training data")
    parser.add_argument("--device-memory", default="640MiB", help="the engine's budget (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps and questions; no gain is asked for")
    parser.add_argument("--model", type=Path, help="another Llama's folder, in place of SmolLM2's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was counted")
    parser.set_defaults(num_train=NUM_TRAIN, num_test=NUM_TEST)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_train, arguments.num_test = QUICK["num_train"], QUICK["num_test"]
        arguments.steps = arguments.steps or QUICK["steps"]
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
