"""`offload-rt train`: its options. What they do is in `train_run`, imported after they were parsed."""

from __future__ import annotations

import argparse
import os

from offload_rt.config import EngineConfig, adapter_folder, parse_adapters, parse_bytes, parse_nvme
from offload_rt.errors import ConfigError
from offload_rt.training.options import SCHEDULES

OPTIMIZERS = ("adamw", "adamw-8bit", "adamw-bf16", "lion", "sgd", "adafactor")
EXAMPLES = """
examples:
  offload-rt train --model ./Llama-3-8B --data chats.jsonl --bits 4 --adapters lora:r=16 \\
      --device-memory 8GiB --host-memory 16GiB --nvme /mnt/ssd --out run --epochs 1
  offload-rt train --model ./Llama-3.2-1B --data chats.jsonl --full --optimizer adamw-8bit \\
      --device-memory 8GiB --nvme /mnt/ssd --out run --tbw 600TB

A line of FILE has 'messages', or 'prompt' and 'completion', or 'text'. Ctrl-C (or SIGTERM) finishes the
step, saves, and exits with 128 + the signal's number; --resume continues exactly there, to the bit, with the
same budgets or others, on the same drives or others. With --full and
--nvme the state is committed on the drive, where it rests: every step, or as often as --save-every says for
state that rests in memory. Nothing is copied, and --resume goes on from the last commit after any kill.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    _add_what(parser.add_argument_group("what"))
    _add_where(parser.add_argument_group("where"))
    _add_how(parser.add_argument_group("how"))
    _add_keep(parser.add_argument_group("keep"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    """Model, data, and what trains of it."""
    group.add_argument(
        "--model", required=True, metavar="DIR", help="folder with config.json, safetensors and tokenizer"
    )
    group.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="training examples: JSON lines, also .gz; several files, or a folder of them, are shuffled together",
    )
    group.add_argument(
        "--eval-data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="held-out examples, likewise: their loss, at the end at least",
    )
    group.add_argument("--out", required=True, metavar="DIR", help="checkpoints, metrics and the result")
    group.add_argument("--bits", type=int, choices=(4,), help="4: frozen weights as NF4; left out: as they are")
    group.add_argument(
        "--adapters",
        metavar="KIND|DIR",
        help="new ones, lora:r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj (default: lora:r=16), or a folder with "
        "an adapter that peft saved, which goes on training as it is configured there",
    )
    group.add_argument("--full", action="store_true", help="train all parameters; the result is a whole model")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="with --full (default: adamw)")


def _add_where(group: argparse._ArgumentGroup) -> None:
    """Devices, drives and their budgets."""
    group.add_argument("--device", default="auto", help='"cpu", "cuda" or "auto" (default)')
    group.add_argument("--device-memory", metavar="SIZE", help="hard budget, such as 8GiB (default: measured)")
    group.add_argument("--host-memory", metavar="SIZE", help="hard budget of the tier between (default: one tier)")
    group.add_argument("--nvme", action="append", metavar="DIR[:SIZE]", help="folder for weights and state; per drive")
    group.add_argument("--plan", default="auto", metavar="PLAN", help='"auto" (default), "optimise" or a plan file')


def _add_how(group: argparse._ArgumentGroup) -> None:
    """Rows, steps and their learning rate."""
    group.add_argument("--seq-len", type=int, help="longest row, in tokens (default: the longest example)")
    group.add_argument("--batch-size", type=int, default=1, help="rows of a micro-batch (default: %(default)s)")
    group.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches per step (default: 1)")
    group.add_argument("--steps", type=int, help="optimizer steps in all (default: one epoch)")
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 2e-4; with --full 1e-5)")
    group.add_argument("--warmup-ratio", type=float, default=0.03, help="share of the steps (default: %(default)s)")
    group.add_argument("--schedule", choices=SCHEDULES, default="linear", help="default: %(default)s")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="clip to this norm; 0: never (default: 1)")
    group.add_argument("--eval-every", type=int, help="with --eval-data: steps between evaluations (default: none)")
    group.add_argument("--seed", type=int, default=0, help="of data order, adapters and dropout (default: 0)")
    group.add_argument("--packing", action="store_true", help="several examples per row, kept apart by attention")
    group.add_argument("--raw-prompts", action="store_true", help="prompt + completion without the chat template")
    group.add_argument("--too-long", choices=("truncate", "error"), default="truncate", help="lines beyond --seq-len")
    group.add_argument(
        "--packed-products",
        action="store_true",
        help="on a GPU: few tokens times 4-bit weights without decoding these first, where measured faster; a cut",
    )


def _add_keep(group: argparse._ArgumentGroup) -> None:
    """What is saved and told, and how a run goes on."""
    group.add_argument("--save-every", type=int, help="steps between checkpoints (default: at the end only)")
    group.add_argument(
        "--copy-every",
        type=int,
        help="with --full and --nvme: steps between copies of the state in --out (default: none)",
    )
    group.add_argument("--keep-last", type=int, default=2, help="checkpoints in --out that stay (default: %(default)s)")
    group.add_argument(
        "--keep-best", action="store_true", help="with --eval-data: what has the lowest held-out loss, in --out/best"
    )
    group.add_argument(
        "--tbw", metavar="SIZE", help="the drives' rated endurance, such as 600TB: says what share is used"
    )
    group.add_argument(
        "--max-writes-per-day", metavar="SIZE", help="stop where the run would write more, such as 500GB"
    )
    group.add_argument("--logdir", metavar="DIR", help="TensorBoard events")
    group.add_argument(
        "--report-to",
        choices=("tensorboard", "wandb", "none"),
        help="tensorboard: in --logdir, or --out/tensorboard; wandb: as its environment variables say; metrics.jsonl "
        "has the same numbers (default: what --logdir says)",
    )
    group.add_argument(
        "--trace", metavar="FILE", help="what was under way when in a measured step, for ui.perfetto.dev; also .gz"
    )
    group.add_argument("--trace-steps", type=int, metavar="N", help="with --trace: steps in it (default: 1)")
    group.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint or commit, under any budgets"
    )
    group.add_argument(
        "--other-cuts",
        action="store_true",
        help="with --resume: sums may be taken in another order than before, where budgets ask for it",
    )


def _let_segments_grow() -> None:
    """Keeps a GPU's memory from fragmenting, unless the user has said how it is to be allocated.

    For a process of our own, before it imports torch: see [Note: fragmentation] in `cuda_memory`.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def run(arguments: argparse.Namespace) -> int:
    """Checks what can be checked without torch, then trains."""
    if arguments.steps is None and arguments.epochs is None:
        arguments.epochs = 1
    elif arguments.steps is not None and arguments.epochs is not None:
        raise ConfigError("--steps, --epochs: give one of the two")
    if arguments.other_cuts and not arguments.resume:
        raise ConfigError("--other-cuts: is for --resume; a new run has no cuts yet")
    if arguments.eval_every is not None and arguments.eval_data is None:
        raise ConfigError("--eval-every: is for --eval-data, which is not given")
    if arguments.keep_best and arguments.eval_data is None:
        raise ConfigError("--keep-best: is for --eval-data, which is not given")
    if arguments.trace is None and arguments.trace_steps is not None:
        raise ConfigError("--trace-steps: is for --trace, which is not given")
    arguments.trace_steps = 1 if arguments.trace_steps is None else arguments.trace_steps
    if arguments.trace_steps < 1:
        raise ConfigError(f"--trace-steps: must be at least 1, got {arguments.trace_steps}")
    if arguments.report_to == "none" and arguments.logdir is not None:
        raise ConfigError("--report-to none, --logdir: give one of the two")
    if arguments.report_to == "tensorboard" and arguments.logdir is None:
        arguments.logdir = os.path.join(arguments.out, "tensorboard")
    if not arguments.out:
        raise ConfigError("--out: the name of the folder is empty")
    if not -(2**63) <= arguments.seed < 2**63:
        raise ConfigError(f"--seed: must have at most 64 bits, got {arguments.seed}")
    if arguments.max_grad_norm == 0:
        arguments.max_grad_norm = None
    _settle_what_trains(arguments)
    for field in ("device_memory", "host_memory", "tbw", "max_writes_per_day"):
        if getattr(arguments, field) is not None:
            parse_bytes(getattr(arguments, field), field=field)
    EngineConfig(
        bits=arguments.bits,
        nvme=parse_nvme(arguments.nvme),
        batch_size=arguments.batch_size,
        seq_len=1 if arguments.seq_len is None else arguments.seq_len,
        accumulation_steps=arguments.accumulation_steps,
        max_grad_norm=arguments.max_grad_norm,
    )

    _let_segments_grow()
    from offload_rt.cli.train_run import train_from_arguments

    return train_from_arguments(arguments)


def _settle_what_trains(arguments: argparse.Namespace) -> None:
    """Fills in what depends on --full, and refuses what contradicts it."""
    if not arguments.full:
        for field in ("optimizer", "copy_every"):
            if getattr(arguments, field) is not None:
                raise ConfigError(f"--{field.replace('_', '-')}: is for --full, which trains all parameters")
        arguments.adapters = arguments.adapters or "lora:r=16"
        arguments.lr = 2e-4 if arguments.lr is None else arguments.lr
        if adapter_folder(arguments.adapters) is None:
            parse_adapters(arguments.adapters)
        return
    if arguments.adapters is not None:
        raise ConfigError("--full, --adapters: give one of the two; --full trains all parameters")
    if arguments.bits is not None:
        raise ConfigError(
            f"--full, --bits {arguments.bits}: weights in 4 bits are frozen, and --full trains all of them"
        )
    if arguments.copy_every is not None and not arguments.nvme:
        raise ConfigError("--copy-every: without --nvme every checkpoint is a copy; give --save-every")
    arguments.optimizer = arguments.optimizer or "adamw"
    arguments.lr = 1e-5 if arguments.lr is None else arguments.lr
