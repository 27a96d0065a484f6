"""The newest commit of a log that another run wrote: taken over by parameter name, or extent by extent.

A run goes on from its own log by `saving.load_commit`, which copies nothing. This is for runs whose state rests
elsewhere: in memory, because there is more of it now, or on other drives. The log is locked meanwhile, and not changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_rt.checkpoint.safetensors_writer import Outline
from offload_rt.checkpoint.saved_tensors import bytes_of
from offload_rt.checkpoint.state import SavedRun
from offload_rt.checkpoint.values import unpack_values
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import CheckpointError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.by_name import LAYOUT, check_layout, read_layout_json
from offload_rt.optimizer.interface import Values
from offload_rt.optimizer.pieces import MASTER, TrainedBlock
from offload_rt.optimizer.state import STATE_PREFIX
from offload_rt.storage.commit_layout import folders_of_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.durable import write_atomically
from offload_rt.storage.snapshot import SnapshotLog, copy_commit
from offload_rt.transfers.links import Links

OpenLog = Callable[[Path], AbstractContextManager["LogCommit"]]
PLACES = "places.json"
_OF_THE_STATE = ("steps", "scalars", "groups", "rng", "weights")
"""Values of a commit that are not what the owner's `carry` gave, but for its step."""


def is_log(folder: Path) -> bool:
    """Whether `folder` holds a commit log, and no checkpoint."""
    return (folder / "log.json").exists()


def note_places(folders: Sequence[Path]) -> None:
    """Notes beside a log, the first of whose folders is its home, where its other parts are; they may move later."""
    text = json.dumps([str(folder.absolute()) for folder in folders[1:]])
    if len(folders) > 1 and (not (folders[0] / PLACES).exists() or (folders[0] / PLACES).read_text() != text):
        write_atomically(folders[0] / PLACES, text.encode())


def _noted_places(folder: Path) -> list[Path]:
    """Where `folder`'s log had its other parts when it was last written; a hint, whatever is there is checked."""
    try:
        return [Path(str(place)) for place in json.loads((folder / PLACES).read_text())]
    except (OSError, ValueError, TypeError):
        return []


@contextmanager
def open_log(folder: Path, *, drives: Sequence[Path], links: Links) -> Iterator[LogCommit]:
    """The newest commit of the log in `folder`, whose other parts lie on `drives`, or where they were made. Blocks.

    Raises `CheckpointError` where there is no step in it, or not all of it is there, `StoreInUse` while it is written,
    and what opening a log raises.
    """
    folders, num_drives = folders_of_log(folder, [*(drive / folder.name for drive in drives), *_noted_places(folder)])
    if len(folders) < num_drives:
        raise CheckpointError(
            f"{folder}: its log lies on {num_drives} drives, of which {len(folders)} are here; give nvme= all of them, "
            f"or save a checkpoint with the run that wrote it"
        )
    log = CommitLog(folders, links)
    try:
        if not log.committed.step:
            raise CheckpointError(f"{folder}: no step has been committed here")
        yield LogCommit(folder, log, links)
    finally:
        log.close()


class LogCommit:
    """What `open_log` gives."""

    def __init__(self, folder: Path, log: CommitLog, links: Links) -> None:
        self.values: Values = unpack_values(log.committed.payload)
        self._folder = folder
        self._log = log
        self._links = links
        if not (folder / LAYOUT).exists():
            raise CheckpointError(f"{folder}: written by an earlier version; go on with it once where it was begun")
        self._layout = read_layout_json(folder)

    def saved_run(self, rule: str) -> SavedRun:
        """The commit of adapters whose optimizer's rule is `rule`, by parameter name, after all of it was verified."""
        self._check_rule(rule)
        values, extents = self.values, _Extents(self._log, self._links)
        for name in self._log.names:
            if name.startswith(STATE_PREFIX):
                extents.read(name)
        scalars: dict[str, Mapping[str, Any]] = {name: values["scalars"].get(name, {}) for name in values["steps"]}
        parameters, moments = _Named(self._folder / "state.bin", extents), _Named(self._folder / "state.bin", extents)
        for name, entry in self._layout["parameters"].items():
            for state in entry["segments"][0]["state"]:
                if state == MASTER:
                    parameters.add(name, entry, state)
                elif name in values["steps"]:
                    moments.add(f"{name}/{state}", entry, state)
        for name, kept in scalars.items():
            moments.add_values({f"{name}/{key}": value for key, value in kept.items() if isinstance(value, Tensor)})
        plain = {
            name: {key: value for key, value in kept.items() if not isinstance(value, Tensor)}
            for name, kept in scalars.items()
        }
        extra = {key: value for key, value in values.items() if key not in _OF_THE_STATE}
        return SavedRun(
            parameters=parameters, optimizer=moments, state=plain, groups=values["groups"], rng=values["rng"],
            extra=extra,
        )  # fmt: skip

    def check_fits(self, blocks: Sequence[TrainedBlock], rule: str) -> None:
        """Raises `CheckpointError` where `blocks` do not lie in the log as they would in this run's."""
        self._check_rule(rule)
        check_layout(self._folder, blocks, self._layout)

    def copy_into(self, log: SnapshotLog) -> None:
        """Writes the state into `log`, which `check_fits`. Raises as `snapshot.load_snapshot` does. Blocks."""
        copy_commit(self._folder, self._log, log, self._links, names=lambda name: name.startswith(STATE_PREFIX))

    def _check_rule(self, rule: str) -> None:
        if self._layout.get("rule") != rule:
            raise CheckpointError(f"{self._folder}: was written by {self._layout.get('rule')}, this run has {rule}")


class _Extents:
    """Extents of a commit, verified, one in memory at a time: the same memory for each."""

    def __init__(self, log: CommitLog, links: Links) -> None:
        self._log = log
        self._links = links
        self._last: str | None = None
        self._room: Slot | None = None

    def read(self, name: str) -> memoryview:
        """Valid until the next one is read. Blocks; raises `StoreCorrupt`."""
        if self._room is None:
            largest = max(map(self._log.length_bytes, self._log.names))
            self._room = Arena("another run's state", largest).acquire(largest, "commit")
        slot = self._room.part(0, self._log.length_bytes(name))
        if self._last != name:
            self._last = None
            self._links.wait(self._log.read(name, slot, committed=True))
            self._last = name
        return slot.buffer()


@dataclass(frozen=True)
class _Range:
    """Bytes of a tensor, in an extent."""

    extent: str
    offset_bytes: int
    num_bytes: int


class _Named:
    """`SavedTensors` of a commit. A tensor whose parameter was cut into ranges is whole here."""

    def __init__(self, path: Path, extents: _Extents) -> None:
        self.path = path
        self.outline: Outline = {}
        self._extents = extents
        self._ranges: dict[str, list[_Range]] = {}
        self._values: dict[str, Tensor] = {}

    def add(self, name: str, entry: Mapping[str, Any], state: str) -> None:
        """A state of the parameter that `entry` of the layout is of."""
        places = [(segment["extent"], segment["state"][state]) for segment in entry["segments"]]
        shape = list(places[0][1]["shape"]) if len(places) == 1 and state != MASTER else list(entry["shape"])
        if len(places) > 1 and state.endswith((".codes", ".absmax")):
            shape = [sum(math.prod(place["shape"]) for _, place in places)]
        tensor = torch.empty(shape, dtype=torch_dtype(places[0][1]["dtype"]), device="meta")
        self.outline = {**self.outline, name: tensor}
        self._ranges[name] = [
            _Range(extent, place["offset"], math.prod(place["shape"]) * tensor.element_size())
            for extent, place in places
        ]

    def add_values(self, values: Mapping[str, Tensor]) -> None:
        """Tensors that the commit's payload holds."""
        self._values.update({name: value.contiguous() for name, value in values.items()})
        self.outline = {**self.outline, **{name: torch.empty_like(v, device="meta") for name, v in values.items()}}

    def read_into(self, name: str, begin_bytes: int, buffer: memoryview) -> None:
        end_bytes = begin_bytes + len(buffer)
        if name in self._values:
            buffer[:] = bytes_of(self._values[name])[begin_bytes:end_bytes]
            return
        at = 0
        for there in self._ranges[name]:
            begin, end = max(begin_bytes, at), min(end_bytes, at + there.num_bytes)
            if begin < end:
                data = self._extents.read(there.extent)[there.offset_bytes :]
                buffer[begin - begin_bytes : end - begin_bytes] = data[begin - at : end - at]
            at += there.num_bytes
