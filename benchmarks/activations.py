"""One layer's forward and backward under each way to treat its activations, beside what others offer.

    python benchmarks/activations.py [--tokens 4096] [--chunk 2048] [--hidden 512] [--rounds 7] [--json FILE]

A Llama layer in bf16, all of it training. A round holds one pass of each contender, one after the other, so that a slow
minute of the machine hits all alike; ratios are taken within a round, to plain autograd.

    plain        autograd keeps everything
    checkpoint   torch.utils.checkpoint, without reentry
    save_on_cpu  torch.autograd.graph.save_on_cpu; on the CPU it copies nothing, so it shows the cost of hooks alone
    offload      what TRL's activation_offloading does: hooks put each saved tensor of 1024 elements or more that is no
                 parameter away, whole, and fetch it back when it is asked for (here by copies to and from an arena)
    keep, swap, recompute, select, or several joined by "/", one for each chunk: this library, in chunks of --chunk
                 tokens; swapped chunks are copied to an arena on the same processor, so that nothing overlaps; select
                 keeps what precedes attention and recomputes what follows it

Beside its time, each has the most that PyTorch's allocator held in a pass, arenas apart: compare at equal peaks.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rounds import circumstances, interleave, ratio, summary
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from offload_rt.layers.access import ResidentAccess
from offload_rt.layers.block import Block
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.memory.arena import Arena
from offload_rt.quantized.decoder import Decoder
from offload_rt.tensor_spec import BlockSpec
from offload_rt.tiering.stash import HostStash
from offload_rt.tokenwise.layer import Tokenwise, TokenwiseLayer
from offload_rt.tokenwise.tiles import Places
from offload_rt.transfers.links import Links
from planners.plans.activations import Action, ActivationPolicy, Chunk, Treatment
from planners.plans.placement import Tier

OURS = ["keep", "swap", "swap/recompute", "select", "recompute"]
STASH_BYTES = 2 << 30


def build_layer(hidden: int, tokens: int) -> tuple[torch.nn.Module, torch.Tensor, Any]:
    """A layer, its input and its rotary embedding; equal at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    given = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    return layer, given, LlamaRotaryEmbedding(config)(given, torch.arange(tokens)[None])


def cut(layer: torch.nn.Module, actions: list[str], chunk: int) -> Tokenwise:
    """Runs `layer` by chunks from now on."""
    stash = HostStash(Arena("swapped", STASH_BYTES), Links())
    tokenwise = Tokenwise(Places(swapped={Tier.HOST: stash}))
    block = Block("layer", (layer,), BlockSpec(name="layer", tensors=()), (), Decoder(Arena("decoded", 4096)))
    policy = ActivationPolicy(chunks=tuple(chunk_of(action, chunk) for action in actions))
    access = ResidentAccess(Arena("slot", 4096).acquire(4096, "layer"))
    TokenwiseLayer(layer, block, access, policy=policy, tokenwise=tokenwise).attach()
    return tokenwise


def chunk_of(action: str, num_tokens: int) -> Chunk:
    if action == "select":
        return Chunk(num_tokens=num_tokens, action=Action.KEEP, after=Treatment(action=Action.RECOMPUTE))
    return Chunk(num_tokens=num_tokens, action=Action(action), tier=Tier.HOST if action == "swap" else None)


class Offloading:
    """Every large saved tensor goes to HOST memory and comes back."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._stash = HostStash(Arena("offloaded", STASH_BYTES), Links())
        self._stays = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.numel() < 1024 or tensor.untyped_storage().data_ptr() in self._stays:
            return tensor.detach()
        return self._stash.put(tensor)

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        tensor: torch.Tensor = saved.load()
        saved.release()
        return tensor


def peak_bytes(action: Callable[[], Any]) -> int:
    """The most of what PyTorch's allocator hands out meanwhile that is held at once."""
    with AllocationMeter() as meter:
        action()
    return meter.peak_bytes


def contender(name: str, arguments: argparse.Namespace) -> tuple[Callable[[], float], Tokenwise | None]:
    """What does one pass and returns its seconds; and what the library counted."""
    layer, given, rotary = build_layer(arguments.hidden, arguments.tokens)
    theirs = name in ("plain", "checkpoint", "save_on_cpu", "offload")
    offloading = Offloading(layer) if name == "offload" else None
    tokenwise = None if theirs else cut(layer, name.split("/"), arguments.chunk)

    def forward() -> Any:
        if name == "checkpoint":
            return torch.utils.checkpoint.checkpoint(layer, given, position_embeddings=rotary, use_reentrant=False)
        hooks: Any = torch.autograd.graph.save_on_cpu() if name == "save_on_cpu" else contextlib.nullcontext()
        with hooks if offloading is None else offloading.hooks():
            return layer(given, position_embeddings=rotary)

    def one_pass() -> float:
        layer.zero_grad()
        start = time.perf_counter()
        output = forward()
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        return time.perf_counter() - start

    return one_pass, tokenwise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", default=["checkpoint", "save_on_cpu", "offload", *OURS])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    made = {name: contender(name, arguments) for name in ["plain", *arguments.contenders]}
    seconds = interleave({name: one_pass for name, (one_pass, _) in made.items()}, arguments.rounds)
    num_passes = arguments.rounds + 2  # with the one that warms up, and that in which memory is measured
    peaks = {name: peak_bytes(one_pass) for name, (one_pass, _) in made.items()}
    results: dict[str, Any] = {}
    for name, (_, tokenwise) in made.items():
        swapped_bytes = 0 if tokenwise is None else tokenwise.counters.swapped_bytes // num_passes
        to_plain = ratio(seconds, name, "plain")
        results[name] = {
            "seconds": summary(seconds[name]), "to_plain": to_plain, "swapped_bytes": swapped_bytes,
            "peak_bytes": peaks[name],
        }  # fmt: skip
        print(
            f"{name:16} {1e3 * median(seconds[name]):8.0f} ms   {to_plain['median']:5.3f} x plain "
            f"({to_plain['min']:.3f} to {to_plain['max']:.3f})   {swapped_bytes / 2**20:7.1f} MiB swapped   "
            f"{peaks[name] / 2**20:7.1f} MiB at once"
        )
    if arguments.json is not None:
        shape = {key: getattr(arguments, key) for key in ("tokens", "chunk", "hidden", "rounds", "threads")}
        run = {**circumstances(), "torch": torch.__version__, "configuration": shape, "results": results}
        arguments.json.write_text(json.dumps({"runs": [run]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
