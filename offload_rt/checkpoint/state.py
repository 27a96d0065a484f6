"""The state of a training run in a folder: written whole or not at all, read back only if it is whole.

    <folder>/trainable.safetensors    parameters that train, by name
             optimizer.safetensors    their optimizer state, as `<parameter name>/<state name>`
             state.pt                 step, param_groups, random number generators, everything tracked
             COMPLETE                 sizes and CRC32C of the others; written last

The folder is made beside its place under another name, synced, and renamed. Nothing in it depends on the plan.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from offload_rt.checksum import crc32c
from offload_rt.errors import CheckpointError, CheckpointVerifyError, StorageError, StorageFull
from offload_rt.store import sync_folder, write_atomically
from planners.errors import format_bytes

STATE_VERSION = 1
_FILES = ("trainable.safetensors", "optimizer.safetensors", "state.pt")


def save_state(
    folder: Path,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
) -> None:
    """Writes a checkpoint to `folder`, replacing one that is there. Blocks until it is durable.

    `extra` holds plain values and tensors. Raises `StorageFull` before the first byte where space is short.
    """
    parameters = {name: p.detach().contiguous().clone() for name, p in trainable.items()}
    tensors, values = _optimizer_state(trainable, optimizer)
    need = sum(t.numel() * t.element_size() for t in [*parameters.values(), *tensors.values()]) + (1 << 20)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < need:
            raise StorageFull(
                f"a checkpoint needs {format_bytes(need)}, {format_bytes(free)} are free", path=str(folder)
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(parameters, partial / _FILES[0])
        save_file(tensors, partial / _FILES[1])
        torch.save({"version": STATE_VERSION, "optimizer": values, "rng": _rng_state(), **extra}, partial / _FILES[2])
        sums = {}
        for name in _FILES:
            content = (partial / name).read_bytes()
            sums[name] = {"bytes": len(content), "crc32c": crc32c(memoryview(content))}
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        write_atomically(partial / "COMPLETE", json.dumps(sums, indent=1).encode())
        sync_folder(partial)
        _put_in_place(partial, folder)
    except StorageError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kind = StorageFull if error.errno == 28 else StorageError
        raise kind("the checkpoint could not be written", path=str(folder), errno=error.errno or 0) from None


def load_state(folder: Path, trainable: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's values into `trainable` and `optimizer`, restores random numbers, returns what was extra.

    Checks everything before it changes anything. Raises `CheckpointError` or `CheckpointVerifyError`.
    """
    _verify(folder)
    parameters = load_file(folder / _FILES[0])
    tensors = load_file(folder / _FILES[1])
    state: dict[str, Any] = torch.load(folder / _FILES[2], weights_only=True)
    if state.pop("version") != STATE_VERSION:
        raise CheckpointError(f"{folder}: written by another version of offload_rt")
    if set(parameters) != set(trainable):
        odd = sorted(set(parameters) ^ set(trainable))
        raise CheckpointError(f"{folder}: trains other parameters than this run, first: {odd[0]} ({len(odd)} differ)")
    for name, value in parameters.items():
        if value.shape != trainable[name].shape or value.dtype != trainable[name].dtype:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(value.shape)} {value.dtype}, here {tuple(trainable[name].shape)} "
                f"{trainable[name].dtype}"
            )
    with torch.no_grad():
        for name, value in parameters.items():
            trainable[name].copy_(value)
    _restore_optimizer(folder, trainable, optimizer, tensors, state.pop("optimizer"))
    _restore_rng(state.pop("rng"))
    return state


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint, by its marker and the files' sizes."""
    try:
        sums = json.loads((folder / "COMPLETE").read_text())
        return all((folder / name).stat().st_size == sums[name]["bytes"] for name in _FILES)
    except (OSError, ValueError, KeyError):
        return False


def _verify(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint")
    try:
        sums = json.loads((folder / "COMPLETE").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({error})") from None
    for name in _FILES:
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read ({error})") from None
        if len(content) != sums[name]["bytes"] or crc32c(memoryview(content)) != sums[name]["crc32c"]:
            raise CheckpointVerifyError(f"{folder}/{name}: {len(content)} bytes do not match the checkpoint's checksum")


def _put_in_place(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _optimizer_state(
    trainable: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state by parameter name: tensors, and everything else."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {"state": {}, "groups": []}
    for parameter, entries in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach().contiguous().clone()
            else:
                values["state"].setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        plain = {key: value for key, value in group.items() if key != "params"}
        values["groups"].append({"params": [names[id(p)] for p in group["params"]], **plain})
    return tensors, values


def _restore_optimizer(
    folder: Path,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    values: dict[str, Any],
) -> None:
    groups = values["groups"]
    names = {id(parameter): name for name, parameter in trainable.items()}
    here = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if here != [group["params"] for group in groups]:
        raise CheckpointError(f"{folder}: the optimizer's parameter groups are not those of this run")
    by_name: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in values["state"].items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = tensor
    order = [name for group in here for name in group]
    positions = {name: index for index, name in enumerate(order)}
    packed_groups = [{**group, "params": [positions[name] for name in group["params"]]} for group in groups]
    state = {positions[name]: entries for name, entries in by_name.items()}
    optimizer.load_state_dict({"state": state, "param_groups": packed_groups})


def _rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
