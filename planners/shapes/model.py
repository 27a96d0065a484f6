"""A model as the planner sees it: layers of linears, counted exactly. No weights, no torch.

`architectures` makes these from configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

QUANT_BLOCK = 64
"""Weights to an NF4 quant block; with double quantization one code byte each, and a float for 256 of them."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One matrix that multiplies tokens, or a stack of equal ones (experts)."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    count: int = 1
    """How many there are."""
    active: int = 1
    """How many of them a token meets."""
    stage: str = "up"
    """`qkv`, `output` (of attention), `router`, `up` or `down` (of the MLP): what its result is."""

    @property
    def weights(self) -> int:
        return self.count * self.in_features * self.out_features

    @property
    def params(self) -> int:
        return self.weights + (self.count * self.out_features if self.bias else 0)

    @property
    def flops_per_token(self) -> int:
        """Of its forward product."""
        return 2 * self.active * self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Sizes of one layer's attention, in features."""

    query_features: int
    """All query heads, with the part that only scores use (DeepSeek's rotary part)."""
    key_features: int
    value_features: int
    output_features: int
    """What attention hands to the output projection."""
    kv_heads: int
    window: int | None = None
    """Tokens that a query looks back at; None: all."""

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs of causal scores and sums, the mean over a sequence."""
        window = seq_len if self.window is None else min(self.window, seq_len)
        # A query at position p meets min(p + 1, window) keys.
        keys = window - window * (window - 1) / (2 * seq_len)
        return 2.0 * keys * (self.query_features + self.output_features)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer."""

    linears: tuple[Linear, ...]
    other_params: int
    """Norms, sinks, anything that multiplies no token by a matrix."""
    attention: Attention
    hidden: int

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears) + self.other_params

    @property
    def mlp_features(self) -> int:
        """Results of the MLP's first products, gates included, of the experts that a token meets."""
        return sum(linear.active * linear.out_features for linear in self.linears if linear.stage == "up")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A whole model."""

    name: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    """In order; equal layers are equal values."""
    embedding_params: int
    head_params: int
    """0 where the head is tied to the embedding."""
    final_params: int
    """The last norm, and whatever else stands outside layers."""
    layer_prefix: str = "model.layers"
    embedding_name: str = "model.embed_tokens"
    head_name: str = "lm_head"

    @property
    def params(self) -> int:
        return self.embedding_params + self.head_params + self.final_params + sum(layer.params for layer in self.layers)


def stored_bytes(linear: Linear, bits: int | None) -> int:
    """Bytes of a linear's frozen parameters: NF4 with double quantization for `bits=4`, 16-bit otherwise."""
    bias = 2 * (linear.params - linear.weights)
    if bits is None:
        return 2 * linear.weights + bias
    quant_blocks = -(-linear.weights // QUANT_BLOCK)
    return -(-linear.weights // 2) + quant_blocks + 4 * -(-quant_blocks // 256) + bias
