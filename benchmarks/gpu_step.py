"""One contender of gpu.py: `gpu_step.py SETTINGS_JSON` makes a Llama, does steps, and writes what they took as JSON."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rounds
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from offload_rt._engine import Engine
from offload_rt.assembly import RuntimeOptions
from offload_rt.config import parse_bytes
from planners.activations import Action, ActivationPolicy, Chunk
from planners.placement import Tier

WARM_UP = 2


def llama(shape: list[int], *, adapters: bool = True) -> torch.nn.Module:
    """A Llama with random weights in RAM, all of which train without `adapters`. They repeat every million: random
    numbers for billions would take minutes.
    """
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    pattern = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1)
            continue
        whole = flat.numel() // pattern.numel() * pattern.numel()
        flat[:whole].view(-1, pattern.numel()).copy_(pattern.expand(whole // pattern.numel(), -1))
        flat[whole:] = pattern[: flat.numel() - whole]
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on meta
    model.config.use_cache = False
    if not adapters:
        return model
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


class Plain:
    """transformers + peft, everything in device memory."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.model = llama(settings["shape"]).to(settings["device"]).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def report(self) -> dict[str, Any]:
        return {}


def swapping(tokens: int) -> ActivationPolicy:
    """Four chunks of tokens: what half of them saves is swapped to HOST, that of the others computed again."""
    actions = [(Action.SWAP, Tier.HOST), (Action.RECOMPUTE, None)] * 2
    return ActivationPolicy(chunks=tuple(Chunk(num_tokens=tokens // 4, action=a, tier=tier) for a, tier in actions))


class Ours:
    """The engine: all layers in slots (`resident`), or streamed through the plan's; adapters train, or all parameters
    (`full`), half of whose updates are the GPU's (`full_device`).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        kind, shape = settings["kind"], settings["shape"]
        on_gpu = settings["device"] == "cuda"
        options = RuntimeOptions(
            num_slots=shape[2] if kind == "resident" else None,
            activations=swapping(settings["tokens"]) if kind == "swap" else None,
            device_share=0.5 if kind == "full_device" and on_gpu else None,
        )
        self.engine = Engine(
            llama(shape, adapters=not kind.startswith("full")).train(),
            bits=None if kind.startswith("full") else 4,
            batch_size=1,
            seq_len=settings["tokens"],
            lr=1e-4,
            device=settings["device"],
            device_memory=settings["device_memory"] if on_gpu else None,
            host_memory=None if on_gpu else "1GiB",
            nvme=settings["nvme"] if kind == "nvme" else None,
            options=options,
        )

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def report(self) -> dict[str, Any]:
        return self.engine.report()


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans of microseconds, in seconds."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6


def profiled(contender: Plain | Ours, batch: dict[str, torch.Tensor], trace: str | None) -> dict[str, Any]:
    """One step under the profiler: busy time of kernels and of copies, and the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        contender.step(batch)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    spans: dict[str, list[tuple[float, float]]] = {}
    by_name: dict[str, float] = {}
    for event in profiler.events():
        if str(event.device_type) != "DeviceType.CUDA":
            continue
        kind = next((k for k in ("HtoD", "DtoH") if f"Memcpy {k}" in event.name), "kernels")
        spans.setdefault(kind, []).append((event.time_range.start, event.time_range.end))
        by_name[event.name[:90]] = by_name.get(event.name[:90], 0.0) + event.time_range.elapsed_us() / 1e6
    if trace:
        profiler.export_chrome_trace(trace)
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {
        "seconds_under_the_profiler": seconds,
        "busy_seconds": {kind: busy_seconds(found) for kind, found in spans.items()},
        "kernels": {name: round(took, 6) for name, took in largest},
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    on_gpu = settings["device"] == "cuda"
    if on_gpu and settings["kind"] != "plain":  # a budget that the allocator itself holds
        whole = torch.cuda.get_device_properties(0).total_memory
        budget = parse_bytes(settings["device_memory"], field="device_memory")
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / whole))
    torch.manual_seed(0)
    start = time.perf_counter()
    contender = (Plain if settings["kind"] == "plain" else Ours)(settings)
    made = time.perf_counter() - start
    tokens = torch.randint(0, settings["shape"][5], (1, settings["tokens"]), generator=torch.Generator().manual_seed(1))
    batch = {name: tokens.to(settings["device"]) for name in ("input_ids", "labels")}
    seconds, losses, host_seconds = [], [], []
    before: dict[str, Any] = {}
    allocations = 0
    for index in range(WARM_UP + settings["steps"]):
        if index == WARM_UP:
            before = contender.report()
            allocations = torch.cuda.memory_stats()["num_device_alloc"] if on_gpu else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = contender.step(batch)
        given = time.perf_counter() - start
        if on_gpu:
            torch.cuda.synchronize()
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            host_seconds.append(given)
            losses.append(float(loss))
    after = contender.report()
    counted = ("bytes_copied", "bytes_read", "stall_seconds", "fetches", "prefetch_misses", "decodes")
    result = {
        "making_seconds": made,
        "seconds": rounds.summary(seconds),
        "host_seconds": rounds.summary(host_seconds),
        "tokens_per_second": settings["tokens"] / rounds.summary(seconds)["median"],
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_reserved() if on_gpu else after.get("peak_resident_bytes", 0),
        "device_allocations_in_steps": torch.cuda.memory_stats()["num_device_alloc"] - allocations if on_gpu else 0,
        "a_step": {name: (after[name] - before[name]) / settings["steps"] for name in counted if name in after},
        "copied_bytes_a_step": (after.get("bytes_copied", 0) - before.get("bytes_copied", 0)) / settings["steps"],
        "gpu": after.get("gpu"),
        "training": after.get("training"),
        "tokenwise": after.get("tokenwise"),
        "summary": contender.engine.summary().splitlines() if isinstance(contender, Ours) else None,
        "profile": profiled(contender, batch, settings["trace"]) if on_gpu and settings["profiled"] else None,
    }
    Path(settings["out"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
        Path(json.loads(sys.argv[1])["out"]).write_text(json.dumps(found), encoding="utf-8")
