"""From the names and shapes of a model's tensors to its `ModelShape`, for models whose family has no function here.

Parameter counts are exact. What a matrix is for is read from its name; which of its sides is its input, from the one
that is as wide as the embedding. What shapes do not say comes from the configuration where there is one: heads,
windows, experts that a token meets. Without it heads are taken to be 128 or 64 wide, which decides only into how many
groups attention may be cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from planners.shapes.model import Attention, Layer, Linear, ModelShape
from planners.units import ProblemError

Shapes = Mapping[str, tuple[int, ...]]

_IN_LAYERS = re.compile(r"(.*?)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(.+)")
_QKV = "q|k|v|qkv|q_a|q_b|kv_a|kv_b|kv_a_proj_with_mqa|query_key_value|query|key|value|c_attn|wq|wk|wv|Wqkv|W_pack"
_STAGES = (
    # What the last parts of a matrix's name say it is; the first match counts.
    ("router", r"(router|gate|shared_expert_gate)$|router\."),
    ("qkv", rf"(^|\.|_)({_QKV})(_proj)?$"),
    ("output", r"(attn|attention|mixer)\.(dense|c_proj|wo|proj|output\.dense)$"),
    ("output", r"(o_proj|out_proj)$"),
    ("down", r"(down_proj|fc2|fc_out|dense_4h_to_h|c_proj|w2|wo|output_linear|output)$"),
)
_NO_PARAMETER = re.compile(r"(rotary_emb\..*|inv_freq|masked_bias|position_ids|_scale|_scale_inv|num_batches_tracked)$")


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a configuration says beyond shapes; None where it does not."""

    kv_heads: int | None = None
    active_experts: int | None = None
    window: int | None = None


def shape_from_tensors(name: str, tensors: Shapes, hints: Hints) -> ModelShape:
    """The shape of the model that has these parameters. `ProblemError` if it is no decoder that can be planned."""
    tensors = {key: shape for key, shape in tensors.items() if _is_parameter(key, shape)}
    prefix, layers = _layers(name, tensors)
    outside = {key: shape for key, shape in tensors.items() if not _in(prefix, key)}
    embedding_name, embedding = _embedding(name, outside)
    vocabulary, hidden = embedding
    head_name = next((key for key, shape in outside.items() if key != embedding_name and shape == embedding), None)
    head = 0 if head_name is None else prod(outside[head_name])
    bias = prod(outside.get(f"{_stem(head_name)}.bias", (0,))) if head_name is not None else 0
    rest = sum(map(prod, outside.values())) - prod(embedding) - head - bias
    made = {key: _layer(name, hidden, own, hints) for key, own in {_key(own): own for own in layers}.items()}
    return ModelShape(
        name=name, hidden=hidden, vocabulary=vocabulary, layers=tuple(made[_key(own)] for own in layers),
        embedding_params=prod(embedding), head_params=head + bias, final_params=rest, layer_prefix=prefix,
        embedding_name=_stem(embedding_name), head_name="lm_head" if head_name is None else _stem(head_name),
    )  # fmt: skip


def _is_parameter(key: str, shape: tuple[int, ...]) -> bool:
    mask = len(shape) == 4 and shape[:2] == (1, 1)
    return not mask and not _NO_PARAMETER.search(key)


def _stem(key: str) -> str:
    return key.removesuffix(".weight")


def _key(own: dict[str, tuple[int, ...]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted(own.items()))


def _in(prefix: str, key: str) -> bool:
    found = _IN_LAYERS.match(key)
    return found is not None and found.group(1) == prefix


def _layers(name: str, tensors: Shapes) -> tuple[str, list[dict[str, tuple[int, ...]]]]:
    """The numbered modules with most of the parameters: their common name, and each one's tensors."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for key, shape in tensors.items():
        match = _IN_LAYERS.match(key)
        if match is not None:
            prefix, number, rest = match.groups()
            found.setdefault(prefix, {}).setdefault(int(number), {})[rest] = shape
    if not found:
        raise ProblemError(f"{name}: none of its {len(tensors)} tensors is in a numbered layer; is it a model's?")
    sizes = {p: sum(prod(shape) for own in layers.values() for shape in own.values()) for p, layers in found.items()}
    prefix = max(sizes, key=lambda p: sizes[p])
    numbers = sorted(found[prefix])
    if numbers != list(range(len(numbers))):
        missing = next(i for i in range(len(numbers)) if numbers[i] != i)
        raise ProblemError(f"{name}: layer {prefix}.{missing} is missing; is this one shard of several?")
    return prefix, [found[prefix][number] for number in numbers]


def _embedding(name: str, outside: Shapes) -> tuple[str, tuple[int, int]]:
    tables = {key: shape for key, shape in outside.items() if len(shape) == 2}
    named = {key: shape for key, shape in tables.items() if re.search(r"emb|wte", key)}
    named = {key: shape for key, shape in named.items() if not re.search(r"pos|wpe|embed_out", key)} or tables
    if not named:
        raise ProblemError(f"{name}: no embedding among {sorted(outside)[:4]}; is this one shard of several?")
    key = max(named, key=lambda k: (named[k][0], k))
    rows, columns = named[key]
    return key, (rows, columns)


def _layer(name: str, hidden: int, own: dict[str, tuple[int, ...]], hints: Hints) -> Layer:
    """One layer: its matrices by what they are for; everything else is counted."""
    matrices: dict[str, tuple[int, int, int]] = {}
    for key, shape in own.items():
        stacked = len(shape) == 3 and "expert" in key
        if not stacked and (len(shape) != 2 or (key.endswith("bias") and "expert" in key)):
            continue
        match = _EXPERT.match(key)
        stem, count = _stem(key), shape[0] if stacked else 1
        if match is not None:
            stem = _stem(f"{match.group(1)}.{match.group(3)}")
            count = matrices.get(stem, (0, 0, 0))[0] + 1
        matrices[stem] = (count, shape[-2], shape[-1])
    linears = tuple(_linear(name, stem, sizes, hidden, own, hints) for stem, sizes in matrices.items())
    counted = sum(linear.params for linear in linears)
    return Layer(
        linears=linears,
        other_params=sum(map(prod, own.values())) - counted,
        attention=_attention(name, linears, hints, own),
        hidden=hidden,
    )


def _linear(
    name: str, stem: str, sizes: tuple[int, int, int], hidden: int, own: dict[str, tuple[int, ...]], hints: Hints
) -> Linear:
    count, rows, columns = sizes
    stage = next((stage for stage, pattern in _STAGES if re.search(pattern, stem)), "up")
    # Stored [out, in], or [in, out] where the embedding's width is on the other side.
    wide_in = stage not in ("output", "down")
    transposed = (rows == hidden and columns != hidden) if wide_in else (columns == hidden and rows != hidden)
    if stem.endswith(("q_b_proj", "kv_b_proj")):
        transposed = False
    active = 1
    if count > 1:
        if hints.active_experts is None:
            raise ProblemError(
                f"{name}: is a mixture of {count} experts, and shapes do not say how many a token meets; give a folder "
                "with its config.json"
            )
        active = min(count, hints.active_experts)
    return Linear(
        name=stem,
        in_features=rows if transposed else columns,
        out_features=columns if transposed else rows,
        bias=count == 1 and f"{stem}.bias" in own,
        count=count,
        active=active,
        stage=stage,
    )


def _attention(name: str, linears: tuple[Linear, ...], hints: Hints, own: dict[str, tuple[int, ...]]) -> Attention:
    """Sizes from the projections, separate or fused; with low-rank ones (DeepSeek) keys are as wide as queries."""
    qkv = [linear for linear in linears if linear.stage == "qkv"]
    output = next((linear for linear in linears if linear.stage == "output"), None)
    if not qkv or output is None:
        raise ProblemError(f"{name}: its layers have no attention that is known here: {sorted(own)[:6]}")
    result = output.in_features

    def out(*names: str) -> int:
        return sum(x.out_features for x in qkv if re.search(rf"(^|\.)({'|'.join(names)})(_proj)?$", x.name))

    low_rank = out("kv_b")
    query = out("q_b") or out("q", "query", "wq") or result
    key, value = out("k", "key", "wk"), out("v", "value", "wv")
    if low_rank:
        key, value = query, result
    elif not key or not value:
        key = value = max(1, (sum(linear.out_features for linear in qkv) - query) // 2)
    norm = next((shape[0] for k, shape in own.items() if k.endswith("k_norm.weight") and shape[0] < key), None)
    head = norm or next((size for size in (128, 64) if key % size == 0), key)
    return Attention(
        query_features=query, key_features=key, value_features=value, output_features=result,
        kv_heads=hints.kv_heads or max(1, key // head), window=hints.window,
    )  # fmt: skip
