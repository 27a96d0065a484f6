"""The operations of one transformer layer, and the tensors that exist while they run. Per token; no times.

    forward          norm 1 ─ qkv ─ attention ─ output ─ norm 2 ─ up ─ product ─ down
    tick               0       1        2         3        4      5      6        7

    recompute, then   0 .. 6 as in forward, then backward of down at 7, of product at 8, ..., of norm 1 at 14
    backward

Two kinds of tensors: what a plan keeps, puts away or computes again (`Saved`), and what is *transient* in any case:
gradients of activations, temporaries within an operation, and what autograd saves besides and is cheap to make again.
The trace is that of a pre-norm layer run operation by operation, as Hugging Face's modules do: norms work in fp32 and
save their input so, keys and queries exist before and after their rotation, attention's result in two orders. A test
measures such a layer. Gradients of weights are not here, nor is the residual stream between layers, in which the
gradient of a layer's result arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planners.plans.schedule import Phase
from planners.shapes.model import Layer, Linear

ITEM_BYTES = 2
"""Of activations and unquantized weights: 16 bit."""
NORM_1, QKV, ATTENTION, OUTPUT, NORM_2, UP, PRODUCT, DOWN = range(8)
NUM_OPERATIONS = 8
NORM_BACKWARD_ROWS = 10
"""Temporaries of an RMS norm's backward, written in Python: five in fp32."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One thing that a block's backward needs again: kept, put away, or computed once more."""

    name: str
    bytes_per_token: float
    flops_per_token: float = 0.0
    """Of the products that make it again, from what is saved before it."""
    is_attention: bool = False
    """Made again by the block's attention."""
    moved_bytes_per_token: float = 0.0
    """By the element-wise operations that make it again."""
    recomputable: bool = True
    made: int = 0
    """The operation whose result it is, or, of a block's input, which reads it first."""
    read: int = 0
    """The last operation of forward that reads it."""
    needed: int = 0
    """The operation whose backward is the last that needs it."""


@dataclass(frozen=True, kw_only=True)
class Transient:
    """A tensor that comes and goes within a pass over one block."""

    name: str
    bytes_per_token: float
    phase: Phase
    begin: int
    """Tick of the pass."""
    end: int


def num_ticks(num_operations: int, phase: Phase) -> int:
    """Of a pass over a block; backward begins with the operations that are run again, all but the last."""
    return num_operations if phase is Phase.FORWARD else 2 * num_operations - 1


def backward_tick(num_operations: int, operation: int) -> int:
    """When the backward of `operation` runs."""
    return 2 * num_operations - 2 - operation


def saved_tensors(layer: Layer, adapter_params: Callable[[Linear], int]) -> tuple[Saved, ...]:
    """What autograd saves of a pre-norm layer, in the order in which it is made."""
    hidden, attention = layer.hidden, layer.attention
    row = ITEM_BYTES * hidden

    def products(*stages: str) -> float:
        own = [linear for linear in layer.linears if linear.stage in stages]
        return float(sum(linear.flops_per_token + 2 * adapter_params(linear) for linear in own))

    inner = _inner(layer)
    heads_bytes = 4 * attention.kv_heads  # log-sum-exp, fp32, at least one for a key head
    return (
        Saved(name="input", bytes_per_token=row, recomputable=False, made=NORM_1, read=OUTPUT, needed=NORM_1),
        Saved(name="norm 1", bytes_per_token=row, moved_bytes_per_token=2 * row, made=NORM_1, read=QKV, needed=QKV),
        Saved(
            name="qkv", bytes_per_token=ITEM_BYTES * _qkv(layer), flops_per_token=products("qkv"), made=QKV,
            read=ATTENTION, needed=ATTENTION,
        ),
        Saved(
            name="attention", bytes_per_token=ITEM_BYTES * attention.output_features + heads_bytes, is_attention=True,
            made=ATTENTION, read=OUTPUT, needed=ATTENTION,
        ),
        Saved(
            name="residual", bytes_per_token=row, flops_per_token=products("output"), made=OUTPUT, read=DOWN,
            needed=NORM_2,
        ),
        Saved(name="norm 2", bytes_per_token=row, moved_bytes_per_token=2 * row, made=NORM_2, read=UP, needed=UP),
        Saved(
            name="up", bytes_per_token=ITEM_BYTES * layer.mlp_features, flops_per_token=products("up", "router"),
            made=UP, read=PRODUCT, needed=PRODUCT,
        ),
        Saved(
            name="product", bytes_per_token=ITEM_BYTES * inner,
            moved_bytes_per_token=ITEM_BYTES * (layer.mlp_features + inner), made=PRODUCT, read=DOWN, needed=DOWN,
        ),
    )  # fmt: skip


def transients(layer: Layer) -> tuple[Transient, ...]:
    """What exists besides, in both passes of a pre-norm layer."""
    row, qkv, inner = ITEM_BYTES * layer.hidden, ITEM_BYTES * _qkv(layer), ITEM_BYTES * _inner(layer)
    result, mlp = ITEM_BYTES * layer.attention.output_features, ITEM_BYTES * layer.mlp_features
    found = []
    forward = (
        # Within one operation of forward; when it is run again, until the backward of the last.
        ("norm 1 in fp32", 2 * row, NORM_1, NORM_1),
        ("before rotation", qkv, QKV, None),
        ("output's product", row, OUTPUT, None),
        ("attention in order", result, OUTPUT, OUTPUT),
        ("norm 2 in fp32", 2 * row, NORM_2, NORM_2),
        ("activation", inner, PRODUCT, PRODUCT),
        ("down's product", row, DOWN, None),
    )
    for name, size, made, needed in forward:
        found.append(Transient(name=name, bytes_per_token=size, phase=Phase.FORWARD, begin=made, end=made + 1))
        if made < DOWN:
            end = made + 1 if needed is None else backward_tick(NUM_OPERATIONS, needed) + 1
            found.append(Transient(name=name, bytes_per_token=size, phase=Phase.BACKWARD, begin=made, end=end))
    backward = (
        # From the backward of one operation to that of another, both included.
        ("gradient of product", inner, DOWN, PRODUCT),
        ("gradient of up", mlp, PRODUCT, UP),
        ("gradient of norm 2", row, UP, NORM_2),
        ("norm 2's gradient in fp32", NORM_BACKWARD_ROWS * row, NORM_2, NORM_2),
        ("gradient of residual", row, NORM_2, NORM_1),
        ("gradient of attention", result, OUTPUT, ATTENTION),
        ("gradient sums of attention", 2 * qkv, ATTENTION, ATTENTION),
        ("gradient of qkv", qkv, ATTENTION, QKV),
        ("gradient before rotation", qkv, QKV, QKV),
        ("gradient of norm 1", row, QKV, NORM_1),
        ("norm 1's gradient in fp32", NORM_BACKWARD_ROWS * row, NORM_1, NORM_1),
    )
    for name, size, first, last in backward:
        begin, end = backward_tick(NUM_OPERATIONS, first), backward_tick(NUM_OPERATIONS, last) + 1
        found.append(Transient(name=name, bytes_per_token=size, phase=Phase.BACKWARD, begin=begin, end=end))
    return tuple(found)


def _qkv(layer: Layer) -> int:
    attention = layer.attention
    return attention.query_features + attention.key_features + attention.value_features


def _inner(layer: Layer) -> int:
    """What the MLP's last products take in, of the experts that a token meets."""
    return sum(linear.active * linear.in_features for linear in layer.linears if linear.stage == "down")
