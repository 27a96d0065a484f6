"""Where a profile runs: the memory, the links and the clock of the device that will compute.

On the CPU that is RAM, and work is over when a call returns. A device with streams of its own has its memory in arenas,
what is put away goes by its own copies, and its clock is read when all that it was given to compute is over: copies may
be under way then, which a plan counts by themselves.

[Note: a device that sleeps]
A GPU that had nothing to do has a slow clock, and takes some tenths of a second to have the one of a training step. So
before it is timed it is given what is timed for so long. And who waits for it is woken later than a short kernel takes:
of what is over soon, several are timed as one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from offload_rt.config import EngineConfig
from offload_rt.errors import UnsupportedModule
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.memory.arena import Arena
from offload_rt.memory.cuda_memory import give_back_freed
from offload_rt.storage.scratch import Scratch
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.device_stash import DeviceStash
from offload_rt.tiering.stash import GRANULE_BYTES, HostStash, NvmeStash, Stash
from offload_rt.tiering.tiers import Tiers
from offload_rt.transfers.device_cuda import CudaDevice
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import TransferCounters
from offload_rt.wiring.runtime_options import MemoryMeter, TensorDevice
from planners.plans.placement import Tier
from planners.rule.attempts import STAGING_PIECE_BYTES

RUNS = 5
"""Of what is timed by itself, of which the median counts."""

AWAKE_SECONDS = 0.3
"""See [Note: a device that sleeps]; to be measured on a GPU."""
TIMED_SECONDS = 0.01
"""What is timed as one on a device, at least about."""


def median_seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of a few runs, after one that warms up. Blocks. clock: in seconds."""
    work()
    taken = []
    for _ in range(RUNS):
        start = clock()
        work()
        taken.append(clock() - start)
    return statistics.median(taken)


class Workbench:
    """Of one device; a context manager, which gives all memory back. Not thread-safe."""

    def __init__(
        self, device: TensorDevice | None = None, host_bytes: int | None = None, drive: Path | None = None
    ) -> None:
        """`device`: None is the CPU. `host_bytes`: what may be put away in HOST, which a device locks; None: all.
        `drive`: a folder on the drive that a plan may put away to; its own parent, where it is yet to be made.
        """
        self._drive = drive if drive is None or drive.is_dir() else drive.parent
        self._scratches: list[Scratch] = []
        self.device = torch.device("cpu") if device is None else device.device
        """Where tensors are made."""
        self._streams = device
        self._links = Links(device=device)
        self._tiers: Tiers | None = None
        """None on the CPU, where memory is in no account: `peaks` sees it as what passes."""
        if device is not None:
            self._tiers = Tiers(None, host_bytes, None, unified=False, poison=False, device=device)

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._links.close()
        for scratch in self._scratches:
            scratch.close()
        if self._tiers is not None:
            self._tiers.give_back()
        if self.device.type == "cuda":
            give_back_freed(self.device)

    @property
    def counters(self) -> TransferCounters:
        """Of what was moved here."""
        return self._links.counters

    @property
    def copies_alone(self) -> bool:
        """Copies run beside what computes, which waits for none but those that it needs."""
        return self._streams is not None

    def now(self) -> float:
        """Seconds, when all is over that was given to compute. Blocks until then."""
        if self._streams is not None:
            self._streams.compute.record().wait()
        return time.perf_counter()

    def median_seconds(self, work: Callable[[], object]) -> float:
        """As the function, of what the device computes: [Note: a device that sleeps]."""
        if self._streams is None:
            return median_seconds(work)
        self.wake(work)
        times = 1

        def several() -> None:
            for _ in range(times):
                work()

        def seconds() -> float:
            start = self.now()
            several()
            return self.now() - start

        while seconds() < TIMED_SECONDS:
            times *= 2
        return median_seconds(several, self.now) / times

    def wake(self, work: Callable[[], object]) -> None:
        """Gives a device `work` until it is awake, see the note; nothing to the CPU. Blocks."""
        begin = self.now()
        while self._streams is not None and self.now() - begin < AWAKE_SECONDS:
            work()

    def arena(self, name: str, num_bytes: int) -> Arena:
        """Of DEVICE memory."""
        if self._tiers is None:
            return Arena(name, num_bytes)
        return self._tiers.arena(Tier.DEVICE, name, num_bytes)

    def stash(self, name: str, num_bytes: int) -> Stash:
        """Room in HOST for tensors of `num_bytes`, all of which may be on their way at once. Raises BudgetExceeded."""
        if self._tiers is None:
            return HostStash(Arena(name, num_bytes, granule_bytes=GRANULE_BYTES), self._links)
        arena = self._tiers.arena(Tier.HOST, name, num_bytes, granule_bytes=GRANULE_BYTES)
        return DeviceStash(arena, self._links, window_bytes=num_bytes)

    def drive_stash(self, num_bytes: int, largest_bytes: int) -> Stash | None:
        """As `stash`, on the drive, for whole pages; None without one. Raises BudgetExceeded and StorageError."""
        if self._drive is None:
            return None
        scratch = Scratch(self._drive, 2 * num_bytes, self._links)
        self._scratches.append(scratch)
        if self._tiers is None:
            piece_bytes = min(align_up(largest_bytes, IO_ALIGNMENT_BYTES), STAGING_PIECE_BYTES)
            staging = Arena("profile, on its way to a drive", 2 * num_bytes)
            return NvmeStash(scratch, staging, self._links, piece_bytes=piece_bytes, ahead_bytes=num_bytes)
        room = 2 * (num_bytes + align_up(largest_bytes, IO_ALIGNMENT_BYTES))
        staging = self._tiers.arena(Tier.HOST, "profile, on its way to a drive", room)
        return DeviceStash(staging, self._links, window_bytes=num_bytes, scratch=scratch)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that torch has allocated at once in `run`. UnsupportedModule where that cannot be counted now."""
        meter = self._meter()
        with meter:
            run()
        return meter.peak_bytes

    def _meter(self) -> MemoryMeter:
        if self._streams is not None:
            return self._streams.meter()
        if (why := AllocationMeter.refusal()) is not None:
            raise UnsupportedModule(why)
        return AllocationMeter()

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """Inside, random numbers are drawn that nobody misses outside."""
        devices = [self.device] if self.device.type == "cuda" else []
        forked: AbstractContextManager[None] = torch.random.fork_rng(devices=devices)
        return forked


@contextmanager
def workbench_of(config: EngineConfig) -> Iterator[Workbench]:
    """The device that `config` says, of RAM beside it the budget, and the first drive, where scratch files are."""
    on_cpu = config.device == "cpu"
    with Workbench(
        None if on_cpu else CudaDevice(config.device), None if on_cpu else config.host_memory_bytes,
        config.nvme[0].path if config.nvme else None,
    ) as found:  # fmt: skip
        yield found


@contextmanager
def or_the_cpu(bench: Workbench | None) -> Iterator[Workbench]:
    """`bench`, which its owner closes, or the CPU's."""
    if bench is not None:
        yield bench
        return
    with Workbench() as found:
        yield found
