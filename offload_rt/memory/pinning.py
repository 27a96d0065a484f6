"""Page-locked arenas for a GPU, exactly as large as asked for; and how much of them the system lets us have.

`torch.pin_memory` rounds sizes up to a power of two and keeps what it has; here a region is mapped first and then
locked by `cudaHostRegister`. On WSL2 and in containers there may be a ceiling, found by a child process once per boot:
there a refusal can spoil every later request of the process. Nobody asks for more than is known to work then, and what
does not fit stays pageable: its copies go through a small locked ring (`locked_ring`).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload_rt.cache import recall, remember
from offload_rt.errors import PinningRefused
from offload_rt.memory.arena import Region
from offload_rt.memory.cudart import CudaRuntime, is_wsl
from offload_rt.memory.process_memory import free_memory_bytes

STEP_BYTES = 256 << 20
RING_BYTES = 32 << 20
"""For both ways: pieces of 4 MiB, which a link of 25 GB/s takes longer for than a thread takes to wake up."""
MIN_RING_BYTES = 1 << 20
TRIED_BYTES = 2 << 30
"""Ceilings that were reported are of 0.5 to 1 GiB."""
CHILD_SECONDS = 120.0


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


def known_ceiling(runtime: CudaRuntime, gpu: int) -> Ceiling | None:
    """The ceiling that is known, where a lock beyond it was refused since the system was started (`doctor` tries that);
    None where none is. On WSL2 it is searched for: blocks for seconds, once per boot, with a context of `gpu`, its
    number.
    """
    ceiling = pin_ceiling(runtime, TRIED_BYTES, gpu=gpu) if is_wsl() else _remembered(runtime, 0)
    return ceiling if ceiling is not None and ceiling.reason else None


def ring_bytes(host_bytes: int, ceiling: Ceiling) -> int:
    """What to lock for a ring, where `host_bytes` may not all be below the ceiling; 0 where there is no need of one, or
    no room. Others in the process lock memory too.
    """
    if host_bytes <= ceiling.ceiling_bytes:
        return 0
    num_bytes = min(RING_BYTES, ceiling.ceiling_bytes // 2)
    return num_bytes if num_bytes >= MIN_RING_BYTES else 0


def pin_ceiling(runtime: CudaRuntime, limit_bytes: int, *, gpu: int = 0, step_bytes: int | None = None) -> Ceiling:
    """How much of `limit_bytes` may be locked, tried in a child process. Blocks for seconds, once per boot.

    No more is tried than half of what is free: the child has a context of `gpu`, its number, besides. So there may be a
    ceiling of less than `limit_bytes` without a reason; of zero, where not one step is free. A child that dies or hangs
    is one of zero too, with a reason.
    """
    step_bytes = STEP_BYTES if step_bytes is None else step_bytes
    tried_bytes = min(limit_bytes, free_memory_bytes() // 2 // step_bytes * step_bytes)
    known = _remembered(runtime, tried_bytes)
    if known is not None:
        return Ceiling(ceiling_bytes=min(known.ceiling_bytes, limit_bytes), reason=known.reason)
    if not tried_bytes:
        return Ceiling(ceiling_bytes=0)
    ceiling = _ask_child(runtime.path, tried_bytes, step_bytes, gpu)
    if ceiling.ceiling_bytes:  # who had none may have had no driver: it can come without a boot, as to a container
        found = {"boot": _boot(), "library": runtime.path, "limit_bytes": tried_bytes, **vars(ceiling)}
        remember("pinning", found)
    return ceiling


def _remembered(runtime: CudaRuntime, limit_bytes: int) -> Ceiling | None:
    """What was found since the system was started. A search that met no refusal says nothing about more than it asked
    for.
    """
    known = recall("pinning")
    if known is None or (known.get("boot"), known.get("library")) != (_boot(), runtime.path):
        return None
    try:
        ceiling = Ceiling(ceiling_bytes=int(known["ceiling_bytes"]), reason=str(known["reason"]))
        known_limit = int(known["limit_bytes"])
    except (KeyError, TypeError, ValueError):
        return None
    return ceiling if ceiling.ceiling_bytes < known_limit or known_limit >= limit_bytes > 0 else None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _ask_child(library: str, limit_bytes: int, step_bytes: int, gpu: int) -> Ceiling:
    arguments = [library, *map(str, (limit_bytes, step_bytes, gpu))]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "offload_rt.memory.cudart", *arguments],
            cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=CHILD_SECONDS, check=False,
        )  # fmt: skip
        data = json.loads(done.stdout)
        return Ceiling(ceiling_bytes=int(data["ceiling_bytes"]), reason=str(data["reason"]))
    except subprocess.TimeoutExpired:
        return Ceiling(ceiling_bytes=0, reason=f"the trial did not end in {CHILD_SECONDS:g} s")
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Ceiling(ceiling_bytes=0, reason=f"the trial ended with {done.returncode}: {last}")
