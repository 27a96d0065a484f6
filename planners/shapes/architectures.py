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

from planners.shapes.model import Attention, Layer, Linear, ModelShape
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

    def window(self) -> int | None:
        return self.size("sliding_window") if self.data.get("sliding_window") is not None else None


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
        name=name_of(Path(c.file.path)), hidden=hidden, vocabulary=vocabulary, layers=tuple(layers),
        embedding_params=table, head_params=head, final_params=final,
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


def name_of(path: Path) -> str:
    """What the model of a configuration, or in a folder, is called; a well-known name is itself."""
    if path.name == "config.json" or path.is_dir():
        path = path.resolve()
        return path.parent.name if path.name == "config.json" else path.name
    return path.stem if path.suffix == ".json" else path.name


def shape_from_config(config: dict[str, Any], name: str) -> ModelShape:
    """The shape of a configuration given as a dictionary."""
    return known_shape(JsonFile(name, json.dumps(config)))


def known_shape(file: JsonFile) -> ModelShape:
    """The shape of a configuration of a family known here. `ProblemError` names path, line and key."""
    config = Config(file)
    kind = model_type(file)
    if kind not in FAMILIES:
        raise unknown_type(file)
    config.data["model_type"] = kind
    return FAMILIES[kind](config)


def model_type(file: JsonFile) -> str:
    """Which family a configuration says it is of. `ProblemError` if it does not say."""
    config = Config(file)
    kind = config.data.get("model_type", file.data.get("model_type"))
    if kind is None:
        raise file.error(config.keys, "has no key 'model_type'; is this a Hugging Face config.json?")
    return str(kind)


def unknown_type(file: JsonFile) -> ProblemError:
    """The error for a family that nobody knows."""
    kind = model_type(file)
    return file.error((*Config(file).keys, "model_type"), f"unknown {kind!r}; {nearest(kind, FAMILIES)}")
