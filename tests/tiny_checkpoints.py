"""Tiny models with random weights for the checkpoint tests: real configurations of transformers, and a plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# 12 experts: sorted as texts, expert 10 would come before expert 2
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 12, "tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": None}),
}  # fmt: skip


def config(name: str) -> Any:
    class_name, changes = CONFIGS[name]
    return getattr(transformers, class_name)(**{**COMMON, **changes})


def new_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, biases and norms included (zeros and ones would hide a swap)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name), dtype=dtype)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    return model


def meta_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(name), dtype=dtype)


def lora(model: Any, **options: Any) -> Any:
    options.setdefault("target_modules", "all-linear")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.layers[0].weight  # type: ignore[assignment]
        self.register_buffer("rebuilt", torch.zeros(2), persistent=False)
