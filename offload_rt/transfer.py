"""The only asynchronous copies there are: drive to memory, memory to drive, memory to memory.

Start and wait are two calls; the `Transfer` between them owns both ends. Reads and writes go through the native ring
(io_uring, or its thread pool where the kernel refuses), or through aiofiles where the native core is not built. Copies
between HOST and DEVICE run on a thread of their own. What is known of files is a descriptor and a path: opening and
locking them is the store's business.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Protocol

from offload_rt.arena import Slot
from offload_rt.errors import StorageError, StorageFull, StorageTimeout
from offload_rt.native import native_core
from offload_rt.recording import Recorder

WAIT_SECONDS = float(os.environ.get("OFFLOAD_RT_IO_TIMEOUT", "60"))


@dataclass(frozen=True)
class OpenFile:
    """A file that the store has open. `direct` says that its descriptor was opened with O_DIRECT."""

    path: str
    fd: int
    direct: bool


@dataclass(kw_only=True)
class TransferCounters:
    """What moved since the start, in bytes, operations and seconds."""

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_copied: int = 0
    num_transfers: int = 0
    stall_seconds: float = 0.0
    """Time in which a wait really waited."""


class Transfer:
    """One asynchronous copy of `num_bytes`. Holds both ends until `wait` has returned or raised.

    `wait` may be called again; it blocks at most `timeout_seconds` and raises what the operation raised.
    """

    def __init__(self, name: str, num_bytes: int, wait: Callable[[float], None], owned: tuple[object, ...]) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self.operation: int | None = None
        """Its number in the recorder, if there is one."""
        self._wait = wait
        self._owned: tuple[object, ...] | None = owned
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def wait(self, timeout_seconds: float | None = None) -> None:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._owned is None:
                return
            try:
                self._wait(WAIT_SECONDS if timeout_seconds is None else timeout_seconds)
            except StorageTimeout:
                raise  # still under way: both ends stay owned, and it can be waited for again
            except Exception as error:
                self._error = error
                self._owned = None
                raise
            self._owned = None


class FileIO(Protocol):
    """Asynchronous file I/O: the native ring, or its plain twin."""

    name: str
    direct: bool
    """Whether it honours O_DIRECT descriptors."""

    def start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        """Starts a "read" or a "write" of the whole buffer; returns the function that waits for it."""

    def outstanding(self) -> str:
        """What is under way, for the message of a timeout."""

    def close(self) -> None:
        """Waits for what is under way."""


class RingIO:
    """File I/O by `_offload_rt_native.Ring`."""

    direct = True

    def __init__(self, core: Any, backend: str = "auto") -> None:
        self._core = core
        self._ring = core.Ring(backend=backend)
        self.name = self._ring.backend

    def start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        ticket = getattr(self._ring, kind)(file.fd, file.path, offset_bytes, buffer)

        def wait(timeout_seconds: float) -> None:
            try:
                self._ring.wait(ticket, timeout_seconds)
            except self._core.NativeTimeout as error:
                raise StorageTimeout(f"{file.path}: {kind} not finished after {timeout_seconds:g} s; {error}") from None
            except self._core.NativeStorageError as error:
                raise storage_error(
                    f"{kind} failed", path=file.path, offset=error.offset, wanted=error.wanted, done=error.done,
                    errno=error.errno or 0,
                ) from None  # fmt: skip

        return wait

    def outstanding(self) -> str:
        return str(self._ring.outstanding())

    def close(self) -> None:
        self._ring.close()


class AiofilesIO:
    """The plain twin: aiofiles on an event loop of its own, through the page cache, which it drops behind itself."""

    name = "aiofiles"
    direct = False

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._names: dict[int, str] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="offload_rt-aiofiles", daemon=True)
        self._thread.start()

    def start(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        future = asyncio.run_coroutine_threadsafe(self._run(kind, file, offset_bytes, buffer), self._loop)
        self._names[id(future)] = f"{kind} {file.path} at {offset_bytes}, {len(buffer)} bytes"
        future.add_done_callback(lambda done: self._names.pop(id(done), None))
        return lambda timeout_seconds: wait_future(future, timeout_seconds, self.outstanding)

    async def _run(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> None:
        import aiofiles  # only where the native core is missing

        done = 0
        try:
            # Through /proc, so that each operation has a position of its own and an unlinked file can be reached.
            path = f"/proc/self/fd/{file.fd}"
            async with aiofiles.open(path, "rb" if kind == "read" else "r+b", buffering=0) as stream:
                await stream.seek(offset_bytes)
                while done < len(buffer):
                    moved = await (stream.readinto if kind == "read" else stream.write)(buffer[done:])
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
                os.posix_fadvise(stream.fileno(), offset_bytes, len(buffer), os.POSIX_FADV_DONTNEED)
        except StorageError:
            raise
        except OSError as error:
            raise storage_error(
                f"{kind} failed", path=file.path, offset=offset_bytes, wanted=len(buffer), done=done,
                errno=error.errno or 0,
            ) from None  # fmt: skip

    def outstanding(self) -> str:
        return "; ".join(list(self._names.values())) or "nothing"

    def close(self) -> None:
        async def drain() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(drain(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def file_io(backend: str = "auto") -> FileIO:
    """The best file I/O there is; `backend` is "auto", "io_uring", "threads" or "aiofiles"."""
    core = native_core()
    if backend == "aiofiles" or core is None:
        return AiofilesIO()
    return RingIO(core, backend)


def storage_error(message: str, *, path: str, offset: int, wanted: int, done: int, errno: int) -> StorageError:
    """A `StorageError`, or `StorageFull` where the drive or a quota is."""
    import errno as names

    kind = StorageFull if errno in (names.ENOSPC, names.EDQUOT) else StorageError
    return kind(message, path=path, offset=offset, wanted=wanted, done=done, errno=errno)


def wait_future(future: Future[None], timeout_seconds: float, outstanding: Callable[[], str]) -> None:
    """Waits for `future`; a timeout says what was outstanding."""
    try:
        future.result(timeout_seconds)
    except FutureTimeout:
        if future.done():  # just now, or with a timeout of its own
            return future.result()
        raise StorageTimeout(f"not finished after {timeout_seconds:g} s; outstanding: {outstanding()}") from None


class Links:
    """All connections between the tiers. One per engine; `close` waits for what is under way.

    `delay_seconds` (the stress mode) starts every operation late by a random time up to that, so that a use that does
    not wait for its arrival meets poisoned memory.
    """

    def __init__(
        self,
        *,
        io: FileIO | None = None,
        recorder: Recorder | None = None,
        delay_seconds: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.io = io if io is not None else file_io()
        self.counters = TransferCounters()
        self.recorder = recorder
        self._delay_seconds = delay_seconds
        self._random = random.Random(seed)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="offload_rt-copy")
        self._delayer = ThreadPoolExecutor(8, thread_name_prefix="offload_rt-delay") if delay_seconds else None

    def read(self, file: OpenFile, offset_bytes: int, slot: Slot) -> Transfer:
        """Starts filling `slot` from `file`. Does not block."""
        self.counters.bytes_read += slot.num_bytes
        return self._file("read", file, offset_bytes, slot)

    def write(self, file: OpenFile, offset_bytes: int, slot: Slot) -> Transfer:
        """Starts writing `slot` to `file`. Does not block; durable only after the store's barrier."""
        self.counters.bytes_written += slot.num_bytes
        return self._file("write", file, offset_bytes, slot)

    def copy(self, source: Slot, destination: Slot, *, after: Transfer | None = None) -> Transfer:
        """Starts copying `source` to `destination` (equal sizes), once `after` has arrived. Does not block."""
        if source.num_bytes != destination.num_bytes:
            raise ValueError(f"copy: {source.num_bytes} bytes into {destination.num_bytes}")
        self.counters.bytes_copied += source.num_bytes

        ends = [(source.buffer(), destination.buffer())]

        def run() -> None:
            if after is not None:
                after.wait()
            self._sleep()
            origin, target = ends.pop()  # so that this thread holds no lease when the future is done
            num_bytes = len(origin)
            ctypes.memmove(
                (ctypes.c_char * num_bytes).from_buffer(target),
                (ctypes.c_char * num_bytes).from_buffer(origin),
                num_bytes,
            )

        future = self._copier.submit(run)
        transfer = Transfer(
            "copy", source.num_bytes, lambda seconds: wait_future(future, seconds, lambda: "a copy"),
            (source, destination),
        )  # fmt: skip
        return self._recorded(transfer, reads=source, writes=destination, after=after)

    def wait(self, transfer: Transfer) -> None:
        """Blocks until `transfer` has arrived, counts the stall, and orders the caller after it."""
        start = time.perf_counter()
        transfer.wait()
        self.counters.stall_seconds += time.perf_counter() - start
        if self.recorder is not None and transfer.operation is not None:
            self.recorder.join(transfer.operation)

    def close(self) -> None:
        if self._delayer is not None:
            self._delayer.shutdown()
        self._copier.shutdown()
        self.io.close()

    def _file(self, kind: str, file: OpenFile, offset_bytes: int, slot: Slot) -> Transfer:
        buffer = slot.buffer()
        if self._delayer is None:
            wait = self.io.start(kind, file, offset_bytes, buffer)
        else:
            late = self._delayer.submit(self._start_late, kind, file, offset_bytes, buffer)

            def wait(timeout_seconds: float) -> None:
                try:
                    started = late.result(timeout_seconds)
                except FutureTimeout:
                    raise StorageTimeout(f"{kind} {file.path}: not begun after {timeout_seconds:g} s") from None
                started(timeout_seconds)

        transfer = Transfer(f"{kind} {file.path}", slot.num_bytes, wait, (slot, buffer))
        if kind == "read":
            return self._recorded(transfer, writes=slot)
        return self._recorded(transfer, reads=slot)

    def _start_late(self, kind: str, file: OpenFile, offset_bytes: int, buffer: memoryview) -> Callable[[float], None]:
        self._sleep()
        return self.io.start(kind, file, offset_bytes, buffer)

    def _sleep(self) -> None:
        if self._delay_seconds:
            time.sleep(self._random.uniform(0, self._delay_seconds))

    def _recorded(
        self,
        transfer: Transfer,
        *,
        reads: Slot | None = None,
        writes: Slot | None = None,
        after: Transfer | None = None,
    ) -> Transfer:
        self.counters.num_transfers += 1
        if self.recorder is not None:
            before = [after.operation] if after is not None and after.operation is not None else []
            transfer.operation = self.recorder.submit(
                transfer.name,
                reads=[reads.range] if reads is not None else [],
                writes=[writes.range] if writes is not None else [],
                after=before,
            )
        return transfer
