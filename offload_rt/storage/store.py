"""Frozen blocks at rest on NVMe: written once, verified, read whole, never written again.

    <drive>/offload_rt-<key>/   OFFLOAD_RT_STORE   the marker: only a folder that carries it is ever deleted
                                lock               flock-ed by the process that uses the store; says who
                                weights.bin        one stripe per block, 4 KiB aligned
                                manifest.json      block -> stripes, tensors, CRC32C; written last, renamed in

The key is a hash of the source's content and of the settings, so a second start finds the store and encodes nothing.
A block is one extent, in stripes over the drives by their speed when the store was built. A store without a manifest
is an unfinished one and is built again. Nothing outside this module opens these files; reads and writes go through
`Links`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload_rt.checksum import crc32c
from offload_rt.config import NvmePath
from offload_rt.errors import ConfigError, StoreCorrupt
from offload_rt.memory.arena import Arena, Slot
from offload_rt.storage.drive_files import (
    FolderLock,
    SealBroken,
    check_space,
    make_folder,
    open_file,
    preallocate,
    sealed,
    unsealed,
)
from offload_rt.storage.drives import drive_profile, drive_weights
from offload_rt.storage.durable import os_error, sync_folder, write_atomically
from offload_rt.storage.sequential_writer import SequentialWriter
from offload_rt.storage.stripes import Stripe, parts, stripe_all
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, BlockSpec, align_up
from offload_rt.transfers.file_io import OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer

STORE_VERSION = 2
STAGING_BYTES = 4 << 20
"""Piece in which a block is written, at most; two are in flight."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a block lies: its stripes, in order."""

    stripes: tuple[Stripe, ...]
    crc32c: int

    @property
    def length_bytes(self) -> int:
        return sum(stripe.length_bytes for stripe in self.stripes)

    def to_json(self) -> dict[str, Any]:
        return {"stripes": [vars(stripe) for stripe in self.stripes], "crc32c": self.crc32c}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Extent:
        return cls(stripes=tuple(Stripe(**stripe) for stripe in data["stripes"]), crc32c=data["crc32c"])


def store_folders(drives: Sequence[NvmePath], key: str) -> list[Path]:
    """The store's folder on each drive. ConfigError where a drive's folder is missing or is a file."""
    for drive in drives:
        if not drive.path.is_dir():
            problem = "is not a folder" if drive.path.exists() else "does not exist"
            raise ConfigError(f"nvme: {drive.path} {problem}")
    places = [drive.path.resolve() for drive in drives]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"nvme: {twice} is given twice; one folder per drive")
    return [drive.path / f"offload_rt-{key}" for drive in drives]


class Store:
    """The frozen blocks of one model on one or more drives. Owns their descriptors and the lock until `close`."""

    def __init__(self, drives: Sequence[NvmePath], key: str, links: Links) -> None:
        self.key = key
        self.folders = store_folders(drives, key)
        self._drives = tuple(drives)
        self._links = links
        self._locks: list[FolderLock] = []
        self._files: list[OpenFile] = []
        self._blocks: dict[str, tuple[BlockSpec, Extent]] = {}
        self._verified: set[str] = set()
        self.verifies_every_read = os.environ.get("OFFLOAD_RT_VERIFY") == "all"
        try:
            for folder in self.folders:
                make_folder(folder)
                self._locks.append(FolderLock(folder))
            self.profiles = [drive_profile(folder, links.io) for folder in self.folders]
            self._read_manifest()
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        """Whether the store holds its blocks; otherwise it is to be built."""
        return bool(self._blocks)

    @property
    def specs(self) -> list[BlockSpec]:
        return [spec for spec, _ in self._blocks.values()]

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return bool(self._files) and all(file.direct for file in self._files)

    @property
    def stored_bytes(self) -> int:
        return sum(extent.length_bytes for _, extent in self._blocks.values())

    def read(self, block: str, slot: Slot) -> Transfer:
        """Starts reading a whole block into `slot`, whose size is the block's. Does not block."""
        _, extent = self._blocks[block]
        return self.read_range(block, 0, slot.part(0, extent.length_bytes))

    def read_range(self, block: str, begin_bytes: int, slot: Slot) -> Transfer:
        """Starts reading what `slot` holds of a block, from `begin_bytes` on; both whole pages. Does not block."""
        _, extent = self._blocks[block]
        reads = [
            self._links.read(self._files[part.drive], part.offset_bytes, slot.part(part.begin_bytes, part.length_bytes))
            for part in parts(extent.stripes, begin_bytes, slot.num_bytes)
        ]
        return reads[0] if len(reads) == 1 else self._links.join(f"read {block}", reads)

    def verify(self, block: str, slot: Slot) -> None:
        """Checks an arrived block against its checksum, on its first read of this run.

        `OFFLOAD_RT_VERIFY=all` in the environment checks every read. Raises `StoreCorrupt`.
        """
        _, extent = self._blocks[block]
        if block in self._verified and not self.verifies_every_read:
            return
        self._check(block, crc32c(slot.part(0, extent.length_bytes).buffer()))

    def slabs(self, block: str, staging: Arena) -> Iterator[tuple[int, Slot]]:
        """Reads a whole block piece by piece: (offset in the block, the piece). A piece is valid until the next one.

        Blocks for the drive. A piece is half of `staging`, since the caller has one while the next is read. The last
        one was yielded when the block is checked: `StoreCorrupt`.
        """
        _, extent = self._blocks[block]
        crc, most = 0, staging.num_bytes // 2
        for begin in range(0, extent.length_bytes, most):
            slab = staging.acquire(min(most, extent.length_bytes - begin), block)
            self._links.wait(self.read_range(block, begin, slab))
            crc = crc32c(slab.buffer(), crc)
            yield begin, slab
            del slab
        self._check(block, crc)

    def build(self, specs: Sequence[BlockSpec]) -> StoreBuilder:
        """Starts building: checks the free space first, then preallocates. Raises `StorageFull`."""
        return StoreBuilder(self, specs)

    @property
    def way_out(self) -> str:
        """Ends an error about a store that is broken."""
        folders = " ".join(f"--nvme {drive.path}" for drive in self._drives)
        return (
            f". The original checkpoint and the state of training are not in it: remove this store with `offload-rt "
            f"clean {folders} --yes` and start again"
        )

    def other_bytes(self, block: str, begin_bytes: int, end_bytes: int, *, found: int, expected: int) -> StoreCorrupt:
        """The error where [begin_bytes, end_bytes) of a block are others than when the whole of it was verified."""
        return StoreCorrupt(
            f"{self.folders[0]}: block {block}, bytes {begin_bytes} to {end_bytes}: checksum {found:08x}, expected "
            f"{expected:08x}, which is what the block held at the start{self.way_out}"
        )

    def close(self) -> None:
        """Closes descriptors and gives the lock back. The files stay."""
        for file in self._files:
            file.close()
        for lock in self._locks:
            lock.close()
        self._files = []
        self._locks = []

    def open_on(self, drive: int, path: Path, *, writable: bool) -> OpenFile:
        """Opens a file on one of the drives, to be asked as its profile says."""
        file = open_file(path, writable=writable)
        self._links.io.tune(file, self.profiles[drive].depth, self.profiles[drive].io_bytes)
        return file

    def _check(self, block: str, found: int) -> None:
        """Holds the checksum of a whole block against the manifest's."""
        _, extent = self._blocks[block]
        if found != extent.crc32c:
            places = " and ".join(
                f"{self._files[stripe.drive].path} at offset {stripe.offset_bytes}, {stripe.length_bytes} bytes"
                for stripe in extent.stripes
            )
            raise StoreCorrupt(
                f"{places}: block {block}: checksum {found:08x}, expected {extent.crc32c:08x}{self.way_out}"
            )
        self._verified.add(block)

    def _read_manifest(self) -> None:
        path = self.folders[0] / "manifest.json"
        try:
            body = unsealed(path.read_text())
        except FileNotFoundError:
            return
        except SealBroken as error:
            raise StoreCorrupt(f"{path}: the manifest {error}{self.way_out}") from None
        except (ValueError, KeyError, TypeError) as error:
            what = f"{path}: not readable as a manifest ({type(error).__name__}: {error})"
            raise StoreCorrupt(what + self.way_out) from None
        if body["version"] != STORE_VERSION or body["num_drives"] != len(self.folders):
            return  # written by another version, or striped over other drives: build again
        blocks = {
            entry["spec"]["name"]: (BlockSpec.from_json(entry["spec"]), Extent.from_json(entry["extent"]))
            for entry in body["blocks"]
        }
        for drive, folder in enumerate(self.folders):
            stripes = [s for _, extent in blocks.values() for s in extent.stripes if s.drive == drive]
            ends = [stripe.offset_bytes + stripe.length_bytes for stripe in stripes]
            weights = folder / "weights.bin"
            size = weights.stat().st_size if weights.exists() else 0
            if size < max(ends, default=0):
                raise StoreCorrupt(f"{weights}: {size} bytes, the manifest needs {max(ends)}{self.way_out}")
            self._files.append(self.open_on(drive, weights, writable=False))
        self._blocks = blocks

    def _finish(self, blocks: dict[str, tuple[BlockSpec, Extent]]) -> None:
        body = {
            "version": STORE_VERSION,
            "key": self.key,
            "num_drives": len(self.folders),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "blocks": [{"spec": spec.to_json(), "extent": extent.to_json()} for spec, extent in blocks.values()],
        }
        write_atomically(self.folders[0] / "manifest.json", sealed(body))
        self._read_manifest()


class StoreBuilder:
    """Writes blocks one behind the other, each from one pass over its bytes; memory is two staging pieces."""

    def __init__(self, store: Store, specs: Sequence[BlockSpec]) -> None:
        self._store = store
        self._specs = list(specs)
        self._done: dict[str, tuple[BlockSpec, Extent]] = {}
        self._files: list[OpenFile] = []
        largest = max((spec.stored_bytes for spec in self._specs), default=0)
        self._piece_bytes = min(STAGING_BYTES, max(IO_ALIGNMENT_BYTES, align_up(largest, IO_ALIGNMENT_BYTES)))
        self._staging = Arena("ingest staging", 2 * self._piece_bytes)
        places = stripe_all(
            [spec.stored_bytes for spec in self._specs],
            drive_weights(store.profiles),
            [usable_bytes(folder, drive) for folder, drive in zip(store.folders, store._drives, strict=True)],
        )
        self._places = {spec.name: stripes for spec, stripes in zip(self._specs, places, strict=True)}
        ends = [0] * len(store.folders)
        for stripe in (stripe for stripes in places for stripe in stripes):
            ends[stripe.drive] += stripe.length_bytes
        for folder, drive, end in zip(store.folders, store._drives, ends, strict=True):
            free_bytes = _free_bytes(folder, drive)
            check_space("the store", folder, end, free_bytes=free_bytes, capacity_bytes=drive.capacity_bytes)
        try:
            for folder in store.folders:  # a manifest must not outlive the bytes it speaks of
                (folder / "manifest.json").unlink(missing_ok=True)
                sync_folder(folder)
            for index, (folder, end) in enumerate(zip(store.folders, ends, strict=True)):
                path = folder / "weights.bin"
                path.unlink(missing_ok=True)  # of an unfinished build
                file = store.open_on(index, path, writable=True)
                self._files.append(file)
                if end:
                    preallocate(file, end)
        except BaseException:
            self.close()
            raise

    def write(self, spec: BlockSpec, pieces: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Writes one block. `pieces` yields (offset in the block, contiguous tensor), offsets ascending."""
        stripes = self._places[spec.name]
        writer = SequentialWriter(self._store._links, self._staging, self._piece_bytes, self._files, stripes)
        try:
            for position, tensor in pieces:
                writer.append(position, tensor)
            checksum = writer.finish(spec.stored_bytes)
        except BaseException:
            writer.abort()
            raise
        self._done[spec.name] = (spec, Extent(stripes=stripes, crc32c=checksum))

    def finish(self) -> None:
        """Makes the store durable and complete. Raises `StorageError`."""
        missing = [spec.name for spec in self._specs if spec.name not in self._done]
        if missing:
            raise ValueError(f"store: blocks never written: {missing}")
        for file in self._files:
            try:
                os.fdatasync(file.fd)
            except OSError as error:
                raise os_error("cannot be made durable", Path(file.path), error) from None
        for folder in self._store.folders:  # the manifest is one folder's, and the names are each one's own
            sync_folder(folder)
            sync_folder(folder.parent)
        self.close()
        self._store._finish(self._done)

    def close(self) -> None:
        """Gives the descriptors back; without `finish`, the store stays incomplete."""
        for file in self._files:
            file.close()
        self._files = []


def usable_bytes(folder: Path, drive: NvmePath) -> int:
    """What a store in `folder` may take: free space, its own old bytes, and no more than `nvme=` allows."""
    free = _free_bytes(folder, drive)
    return free if drive.capacity_bytes is None else min(free, drive.capacity_bytes)


def _free_bytes(folder: Path, drive: NvmePath) -> int:
    old = folder / "weights.bin"
    return shutil.disk_usage(drive.path).free + (old.stat().st_blocks * 512 if old.exists() else 0)
