"""Asynchronous reads and writes of open files: the native ring, or its plain twin on aiofiles.

What is known of a file is a descriptor and a path: opening and locking it is the store's business. A file whose system
refuses O_DIRECT goes through the page cache, which is dropped behind every operation, so that it does not grow to the
model's size.
"""

from __future__ import annotations

import asyncio
import errno as errno_names
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from offload_rt.errors import StorageError, StorageTimeout, storage_error
from offload_rt.memory.arena import WAIT_SECONDS, Region
from offload_rt.meter import SSD_READ, SSD_WRITE, Meter
from offload_rt.native import native_core
from offload_rt.patience import Patience
from offload_rt.transfers.io_records import Recorded, Records

Result = TypeVar("Result")

RING_DEPTH = 64
"""Requests in flight at one device, at most; `FileIO.tune` sets less where a drive wants no more."""


class Descriptor:
    """Closes `fd` once: by `close`, or when nobody sees this any more. Operations under way see it: the ring holds it.

    So what is collected with nobody having closed it ends its own reads and writes first, and no number of a closed
    descriptor is used that may be another file's by then.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Nothing may be under way. May be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)  # no lock is given back: in a forked child it is the parent's


@dataclass(frozen=True)
class OpenFile:
    """A file that the store has open. `direct` says that its descriptor was opened with O_DIRECT."""

    path: str
    fd: int
    direct: bool
    owner: Descriptor | None = None
    """Who closes it; None where the caller does."""

    def close(self) -> None:
        """Nothing may be under way."""
        if self.owner is not None:
            self.owner.close()


def open_file(path: str | Path, *, writable: bool) -> OpenFile:
    """Opens (and, if writable, makes) a file, past the page cache where its file system lets us, which is tried: some
    take the flag and refuse the first transfer. Raises `OSError`.
    """
    flags = (os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY
    fd = -1
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o644)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            if writable and os.fstat(fd).st_size == 0:  # reading nothing is no trial
                os.pwrite(fd, page, 0)
                os.ftruncate(fd, 0)
            else:
                os.preadv(fd, [page], 0)
        return OpenFile(str(path), fd, True, Descriptor(fd))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno not in (errno_names.EINVAL, errno_names.EOPNOTSUPP):
            raise
    fd = os.open(path, flags, 0o644)
    return OpenFile(str(path), fd, False, Descriptor(fd))


class FileIO(Protocol):
    """Asynchronous file I/O: the native ring, or its plain twin."""

    name: str
    direct: bool
    """Whether it honours O_DIRECT descriptors."""
    refusal: str
    """Why arenas are not registered with the kernel; empty where they are."""

    def start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        """Starts a "read" or a "write" of the whole buffer; returns the function that waits for it.

        A "sync" is fdatasync; it covers what was waited for before it was started, and its buffer is empty.
        """

    def adopt(self, region: Region) -> None:
        """Prepares for operations on memory, where that saves work. Blocks the first time; never fails."""

    def tune(self, file: OpenFile, depth: int, io_bytes: int) -> None:
        """Requests in flight, at most `RING_DEPTH`, and the length of one, for the drive that `file` lies on."""

    def busy_seconds(self) -> tuple[float, float]:
        """How long reads, and writes with syncs, were under way since the start: what overlaps counts once."""

    def record(self, most: int) -> None:
        """Forgets what was recorded, and records those of the operations started from now on, the first `most`."""

    def records(self) -> tuple[list[Recorded], int]:
        """What was recorded, and how many there was no room for."""

    def outstanding(self) -> str:
        """What is under way, for the message of a timeout."""

    def close(self) -> None:
        """Waits for what is under way. Raises `StorageTimeout` where a drive does nothing of it for `WAIT_SECONDS`:
        memory and files stay with what it was asked for, then.
        """


class RingIO:
    """File I/O by `_offload_rt_native.Ring`.

    [Note: registration]
    With `register`, the kernel is told of an arena on its first use: it then pins the pages once instead of with every
    request, which took a third off the processor time of large direct reads (docs/log.md). Where it refuses (`refusal`
    says why: no io_uring, or `RLIMIT_MEMLOCK`, which counts for ordinary users), the same requests go unregistered. The
    memory is forgotten before it is unmapped.
    """

    direct = True

    def __init__(self, core: Any, backend: str = "auto", *, register: bool | None = None) -> None:
        self._core = core
        self._ring = core.Ring(depth=RING_DEPTH, backend=backend, patience_seconds=WAIT_SECONDS)
        self.name = self._ring.backend
        if register is None:
            register = os.environ.get("OFFLOAD_RT_IO_REGISTER") != "0"
        self._register = register and self.name == "io_uring"
        self.refusal = "" if register else "switched off"
        if register and not self._register:
            self.refusal = "memory is registered by io_uring only"
        self._adopted: weakref.WeakSet[Region] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._number = next(_numbers)
        _rings[self._number] = self._ring

    def adopt(self, region: Region) -> None:
        if not self._register or region in self._adopted:
            return
        with self._lock:
            if region in self._adopted:
                return
            self._adopted.add(region)
            try:
                self._ring.register_memory(region)
            except self._core.NativeStorageError as error:
                self.refusal = str(error)
                return
        region.before_unmap.append(partial(_forget, self._number))

    def tune(self, file: OpenFile, depth: int, io_bytes: int) -> None:
        self._ring.tune(file.fd, depth, io_bytes)

    def counters(self) -> dict[str, int]:
        """What the ring counted: bytes, operations, requests, those resubmitted and on registered memory; seconds."""
        return dict(self._ring.counters())

    def start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        place = () if kind == "sync" else (offset_bytes, buffer)
        ticket = getattr(self._ring, kind)(file.fd, file.path, *place, owner=file.owner)
        num_bytes, has_begun = len(buffer), False

        def wait(timeout_seconds: float) -> None:
            nonlocal has_begun
            again, has_begun = has_begun, True
            try:
                # Ctrl-C may have come when a wait had ended the ticket, and nobody knew it yet.
                self._ring.wait(ticket, timeout_seconds, again)
            except self._core.NativeTimeout as error:
                raise StorageTimeout(f"{file.path}: {kind} not finished after {timeout_seconds:g} s; {error}") from None
            except self._core.NativeStorageError as error:
                raise storage_error(
                    f"{kind} failed", path=file.path, offset=error.offset, wanted=error.wanted, done=error.done,
                    errno=error.errno or 0,
                ) from None  # fmt: skip
            if not file.direct and kind != "sync":
                _drop_cached(file.fd, offset_bytes, num_bytes)

        return wait

    def busy_seconds(self) -> tuple[float, float]:
        counters = self._ring.counters()
        return float(counters["read_seconds"]), float(counters["write_seconds"])

    def record(self, most: int) -> None:
        self._ring.record(most)

    def records(self) -> tuple[list[Recorded], int]:
        operations, num_left_out = self._ring.records()
        return [
            Recorded(
                kind, path, offset, length, begun if begun >= 0 else submitted, finished if finished >= 0 else None
            )
            for kind, path, offset, length, submitted, begun, finished in operations
        ], num_left_out  # fmt: skip

    def outstanding(self) -> str:
        return str(self._ring.outstanding())

    def close(self) -> None:
        try:
            self._ring.close()
        except self._core.NativeTimeout as error:
            raise StorageTimeout(f"{error.path}: not closed, as it is used after {WAIT_SECONDS:g} s; {error}") from None


class AiofilesIO:
    """The plain twin: aiofiles on an event loop of its own, always through the page cache."""

    name = "aiofiles"
    direct = False
    refusal = "memory is registered by io_uring only"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._names: dict[int, str] = {}
        self._meter = Meter()
        self._records = Records(self._meter.clock)
        self._thread = threading.Thread(target=self._loop.run_forever, name="offload_rt-aiofiles", daemon=True)
        self._thread.start()

    def start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        resource = SSD_READ if kind == "read" else SSD_WRITE
        self._meter.begin(resource)
        future = asyncio.run_coroutine_threadsafe(self._run(kind, file, offset_bytes, buffer[:]), self._loop)
        self._names[id(future)] = f"{kind} {file.path} at {offset_bytes}, {len(buffer)} bytes"
        note = self._records.noting(kind, file.path, offset_bytes, len(buffer))

        def over(done: Future[None]) -> None:
            self._names.pop(id(done), None)
            self._meter.end(resource)
            note()

        future.add_done_callback(over)
        return lambda timeout_seconds: wait_future(future, timeout_seconds, self.outstanding)

    def adopt(self, region: Region) -> None:
        pass  # threads of Python read with what memory they are given

    def tune(self, file: OpenFile, depth: int, io_bytes: int) -> None:
        pass  # an operation is one request, and the event loop's threads are the depth

    def record(self, most: int) -> None:
        self._records.begin_anew(most)

    def records(self) -> tuple[list[Recorded], int]:
        return self._records.all()

    async def _run(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> None:
        """Owns `buffer` and releases it, and each part of it: a thread of the loop's may hold on to what it was called
        with after whoever waits knows that the operation is over, and an exception to the frames that it passed.
        """
        import aiofiles  # only where the native core is missing

        done = 0
        try:
            if kind == "sync":
                return await asyncio.to_thread(os.fdatasync, file.fd)
            # Through /proc, so that each operation has a position of its own and an unlinked file can be reached.
            path = f"/proc/self/fd/{file.fd}"
            async with aiofiles.open(path, "rb" if kind == "read" else "r+b", buffering=0) as stream:
                await stream.seek(offset_bytes)
                while done < len(buffer):
                    with buffer[done:] as rest:
                        moved = await (stream.readinto if kind == "read" else stream.write)(rest)
                    if not moved:
                        raise storage_error(
                            "end of file",
                            path=file.path,
                            offset=offset_bytes,
                            wanted=len(buffer),
                            done=done,
                            errno=0,
                        )
                    done += moved
                _drop_cached(stream.fileno(), offset_bytes, len(buffer))
        except StorageError:
            raise
        except OSError as error:
            raise storage_error(
                f"{kind} failed", path=file.path, offset=offset_bytes, wanted=len(buffer), done=done,
                errno=error.errno or 0,
            ) from None  # fmt: skip
        finally:
            buffer.release()

    def busy_seconds(self) -> tuple[float, float]:
        busy = self._meter.reading().busy_seconds
        return busy.get(SSD_READ, 0.0), busy.get(SSD_WRITE, 0.0)

    def outstanding(self) -> str:
        return "; ".join(list(self._names.values())) or "nothing"

    def close(self) -> None:
        async def drain() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            await asyncio.gather(*tasks, return_exceptions=True)

        if not self._loop.is_closed():  # its thread may be about to run it
            wait_future(asyncio.run_coroutine_threadsafe(drain(), self._loop), WAIT_SECONDS, self.outstanding)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def file_io(backend: str = "auto") -> FileIO:
    """The best file I/O there is; `backend` is "auto", "io_uring", "threads" or "aiofiles"."""
    core = native_core()
    if backend == "aiofiles" or core is None:
        return AiofilesIO()
    return RingIO(core, backend)


_numbers = itertools.count()
_rings: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By number, those that are there: a region may outlive its ring. It knows the number only, since a weak reference that
were its own would be cleared before its end where it is collected as garbage, and its memory never forgotten.
"""


def _forget(number: int, address: int) -> None:
    if (ring := _rings.get(number)) is not None:
        ring.forget_memory(address)


def _drop_cached(fd: int, offset_bytes: int, num_bytes: int) -> None:
    """Drops what the page cache holds of a range; what is not yet written begins to be."""
    os.posix_fadvise(fd, offset_bytes, num_bytes, os.POSIX_FADV_DONTNEED)


def wait_future(future: Future[Result], timeout_seconds: float, outstanding: Callable[[], str]) -> Result:
    """Waits for `future`; a timeout says what was outstanding."""
    patience = Patience(timeout_seconds)
    while True:
        slice_seconds = patience.slice_seconds()
        try:
            return future.result(slice_seconds)
        except FutureTimeout:
            if future.done():  # just now, or with a timeout of its own
                return future.result()
            if not slice_seconds:
                raise StorageTimeout(
                    f"not finished after {timeout_seconds:g} s; outstanding: {outstanding()}"
                ) from None
