"""A checkpoint laid against a model: where each tensor of the model comes from, and whether it fits.

What it is: the answer to "can this checkpoint be loaded into this model, and how", found from headers alone,
before a byte of data is read. What it is not: the loading; `ingest` streams the sources, encodes and stores
them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.base_names import ModelTensor, base_module, model_tensors
from offload_rt.checkpoint.conversion import Resolved, resolve
from offload_rt.checkpoint.safetensors_reader import Checkpoint
from offload_rt.checkpoint.sources import EntrySource, TensorSource, materialise
from offload_rt.errors import CheckpointError
from planners.shapes.models import NOT_READ, unread_format

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BNB_STATE = re.compile(r"(?P<key>.+)\.quant_state\.bitsandbytes__(?P<kind>\w+)")
_BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_OTHER_QUANTIZATION = {
    ".qweight": (".weight", "GPTQ or AWQ"),
    ".weight_packed": (".weight", "compressed-tensors"),
    "_blocks": ("", "MXFP4"),
}
"""How keys of formats that are not read end, what the model calls the tensor instead, and the format."""
_MAX_BNB_STATE_BYTES = 1 << 16
_COMPARE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BnbTensors:
    """One weight as bitsandbytes stores it in 4 bits: raw streams, which the codec converts."""

    packed: TensorSource
    """`X.weight`: two codes to a byte, under whatever dtype bitsandbytes stored the bytes."""
    parts: dict[str, TensorSource]
    """By suffix: `absmax`, `quant_map`, and with double quantization `nested_absmax`, `nested_quant_map`."""
    state: dict[str, Any]
    """JSON of `quant_state.bitsandbytes__nf4`: `quant_type`, `blocksize`, `dtype`, `shape`, `nested_*`."""
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """Names are those of `model.named_parameters(remove_duplicate=False)` and of persistent buffers."""

    sources: dict[str, TensorSource]
    """Model tensor to stream, in the dtype of the file. Tied tensors share one source object."""
    prequantized: dict[str, BnbTensors]
    """Model tensors that the checkpoint holds in bitsandbytes' 4 bits; none of them is in `sources`."""
    ties: dict[str, str]
    """Model tensor to the one whose source it shares."""
    keys: dict[str, tuple[str, ...]]
    """Model tensor to the checkpoint keys that it is made of."""
    casts: dict[str, tuple[torch.dtype, torch.dtype]]
    """Tensors whose stored dtype is not the model's: stored, wanted."""
    missing: list[str]
    """Model tensors without a source. Adapters' own tensors are not among them."""
    unused: list[str]
    """Checkpoint keys that the model has no tensor for, but for those that transformers ignores as well."""


def map_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> Mapping:
    """Finds the source of every parameter and persistent buffer of `model`, which may be on the meta device.

    A transformers model is mapped as transformers' loader does it, any other by equal names. peft's wrappers
    are looked through; an adapter's copy of a module (`modules_to_save`) gets the module's source while it is
    on meta, and keeps its values otherwise. Reads headers only, unless two tied tensors are both stored:
    those are compared.

    Raises `CheckpointError` for a shape that differs, data that do not cast (integers or fp8 for a
    floating-point tensor), tensors that do not merge, and tied tensors of which the checkpoint holds two
    different values.
    """
    inner = base_module(model)
    tensors = [t for t in model_tensors(model) if t.base_name is not None and (not t.is_copy or t.tensor.is_meta)]
    reference: dict[str, torch.Tensor] = {}
    for item in tensors:
        if item.base_name is not None and not item.is_copy:
            reference[item.base_name] = item.tensor

    groups = _bnb_groups(checkpoint)
    companions = {key for parts in groups.values() for key in parts.values()}
    keys = [key for key in checkpoint.tensors if key not in companions]
    resolution = resolve(inner, checkpoint, keys, reference)
    resolved = resolution.resolved

    ties = _find_ties(inner, tensors, resolved)
    result = Mapping(sources={}, prequantized={}, ties={}, keys={}, casts={}, missing=[], unused=resolution.unused)
    ignored = _ignored_missing(inner)
    full_names = {item.base_name: item.name for item in reversed(tensors) if not item.is_copy}
    for item in tensors:
        base_name = item.base_name or ""
        origin = ties.get(base_name, base_name)
        found = resolved.get(origin)
        if found is None:
            if item.tensor.is_meta or not ignored.search(base_name):
                result.missing.append(item.name)
            continue
        if item.name != full_names.get(origin, item.name):
            result.ties[item.name] = full_names[origin]
        _add(result, item, found, groups, checkpoint)
    _refuse_other_quantization(result, tensors, checkpoint)
    return result


def declared_quantization(checkpoint: Checkpoint) -> str:
    """Ends an error about missing tensors: what `config.json` beside the checkpoint says of their format, if that is
    one that is not read.
    """
    try:
        method = unread_format(json.loads((checkpoint.path.parent / "config.json").read_bytes()))
    except (OSError, ValueError, RecursionError):
        return ""
    return "" if method is None else f"; its config.json says that it is quantized by {method!r}, and {NOT_READ}"


def _refuse_other_quantization(result: Mapping, tensors: Iterable[ModelTensor], checkpoint: Checkpoint) -> None:
    """Says what it is when a weight is missing because it is stored in a format that is not read."""
    missing = {item.base_name for item in tensors if item.name in result.missing}
    for key in result.unused:
        for suffix, (replacement, kind) in _OTHER_QUANTIZATION.items():
            name = key.removesuffix(suffix) + replacement
            if key.endswith(suffix) and name in missing:
                raise CheckpointError(
                    f"{checkpoint.tensors[key].file}: {key}: {name} is stored as {kind}; {NOT_READ}: use the "
                    "checkpoint that is not quantized"
                )


def _add(
    result: Mapping,
    item: ModelTensor,
    found: Resolved,
    groups: dict[str, dict[str, str]],
    checkpoint: Checkpoint,
) -> None:
    """Checks one tensor against its source and enters it."""
    quantized = [key for key in found.keys if key in groups]
    where = f"{checkpoint.tensors[found.keys[0]].file}: {', '.join(found.keys[:3])}"
    if len(found.keys) > 3:
        where += f" and {len(found.keys) - 3} more"
    if quantized:
        if len(found.keys) > 1 or not isinstance(found.source, EntrySource):
            raise CheckpointError(
                f"{where}: quantized by bitsandbytes, but {item.name} is cut or merged from it, "
                "which cannot be done in 4 bits; use the checkpoint that is not quantized"
            )
        bnb = _bnb_tensors(checkpoint, found.keys[0], groups[found.keys[0]])
        shape = tuple(bnb.state["shape"])
        # GPT-2's Conv1D holds (in, out); bitsandbytes transposes it first and notes the shape of what it
        # quantized
        if tuple(item.tensor.shape) not in (shape, shape[::-1]):
            raise CheckpointError(f"{where}: shape {shape}, but {item.name} of the model is {tuple(item.tensor.shape)}")
        result.prequantized[item.name] = bnb
        result.keys[item.name] = bnb.keys
        return
    stored, wanted = found.source.dtype, item.tensor.dtype
    # before the shapes: packed weights have another, and the reason is that they are packed
    if stored != wanted and (stored not in _FLOATS or wanted not in _FLOATS):
        raise CheckpointError(
            f"{where}: {stored} data for {item.name}, which is {wanted} in the model; {NOT_READ}: use the "
            "checkpoint that is not quantized"
        )
    if found.source.shape != tuple(item.tensor.shape):
        raise CheckpointError(
            f"{where}: shape {found.source.shape}, but {item.name} of the model is "
            f"{tuple(item.tensor.shape)}; is it the checkpoint of this model?"
        )
    if stored != wanted:
        result.casts[item.name] = (stored, wanted)
    result.sources[item.name] = found.source
    result.keys[item.name] = found.keys


def _find_ties(model: nn.Module, tensors: Iterable[ModelTensor], resolved: dict[str, Resolved]) -> dict[str, str]:
    """Base name to the base name that it takes its value from, where the two differ."""
    shared: dict[int, list[str]] = {}
    for item in tensors:
        names = shared.setdefault(id(item.tensor), [])
        if item.base_name is not None and item.base_name not in names:
            names.append(item.base_name)
    ties: dict[str, str] = {}
    for names in shared.values():
        present = [name for name in names if name in resolved]
        for other in present[1:]:
            if not _are_equal(resolved[present[0]].source, resolved[other].source):
                raise CheckpointError(
                    f"{present[0]} and {other} are one tensor in the model, but the checkpoint holds "
                    f"different values ({resolved[present[0]].keys[0]}, {resolved[other].keys[0]}); untie "
                    "them in the model (tie_word_embeddings=False in its configuration)"
                )
        if present:
            ties.update({name: present[0] for name in names if name != present[0]})
    # ties that transformers declares, for names whose tensors are still two objects
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        for name, other in ((target, source), (source, target)):
            origin = ties.get(other, other)
            if name not in resolved and name not in ties and origin in resolved:
                ties[name] = origin
    return ties


def _are_equal(a: TensorSource, b: TensorSource) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = zip(a.slabs(_COMPARE_BYTES), b.slabs(_COMPARE_BYTES), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def _ignored_missing(model: nn.Module) -> re.Pattern[str]:
    """What transformers lets a checkpoint leave out. On meta it would have no value, and is listed."""
    patterns = sorted(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    return re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")


def _bnb_groups(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Keys of weights that bitsandbytes quantized to 4 bits; for each, its companions' keys by suffix."""
    groups: dict[str, dict[str, str]] = {}
    for state_key in checkpoint.tensors:
        match = _BNB_STATE.fullmatch(state_key)
        if match is None:
            continue
        key, kind = match["key"], match["kind"]
        where = f"{checkpoint.tensors[state_key].file}: {key}"
        if kind != "nf4":
            raise CheckpointError(f"{where}: quantized to {kind} by bitsandbytes; only nf4 is read")
        parts = {part: f"{key}.{part}" for part in _BNB_PARTS if f"{key}.{part}" in checkpoint.tensors}
        wanted = _BNB_PARTS if any(part.startswith("nested") for part in parts) else _BNB_PARTS[:2]
        absent = [f"{key}.{part}" for part in wanted if part not in parts]
        if key not in checkpoint.tensors:
            absent.append(key)
        if absent:
            raise CheckpointError(f"{where}: quantized by bitsandbytes, but {', '.join(absent)} is missing")
        groups[key] = {**parts, "quant_state": state_key}
    return groups


def _bnb_tensors(checkpoint: Checkpoint, key: str, parts: dict[str, str]) -> BnbTensors:
    """Streams and the parsed state of one weight."""

    def source(name: str) -> EntrySource:
        return EntrySource(checkpoint, checkpoint.tensors[name])

    state_source, packed = source(parts["quant_state"]), source(key)
    where = f"{state_source.entry.file}: {parts['quant_state']}"
    if state_source.dtype != torch.uint8 or state_source.entry.num_bytes > _MAX_BNB_STATE_BYTES:
        raise CheckpointError(f"{where}: {state_source.shape} of {state_source.dtype} is no JSON text")
    try:
        state = json.loads(bytes(materialise(state_source).tolist()).decode("utf-8"))
        shape = [int(size) for size in state["shape"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: no JSON with a shape: {error!r}") from error
    num_elements = math.prod(shape)
    if packed.entry.num_bytes != (num_elements + 1) // 2:
        raise CheckpointError(
            f"{where}: says {num_elements} elements {tuple(shape)}, but {key} holds {packed.entry.num_bytes} "
            f"bytes, not {(num_elements + 1) // 2}"
        )
    return BnbTensors(
        packed=packed,
        parts={part: source(name) for part, name in parts.items() if part != "quant_state"},
        state=state,
        keys=(key, *parts.values()),
    )
