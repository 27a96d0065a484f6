"""Page-locked arenas for a GPU, exactly as large as asked for; and what to do where not enough can be locked.

`torch.pin_memory` rounds sizes up to a power of two and keeps what it has; here a region is mapped first and then
locked by `cudaHostRegister`. On WSL2 and in containers there may be a ceiling, found by a child process once per boot.
Where an arena does not fit below it, memory stays pageable, and a small locked ring carries bytes to the device:

    pageable arena   |....|....|....|....|....|
                         \\ copied by the CPU
    locked ring           [ 0 ][ 1 ][ 2 ]              a piece is filled again when the device has read it
                                  \\ copied by the device
    device memory            |....|....|....|
"""

from __future__ import annotations

import contextlib
import enum
import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload_rt.arena import Arena, Region, Slot
from offload_rt.cache import recall, remember
from offload_rt.cudart import CudaRuntime
from offload_rt.errors import OffloadError, PinningRefused
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from planners.errors import format_bytes

STEP_BYTES = 256 << 20
RING_BYTES = 512 << 20
"""Enough for a few blocks of any model; less where the ceiling is lower."""
MIN_RING_BYTES = 16 << 20
CHILD_SECONDS = 120.0

Wait = Callable[[], None]


class Pinning(enum.Enum):
    """How host memory reaches the device."""

    ARENA = "arena"
    """All of it is locked."""
    RING = "ring"
    """It is pageable; a locked ring is between."""
    NONE = "none"
    """Nothing can be locked: copies block."""


@dataclass(frozen=True, kw_only=True)
class PinningPlan:
    """What to lock."""

    pinning: Pinning
    locked_bytes: int
    reason: str = ""
    """For the user, where it is not `ARENA`."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """How much may be locked at once."""

    ceiling_bytes: int
    reason: str = ""
    """What the runtime answered beyond it; empty where the limit of the search was reached."""


def pin(
    region: Region,
    runtime: CudaRuntime,
    on_device: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Locks a region until it is unmapped. Blocks while pages are faulted in. Raises `PinningRefused`.

    `on_device` makes the GPU current that is to have it; the runtime makes a context for another one otherwise.

    Processes that are forked (workers of a data loader) do not have it: it would be theirs too until either writes to a
    page, and who wrote would have another page than the one that the device copies.
    """
    with on_device():
        runtime.register(region.address, len(region))
    region.madvise(mmap.MADV_DONTFORK)

    def undo(address: int) -> None:
        # At the end of a process the driver may be gone before the memory, and a forked one has none.
        with contextlib.suppress(PinningRefused, RuntimeError), on_device():
            runtime.unregister(address)

    region.before_unmap.append(undo)


def pinning_plan(arena_bytes: int, ceiling: Ceiling) -> PinningPlan:
    """Locks all of `arena_bytes` below the ceiling, otherwise a ring. Never asks for more than was seen to work."""
    if arena_bytes <= ceiling.ceiling_bytes:
        return PinningPlan(pinning=Pinning.ARENA, locked_bytes=arena_bytes)
    ring_bytes = min(RING_BYTES, ceiling.ceiling_bytes // 2)  # others in the process lock memory too
    found = f"only {format_bytes(ceiling.ceiling_bytes)} of host memory can be locked ({ceiling.reason or 'as asked'})"
    if ring_bytes < MIN_RING_BYTES:
        return PinningPlan(
            pinning=Pinning.NONE, locked_bytes=0, reason=f"{found}: copies to the device block, at about half the speed"
        )
    return PinningPlan(
        pinning=Pinning.RING, locked_bytes=ring_bytes,
        reason=f"{found}, not {format_bytes(arena_bytes)}: a ring of {format_bytes(ring_bytes)} over pageable memory",
    )  # fmt: skip


def pin_ceiling(runtime: CudaRuntime, limit_bytes: int, *, step_bytes: int = STEP_BYTES) -> Ceiling:
    """How much of `limit_bytes` may be locked, tried in a child process. Blocks for seconds, once per boot.

    A child that dies or hangs is a ceiling of zero. The caller makes sure that `limit_bytes` are free.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = recall("pinning")
    if known is not None and (known.get("boot"), known.get("library")) == (boot, runtime.path):
        try:
            known_bytes, known_limit, reason = int(known["ceiling_bytes"]), int(known["limit_bytes"]), known["reason"]
        except (KeyError, TypeError, ValueError):
            known_bytes = known_limit = 0
        # A search that met no refusal says nothing about more than it asked for.
        if known_bytes < known_limit or known_limit >= limit_bytes > 0:
            return Ceiling(ceiling_bytes=min(known_bytes, limit_bytes), reason=str(reason))
    ceiling = _ask_child(runtime.path, limit_bytes, step_bytes)
    if ceiling.ceiling_bytes:  # who had none may have had no driver: it can come without a boot, as to a container
        remember("pinning", {"boot": boot, "library": runtime.path, "limit_bytes": limit_bytes, **vars(ceiling)})
    return ceiling


def _ask_child(library: str, limit_bytes: int, step_bytes: int) -> Ceiling:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "offload_rt.cudart", library, str(limit_bytes), str(step_bytes)],
            cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=CHILD_SECONDS, check=False,
        )  # fmt: skip
        data = json.loads(done.stdout)
        return Ceiling(ceiling_bytes=int(data["ceiling_bytes"]), reason=str(data["reason"]))
    except subprocess.TimeoutExpired:
        return Ceiling(ceiling_bytes=0, reason=f"the trial did not end in {CHILD_SECONDS:g} s")
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Ceiling(ceiling_bytes=0, reason=f"the trial ended with {done.returncode}: {last}")


class PinnedRing:
    """Locked pieces through which pageable bytes go to a device and come back. One transfer at a time.

    `put` and `get` start the device's side: an asynchronous copy between the piece they are given and the device, at an
    offset of the whole. They return what waits for it. A piece is touched again only after that has returned.
    """

    def __init__(self, num_bytes: int, num_pieces: int, runtime: CudaRuntime) -> None:
        """Locks `num_bytes`, in pieces of equal size. Raises `PinningRefused`."""
        self.piece_bytes = num_bytes // num_pieces // IO_ALIGNMENT_BYTES * IO_ALIGNMENT_BYTES
        self._arena = Arena("pinned ring", num_pieces * self.piece_bytes)
        pin(self._arena.region, runtime)
        whole = self._arena.acquire(num_pieces * self.piece_bytes, "pinned ring")
        self._pieces = [whole.part(index * self.piece_bytes, self.piece_bytes) for index in range(num_pieces)]

    def send(self, source: memoryview, put: Callable[[Slot, int], Wait]) -> None:
        """Copies `source` to the device. Blocks until it is there, or until a failure has nothing under way."""
        self._run(len(source), put, before=lambda piece, at: _copy(source[at : at + piece.num_bytes], piece.buffer()))

    def receive(self, target: memoryview, get: Callable[[Slot, int], Wait]) -> None:
        """Fills `target` from the device. Blocks as `send`."""
        self._run(len(target), get, after=lambda piece, at: _copy(piece.buffer(), target[at : at + piece.num_bytes]))

    def _run(
        self,
        num_bytes: int,
        start: Callable[[Slot, int], Wait],
        *,
        before: Callable[[Slot, int], None] | None = None,
        after: Callable[[Slot, int], None] | None = None,
    ) -> None:
        under_way: dict[int, tuple[Wait, Slot, int]] = {}  # by piece, oldest first
        failure: OffloadError | None = None

        def finish(index: int) -> None:
            nonlocal failure
            wait, piece, at = under_way.pop(index)
            try:
                wait()
                if after is not None and failure is None:
                    after(piece, at)
            except OffloadError as error:
                failure = failure or error

        try:
            for number, at in enumerate(range(0, num_bytes, self.piece_bytes)):
                index = number % len(self._pieces)
                if index in under_way:
                    finish(index)
                if failure is not None:
                    break
                piece = self._pieces[index].part(0, min(self.piece_bytes, num_bytes - at))
                if before is not None:
                    before(piece, at)
                under_way[index] = start(piece, at), piece, at
        finally:
            for index in list(under_way):
                finish(index)
        if failure is not None:
            raise failure


def _copy(source: memoryview, target: memoryview) -> None:
    target[:] = source
