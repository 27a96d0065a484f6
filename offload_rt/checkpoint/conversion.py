"""Which model tensor each checkpoint key becomes, by the rules of transformers' own loader, as streams.

What it is: the first half of transformers' `convert_and_load_state_dict_in_model` (renamings, prefixes, which
keys merge into which tensor), run over names, with the second half replaced: its merges (stacked experts,
gate and up in one matrix, fused query, key and value cut apart) become ranges of the file's tensors. An
operation that does not stream calls transformers' own code on whole tensors (`MaterialisedSource`). What it
is not: a check that what comes out fits the model, which is in `mapping`.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.safetensors_reader import Checkpoint
from offload_rt.checkpoint.sources import (
    ConcatSource,
    EntrySource,
    MaterialisedSource,
    SliceSource,
    TensorSource,
    TransposedSource,
    cat,
    materialise,
    stack,
)
from offload_rt.errors import CheckpointError

_MAX_PIECES = 65536
"""Concatenating along an inner dimension takes a piece per row; beyond this, the pieces outweigh a slab."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The stream of one model tensor, and the checkpoint keys that it is made of."""

    source: TensorSource
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Resolution:
    resolved: dict[str, Resolved]
    unused: list[str]


@dataclass
class _Merge:
    """Keys that one transformers `WeightConverter` collects for one target."""

    converter: Any
    keys: dict[str, list[str]] = field(default_factory=dict)
    """Source pattern to checkpoint keys, in the loader's order."""

    @property
    def all_keys(self) -> tuple[str, ...]:
        return tuple(key for keys in self.keys.values() for key in keys)


class _Shapes:
    """What conversion operations ask of the model, under the names of the unwrapped one."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: Any) -> None:
        self._tensors = tensors
        self.config = config

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    get_parameter_or_buffer = get_parameter


def is_transformers_model(model: nn.Module) -> bool:
    """True for a `PreTrainedModel`. Does not import transformers: whoever has such a model has done so."""
    if "transformers.modeling_utils" not in sys.modules:
        return False
    from transformers.modeling_utils import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def resolve(
    model: nn.Module, checkpoint: Checkpoint, keys: Iterable[str], tensors: dict[str, torch.Tensor]
) -> Resolution:
    """Maps `keys` of the checkpoint onto `tensors` (base name to model tensor) of the unwrapped `model`."""
    if is_transformers_model(model):
        return _resolve_transformers(model, checkpoint, keys, tensors)
    resolved, unused = {}, []
    for key in keys:
        if key in tensors:
            source = EntrySource(checkpoint, checkpoint.tensors[key])
            resolved[key] = Resolved(source=source, keys=(key,))
        else:
            unused.append(key)
    return Resolution(resolved=resolved, unused=unused)


def _resolve_transformers(
    model: Any, checkpoint: Checkpoint, keys: Iterable[str], tensors: dict[str, torch.Tensor]
) -> Resolution:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix

    resolved: dict[str, Resolved] = {}
    merges: dict[str, _Merge] = {}
    unmatched: dict[str, str] = {}
    # The order is the loader's: it is that of the experts in a stack, and some renamings depend on it.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        if name not in tensors or (name in resolved or name in merges) and pattern is None:
            unmatched[key] = name
        elif pattern is None:
            resolved[name] = Resolved(source=EntrySource(checkpoint, checkpoint.tensors[key]), keys=(key,))
        else:
            merge = merges.setdefault(name, _Merge(converter_of[pattern]))
            merge.keys.setdefault(pattern, []).append(key)

    shapes = _Shapes(tensors, model.config)
    for name, merge in merges.items():
        for target, source in _merge_sources(name, merge, checkpoint, shapes).items():
            if target in tensors:
                resolved[target] = Resolved(source=source, keys=merge.all_keys)
    ignored = _ignored_keys(model)
    unused = [key for key, name in unmatched.items() if not (ignored.search(key) or ignored.search(name))]
    return Resolution(resolved=resolved, unused=unused)


def _ignored_keys(model: Any) -> re.Pattern[str]:
    """Keys that a checkpoint of this model may hold for nothing, as transformers' loading report has it."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)) or "(?!)")


def _merge_sources(name: str, merge: _Merge, checkpoint: Checkpoint, shapes: _Shapes) -> dict[str, TensorSource]:
    """Target names and streams of one merge."""
    collected = {
        pattern: [EntrySource(checkpoint, checkpoint.tensors[key]) for key in keys]
        for pattern, keys in merge.keys.items()
    }
    try:
        lazy = _evaluate_lazily(name, merge.converter, collected, shapes)
        return _evaluate_whole(name, merge.converter, collected, shapes) if lazy is None else lazy
    # whatever transformers' operations raise (they raise everything), the cause is the same: these keys do
    # not fit
    except Exception as error:
        first = checkpoint.tensors[merge.all_keys[0]]
        raise CheckpointError(
            f"{first.file}: {len(merge.all_keys)} tensors ({first.name} {first.shape}, ...) do not convert "
            f"into {name} by {merge.converter.operations}: {error}"
        ) from error


_Lazy = dict[str, "list[TensorSource] | TensorSource"]


def _evaluate_lazily(
    name: str, converter: Any, collected: dict[str, list[EntrySource]], shapes: _Shapes
) -> dict[str, TensorSource] | None:
    """The converter's operations over streams, or None if one of them does not stream.

    The dictionary goes from operation to operation as it does in transformers; each operation itself says
    what its outputs are called.
    """
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose

    sources, targets = converter.source_patterns, converter.target_patterns
    values: _Lazy = {pattern: list(streams) for pattern, streams in collected.items()}
    for op in converter.operations:
        result: _Lazy = {}
        if type(op) is MergeModulelist and op.dim == 0:
            for pattern, value in values.items():
                target = op.get_target_pattern(len(values), pattern, targets)
                result[target] = stack(value) if isinstance(value, list) else value
        elif type(op) is Concatenate:
            streams = [s for pattern in sources if pattern in values for s in _as_list(values[pattern])]
            outer = math.prod(streams[0].shape[: op.dim % len(streams[0].shape)])
            if outer * len(streams) > _MAX_PIECES:
                return None
            result[op.get_target_pattern(targets)] = cat(streams, op.dim)
        elif type(op) is Chunk and op.dim == 0 and len(values) == 1:
            stream = _as_list(next(iter(values.values())))[0]
            names = op.get_target_patterns(targets, config=shapes.config)
            chunks = torch.empty(stream.shape, device="meta").chunk(len(names))
            begin = 0
            for target, chunk in zip(names, chunks, strict=False):
                result[target] = SliceSource(stream, begin, chunk.shape)
                begin += chunk.numel()
        elif type(op) is Transpose and len(values) == 1:
            stream = _as_list(next(iter(values.values())))[0]
            transposed = _transpose(stream, op.dim0, op.dim1)
            if transposed is None:
                return None
            if op.check_dims and stream.shape == tuple(shapes.get_parameter(name).shape):
                transposed = stream
            result[op.get_target_pattern(values, sources, targets)] = transposed
        else:
            return None
        values = result
    # operations name their outputs by pattern: put back what stands around it, as WeightConverter.convert
    # does
    full_name = name.replace("*.", "0.")
    found = next((full_name.partition(pattern) for pattern in values if pattern in full_name), None)
    before, after = (found[0], found[2]) if found else ("", "")
    return {before + pattern + after: _as_list(value)[0] for pattern, value in values.items()}


def _as_list(value: list[TensorSource] | TensorSource) -> list[TensorSource]:
    return value if isinstance(value, list) else [value]


def _transpose(source: TensorSource, dim0: int, dim1: int) -> TensorSource | None:
    """The last two dimensions exchanged, matrix by matrix; None for other dimensions."""
    rank = len(source.shape)
    if rank < 2 or {dim0 % rank, dim1 % rank} != {rank - 2, rank - 1}:
        return None
    matrix = source.shape[-2:]
    count, size = math.prod(source.shape[:-2]), math.prod(matrix)
    if rank == 2:
        return TransposedSource(source)
    if not 0 < count <= _MAX_PIECES:
        return None
    turned = [TransposedSource(SliceSource(source, i * size, matrix)) for i in range(count)]
    return ConcatSource(turned, (*source.shape[:-2], *matrix[::-1]))


def _evaluate_whole(
    name: str, converter: Any, collected: dict[str, list[EntrySource]], shapes: _Shapes
) -> dict[str, TensorSource]:
    """transformers' own operations on whole tensors, once per target; names and shapes from a run on meta."""

    def convert(tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        run = copy.deepcopy(converter)
        run.collected_tensors.update(tensors)
        result = run.convert(name, model=shapes, config=shapes.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in result.items()}

    def load(target: str) -> torch.Tensor:
        return convert({p: [materialise(s) for s in streams] for p, streams in collected.items()})[target]

    outline = convert(
        {
            pattern: [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in streams]
            for pattern, streams in collected.items()
        }
    )
    return {
        target: MaterialisedSource(tensor.shape, tensor.dtype, functools.partial(load, target))
        for target, tensor in outline.items()
    }
