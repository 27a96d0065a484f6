"""Public configurations of well-known models, by name."""

from __future__ import annotations

from typing import Any


def _dense(
    kind: str, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocab, **more,
    }  # fmt: skip


def _gpt3(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 50257,
        "n_positions": 2048,
    }  # fmt: skip


NAMED: dict[str, dict[str, Any]] = {
    "smollm2-135m": _dense("llama", 576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "llama3.2-1b": _dense("llama", 2048, 16, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True),
    "llama3.2-3b": _dense("llama", 3072, 28, 24, 8, 8192, 128256, head_dim=128, tie_word_embeddings=True),
    "llama2-7b": _dense("llama", 4096, 32, 32, 32, 11008, 32000),
    "llama2-13b": _dense("llama", 5120, 40, 40, 40, 13824, 32000),
    "llama2-70b": _dense("llama", 8192, 80, 64, 8, 28672, 32000),
    "llama3-8b": _dense("llama", 4096, 32, 32, 8, 14336, 128256),
    "llama3-70b": _dense("llama", 8192, 80, 64, 8, 28672, 128256),
    "llama3-405b": _dense("llama", 16384, 126, 128, 8, 53248, 128256),
    "mistral-7b": _dense("mistral", 4096, 32, 32, 8, 14336, 32000),
    "qwen2.5-7b": _dense("qwen2", 3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-32b": _dense("qwen2", 5120, 64, 40, 8, 27648, 152064),
    "qwen2.5-72b": _dense("qwen2", 8192, 80, 64, 8, 29568, 152064),
    "qwen3-8b": _dense("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128),
    "qwen3-32b": _dense("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128),
    "gemma2-9b": _dense("gemma2", 3584, 42, 16, 8, 14336, 256000, head_dim=256, sliding_window=4096),
    "gemma2-27b": _dense("gemma2", 4608, 46, 32, 16, 36864, 256000, head_dim=128, sliding_window=4096),
    "phi3-mini": _dense("phi3", 3072, 32, 32, 32, 8192, 32064),
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257},
    "gpt3-13b": _gpt3(5120, 40, 40),
    "gpt3-175b": _gpt3(12288, 96, 96),
    "opt-30b": {
        "model_type": "opt", "hidden_size": 7168, "num_hidden_layers": 48, "num_attention_heads": 56, "ffn_dim": 28672,
        "vocab_size": 50272, "max_position_embeddings": 2048,
    },
    "falcon-40b": {
        "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_kv_heads": 8, "vocab_size": 65024, "new_decoder_architecture": True,
    },
    "mixtral-8x7b": _dense("mixtral", 4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-8x22b": _dense("mixtral", 6144, 56, 48, 8, 16384, 32768, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-30b-a3b": _dense("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, head_dim=128, num_experts=128,
                            num_experts_per_tok=8, moe_intermediate_size=768),
    "gpt-oss-20b": _dense("gpt_oss", 2880, 24, 64, 8, 2880, 201088, head_dim=64, num_local_experts=32,
                          num_experts_per_tok=4, sliding_window=128),
    "gpt-oss-120b": _dense("gpt_oss", 2880, 36, 64, 8, 2880, 201088, head_dim=64, num_local_experts=128,
                           num_experts_per_tok=4, sliding_window=128),
    "deepseek-v3": _dense("deepseek_v3", 7168, 61, 128, 128, 18432, 129280, q_lora_rank=1536, kv_lora_rank=512,
                          qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, moe_intermediate_size=2048,
                          n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=3),
}  # fmt: skip
