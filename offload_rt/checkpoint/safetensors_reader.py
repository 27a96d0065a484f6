"""Reads safetensors checkpoints: which files and tensors there are, and their bytes, a range at a time.

A checkpoint is one safetensors file, or a folder in the Hugging Face layout: `model.safetensors`, or shards
beside a `model.safetensors.index.json` whose `weight_map` names the shard of each tensor. Bytes are read by
`pread` into memory that the caller owns. What it is not: it knows neither torch nor models, and it never
maps a file: mapped pages would count as the process' own resident memory, which the user has budgeted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from offload_rt.checkpoint.safetensors_header import (
    MAX_HEADER_BYTES,
    TensorEntry,
    parse_header,
    parse_json,
)
from offload_rt.errors import CheckpointError, StorageError

_PAGE_BYTES = 4096
_NUM_FINGERPRINT_SAMPLES = 8
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file as it was when its header was read."""

    file: Path
    size_bytes: int
    mtime_ns: int
    header_bytes: int
    """Length of the JSON; the tensors start 8 bytes later."""
    header_sha256: str
    tensors: dict[str, TensorEntry]


class Checkpoint:
    """The tensors of one checkpoint, open for reading. A context manager; `close` gives back the descriptors.

    `read_into` may be called from several threads: reads carry their own offset.
    """

    def __init__(self, path: Path, shards: Iterable[Shard], tensors: dict[str, TensorEntry]) -> None:
        self.path = path
        self.shards = tuple(shards)
        self.tensors = tensors
        self._shard_of = {shard.file: shard for shard in self.shards}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def fingerprint(self) -> str:
        """A sha256 (hex) that changes when a shard does: name, size, time, header, a few samples of the data.

        It reads 32 KiB a shard, not the shard: a cache key, not a proof of integrity.
        """
        digest = hashlib.sha256()
        for shard in sorted(self.shards, key=lambda s: s.file.name):
            digest.update(repr((shard.file.name, shard.size_bytes, shard.mtime_ns)).encode())
            digest.update(shard.header_sha256.encode())
            first = 8 + shard.header_bytes
            last = max(first, shard.size_bytes - _PAGE_BYTES)
            for i in range(_NUM_FINGERPRINT_SAMPLES):
                offset = first + (last - first) * i // (_NUM_FINGERPRINT_SAMPLES - 1)
                sample = bytearray(min(_PAGE_BYTES, shard.size_bytes - offset))
                self._read(shard, offset, memoryview(sample))
                digest.update(sample)
        return digest.hexdigest()

    def read_into(self, entry: TensorEntry, begin_bytes: int, buffer: memoryview | bytearray) -> None:
        """Fills `buffer` with the tensor's bytes from `begin_bytes` on. Blocks. The caller owns the buffer.

        Raises `StorageError` for a failed read, `CheckpointError` for a file that ends early or was replaced.
        """
        view = memoryview(buffer).cast("B")
        end_bytes = begin_bytes + len(view)
        if begin_bytes < 0 or end_bytes > entry.num_bytes:
            raise ValueError(f"{entry.name}: [{begin_bytes}, {end_bytes}) asked for of {entry.num_bytes} bytes")
        if len(view):
            self._read(self._shard_of[entry.file], entry.begin + begin_bytes, view)

    def close(self) -> None:
        """Closes every descriptor; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _descriptor(self, shard: Shard) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{shard.file}: read after the checkpoint was closed")
            descriptor = self._descriptors.get(shard.file)
            if descriptor is None:
                descriptor = _open(shard.file)
                found = os.fstat(descriptor)
                if (found.st_size, found.st_mtime_ns) != (shard.size_bytes, shard.mtime_ns):
                    os.close(descriptor)
                    raise CheckpointError(f"{shard.file}: changed since its header was read; open it again")
                self._descriptors[shard.file] = descriptor
            return descriptor

    def _read(self, shard: Shard, offset: int, view: memoryview) -> None:
        descriptor = self._descriptor(shard)
        _pread(descriptor, shard.file, offset, view)
        # The page cache is charged to the same memory cgroup as the process: leave nothing of a pass-through
        # read there. The kernel keeps a page that the range covers only in part, so the range starts at its
        # page.
        begin = offset - offset % _PAGE_BYTES
        with contextlib.suppress(OSError):  # advice: some file systems know none
            os.posix_fadvise(descriptor, begin, offset + len(view) - begin, os.POSIX_FADV_DONTNEED)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a safetensors file, an index file, or a folder that holds either. Reads headers, no tensor."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = _choose_file(path)
    elif not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; checkpoint= takes a local path")
    if path.name.endswith(".json"):
        return _open_index(path)
    if path.suffix in (*_PICKLED, ".gguf"):
        raise CheckpointError(f"{path}: {_convert_hint(path.suffix)}")
    shard = read_shard(path)
    return Checkpoint(path, [shard], shard.tensors)


def read_shard(file: Path) -> Shard:
    """Reads and checks one file's header."""
    descriptor = _open(file)
    try:
        stat = os.fstat(descriptor)
        size = stat.st_size
        if size < 8:
            raise CheckpointError(f"{file}: truncated: {size} bytes, a safetensors file has at least 8")
        head = bytearray(8)
        _pread(descriptor, file, 0, memoryview(head))
        length = int.from_bytes(head, "little")
        if bytes(head) == b"version ":
            raise CheckpointError(f"{file}: a Git LFS pointer, not the file; run `git lfs pull`")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: not a safetensors file: its first 8 bytes give a header of {length} bytes, "
                f"at most {MAX_HEADER_BYTES} are allowed"
            )
        if 8 + length > size:
            raise CheckpointError(f"{file}: truncated: a header of {length} bytes in a file of {size} bytes")
        header = bytearray(length)
        _pread(descriptor, file, 8, memoryview(header))
    finally:
        os.close(descriptor)
    return Shard(
        file=file,
        size_bytes=size,
        mtime_ns=stat.st_mtime_ns,
        header_bytes=length,
        header_sha256=hashlib.sha256(header).hexdigest(),
        tensors=parse_header(bytes(header), file=file, data_bytes=size - 8 - length),
    )


def _choose_file(folder: Path) -> Path:
    """The file of a folder that `open_checkpoint` starts from."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    single, index = folder / "model.safetensors", folder / f"model{_INDEX_SUFFIX}"
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder}: holds both {single.name} and {index.name}; give the one that is meant")
    if single.exists() or index.exists():
        return single if single.exists() else index
    for kind in (_INDEX_SUFFIX, ".safetensors"):
        found = [file for file in files if file.name.endswith(kind)]
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:4])
            raise CheckpointError(
                f"{folder}: {len(found)} files end in {kind} ({names}, ...) and none is {single.name} or "
                f"{index.name}; give the one that is meant"
            )
        if found:
            if found[0].name.startswith("adapter_model"):
                raise CheckpointError(f"{folder}: holds a peft adapter, not the weights of a model")
            return found[0]
    for file in files:
        if file.suffix in (*_PICKLED, ".gguf"):
            raise CheckpointError(f"{folder}: no safetensors, but {file.name}; {_convert_hint(file.suffix)}")
    raise CheckpointError(f"{folder}: holds neither {single.name} nor {index.name}")


def _convert_hint(suffix: str) -> str:
    what = "a pickle, which can run code when it is read" if suffix in _PICKLED else "of another format"
    argument = ", gguf_file=..." if suffix == ".gguf" else ""
    return (
        f"it is {what}; convert it once: "
        f"transformers.AutoModelForCausalLM.from_pretrained(folder{argument}).save_pretrained(new_folder)"
    )


def _open_index(index: Path) -> Checkpoint:
    try:
        declared = parse_json(index.read_bytes(), index)
    except OSError as error:
        raise StorageError("cannot read the index", path=str(index), errno=error.errno or 0) from error
    weight_map = declared.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to shard files")
    shards: dict[str, Shard] = {}
    for name, shard_name in weight_map.items():
        # A file name only: an index from elsewhere must not reach outside its folder.
        if not isinstance(shard_name, str) or shard_name in ("", ".", "..") or "/" in shard_name or "\0" in shard_name:
            raise CheckpointError(f"{index}: {name}: {shard_name!r} is not a file name")
        if shard_name not in shards:
            if not (index.parent / shard_name).exists():
                raise CheckpointError(f"{index}: names {shard_name} (for {name}), which is missing")
            shards[shard_name] = read_shard(index.parent / shard_name)
        if name not in shards[shard_name].tensors:
            raise CheckpointError(f"{index}: names {name} in {shard_name}, which does not hold it")
    tensors: dict[str, TensorEntry] = {}
    for shard_name, shard in shards.items():
        for name, entry in shard.tensors.items():
            # transformers loads all that the shards hold; where two hold the same tensor, the index decides
            if weight_map.get(name, shard_name) != shard_name:
                continue
            if name in tensors:
                raise CheckpointError(f"{index}: {name} is in {tensors[name].file.name} and in {shard_name}")
            tensors[name] = entry
    return Checkpoint(index, shards.values(), tensors)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise StorageError("cannot open the checkpoint", path=str(file), errno=error.errno or 0) from error


def _pread(descriptor: int, file: Path, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise StorageError(
                "read failed", path=str(file), offset=offset, wanted=len(view), done=done,
                errno=error.errno or errno.EIO,
            ) from error  # fmt: skip
        if count == 0:
            raise CheckpointError(
                f"{file}: truncated: {done} of {len(view)} bytes at offset {offset}, then the end of the file"
            )
        done += count
