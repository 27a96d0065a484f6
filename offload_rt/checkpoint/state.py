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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload_rt.checkpoint.optimizer_state import OptimizerState, TorchState, Write
from offload_rt.checkpoint.safetensors_writer import READ_BYTES, Outline, SafetensorsWriter, file_bytes
from offload_rt.checkpoint.saved_tensors import FileTensors, SavedTensors, read_tensor
from offload_rt.checkpoint.values import pack_values, restore_rng, rng_state
from offload_rt.checkpoint.whole_folder import replaced_whole
from offload_rt.checksum import crc32c
from offload_rt.closing import Unfinished
from offload_rt.errors import CheckpointError, CheckpointVerifyError, ConfigError
from offload_rt.storage.durable import write_atomically

STATE_VERSION = 1
_FILES = ("trainable.safetensors", "optimizer.safetensors", "state.pt")
_OURS = (*_FILES, "COMPLETE")


def save_state(
    folder: Path,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    *,
    state: OptimizerState | None = None,
) -> None:
    """Writes a checkpoint to `folder`, replacing one that is there; other files stay. Blocks until it is durable.

    `state` is the optimizer's where it is not in the optimizer itself, and need not be in memory.
    `extra` holds plain values and tensors; random numbers are those of now, unless it has `rng`. Raises `StorageFull`
    before the first byte where space is short, `ConfigError` where `folder` holds folders, or a run's commit log, which
    would be loaded in place of the checkpoint.
    """
    if (folder / "log.json").exists():
        raise ConfigError(f"{folder} holds the commit log of a run; give a checkpoint a folder of its own")
    state = state if state is not None else TorchState(trainable, optimizer)
    parameters = {name: torch.empty_like(p, device="meta") for name, p in trainable.items()}
    tensors = state.outline()
    values = {"state": state.values(), "groups": _group_values(trainable, optimizer)}
    need = file_bytes(parameters) + file_bytes(tensors) + (1 << 20)

    def give_parameters(write: Write) -> None:
        for name, parameter in trainable.items():
            write(name, parameter)

    with replaced_whole(folder, need, what="a checkpoint", is_ours=_OURS.__contains__) as partial:
        _write(partial / _FILES[0], parameters, give_parameters)
        _write(partial / _FILES[1], tensors, state.write)
        packed = {"version": STATE_VERSION, "optimizer": values, "rng": rng_state(), **extra}
        (partial / _FILES[2]).write_bytes(pack_values(packed, of=str(folder)))
        sums = {}
        for name in _FILES:
            num_bytes, checksum = _sum(partial / name)
            sums[name] = {"bytes": num_bytes, "crc32c": checksum}
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        write_atomically(partial / "COMPLETE", json.dumps(sums, indent=1).encode())


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What a run has saved, wherever it lies: read, and found to be whole."""

    parameters: SavedTensors
    """Those that train, by name."""
    optimizer: SavedTensors
    """Its state, as `<parameter name>/<state name>`."""
    state: Mapping[str, Mapping[str, Any]]
    """What it keeps besides tensors, by parameter name."""
    groups: Sequence[Mapping[str, Any]]
    """Param groups with names in place of parameters."""
    rng: dict[str, Any]
    extra: dict[str, Any]


def load_state(
    folder: Path,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    check: Callable[[Mapping[str, Any]], None] = lambda extra: None,
    *,
    state: OptimizerState | None = None,
) -> dict[str, Any]:
    """Puts a checkpoint's values into `trainable` and `optimizer`; see `restore`."""
    _verify(folder)
    extra: dict[str, Any] = torch.load(folder / _FILES[2], map_location="cpu", weights_only=True)
    if extra.pop("version") != STATE_VERSION:
        raise CheckpointError(f"{folder}: written by another version of offload_rt")
    values, rng = extra.pop("optimizer"), extra.pop("rng")
    with FileTensors(folder / _FILES[0]) as parameters, FileTensors(folder / _FILES[1]) as tensors:
        saved = SavedRun(
            parameters=parameters, optimizer=tensors, state=values["state"], groups=values["groups"], rng=rng,
            extra=extra,
        )  # fmt: skip
        return restore(saved, trainable, optimizer, check, state=state)


def restore(
    saved: SavedRun,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    check: Callable[[Mapping[str, Any]], None],
    *,
    state: OptimizerState | None = None,
) -> dict[str, Any]:
    """Puts what was saved into `trainable` and `optimizer`, restores random numbers, returns what was extra. Blocks.

    `state` takes the optimizer's where it is not in the optimizer itself.

    Everything is checked before anything is changed; `check` may refuse what was extra, by raising. Raises
    `CheckpointError` or `CheckpointVerifyError`.
    """
    parameters, of = saved.parameters.outline, saved.parameters.path.parent
    if set(parameters) != set(trainable):
        odd = sorted(set(parameters) ^ set(trainable))
        raise CheckpointError(f"{of}: trains other parameters than this run, first: {odd[0]} ({len(odd)} differ)")
    for name, value in parameters.items():
        if value.shape != trainable[name].shape or value.dtype != trainable[name].dtype:
            raise CheckpointError(
                f"{of}: {name} is {tuple(value.shape)} {value.dtype}, here {tuple(trainable[name].shape)} "
                f"{trainable[name].dtype}"
            )
    here = [group["params"] for group in _group_values(trainable, optimizer)]
    if here != [group["params"] for group in saved.groups]:
        raise CheckpointError(f"{of}: the optimizer's parameter groups are not those of this run")
    check(saved.extra)
    state = state if state is not None else TorchState(trainable, optimizer)
    state.check(saved.optimizer, saved.state)

    with torch.no_grad():
        for name in parameters:
            trainable[name].copy_(read_tensor(saved.parameters, name))
    state.load(saved.optimizer, saved.state)
    for group, values in zip(optimizer.param_groups, saved.groups, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    restore_rng(saved.rng)
    return saved.extra


class FolderCommits:
    """Commits of a run whose state is in memory: one folder, that of the last step that was to be committed.

    Made when the next forward begins, see [Note: when a step is committed] in `optimizer.commits`. Used by
    one thread.
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
        self._unfinished = Unfinished()
        self._due: dict[str, Any] | None = None

    def step_taken(self, step: int) -> None:
        """Notes the state of `step`, if it is to be committed."""
        if step % self._every == 0:
            self._due = copy.deepcopy({**self._values(), "rng": rng_state()})
            self._unfinished.step_taken()

    @property
    def is_due(self) -> bool:
        """Whether `finish` would commit."""
        return self._due is not None

    def abandon(self) -> None:
        """Leaves the last step uncommitted where the loop has failed since: see `closing`."""
        if self._due is not None and self._unfinished.has_failed(self._due["step"]):
            self._due = None

    def finish(self) -> None:
        """Makes the commit of the last step, where it is due. Blocks; raises as `save_state` does, and stays due."""
        self._unfinished.next_begins()
        if self._due is not None:
            save_state(self._folder, self._trainable, self._optimizer, self._amend(self._due))
            self._due = None


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
            found = _sum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read ({error})") from None
        if found != (num_bytes, checksum):
            raise CheckpointVerifyError(f"{folder}/{name}: {found[0]} bytes do not match the checkpoint's checksum")


def _write(path: Path, outline: Outline, give: Callable[[Write], None]) -> None:
    """Writes a safetensors file, tensor by tensor as `give` gives them."""
    writer = SafetensorsWriter(path, outline)
    try:
        give(writer.write_next)
        writer.finish()
    finally:
        writer.close()


def _sum(path: Path) -> tuple[int, int]:
    """Size and CRC32C of a file, a chunk in memory at a time."""
    num_bytes = checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            num_bytes, checksum = num_bytes + len(chunk), crc32c(memoryview(chunk), checksum)
    return num_bytes, checksum


def _group_values(trainable: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Param groups with names in place of parameters."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    return [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
