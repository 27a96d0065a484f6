"""Trains at a sequence whose activations are at least ten times the memory limit that the kernel holds the process to.

    python benchmarks/long_context.py [--tokens 4096] [--layers 184] [--hidden 128] [--limit-mib 600] [--json FILE]

A Llama with random bf16 weights on the drive and LoRA on all linears. Each contender is a process of its own:

    limited    this library in a memory cgroup of --limit-mib: plan="auto", everything that waits is on the drive
    kept       the same chunks, if any, without a limit, all activations kept in memory: its losses, and its adapters
               after the last step, must be the same bits
    plain      transformers and peft without a limit: the difference of its losses is that of the chunks alone
    refused    plain in the cgroup: the kernel kills it, or the limit is none

What autograd would keep is counted on the plain model at a sixteenth of the tokens, each storage once and without
parameters, and scaled: it goes by tokens. Needs to be root, or a cgroup that it may write to.

The limit is for all that the process takes. Torch, transformers and peft hold 325 MiB that are no file and stay, and
--device-memory comes on top: a limit below the sum is refused beforehand, with these numbers. The page cache that
reading the checkpoint fills takes what is left, up to the limit, and gives it back. The narrow shape is for time:
products take it by the square of the width, attention by that of the tokens, activations take their bytes by neither.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import random_llama
from rounds import circumstances

from planners.errors import format_bytes
from planners.units import parse_size

SCALE = 16
LEARNING_RATE = 1e-3
KERNEL_BYTES = 8 << 20
"""Charged to a cgroup beside the process's pages: page tables, slabs, stacks. 2 MiB were seen."""
ROOMY_BYTES = 4 << 30
"""Freed memory that the run without a limit need not give back: the tight plan's slack would have it trim."""


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A new memory cgroup, version 1 or 2, without swap. OSError where none can be made."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, knob = (v1, "memory.limit_in_bytes") if v1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"offload_rt-long-context-{os.getpid()}"
    group.mkdir()
    try:
        (group / knob).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            swap = "memory.memsw.limit_in_bytes" if root == v1 else "memory.swap.max"
            (group / swap).write_text(str(limit_bytes) if root == v1 else "0")
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def peak_of(group: Path) -> int:
    names = ("memory.max_usage_in_bytes", "memory.peak")
    return next((int((group / name).read_text()) for name in names if (group / name).exists()), 0)


def anonymous_bytes() -> int:
    """What this process holds that is no file: it cannot be given back to the system."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def child(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs one contender in this process. Nothing heavy is imported before it has joined its cgroup."""
    if settings["procs"]:
        Path(settings["procs"]).write_text(str(os.getpid()))
    import torch

    torch.set_num_threads(settings["threads"])
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    base_bytes = anonymous_bytes()
    tokens = settings["tokens"]
    lora = LoraConfig(r=settings["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(settings["steps"]):
            ids = torch.randint(0, settings["vocabulary"], (1, tokens), generator=generator)
            yield {"input_ids": ids, "labels": ids}

    if settings["contender"] == "plain":
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
        model = get_peft_model(model, lora)
        if settings["count"]:
            (inputs,) = batches()
            return {"saved_bytes": saved_bytes(model, inputs), "base_bytes": base_bytes}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        losses = []
        for inputs in batches():
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return {"losses": losses}

    import offload_rt
    from planners.plans.activations import Action, ActivationPolicy, Chunk
    from planners.plans.plan import Plan, Tier

    config = AutoConfig.from_pretrained(settings["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"device_memory": settings["device_memory"]}
    if settings["plan"]:
        plan = Plan.from_json(settings["plan"])
        layers = next(ring.blocks for ring in plan.rings if ring.name == "layers")
        policies = (plan.activations or {}).values()
        (chunk_tokens,) = {chunk.num_tokens for policy in policies for chunk in policy.chunks} or {tokens}
        kept = ActivationPolicy(chunks=(Chunk(num_tokens=chunk_tokens, action=Action.KEEP),))
        activations = dict.fromkeys(layers, kept)
        arguments["plan"] = replace(
            plan, activations=activations, layer_inputs=Tier.DEVICE, peak_bytes={}, allocator_slack_bytes=ROOMY_BYTES
        )
    torch.manual_seed(1)
    engine = offload_rt.engine(
        model, checkpoint=settings["model"], adapters=lora, nvme=settings["nvme"], seq_len=tokens, batch_size=1,
        lr=LEARNING_RATE, **arguments,
    )  # fmt: skip
    losses = []
    start = time.perf_counter()
    for inputs in batches():
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for _, parameter in sorted(engine.trainable.items()):
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    report = engine.report()
    found = {
        "losses": losses,
        "adapters_sha256": digest.hexdigest(),
        "seconds": seconds,
        "plan": engine.plan.to_json(),
        "planned_bytes": {tier: sum(items.values()) for tier, items in engine.plan.peak_bytes.items()},
        "base_bytes": report["base_bytes"],
        "arena_bytes": report["arena_bytes"],
        "allocator": report["allocator"],
        "peak_resident_bytes": report["peak_resident_bytes"],
        "bytes_written": report["bytes_written"],
        "bytes_read": report["bytes_read"],
        "tokenwise": report["tokenwise"],
    }
    engine.close()
    return found


def saved_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """What autograd keeps between forward and backward."""
    import torch

    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: list[Any] = []  # so that no address comes again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(storage)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in alive)


def run(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One contender's answer; `killed` where the kernel has ended it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({**settings, **changes})]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if finished.returncode == -9:
        return {"killed": True}
    if finished.returncode:
        raise SystemExit(f"{changes.get('contender')}: ended with {finished.returncode}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4, help="of the adapters, on all linears of the layers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-mib", type=int, default=600, help="of the cgroup: the whole process, imports included")
    parser.add_argument("--device-memory", default="104MiB", help="of it, what this library may plan with")
    parser.add_argument("--skip", nargs="*", default=[], choices=["kept", "plain", "refused"])
    parser.add_argument("--nvme", type=Path, default=Path(tempfile.gettempdir()) / "offload_rt-long-context")
    parser.add_argument("--json", type=Path)
    random_llama.add_arguments(parser)
    parser.set_defaults(layers=184, hidden=128, intermediate=384, heads=2, kv_heads=1, vocabulary=1024)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    arguments.nvme.mkdir(parents=True, exist_ok=True)
    folder = random_llama.folder(arguments, arguments.tokens)
    settings: dict[str, Any] = {
        "procs": None, "threads": arguments.threads, "tokens": arguments.tokens, "steps": arguments.steps,
        "vocabulary": arguments.vocabulary, "model": str(folder), "nvme": str(arguments.nvme), "count": False,
        "device_memory": arguments.device_memory, "rank": arguments.rank, "plan": None,
    }  # fmt: skip
    limit_bytes = arguments.limit_mib << 20
    counted = run(settings, contender="plain", count=True, tokens=arguments.tokens // SCALE, steps=1)
    results: dict[str, Any] = {"limit_bytes": limit_bytes, "activation_bytes": SCALE * counted["saved_bytes"]}
    results["activations_to_limit"] = results["activation_bytes"] / limit_bytes
    print(f"activations are {results['activations_to_limit']:.1f} times the limit", file=sys.stderr)
    budget_bytes = parse_size(arguments.device_memory, field="--device-memory")
    results["base_bytes"] = counted["base_bytes"]
    need_bytes = counted["base_bytes"] + budget_bytes + KERNEL_BYTES
    if need_bytes > limit_bytes:
        raise SystemExit(
            f"limited: does not fit {format_bytes(limit_bytes)}: imports hold {format_bytes(counted['base_bytes'])}, "
            f"--device-memory is {format_bytes(budget_bytes)}, the kernel takes {format_bytes(KERNEL_BYTES)} besides"
        )
    with memory_cgroup(limit_bytes) as group:
        limited = run(settings, contender="ours", procs=str(group / "cgroup.procs"))
        if "killed" in limited:
            raise SystemExit("limited: killed by the kernel: the plan was too lean")
        results["limited"] = {**limited, "peak_in_cgroup_bytes": peak_of(group)}
        if "refused" not in arguments.skip:
            results["refused"] = run(settings, contender="plain", procs=str(group / "cgroup.procs"), steps=1)
    if "kept" not in arguments.skip:
        kept = run(settings, contender="ours", plan=limited["plan"], device_memory=None)
        results["kept"] = kept
        results["same_bits"] = all(kept[what] == limited[what] for what in ("losses", "adapters_sha256"))
    if "plain" not in arguments.skip:
        results["plain"] = run(settings, contender="plain")
        pairs = zip(results["plain"]["losses"], limited["losses"], strict=True)
        results["loss_difference_to_plain"] = max(abs(a - b) / a for a, b in pairs)
    for name in ("limited", "kept"):
        results.get(name, {}).pop("plan", None)
    print(json.dumps(results, indent=1))
    if arguments.json is not None:
        shape = {name: getattr(arguments, name) for name in ("tokens", "steps", *random_llama.SHAPE)}
        arguments.json.write_text(
            json.dumps({"runs": [{**circumstances(), **shape, "results": results}]}, indent=1) + "\n"
        )
    failed = results["activations_to_limit"] < 10 or not results.get("same_bits", True)
    return int(failed or "losses" in results.get("refused", {}))


if __name__ == "__main__":
    sys.exit(main())
