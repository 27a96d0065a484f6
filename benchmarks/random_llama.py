"""A Llama of any shape with random bf16 weights, as a sharded safetensors folder: random_llama.py FOLDER SHAPE_JSON.

A shard a layer, made and written one after the other, so that the model is never in memory. The index is written last:
a folder that has one is complete.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STANDARD_DEVIATION = 0.02
SHAPE = {"layers": 22, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000}
"""TinyLlama's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)


def folder(arguments: argparse.Namespace, max_tokens: int) -> Path:
    """The weights of the shape asked for, written once; a name that depends on the shape, so that runs share it."""
    shape = {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": max_tokens,
    }
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]
    found = Path(arguments.nvme) / f"llama-{key}"
    if not (found / "model.safetensors.index.json").exists():
        print(f"writing random weights to {found}", file=sys.stderr)
        command = [sys.executable, str(Path(__file__).resolve()), str(found), json.dumps(shape)]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return found


def write(folder: Path, shape: dict[str, Any]) -> None:
    import torch  # not by whoever only asks where the weights are
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)
    config.save_pretrained(folder)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * STANDARD_DEVIATION).bfloat16()

    index: dict[str, str] = {}
    total_bytes = 0

    def write_shard(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total_bytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    write_shard("embed.safetensors", {"model.embed_tokens.weight": random(config.vocab_size, hidden)})
    for layer in range(config.num_hidden_layers):
        tensors = {f"model.layers.{layer}.{name}.weight": random(*size) for name, size in linears.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.ones(hidden).bfloat16() for name in norms}
        write_shard(f"layer-{layer:03}.safetensors", tensors)
    head = {"lm_head.weight": random(config.vocab_size, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    write_shard("head.safetensors", head)
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), json.loads(sys.argv[2]))
