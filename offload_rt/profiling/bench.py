"""What calibration times: one thing that training does, a pass at a time, on one device.

A pass is a piece of work between two looks at the clock, through the code that training runs; its rate is that of the
median pass. What is over sooner than a look at the clock is is done several times in one. What runs where is in
`DEVICES`; a further device is a further entry there. A GPU's links are its own copies between its memory and RAM that
is locked.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from offload_rt.adamw import cpu_adam
from offload_rt.memory.arena import Arena
from offload_rt.memory.memory_groups import memory_groups
from offload_rt.quantized import codec
from offload_rt.storage.drives import DriveProfile
from offload_rt.transfers.device_cuda import CudaDevice, find_device
from offload_rt.transfers.file_io import OpenFile, file_io, open_file
from offload_rt.transfers.links import Links


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each thing a pass does. What is here keeps a pass well above the clock's grain, and caches out."""

    seconds: float = 1.5
    """For one number, at least."""
    passes: int = 5
    """For one number, at least."""
    pass_seconds: float = 0.02
    """Between two looks at the clock, at least: to wait for a GPU takes as long as a small product does there."""
    matrix: int = 2048
    """Rows and columns of both factors, on the CPU; see `LARGER`."""
    attention_tokens: int = 2048
    """The same."""
    copy_bytes: int = 64 << 20
    elements: int = 64 << 20
    """Weights decoded; elements of a sum."""
    params: int = 8 << 20
    """Stepped by AdamW."""
    operation_bytes: int = 16 << 20
    """Of one read or write, about a layer."""
    file_bytes: int = 512 << 20
    """Of the file on each drive; twice as much has to be free."""


LARGER = 4
"""Times as many rows, columns and tokens are multiplied on a GPU, which smaller ones do not fill."""


@dataclass(frozen=True)
class Spread:
    """A rate per second: the median of its passes, and their quartiles."""

    median: float
    low: float
    high: float
    passes: int


class TorchDevice(Protocol):
    """Where products run."""

    name: str
    """As torch has it."""
    unified: bool
    """DEVICE and HOST are one tier."""

    def describe(self) -> str:
        """Its model, for the profile's name."""

    def which(self) -> str:
        """This one among others of its model, whatever number it has in this process."""

    def synchronize(self) -> None:
        """Returns when all that was started on it is done."""

    def memory_bytes(self) -> int: ...

    def links(self) -> Links:
        """Connections of its own. The caller closes them."""

    def arenas(self, num_bytes: int) -> tuple[Arena, Arena]:
        """Of so much HOST and DEVICE memory, for those links."""


class Cpu:
    """The processor as the device."""

    name = "cpu"
    unified = True

    def describe(self) -> str:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
        return platform.machine()

    def which(self) -> str:
        return self.name

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def memory_bytes(self) -> int:
        return min([int(psutil.virtual_memory().total), *(group.limit_bytes for group in memory_groups())])

    def links(self) -> Links:
        return Links(io=file_io("threads"))

    def arenas(self, num_bytes: int) -> tuple[Arena, Arena]:
        return Arena("calibration, HOST", num_bytes), Arena("calibration, DEVICE", num_bytes)


class Gpu:
    """One GPU of this machine."""

    unified = False

    def __init__(self, name: str = "cuda") -> None:
        """`name` is "cuda" or "cuda:N". Raises ConfigError where that is not there."""
        self.name = find_device(name)

    @cached_property
    def _device(self) -> CudaDevice:
        """With streams, which who only asks for its name has no use for."""
        return CudaDevice(self.name)

    def describe(self) -> str:
        return torch.cuda.get_device_name(self.name)

    def which(self) -> str:
        return f"cuda {torch.cuda.get_device_properties(self.name).uuid}"

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.name)

    def memory_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.name).total_memory)

    def links(self) -> Links:
        return Links(io=file_io("threads"), device=self._device)

    def arenas(self, num_bytes: int) -> tuple[Arena, Arena]:
        host = Arena("calibration, HOST", num_bytes)
        self._device.lock(host.name, host.region)
        return host, self._device.arena("calibration, DEVICE", num_bytes, poison=False)


DEVICES: dict[str, Callable[[], TorchDevice]] = {"cpu": Cpu, "cuda": Gpu}
Work = tuple[Callable[[], object], float]
"""One pass, and how much it does: bytes, FLOPs, parameters, operations."""


@dataclass
class Bench:
    """What measurements work on."""

    device: TorchDevice
    sizes: Sizes
    spread: dict[str, Spread] = field(default_factory=dict)

    def rate(self, name: str, work: Work) -> float:
        """Runs passes of `work`, and keeps the spread of its rate under `name`; returns the median."""
        run, amount = work
        run()
        self.device.synchronize()
        times = 1
        while self.sizes.pass_seconds and self._seconds(run, times) < self.sizes.pass_seconds:
            times *= 2
        rates: list[float] = []
        begin = time.perf_counter()
        while len(rates) < self.sizes.passes or time.perf_counter() - begin < self.sizes.seconds:
            rates.append(times * amount / self._seconds(run, times))
        low, median, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
        self.spread[name] = Spread(median, low, high, len(rates))
        return median

    def larger(self, size: int) -> int:
        """See `LARGER`."""
        return size if self.device.name == Cpu.name else LARGER * size

    def _seconds(self, run: Callable[[], object], times: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        self.device.synchronize()
        return max(1e-9, time.perf_counter() - start)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
        return torch.randn(*shape, generator=generator).to(device=self.device.name, dtype=dtype)


def matmul(bench: Bench, dtype: torch.dtype) -> Work:
    n = bench.larger(bench.sizes.matrix)
    left, right = (bench.random(n, n, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2.0 * n**3


def attention(bench: Bench, *, backward: bool) -> Work:
    """Causal attention of 16 heads of 64; backward runs forward, too."""
    tokens, heads, size = bench.larger(bench.sizes.attention_tokens), 16, 64
    query, key, value = (bench.random(1, heads, tokens, size).requires_grad_(backward) for _ in range(3))
    forward = 4.0 * heads * size * tokens * (tokens + 1) / 2

    def run() -> None:
        with torch.set_grad_enabled(backward):
            result = scaled_dot_product_attention(query, key, value, is_causal=True)
            if backward:
                torch.autograd.grad(result.sum(), (query, key, value))

    return run, forward


def element_wise(bench: Bench) -> Work:
    left, right = (bench.random(bench.sizes.elements) for _ in range(2))
    return lambda: left.add_(right, alpha=1e-6), 6.0 * left.numel()


def nf4_decode(bench: Bench) -> Work:
    n = bench.sizes.elements
    blob = codec.encode(bench.random(n).cpu()).to(bench.device.name)
    out = torch.empty(n, dtype=torch.bfloat16, device=bench.device.name)
    return lambda: codec.decode_into(blob, out), 2.0 * n


def adamw(bench: Bench) -> Work:
    """On the processor, wherever products run."""
    n = bench.sizes.params
    master, grad = bench.random(n, dtype=torch.float32).cpu(), bench.random(n).cpu()
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    weight = torch.empty(n, dtype=torch.bfloat16)
    numbers = cpu_adam.AdamW()
    return lambda: cpu_adam.update(grad, master, exp_avg, exp_avg_sq, weight, step=1, numbers=numbers), float(n)


def adamw_on_device(bench: Bench) -> Work:
    """By torch, of parameters in its memory."""
    parameter = torch.nn.Parameter(bench.random(bench.sizes.params, dtype=torch.float32))
    parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW([parameter]).step, float(parameter.numel())


def small_operations(bench: Bench) -> Work:
    one = bench.random(8)

    def run() -> None:
        for _ in range(100):
            one.add_(0.0)

    return run, 100.0


@contextlib.contextmanager
def copies(bench: Bench, meanwhile: Callable[[], object] = lambda: None) -> Iterator[dict[str, Work]]:
    """From HOST to DEVICE, back, and both at once (the bytes of both), when `meanwhile` is called."""
    n = bench.sizes.copy_bytes
    host, device = ([arena.acquire(n, "calibration") for _ in range(2)] for arena in bench.device.arenas(2 * n))
    for slot in (*host, *device):
        slot.tensor(torch.uint8, (n,)).zero_()
    ways = [bench.device.links() for _ in range(2)]

    def both() -> None:
        under_way = [ways[0].copy(host[0], device[0]), ways[1].copy(device[1], host[1])]
        meanwhile()
        for transfer in under_way:
            transfer.wait()

    try:
        yield {
            "host_to_device": (lambda: ways[0].copy(host[0], device[0]).wait(), float(n)),
            "device_to_host": (lambda: ways[1].copy(device[1], host[1]).wait(), float(n)),
            "both_ways": (both, 2.0 * n),
        }
    finally:
        for way in ways:
            way.close()


@contextlib.contextmanager
def drive(bench: Bench, folder: Path, links: Links, profile: DriveProfile) -> Iterator[dict[str, Work]]:
    """Reads, writes, and both at once, in operations of a layer's size. The file has no name, so that nothing stays."""
    sizes = bench.sizes
    with tempfile.TemporaryDirectory(prefix=".offload_rt-calibrate-", dir=folder) as place:
        file: OpenFile = open_file(Path(place) / "probe", writable=True)
    try:
        os.posix_fallocate(file.fd, 0, sizes.file_bytes)
        links.io.tune(file, profile.depth, profile.io_bytes)
        arena = Arena("calibration", 4 * sizes.operation_bytes)
        slots = [arena.acquire(sizes.operation_bytes, "calibration") for _ in range(4)]
        noise = os.urandom(min(1 << 20, sizes.operation_bytes))  # zeros would flatter a drive that compresses
        for slot in slots:
            slot.buffer()[:] = noise * (sizes.operation_bytes // len(noise))
        count = sizes.file_bytes // sizes.operation_bytes
        turns = itertools.cycle(range(count))

        def run(*kinds: str) -> Callable[[], None]:
            def once() -> None:
                started = []
                for kind, slot in zip(kinds, slots, strict=True):
                    start = links.read if kind == "read" else links.write
                    started.append(start(file, next(turns) * sizes.operation_bytes, slot))
                for transfer in started:
                    transfer.wait()

            return once

        write = run(*["write"] * 4)
        for _ in range(-(-count // 4)):  # what is read later was written
            write()
        os.fdatasync(file.fd)
        amount = 4.0 * sizes.operation_bytes
        yield {
            "write": (write, amount),
            "read": (run(*["read"] * 4), amount),
            "read and write": (run("read", "write", "read", "write"), amount),
        }
    finally:
        file.close()
