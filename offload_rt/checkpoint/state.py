"""The state of a training run in a folder: written whole or not at all, read back only if it is whole.

    <folder>/trainable.safetensors    parameters that train, by name
             optimizer.safetensors    their optimizer state, as `<parameter name>/<state name>`
             state.pt                 step, param_groups, random number generators, everything tracked
             COMPLETE                 sizes and CRC32C of the others; written last

The folder is made beside its place under another name, synced, and renamed. Nothing in it depends on the plan.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from offload_rt.checkpoint.values import pack_values, restore_rng, rng_state
from offload_rt.checkpoint.whole_folder import replaced_whole
from offload_rt.checksum import crc32c
from offload_rt.drive_files import write_atomically
from offload_rt.errors import CheckpointError, CheckpointVerifyError

STATE_VERSION = 1
_FILES = ("trainable.safetensors", "optimizer.safetensors", "state.pt")


def save_state(
    folder: Path,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
) -> None:
    """Writes a checkpoint to `folder`, replacing one that is there. Blocks until it is durable.

    `extra` holds plain values and tensors; random numbers are those of now, unless it has `rng`. Raises `StorageFull`
    before the first byte where space is short.
    """
    parameters = {name: p.detach().contiguous().clone() for name, p in trainable.items()}
    tensors, values = _optimizer_state(trainable, optimizer)
    need = sum(t.numel() * t.element_size() for t in [*parameters.values(), *tensors.values()]) + (1 << 20)
    with replaced_whole(folder, need, what="a checkpoint") as partial:
        save_file(parameters, partial / _FILES[0])
        save_file(tensors, partial / _FILES[1])
        state = {"version": STATE_VERSION, "optimizer": values, "rng": rng_state(), **extra}
        (partial / _FILES[2]).write_bytes(pack_values(state, of=str(folder)))
        sums = {}
        for name in _FILES:
            content = (partial / name).read_bytes()
            sums[name] = {"bytes": len(content), "crc32c": crc32c(memoryview(content))}
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        write_atomically(partial / "COMPLETE", json.dumps(sums, indent=1).encode())


def load_state(
    folder: Path,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    check: Callable[[Mapping[str, Any]], None] = lambda extra: None,
) -> dict[str, Any]:
    """Puts a checkpoint's values into `trainable` and `optimizer`, restores random numbers, returns what was extra.

    Everything is checked before anything is changed; `check` may refuse what was extra, by raising. Raises
    `CheckpointError` or `CheckpointVerifyError`.
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
    values = state.pop("optimizer")
    names = {id(parameter): name for name, parameter in trainable.items()}
    here = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if here != [group["params"] for group in values["groups"]]:
        raise CheckpointError(f"{folder}: the optimizer's parameter groups are not those of this run")
    rng = state.pop("rng")
    check(state)

    with torch.no_grad():
        for name, value in parameters.items():
            trainable[name].copy_(value)
    _restore_optimizer(trainable, optimizer, tensors, values)
    restore_rng(rng)
    return state


class FolderCommits:
    """Commits of a run whose state is in memory: one folder, that of the last step that was to be committed.

    Made when the next forward begins, see [Note: when a step is committed] in `optimizer.commits`. Used by one thread.
    """

    def __init__(
        self,
        trainable: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        values: Callable[[], Mapping[str, Any]],
        amend: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        every: int,
        folder: Path,
    ) -> None:
        """`values` gives what `save_state` calls extra, `amend` replaces of it what follows a step."""
        self._trainable = trainable
        self._optimizer = optimizer
        self._values = values
        self._amend = amend
        self._every = every
        self._folder = folder
        self._due: dict[str, Any] | None = None

    def step_taken(self, step: int) -> None:
        """Notes the state of `step`, if it is to be committed."""
        if step % self._every == 0:
            self._due = copy.deepcopy({**self._values(), "rng": rng_state()})

    def finish(self) -> None:
        """Makes the commit of the last step, where it is due. Blocks; raises as `save_state` does, and stays due."""
        if self._due is not None:
            save_state(self._folder, self._trainable, self._optimizer, self._amend(self._due))
            self._due = None


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint, by its marker and the files' sizes."""
    try:
        sums = _read_marker(folder)
        return all((folder / name).stat().st_size == sums[name][0] for name in _FILES)
    except (OSError, CheckpointError):
        return False


def _read_marker(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC32C of each file."""
    try:
        data = json.loads((folder / "COMPLETE").read_text())
        return {name: (int(data[name]["bytes"]), int(data[name]["crc32c"])) for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({type(error).__name__}: {error})") from None


def _verify(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint")
    for name, (num_bytes, checksum) in _read_marker(folder).items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read ({error})") from None
        if len(content) != num_bytes or crc32c(memoryview(content)) != checksum:
            raise CheckpointVerifyError(f"{folder}/{name}: {len(content)} bytes do not match the checkpoint's checksum")


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
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    values: dict[str, Any],
) -> None:
    """Sets the state itself: `load_state_dict` would cast fp32 moments to the dtype of a bf16 parameter."""
    optimizer.state.clear()
    for name, entries in values["state"].items():
        optimizer.state[trainable[name]].update(entries)
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        optimizer.state[trainable[name]][entry] = tensor
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
