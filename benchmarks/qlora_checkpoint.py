"""Writes a Llama with random bf16 weights as a sharded safetensors folder: qlora_checkpoint.py FOLDER SHAPE_JSON.

A shard a layer, made and written one after the other, so that the model is never in memory. The index is written last:
a folder that has one is complete.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

STANDARD_DEVIATION = 0.02


def main() -> None:
    folder, shape = Path(sys.argv[1]), json.loads(sys.argv[2])
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

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
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
    write("embed.safetensors", {"model.embed_tokens.weight": random(config.vocab_size, hidden)})
    for layer in range(config.num_hidden_layers):
        tensors = {f"model.layers.{layer}.{name}.weight": random(*size) for name, size in linears.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.ones(hidden).bfloat16() for name in norms}
        write(f"layer-{layer:03}.safetensors", tensors)
    head = {"lm_head.weight": random(config.vocab_size, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    write("head.safetensors", head)
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
