"""Configurations of Hugging Face models as `ModelShape`, with exact parameter counts.

One function an architecture family, each a transcription of which matrices that family has. A test holds every family
against the parameters that transformers creates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from planners.model import Attention, Layer, Linear, ModelShape
from planners.units import JsonFile, ProblemError, nearest

_LIMIT = float(1 << 40)


class Config:
    """A configuration whose values are checked as they are read."""

    def __init__(self, file: JsonFile) -> None:
        self.file = file
        data = file.data
        inner = data.get("text_config")
        self.keys: tuple[str, ...] = ("text_config",) if isinstance(inner, dict) and "hidden_size" not in data else ()
        self.data: dict[str, Any] = inner if self.keys and isinstance(inner, dict) else data

    def size(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """A whole number; `default` where the key is missing or null."""
        value = self.data.get(key)
        if value is None:
            if default is None:
                raise self.file.error(self.keys, f"has no key {key!r}")
            return default
        return int(self.file.number((*self.keys, key), value, low=low, high=_LIMIT, whole=True))

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.file.error((*self.keys, key), f"expected true or false, got {value!r:.60}")
        return value

    def window(self, key: str = "sliding_window") -> int | None:
        return self.size(key) if self.data.get(key) is not None else None


def _attention(
    c: Config, *, hidden: int, bias: bool = False, out_bias: bool = False, window: int | None = None
) -> tuple[tuple[Linear, ...], Attention, int]:
    """Separate query, key, value and output projections; also the size of a head."""
    heads = c.size("num_attention_heads")
    kv_heads = c.size("num_key_value_heads", heads)
    head = c.size("head_dim", max(1, hidden // heads))
    wide, narrow = heads * head, kv_heads * head
    linears = (
        Linear(name="q_proj", in_features=hidden, out_features=wide, bias=bias, stage="qkv"),
        Linear(name="k_proj", in_features=hidden, out_features=narrow, bias=bias, stage="qkv"),
        Linear(name="v_proj", in_features=hidden, out_features=narrow, bias=bias, stage="qkv"),
        Linear(name="o_proj", in_features=wide, out_features=hidden, bias=out_bias, stage="output"),
    )
    sizes = Attention(
        query_features=wide, key_features=narrow, value_features=narrow, output_features=wide, kv_heads=kv_heads,
        window=window,
    )  # fmt: skip
    return linears, sizes, head


def _gated_mlp(hidden: int, inner: int, *, bias: bool = False, prefix: str = "") -> tuple[Linear, ...]:
    return (
        Linear(name=f"{prefix}gate_proj", in_features=hidden, out_features=inner, bias=bias),
        Linear(name=f"{prefix}up_proj", in_features=hidden, out_features=inner, bias=bias),
        Linear(name=f"{prefix}down_proj", in_features=inner, out_features=hidden, bias=bias, stage="down"),
    )


def _experts(hidden: int, inner: int, count: int, active: int, *, bias: bool = False) -> tuple[Linear, ...]:
    """A router and a stack of gated experts."""
    return (
        Linear(name="router", in_features=hidden, out_features=count, bias=bias, stage="router"),
        Linear(name="experts.gate_up_proj", in_features=hidden, out_features=2 * inner, bias=bias, count=count,
               active=active),
        Linear(name="experts.down_proj", in_features=inner, out_features=hidden, bias=bias, count=count,
               active=active, stage="down"),
    )  # fmt: skip


def _plain_mlp(hidden: int, inner: int, *, bias: bool) -> tuple[Linear, ...]:
    return (
        Linear(name="fc1", in_features=hidden, out_features=inner, bias=bias),
        Linear(name="fc2", in_features=inner, out_features=hidden, bias=bias, stage="down"),
    )


def _model(
    c: Config, layers: list[Layer], *, tied: bool, final: int, embedding: int | None = None, head_bias: bool = False,
) -> ModelShape:  # fmt: skip
    vocabulary, hidden = c.size("vocab_size"), layers[0].hidden
    tied = c.flag("tie_word_embeddings", tied)
    table = vocabulary * hidden if embedding is None else embedding
    head = (0 if tied else vocabulary * hidden) + (vocabulary if head_bias else 0)
    return ModelShape(
        name=Path(c.file.path).stem, hidden=hidden, vocabulary=vocabulary, layers=tuple(layers), embedding_params=table,
        head_params=head, final_params=final,
    )  # fmt: skip


def _llama(c: Config) -> ModelShape:
    """Llama, Mistral, Granite and Qwen2, which has biases on query, key and value."""
    kind = c.data["model_type"]
    hidden = c.size("hidden_size")
    bias = kind == "qwen2" or c.flag("attention_bias", False)
    window = c.window() if kind == "mistral" or c.flag("use_sliding_window", False) else None
    linears, attention, head = _attention(c, hidden=hidden, bias=bias, out_bias=bias and kind != "qwen2", window=window)
    mlp = _gated_mlp(hidden, c.size("intermediate_size"), bias=c.flag("mlp_bias", False))
    other = 2 * hidden
    if kind == "qwen3":
        other += 2 * head
    elif kind == "olmo2":
        other += attention.query_features + attention.key_features
    layer = Layer(linears=linears + mlp, other_params=other, attention=attention, hidden=hidden)
    return _model(c, [layer] * c.size("num_hidden_layers"), tied=False, final=hidden)


def _phi3(c: Config) -> ModelShape:
    hidden = c.size("hidden_size")
    _, attention, _ = _attention(c, hidden=hidden, window=c.window())
    fused = attention.query_features + attention.key_features + attention.value_features
    inner = c.size("intermediate_size")
    linears = (
        Linear(name="qkv_proj", in_features=hidden, out_features=fused, stage="qkv"),
        Linear(name="o_proj", in_features=attention.output_features, out_features=hidden, stage="output"),
        Linear(name="gate_up_proj", in_features=hidden, out_features=2 * inner),
        Linear(name="down_proj", in_features=inner, out_features=hidden, stage="down"),
    )
    layer = Layer(linears=linears, other_params=2 * hidden, attention=attention, hidden=hidden)
    return _model(c, [layer] * c.size("num_hidden_layers"), tied=False, final=hidden)


def _phi(c: Config) -> ModelShape:
    hidden = c.size("hidden_size")
    linears, attention, head = _attention(c, hidden=hidden, bias=True, out_bias=True)
    other = 2 * hidden + (4 * head if c.flag("qk_layernorm", False) else 0)
    mlp = _plain_mlp(hidden, c.size("intermediate_size"), bias=True)
    layer = Layer(linears=linears + mlp, other_params=other, attention=attention, hidden=hidden)
    return _model(c, [layer] * c.size("num_hidden_layers"), tied=False, final=2 * hidden, head_bias=True)


def _gemma(c: Config) -> ModelShape:
    """Gemma 1, 2 and 3. In 2 every other layer looks back a window, in 3 all but every sixth."""
    kind = c.data["model_type"]
    hidden = c.size("hidden_size")
    if c.data.get("head_dim") is None:
        c.data["head_dim"] = 256
    bias = c.flag("attention_bias", False)
    num_layers = c.size("num_hidden_layers")
    period = {"gemma": 0, "gemma2": 2}.get(kind, c.size("sliding_window_pattern", 6))
    kinds = c.data.get("layer_types")
    layers = []
    for index in range(num_layers):
        slides = period > 0 and (index + 1) % period != 0
        if isinstance(kinds, list) and index < len(kinds):
            slides = kinds[index] == "sliding_attention"
        linears, attention, head = _attention(
            c, hidden=hidden, bias=bias, out_bias=bias, window=c.window() if slides else None
        )
        other = {"gemma": 2 * hidden, "gemma2": 4 * hidden}.get(kind, 4 * hidden + 2 * head)
        mlp = _gated_mlp(hidden, c.size("intermediate_size"))
        layers.append(Layer(linears=linears + mlp, other_params=other, attention=attention, hidden=hidden))
    return _model(c, layers, tied=True, final=hidden)


def _gpt2(c: Config) -> ModelShape:
    """GPT-2, and GPT-3, which has its shapes."""
    hidden = c.size("n_embd", 768)
    heads = c.size("n_head", 12)
    attention = Attention(
        query_features=hidden, key_features=hidden, value_features=hidden, output_features=hidden, kv_heads=heads
    )
    linears = (
        Linear(name="c_attn", in_features=hidden, out_features=3 * hidden, bias=True, stage="qkv"),
        Linear(name="attn.c_proj", in_features=hidden, out_features=hidden, bias=True, stage="output"),
        *_plain_mlp(hidden, c.size("n_inner", 4 * hidden), bias=True),
    )
    layer = Layer(linears=linears, other_params=4 * hidden, attention=attention, hidden=hidden)
    final = 2 * hidden + c.size("n_positions", 1024) * hidden
    shape = _model(c, [layer] * c.size("n_layer", 12), tied=True, final=final)
    return replace(shape, layer_prefix="transformer.h", embedding_name="transformer.wte")


def _opt(c: Config) -> ModelShape:
    hidden = c.size("hidden_size")
    bias = c.flag("enable_bias", True)
    linears, attention, _ = _attention(c, hidden=hidden, bias=bias, out_bias=bias)
    mlp = _plain_mlp(hidden, c.size("ffn_dim"), bias=bias)
    layer = Layer(linears=linears + mlp, other_params=4 * hidden, attention=attention, hidden=hidden)
    narrow = c.size("word_embed_proj_dim", hidden)
    projections = 0 if narrow == hidden else 2 * narrow * hidden
    norm = 2 * hidden if c.flag("do_layer_norm_before", True) and not c.flag("_remove_final_layer_norm", False) else 0
    positions = (c.size("max_position_embeddings") + 2) * hidden
    shape = _model(
        c, [layer] * c.size("num_hidden_layers"), tied=True, final=norm + positions + projections,
        embedding=c.size("vocab_size") * narrow,
    )  # fmt: skip
    return replace(shape, layer_prefix="model.decoder.layers", embedding_name="model.decoder.embed_tokens")


def _falcon(c: Config) -> ModelShape:
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    new = c.flag("new_decoder_architecture", False)
    kv_heads = c.size("num_kv_heads", heads) if new else (1 if c.flag("multi_query", True) else heads)
    head = hidden // heads
    bias = c.flag("bias", False)
    attention = Attention(
        query_features=hidden, key_features=kv_heads * head, value_features=kv_heads * head, output_features=hidden,
        kv_heads=kv_heads,
    )  # fmt: skip
    linears = (
        Linear(name="query_key_value", in_features=hidden, out_features=hidden + 2 * kv_heads * head, bias=bias,
               stage="qkv"),
        Linear(name="dense", in_features=hidden, out_features=hidden, bias=bias, stage="output"),
        *_plain_mlp(hidden, c.size("ffn_hidden_size", 4 * hidden), bias=bias),
    )  # fmt: skip
    norms = 2 if (new and c.size("num_ln_in_parallel_attn", 2) == 2) or not c.flag("parallel_attn", True) else 1
    layer = Layer(linears=linears, other_params=norms * 2 * hidden, attention=attention, hidden=hidden)
    shape = _model(c, [layer] * c.size("num_hidden_layers"), tied=True, final=2 * hidden)
    return replace(shape, layer_prefix="transformer.h", embedding_name="transformer.word_embeddings")


def _mixture(c: Config) -> ModelShape:
    """Mixtral, Qwen2-MoE, Qwen3-MoE and gpt-oss: every layer routes, but for those that Qwen's settings name."""
    kind = c.data["model_type"]
    hidden = c.size("hidden_size")
    is_oss = kind == "gpt_oss"
    bias = kind == "qwen2_moe" or is_oss or c.flag("attention_bias", False)
    # Older configurations of Qwen say num_experts, newer ones and all others num_local_experts.
    count = c.size("num_experts" if "num_experts" in c.data else "num_local_experts")
    active = c.size("num_experts_per_tok")
    if active > count:
        raise c.file.error((*c.keys, "num_experts_per_tok"), f"is {active}, of {count} experts")
    own = "moe_intermediate_size" if kind.startswith("qwen") else "intermediate_size"
    experts = _experts(hidden, c.size(own), count, active, bias=is_oss)
    dense = c.data.get("mlp_only_layers") or []
    step = c.size("decoder_sparse_step", 1)
    layers = []
    for index in range(c.size("num_hidden_layers")):
        window = c.window() if (is_oss and index % 2 == 0) or kind == "mixtral" else None
        linears, attention, head = _attention(
            c, hidden=hidden, bias=bias, out_bias=bias and kind != "qwen2_moe", window=window
        )
        mlp = experts
        if kind == "qwen2_moe":
            shared = Linear(name="shared_expert_gate", in_features=hidden, out_features=1, stage="router")
            mlp += (*_gated_mlp(hidden, c.size("shared_expert_intermediate_size"), prefix="shared_"), shared)
        if kind.startswith("qwen") and (index in dense or (index + 1) % step):
            mlp = _gated_mlp(hidden, c.size("intermediate_size"))
        other = 2 * hidden + (2 * head if kind == "qwen3_moe" else 0)
        other += c.size("num_attention_heads") if is_oss else 0
        layers.append(Layer(linears=linears + mlp, other_params=other, attention=attention, hidden=hidden))
    return _model(c, layers, tied=False, final=hidden)


def _deepseek(c: Config) -> ModelShape:
    """DeepSeek V2 and V3: attention through low-rank projections, dense layers first."""
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    rope, nope, value = c.size("qk_rope_head_dim"), c.size("qk_nope_head_dim"), c.size("v_head_dim")
    rank = c.size("kv_lora_rank")
    bias = c.flag("attention_bias", False)
    wide = heads * (nope + rope)
    other = 2 * hidden + rank
    if c.data.get("q_lora_rank") is None:
        query: tuple[Linear, ...] = (Linear(name="q_proj", in_features=hidden, out_features=wide, stage="qkv"),)
    else:
        query_rank = c.size("q_lora_rank")
        other += query_rank
        query = (
            Linear(name="q_a_proj", in_features=hidden, out_features=query_rank, bias=bias, stage="qkv"),
            Linear(name="q_b_proj", in_features=query_rank, out_features=wide, stage="qkv"),
        )
    attention = Attention(
        query_features=wide, key_features=wide, value_features=heads * value, output_features=heads * value,
        kv_heads=heads,
    )  # fmt: skip
    projections = (
        *query,
        Linear(name="kv_a_proj_with_mqa", in_features=hidden, out_features=rank + rope, bias=bias, stage="qkv"),
        Linear(name="kv_b_proj", in_features=rank, out_features=heads * (nope + value), stage="qkv"),
        Linear(name="o_proj", in_features=heads * value, out_features=hidden, bias=bias, stage="output"),
    )
    inner = c.size("moe_intermediate_size")
    experts = _experts(hidden, inner, c.size("n_routed_experts"), c.size("num_experts_per_tok"))
    shared = _gated_mlp(hidden, inner * c.size("n_shared_experts", 1), prefix="shared_")
    dense = _gated_mlp(hidden, c.size("intermediate_size"))
    layers = [
        Layer(
            linears=projections + (dense if index < c.size("first_k_dense_replace", 0, low=0) else experts + shared),
            other_params=other,
            attention=attention,
            hidden=hidden,
        )
        for index in range(c.size("num_hidden_layers"))
    ]
    return _model(c, layers, tied=False, final=hidden)


FAMILIES: dict[str, Callable[[Config], ModelShape]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "granite": _llama, "olmo2": _llama,
    "phi": _phi, "phi3": _phi3,
    "gemma": _gemma, "gemma2": _gemma, "gemma3": _gemma, "gemma3_text": _gemma,
    "gpt2": _gpt2, "opt": _opt, "falcon": _falcon,
    "mixtral": _mixture, "qwen2_moe": _mixture, "qwen3_moe": _mixture, "gpt_oss": _mixture,
    "deepseek_v2": _deepseek, "deepseek_v3": _deepseek,
}  # fmt: skip


def read_config(path: Path | str) -> ModelShape:
    """The shape in a `config.json`, or in the folder that holds one. `ProblemError` names path, line and key."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    return _shape(JsonFile.load(path))


def shape_from_config(config: dict[str, Any], name: str) -> ModelShape:
    """The shape of a configuration given as a dictionary."""
    return _shape(JsonFile(name, json.dumps(config)))


def _shape(file: JsonFile) -> ModelShape:
    config = Config(file)
    kind = config.data.get("model_type", file.data.get("model_type"))
    if kind is None:
        raise file.error(config.keys, "has no key 'model_type'; is this a Hugging Face config.json?")
    if kind not in FAMILIES:
        raise file.error((*config.keys, "model_type"), f"unknown {kind!r}; {nearest(str(kind), FAMILIES)}")
    config.data["model_type"] = kind
    return FAMILIES[kind](config)


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
"""Public configurations of well-known models."""


def find_model(name_or_path: str) -> ModelShape:
    """A well-known name, a `config.json`, or a folder with one. `ProblemError` names the nearest match."""
    name = name_or_path.lower()
    if name in NAMED:
        return shape_from_config(NAMED[name], name)
    if Path(name_or_path).exists():
        return read_config(name_or_path)
    if "/" in name_or_path or name_or_path.endswith(".json"):
        raise ProblemError(f"model: no file {name_or_path!r}, and no well-known name; {nearest(name, NAMED)}")
    raise ProblemError(f"model: unknown {name_or_path!r}; {nearest(name, NAMED)}")
