"""A whole model as `from_pretrained` loads it: safetensors shards, their index, the configuration; streamed.

What it is: transformers' `save_pretrained` for a model whose weights are not in memory. Names, ties and conversions
(a stack of experts is stored expert by expert) are those of transformers' own code, run once over the meta device to
know every size, and then block by block over the weights. What it is not: it fetches nothing; the caller shows it one
group of tensors after the other, each for as long as it is written.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.checkpoint.conversion import is_transformers_model
from offload_rt.checkpoint.safetensors_writer import SafetensorsWriter, all_written, file_bytes
from offload_rt.checkpoint.tensor_groups import TensorGroup, saved_tensors
from offload_rt.checkpoint.whole_folder import replaced_whole
from offload_rt.errors import ConfigError, UnsupportedModule
from offload_rt.storage.durable import write_atomically

MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_MARGIN_BYTES = 1 << 20


def save_model(
    model: nn.Module,
    groups: Sequence[TensorGroup],
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    configuration: Callable[[Path], None] | None = None,
) -> None:
    """Writes `model` to `folder`, in place of what was saved there; other files stay. Blocks until it is durable.

    `groups` hold every tensor of `saved_tensors` once. Peak memory is what a group shows, and what a conversion that
    is no view makes of one. A shard holds more than `max_shard_bytes` only where a single tensor does. Until the end,
    the old content is whole. Raises `StorageFull` before the first byte, `StorageError`, `CheckpointVerifyError` where
    a tensor does not read back as it was written, ConfigError where `folder` is not one for a model.
    `configuration` writes what belongs beside the weights to the folder that it is given; None: the model's own.
    """
    folder = folder.absolute()
    _check_place(folder)
    outlines = _outlines(model, groups)
    shards = _shards(outlines, max_shard_bytes)
    need = sum(map(file_bytes, shards.values())) + _MARGIN_BYTES
    with replaced_whole(folder, need, what="the model", is_ours=_WEIGHTS.fullmatch) as partial:
        (configuration or functools.partial(_save_configuration, model))(partial)
        _write_shards(model, groups, outlines, shards, partial)
        if len(shards) > 1:
            write_atomically(partial / _INDEX, _index(model, shards))
        for path in partial.iterdir():
            _sync(path)


def _write_shards(
    model: nn.Module,
    groups: Sequence[TensorGroup],
    outlines: Sequence[Mapping[str, Tensor]],
    shards: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
) -> None:
    shard_of = {name: shard for shard, outline in shards.items() for name in outline}
    writers: dict[str, SafetensorsWriter] = {}
    with all_written(writers):
        for group, outline in zip(groups, outlines, strict=True):
            with group.shown() as shown, torch.no_grad():
                converted = _converted(model, shown)
                for name in outline:
                    shard = shard_of[name]
                    if shard not in writers:
                        writers[shard] = SafetensorsWriter(folder / shard, shards[shard])
                    writers[shard].write(name, converted[name])
                del converted, shown  # views of memory that is used again


def _outlines(model: nn.Module, groups: Iterable[TensorGroup]) -> list[dict[str, Tensor]]:
    """What each group is saved as: names, shapes and dtypes, on the meta device."""
    saved = saved_tensors(model)
    on_meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in saved.items()}
    outlines = [dict(_converted(model, {name: on_meta[name] for name in group.names})) for group in groups]
    whole = _converted(model, on_meta)
    found = {name: (tensor.shape, tensor.dtype) for outline in outlines for name, tensor in outline.items()}
    odd = {name for name, tensor in whole.items() if found.pop(name, None) != (tensor.shape, tensor.dtype)} | set(found)
    if odd or sum(map(len, outlines)) != len(whole):
        raise UnsupportedModule(
            f"save_pretrained: transformers saves {type(model).__name__} with tensors made of several layers "
            f"({min(odd, default='of one name')}); that cannot be streamed"
        )
    return outlines


def _converted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names and tensors as transformers saves them."""
    if not is_transformers_model(model):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def _shards(outlines: Sequence[Mapping[str, Tensor]], max_shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """File name to what it holds, filled in the order of the groups."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in (item for outline in outlines for item in outline.items()):
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _index(model: nn.Module, shards: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    sizes = {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "total_size": sum(tensor.nbytes for shard in shards.values() for tensor in shard.values()),
    }
    weight_map = {name: shard for shard, outline in shards.items() for name in outline}
    return (json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def _save_configuration(model: Any, folder: Path) -> None:
    """config.json and generation_config.json, as transformers writes them. Nothing for other models."""
    if not is_transformers_model(model):
        return
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise ConfigError(f"save_pretrained: model.generation_config is not valid: {error}") from None


def _check_place(folder: Path) -> None:
    """ConfigError where `folder` holds an adapter, which `from_pretrained` would load in place of the model."""
    if not folder.is_dir():
        return
    adapter = next((entry.name for entry in folder.iterdir() if entry.name.startswith("adapter")), None)
    if adapter is not None:
        raise ConfigError(f"save_pretrained: {folder} holds an adapter, {adapter}; give the model a folder of its own")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
