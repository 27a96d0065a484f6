"""An adapter that peft saved, whoever trained it: found, matched with a model's tensors, put on a model to train on.

What it is: peft's `PeftModel.from_pretrained(model, folder, is_trainable=True)`, to the bit, a tensor at a time, on a
model that may be on the meta device; what peft leaves at its first values, or ignores, is an error here. What it is
not: a conversion; names are those that peft writes today.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.base_names import model_tensors
from offload_rt.checkpoint.mapping import map_checkpoint
from offload_rt.checkpoint.materialise import make_real
from offload_rt.checkpoint.safetensors_reader import Checkpoint, open_checkpoint
from offload_rt.checkpoint.sources import EntrySource, MemorySource, TensorSource, materialise
from offload_rt.errors import CheckpointError, ConfigError, UnsupportedModule
from offload_rt.guards.adapter_kinds import changes_the_base

logger = logging.getLogger("offload_rt")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_COMPARED_ELEMENTS = 1 << 19
_NEEDS_VALUES = (
    "peft computes a part of this adapter where it makes it, and cannot on the meta device; put the adapter on a model "
    "in memory"
)


def adapter_kind(folder: Path) -> str:
    """What peft calls the kind of adapter in `folder`, such as "LORA". Imports no peft. Raises `ConfigError` where
    `folder` is not one that peft saved an adapter to, as safetensors.
    """
    if not folder.is_dir():
        raise ConfigError(f"adapters: {folder} is not a folder; nothing is downloaded here")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"adapters: {folder} has no {ADAPTER_CONFIG}, which peft writes beside an adapter")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = f"; its {_PICKLED} can hold code and is not read: save it again with peft, as safetensors"
        raise ConfigError(
            f"adapters: {folder} has no {ADAPTER_WEIGHTS}{pickled if (folder / _PICKLED).is_file() else ''}"
        )
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"adapters: {folder / ADAPTER_CONFIG} cannot be read ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ConfigError(f"adapters: {folder / ADAPTER_CONFIG} has no peft_type: it is no configuration of peft's")
    return str(config["peft_type"])


def read_config(folder: Path) -> Any:
    """peft's configuration of the adapter in `folder`, to train. Raises `ConfigError`, and `UnsupportedModule` for an
    adapter that trained beside other weights than the base model's files have.
    """
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(f"adapters: {folder / ADAPTER_CONFIG}: {error}") from error
    check_base_is_kept(config, folder)
    config.inference_mode = False
    return config


def check_base_is_kept(config: Any, folder: Path) -> None:
    """Raises `UnsupportedModule` for an adapter that trained beside other weights than the base model's files have."""
    if changed_by := changes_the_base(config):
        raise UnsupportedModule(
            f"{folder}: {changed_by} takes something out of the base model's weights before it trains, "
            f"which its files have: with them, it would be there twice. Save the adapter with peft's "
            f"save_pretrained(path_initial_model_for_weight_conversion=...), which makes it one of the files' weights"
        )


def matched(model: Any, saved: Checkpoint) -> dict[str, torch.Tensor]:
    """By its name in the file: the tensor of `model`, which has the adapter on it. The file may have some of the base's
    (peft saves embedding and head with an adapter on them). Raises `CheckpointError` that names what is missing, what
    nothing in the model goes by, and shapes that differ.
    """
    import peft

    entries = model.state_dict(keep_vars=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that are not transformers', which have no such layers
        needed, found = (
            peft.get_peft_model_state_dict(model, state_dict=entries, save_embedding_layers=with_embeddings)
            for with_embeddings in (False, True)
        )
    missing = sorted(set(needed) - set(saved.tensors))
    odd = missing or sorted(set(saved.tensors) - set(found))
    if odd:
        raise CheckpointError(
            f"{saved.path}: {'lacks' if missing else 'has'} {len(odd)} tensors that an adapter of this "
            f"configuration {'has' if missing else 'has not'}, first: {', '.join(odd[:5])}"
        )
    for name, entry in saved.tensors.items():
        if tuple(entry.shape) != tuple(found[name].shape):
            raise CheckpointError(
                f"{saved.path}: {name} has shape {tuple(entry.shape)}, the model's has "
                f"{tuple(found[name].shape)}: is it an adapter of this base model?"
            )
    return {name: tensor for name, tensor in found.items() if name in saved.tensors}


@contextlib.contextmanager
def without_peft_warning() -> Iterator[None]:
    """peft asks transformers 5.23 for a name that is on its way out; nothing a user could do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def put_on(model: nn.Module, config: Any) -> nn.Module:
    """`model` with an adapter of that configuration, at its first values: peft's own module. Raises `UnsupportedModule`
    where peft needs values for it that the model, on the meta device, does not have.
    """
    import peft

    kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    try:
        with without_peft_warning():
            return kind(model, config)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError) as error:
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        raise UnsupportedModule(f"{config.peft_type.value}: {_NEEDS_VALUES} ({error})") from error


def fill(tuned: nn.Module, folder: Path, base: Path | None) -> None:
    """Gives the adapter on `tuned` the values that lie in `folder`. Blocks; holds a tensor of the file at a time.

    `base` is the base model's checkpoint; None where its weights are in memory. Raises `CheckpointError` as `matched`
    does, for values that are not finite or of a dtype that is no float's, and where the file has weights of the base
    model's that do not train and are not equal to those it is put on; `UnsupportedModule` where a part of the adapter,
    or a weight of the base model's that trains with it, would not have its value.
    """
    with open_checkpoint(folder / ADAPTER_WEIGHTS) as saved:
        found = matched(tuned, saved)
        of_base = {id(item.tensor): item for item in model_tensors(tuned) if item.base_name is not None}
        copies = {id(item.tensor) for item in of_base.values() if item.is_copy}
        beside = {name: tensor for name, tensor in found.items() if id(tensor) in of_base and id(tensor) not in copies}
        trained = [name for name, tensor in beside.items() if tensor.requires_grad]
        if trained and base is not None:
            raise UnsupportedModule(
                f"{folder}: {trained[0]} trains in a module of the base model's, which gets its weights from {base}; "
                f"put the adapter on a model in memory, without checkpoint="
            )
        beside = {name: tensor for name, tensor in beside.items() if name not in trained}
        if beside:
            _check_base(tuned, {name: of_base[id(tensor)].name for name, tensor in beside.items()}, saved, base)
        for name, tensor in found.items():
            if name not in beside:
                _put(tuned, tensor, _value(saved, name, tensor.dtype))
    _check_all_has_values(tuned, folder)


def _check_all_has_values(tuned: nn.Module, folder: Path) -> None:
    """Raises `UnsupportedModule` for a part of the adapter that is on the meta device: peft computes it once, from
    other weights or a seed, and the engine cannot.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    of_base = {id(item.tensor) for item in model_tensors(tuned) if item.base_name is not None}
    for path, layer in tuned.named_modules():
        if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for name, child in layer.named_children():
            if name in ("base_layer", "original_module", "modules_to_save"):
                continue
            tensors = (*child.named_parameters(), *child.named_buffers())
            absent = [inside for inside, tensor in tensors if tensor.is_meta and id(tensor) not in of_base]
            if absent:
                raise UnsupportedModule(f"{folder}: {path}.{name}.{absent[0]} is not in its file: {_NEEDS_VALUES}")


def _value(saved: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    source = EntrySource(saved, saved.tensors[name])
    if source.dtype.is_floating_point != dtype.is_floating_point:
        raise CheckpointError(f"{saved.path}: {name} is {source.dtype}, the model's is {dtype}")
    value = materialise(source).to(dtype)
    if not value.isfinite().all():
        raise CheckpointError(f"{saved.path}: {name} has values that are not finite")
    return value


def _put(tuned: nn.Module, tensor: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        make_real(tensor, value.to(tensor.device if not tensor.is_meta else "cpu"))
        return
    for module in tuned.modules():
        for name, buffer in module._buffers.items():
            if buffer is tensor:
                module._buffers[name] = value


def _check_base(tuned: nn.Module, names: Mapping[str, str], saved: Checkpoint, base: Path | None) -> None:
    """`names`: of tensors in the file, and what the model calls the weights of its own that they are."""
    if base is None:
        entries = dict(tuned.named_parameters(remove_duplicate=False))
        _compare(saved, {name: MemorySource(entries[own]) for name, own in names.items()})
        return
    with open_checkpoint(base) as checkpoint:
        sources = map_checkpoint(tuned, checkpoint).sources
        _compare(saved, {name: sources.get(own) for name, own in names.items()})


def _compare(saved: Checkpoint, sources: Mapping[str, TensorSource | None]) -> None:
    for name, source in sources.items():
        if source is None or not _is_equal(EntrySource(saved, saved.tensors[name]), source):
            raise CheckpointError(
                f"{saved.path}: {name} is a weight of the base model's, and not equal to the one that the base model "
                f"has here: the adapter was trained beside other weights"
            )


def _is_equal(one: TensorSource, other: TensorSource) -> bool:
    """By elements, rounded to the dtype of `one`, which a run may have trained beside."""
    pairs = zip(
        one.slabs(_COMPARED_ELEMENTS * one.dtype.itemsize),
        other.slabs(_COMPARED_ELEMENTS * other.dtype.itemsize),
        strict=True,
    )
    return all(torch.equal(left, right.to(left.dtype)) for left, right in pairs)


def warn_of_another_base(config: Any, model: nn.Module, base: Path | None) -> None:
    """Warns where the adapter was made for a model of another name than that of the model or its folder."""
    recorded = str(getattr(config, "base_model_name_or_path", None) or "").rstrip("/")
    given = [str(place) for place in (base and base.resolve(), base, getattr(model, "name_or_path", None)) if place]
    if not recorded or not given:
        return
    name = Path(recorded).name.lower()
    # a hub's cache has models--organisation--name/snapshots/<commit>
    parts = {part.lower().rpartition("--")[2] for place in given for part in Path(place).parts}
    if name not in parts and not any(Path(recorded).resolve() == Path(place).resolve() for place in given):
        logger.warning(
            "adapters: the adapter was made for %s, the model is %s; shapes fit, which says nothing of the weights",
            recorded, given[-1],
        )  # fmt: skip
