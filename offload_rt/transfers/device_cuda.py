"""A CUDA GPU as the tier DEVICE: its memory in arenas, and its four streams, by torch's own calls.

What orders them is in `streams`; here is only what CUDA calls these things. Little of this runs in the tests, for
want of a GPU: `benchmarks/gpu.py` begins by checking it on one.

[Note: a lease of device memory]
An arena is one uint8 tensor. A slot's tensors must hold its lease as RAM's do (see [Note: slot lifetime] in arena), but
all views of one tensor share its storage. So a slot hands its address to torch as `__cuda_array_interface__`: torch
makes a storage of its own for it and keeps the object that has the attribute until that storage dies.

    arena tensor   |------------- uint8, one allocation --------------|
    _Memory              |- address, length -|                             finalized: the range is free
    _Window                 |- dtype's bytes -|   holds the lease          one for each tensor, held by its storage

[Note: whose context]
Calls that name no GPU are for the one that is current in their thread, which is cuda:0 in a thread of ours, and make a
context there, 300 to 500 MiB of a card that is somebody else's. torch makes a stream's GPU current where it gives work
to it, and an event's where it is recorded; not where the host waits for one.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from offload_rt.errors import ConfigError, PinningRefused
from offload_rt.memory.arena import POISON, Arena, Region, Slot
from offload_rt.memory.cuda_memory import Bound, bytes_beside_allocator, no_room
from offload_rt.memory.cudart import CudaRuntime, find_cuda_runtime
from offload_rt.memory.pinning import Ceiling, known_ceiling, pin
from offload_rt.transfers.device_streams import Ends, Event, Mark
from offload_rt.transfers.device_streams import Stream as AnyStream
from offload_rt.transfers.locked_ring import LockedRing
from planners.errors import format_bytes

logger = logging.getLogger("offload_rt")


class CudaRegion:
    """The memory of an arena: one allocation of torch's allocator, free when nothing sees this any more."""

    tell_gone: Callable[[], object]
    """As `Region.tell_gone`."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.tell_gone = lambda: None

    def give_back(self) -> None:
        """As `Region.give_back`. The allocator hands the memory out again behind what `compute` was given so far: slots
        know their addresses, nobody else has the storage.
        """
        self.tensor = self.tensor.new_empty(0)
        self.tell_gone()


class _Memory:
    """A range of device memory, leased while this lives. Holds the arena's region."""

    __slots__ = ("__weakref__", "address", "num_bytes", "region")

    def __init__(self, region: CudaRegion, start: int, num_bytes: int) -> None:
        self.region = region
        self.address = region.tensor.data_ptr() + start
        self.num_bytes = num_bytes

    @property
    def device(self) -> torch.device:
        return self.region.tensor.device


class _Window:
    """Bytes of a lease, as torch takes them. Version 2: no stream, so that torch waits for none."""

    def __init__(self, memory: _Memory, offset_bytes: int, num_bytes: int) -> None:
        self.memory = memory
        shape, data = _shape_and_data(memory.address + offset_bytes, num_bytes)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": data, "version": 2}


@lru_cache(maxsize=1 << 16)
def _shape_and_data(address: int, num_bytes: int) -> tuple[tuple[int], tuple[int, bool]]:
    """The same objects for the same bytes: torch 2.13 never lets go of those that it was given, 8 KB a step of a model
    of three layers.
    """
    return (num_bytes,), (address, False)


class CudaSlot(Slot):
    """A lease of device memory, or the part of one."""

    on_device = True

    @property
    def address(self) -> int:
        return int(self._memory.address) + self._offset_bytes

    def buffer(self) -> memoryview:
        raise TypeError(f"{self._lease.arena}: device memory has no bytes that the host can read or a drive can fill")

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> torch.Tensor:
        memory: _Memory = self._memory
        num_elements = 1
        for size in shape:
            num_elements *= size
        num_bytes = num_elements * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=memory.device)
        if offset_bytes < 0 or offset_bytes + num_bytes > self.num_bytes:
            raise ValueError(f"slot: {tuple(shape)} of {dtype} at {offset_bytes} exceeds {self.num_bytes} bytes")
        window = _Window(memory, self._offset_bytes + offset_bytes, num_bytes)
        return torch.as_tensor(window, device=memory.device).view(dtype).view(tuple(shape))


class CudaArena(Arena):
    """One allocation of device memory, of torch's allocator, leased out in slots. `OutOfDeviceMemory` where it has
    none.
    """

    slot_type = CudaSlot

    def __init__(self, name: str, num_bytes: int, device: CudaDevice, *, poison: bool) -> None:
        self._device = device
        super().__init__(name, num_bytes, poison=poison)

    def _map(self) -> CudaRegion:
        try:
            return CudaRegion(self.num_bytes, self._device.device)
        except torch.OutOfMemoryError:
            raise no_room(self._device.device, f"arena {self.name}", self.num_bytes) from None

    def _memory(self, start: int, num_bytes: int) -> _Memory:
        return _Memory(self.region, start, num_bytes)

    def _fill(self, start: int, num_bytes: int) -> None:
        with torch.cuda.stream(self._device.compute.stream):
            self.region.tensor[start : start + num_bytes].fill_(POISON)


@dataclass(frozen=True)
class CudaEvent:
    """A place in a stream of `device`."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        with torch.cuda.device(self.device):  # [Note: whose context]
            self.event.synchronize()


class CudaMark:
    """An event that notes the time. Of the GPU's clock: half a microsecond."""

    def __init__(self, stream: CudaStream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._device = stream.stream.device
        self.record(stream)  # which makes it

    def record(self, stream: AnyStream) -> None:
        if not isinstance(stream, CudaStream):
            raise TypeError(f"a CUDA event cannot be recorded in {type(stream).__name__}")
        self._event.record(stream.stream)

    def has_passed(self) -> bool:
        with torch.cuda.device(self._device):  # [Note: whose context]
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def seconds_since(self, other: Mark) -> float:
        if not isinstance(other, CudaMark):
            raise TypeError(f"a CUDA event has no time since {type(other).__name__}")
        with torch.cuda.device(self._device):
            return float(other._event.elapsed_time(self._event)) / 1000


class CudaStream:
    """One stream of the GPU."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def record(self) -> CudaEvent:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # whoever waits sleeps
        event.record(self.stream)
        return CudaEvent(event, self.stream.device)

    def wait(self, event: Event) -> None:
        if not isinstance(event, CudaEvent):
            raise TypeError(f"a CUDA stream cannot wait for {type(event).__name__}")
        self.stream.wait_event(event.event)

    def copy(self, ends: Sequence[Ends]) -> None:
        # Whoever asked for the copy may have made its ends in inference mode, which a thread of ours is not in.
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for source, destination in ends:
                destination.copy_(source, non_blocking=True)

    def run(self, launch: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            launch()


class CudaDevice:
    """One GPU. Its compute stream is the one that is current now; the model must run on that."""

    def __init__(self, name: str, *, ring_bytes: int = 0) -> None:
        """`name` is "cuda:N", from `find_device`. `ring_bytes`, below a ceiling, are left for `pass_through`."""
        self.device = torch.device(name)
        self.compute = CudaStream(torch.cuda.current_stream(self.device))
        self.to_device = CudaStream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        self.to_host = CudaStream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        # Short kernels between long ones, which copies back wait for.
        self.updates = CudaStream(torch.cuda.Stream(self.device, priority=-1))  # type: ignore[no-untyped-call]
        self._locked: weakref.WeakSet[Region] = weakref.WeakSet()
        self._pageable: weakref.WeakSet[Region] = weakref.WeakSet()
        self._peak_bytes = 0
        """Of torch's allocator until a meter began anew."""
        self._reserved_peak_bytes = 0
        self._bound = Bound(self.device)
        self._runtime: CudaRuntime | None = None
        self._ceiling: Ceiling | None = None
        """Of what can be locked, if one is known; more is never asked for."""
        self._ring_bytes = ring_bytes
        self.rings: tuple[LockedRing, LockedRing] | None = None
        self._passed_bytes = 0
        """Through rings that there were."""

    @property
    def locked_bytes(self) -> int:
        """HOST memory that the GPU copies by itself, of what was not given back."""
        return sum(len(region) for region in self._locked if region.is_locked)

    @property
    def pageable_bytes(self) -> int:
        """The same of what could not be locked: copies of it go through `rings`, or hold up whoever asks for them."""
        return sum(len(region) for region in self._pageable if region.is_locked)

    def mark(self) -> CudaMark:
        return CudaMark(self.compute)

    def check_stream(self) -> None:
        """Raises `ConfigError` where the model runs on another stream than the engine orders its copies with, or where
        that captures a graph.
        """
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise ConfigError(
                    "a CUDA graph is being captured: a model that an engine manages cannot be part of one, for a graph "
                    "repeats copies and kernels on the same memory, and an engine moves weights; call it outside "
                    "`torch.cuda.graph`"
                )
        current = torch.cuda.current_stream(self.device)
        if current != self.compute.stream:
            raise ConfigError(
                f"the model runs on {current}, the engine was made on {self.compute.stream}: make the engine "
                f"inside the `torch.cuda.stream` block that trains"
            )

    def on_compute(self) -> AbstractContextManager[None]:
        stream: AbstractContextManager[None] = torch.cuda.stream(self.compute.stream)
        return stream

    def meter(self) -> CudaMeter:
        """Counts what torch's allocator hands out in the GPU's memory, in any thread."""
        self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))
        self._reserved_peak_bytes = max(self._reserved_peak_bytes, torch.cuda.max_memory_reserved(self.device))
        return CudaMeter(self.device)

    def report(self) -> dict[str, Any]:
        """The GPU's name; bytes of HOST memory locked or not, and what of it passed through a locked ring; what torch's
        allocator took at most, arenas included, and what the process has of the GPU beside that; how often freed memory
        was given back.
        """
        return {
            "name": torch.cuda.get_device_name(self.device),
            "locked_bytes": self.locked_bytes,
            "pageable_bytes": self.pageable_bytes,
            "through_ring_bytes": self._passed_bytes + sum(ring.num_bytes for ring in self.rings or ()),
            "allocator_peak_bytes": max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device)),
            "reserved_peak_bytes": max(self._reserved_peak_bytes, torch.cuda.max_memory_reserved(self.device)),
            "beside_allocator_bytes": bytes_beside_allocator(self.device),
            "trims": self._bound.num_trims,
        }

    def keep_within(self, budget_bytes: int) -> None:
        self._bound.keep_within(budget_bytes)

    def arena(self, name: str, num_bytes: int, *, poison: bool) -> Arena:
        return CudaArena(name, num_bytes, self, poison=poison)

    def lock(self, name: str, region: Region) -> None:
        region.is_locked = True
        try:
            self._pin(region, beside_bytes=self._ring_bytes)
        except PinningRefused as refusal:
            region.is_pageable = True
            self._pageable.add(region)
            logger.warning("%s stays pageable, copies from it run at about half speed: %s", name, refusal)

    def pass_through(self, memory: Slot | None) -> None:
        self._passed_bytes += sum(ring.num_bytes for ring in self.rings or ())
        self.rings = None
        if memory is None:
            return
        self._pin(memory.region)
        half = memory.num_bytes // 2
        self.rings = LockedRing(memory.part(0, half)), LockedRing(memory.part(half, half))

    def _pin(self, region: Region, *, beside_bytes: int = 0) -> None:
        """Locks it, so that `beside_bytes` still can be. Raises `PinningRefused`."""
        if self._runtime is None:
            self._runtime = cuda_runtime()
            self._ceiling = None if self._runtime is None else known_ceiling(self._runtime, self.device.index)
        if self._runtime is None:
            raise PinningRefused("no CUDA runtime library was found in this process", code=0)
        if self._ceiling is not None and self.locked_bytes + len(region) > self._ceiling.ceiling_bytes - beside_bytes:
            raise PinningRefused(
                f"only {format_bytes(self._ceiling.ceiling_bytes)} can be locked ({self._ceiling.reason})", code=0
            )
        pin(region, self._runtime, partial(torch.cuda.device, self.device))
        region.is_locked = True
        self._locked.add(region)


class CudaMeter:
    """Begins torch's own peak of one GPU anew. Its allocator books blocks when they are asked for, whatever a stream
    is doing, so that nothing is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak_bytes = 0
        self._device = device
        self._before_bytes = 0

    def __enter__(self) -> CudaMeter:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before_bytes = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before_bytes


def cuda_runtime() -> CudaRuntime | None:
    """The one that torch has, which it loads when it is first used. None where there is no GPU, or no such library."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return find_cuda_runtime()


def find_device(name: str) -> str:
    """`"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"` as `"cpu"` or `"cuda:N"`. Raises `ConfigError` where there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if match is None:
        raise ConfigError(f"device: {name!r} is not offered; allowed: 'auto', 'cpu', 'cuda', 'cuda:N'")
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r}, but torch {torch.__version__} finds no GPU here; allowed: 'cpu', 'auto'")
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r}, but this machine's GPUs are 0 to {torch.cuda.device_count() - 1}")
    return f"cuda:{index}"
