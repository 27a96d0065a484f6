"""Measures this machine in less than a minute: the hardware profile that the planner reads, with its spread.

Each number is the median over passes of one thing that training really does, through the code that does it: copies by
`transfer.Links`, drives at the request size that `drives` chose for them, NF4 by `codec`, AdamW by `cpu_adam`, products
and attention by torch. A pass is one piece of work between two looks at the clock; passes go on for `Sizes.seconds`,
after one that is not counted. Quartiles say how steady the machine was.

What runs where is in `DEVICES`; a further device is a further entry there. On the CPU, DEVICE and HOST are one tier.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from offload_rt import codec, cpu_adam
from offload_rt.arena import Arena
from offload_rt.cache import recall, remember
from offload_rt.drives import DriveProfile, drive_identity, drive_profile
from offload_rt.errors import ConfigError, OffloadError, StorageError, StorageFull
from offload_rt.file_io import OpenFile, file_io, open_file
from offload_rt.profile import cgroup_memory_bytes
from offload_rt.transfer import Links
from planners.errors import format_bytes
from planners.hardware import Device, Drive, Hardware, Host
from planners.hardware import Links as LinkRates

MAX_AGE_SECONDS = 30 * 24 * 3600.0
RESERVE = 0.1
"""Of memory: the process, and what else runs."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each thing a pass does. What is here keeps a pass well above the clock's grain, and caches out."""

    seconds: float = 1.5
    """For one number, at least."""
    passes: int = 5
    """For one number, at least."""
    matrix: int = 2048
    """Rows and columns of both factors."""
    attention_tokens: int = 2048
    copy_bytes: int = 64 << 20
    elements: int = 16 << 20
    """Weights decoded; elements of a sum."""
    params: int = 8 << 20
    """Stepped by AdamW."""
    operation_bytes: int = 16 << 20
    """Of one read or write, about a layer."""
    file_bytes: int = 512 << 20
    """Of the file on each drive; twice as much has to be free."""


@dataclass(frozen=True)
class Spread:
    """A rate per second: the median of its passes, and their quartiles."""

    median: float
    low: float
    high: float
    passes: int


@dataclass(frozen=True)
class Measurement:
    """A profile, and how steady each of its numbers was."""

    hardware: Hardware
    spread: dict[str, Spread]
    """By name of the number; rates of dtypes that a profile does not say are here only."""
    seconds: float
    """What measuring took."""

    def to_json(self) -> str:
        """The hardware profile format, with `measured` beside it."""
        data = json.loads(self.hardware.to_json())
        data["measured"] = {name: asdict(spread) for name, spread in self.spread.items()}
        return json.dumps(data, indent=1)


class TorchDevice(Protocol):
    """Where products run."""

    name: str
    unified: bool
    """DEVICE and HOST are one tier."""

    def describe(self) -> str:
        """Its model, for the profile's name."""

    def synchronize(self) -> None:
        """Returns when all that was started on it is done."""

    def memory_bytes(self) -> int: ...


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

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def memory_bytes(self) -> int:
        limit, _ = cgroup_memory_bytes()
        total = int(psutil.virtual_memory().total)
        return total if limit is None else min(total, limit)


DEVICES: dict[str, Callable[[], TorchDevice]] = {"cpu": Cpu}
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
        rates: list[float] = []
        begin = time.perf_counter()
        while len(rates) < self.sizes.passes or time.perf_counter() - begin < self.sizes.seconds:
            start = time.perf_counter()
            run()
            self.device.synchronize()
            rates.append(amount / max(1e-9, time.perf_counter() - start))
        low, median, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
        self.spread[name] = Spread(median, low, high, len(rates))
        return median

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
        return torch.randn(*shape, generator=generator).to(device=self.device.name, dtype=dtype)


def matmul(bench: Bench, dtype: torch.dtype) -> Work:
    n = bench.sizes.matrix
    left, right = (bench.random(n, n, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2.0 * n**3


def attention(bench: Bench, *, backward: bool) -> Work:
    """Causal attention of 16 heads of 64; backward runs forward, too."""
    tokens, heads, size = bench.sizes.attention_tokens, 16, 64
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
    blob = codec.encode(bench.random(n))
    out = torch.empty(n, dtype=torch.bfloat16, device=bench.device.name)
    return lambda: codec.decode_into(blob, out), 2.0 * n


def adamw(bench: Bench) -> Work:
    n = bench.sizes.params
    master = bench.random(n, dtype=torch.float32)
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    grad, weight = bench.random(n), torch.empty(n, dtype=torch.bfloat16)
    numbers = cpu_adam.AdamW()
    return lambda: cpu_adam.update(grad, master, exp_avg, exp_avg_sq, weight, step=1, numbers=numbers), float(n)


def small_operations(bench: Bench) -> Work:
    one = bench.random(8)

    def run() -> None:
        for _ in range(100):
            one.add_(0.0)

    return run, 100.0


@contextlib.contextmanager
def copies(bench: Bench) -> Iterator[dict[str, Work]]:
    """From HOST to DEVICE, back, and both at once (the bytes of both)."""
    n = bench.sizes.copy_bytes
    arena = Arena("calibration", 4 * n)
    slots = [arena.acquire(n, "calibration") for _ in range(4)]
    for slot in slots:
        slot.buffer()[:] = bytes(n)
    ways = [Links(io=file_io("threads")) for _ in range(2)]

    def both() -> None:
        under_way = [ways[0].copy(slots[0], slots[1]), ways[1].copy(slots[2], slots[3])]
        for transfer in under_way:
            transfer.wait()

    try:
        yield {
            "host_to_device": (lambda: ways[0].copy(slots[0], slots[1]).wait(), float(n)),
            "device_to_host": (lambda: ways[1].copy(slots[2], slots[3]).wait(), float(n)),
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
        os.close(file.fd)


def measure(device: str, folders: tuple[Path, ...], sizes: Sizes | None = None) -> Measurement:
    """Measures everything; blocks for it. ConfigError for what cannot be measured, StorageFull without room."""
    if device not in DEVICES:
        raise ConfigError(f"device: {device!r} cannot be calibrated yet; allowed: {', '.join(DEVICES)}")
    sizes = sizes or Sizes()
    begin = time.perf_counter()
    found = DEVICES[device]()
    bench = Bench(found, sizes)
    products = bench.rate("matmul bfloat16 FLOP/s", matmul(bench, torch.bfloat16))
    bench.rate("matmul float32 FLOP/s", matmul(bench, torch.float32))
    forward = bench.rate("attention forward FLOP/s", attention(bench, backward=False))
    with_backward = bench.rate("attention forward and backward, forward's FLOP/s", attention(bench, backward=True))
    # Backward has two and a half times forward's FLOPs, and what is measured takes both.
    backward = 2.5 / max(1e-30, 1 / with_backward - 1 / forward) if with_backward < forward else forward
    moved = bench.rate("element-wise B/s", element_wise(bench))
    decoded = bench.rate("NF4 decode B/s", nf4_decode(bench))
    stepped = bench.rate("AdamW params/s", adamw(bench))
    operations = bench.rate("small operations/s", small_operations(bench))
    with copies(bench) as ways:
        into = bench.rate("host to device B/s", ways["host_to_device"])
        back = bench.rate("device to host B/s", ways["device_to_host"])
        both = bench.rate("both ways B/s", ways["both_ways"])
    measured, mixes = [], []
    for folder in folders:
        one, mix = _measure_drive(bench, folder)
        measured.append(one)
        mixes.append(mix)
    memory = found.memory_bytes()
    hardware = Hardware(
        name=found.describe(),
        device=Device(
            memory_bytes=memory,
            reserve_bytes=int(RESERVE * memory),
            matmul_flops_per_second=products,
            attention_forward_efficiency=_within(forward / products, 0.001, 2.0),
            attention_backward_efficiency=_within(backward / products, 0.001, 2.0),
            memory_bytes_per_second=moved,
            nf4_decode_bytes_per_second=decoded,
            adamw_params_per_second=stepped,
            operation_seconds=min(1.0, 1 / operations),
        ),
        host=Host(memory_bytes=0 if found.unified else memory, adamw_params_per_second=stepped),
        links=LinkRates(
            host_to_device_bytes_per_second=into,
            device_to_host_bytes_per_second=back,
            duplex=_together(both, into, back),
        ),
        drives=tuple(measured),
        unified=found.unified,
    )
    if mixes:
        hardware = replace(hardware, drive_mix=min(mixes))
    return Measurement(hardware, bench.spread, time.perf_counter() - begin)


def _measure_drive(bench: Bench, folder: Path) -> tuple[Drive, float]:
    """A drive, and how much of both rates is left when it reads and writes together."""
    if not folder.is_dir():
        raise ConfigError(f"nvme: {folder} is not a folder")
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < 2 * bench.sizes.file_bytes:
        needed = format_bytes(2 * bench.sizes.file_bytes)
        raise StorageFull(f"calibration needs {needed} free, {format_bytes(free)} are", path=str(folder))
    links = Links()
    try:
        with drive(bench, folder, links, drive_profile(folder, links.io)) as works:
            rates = {kind: bench.rate(f"{kind} {folder} B/s", work) for kind, work in works.items()}
    except StorageError:
        raise
    except OSError as error:
        raise OffloadError(f"{folder}: cannot be measured: {error.strerror} (errno {error.errno})") from error
    finally:
        links.close()
    known = Drive(capacity_bytes=free, read_bytes_per_second=rates["read"], write_bytes_per_second=rates["write"])
    return known, _together(rates["read and write"], rates["read"], rates["write"])


def _together(both: float, one: float, other: float) -> float:
    """What two directions gain by running together: 0 if they take turns, 1 if neither notices the other.

    `both` is their common rate for as many bytes each way.
    """
    return _within(both * (0.5 / one + 0.5 / other) - 1, 0.0, 1.0)


def _within(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def identity(device: str, folders: tuple[Path, ...]) -> dict[str, Any]:
    """What a measurement is good for: device, memory, threads, software, drives."""
    found = DEVICES[device]()
    return {
        "device": device,
        "model": found.describe(),
        "memory_bytes": found.memory_bytes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "paths": [codec.backend(), cpu_adam.backend()],
        "kernel": platform.release(),
        "drives": [drive_identity(folder, "any") for folder in folders],
    }


def remembered(name: str, known: dict[str, Any]) -> dict[str, Any] | None:
    """The profile that was measured on this machine within a month, or None."""
    data = recall(name)
    if data is None or data.get("identity") != known or not isinstance(data.get("profile"), dict):
        return None
    measured = data.get("measured")
    fresh = isinstance(measured, (int, float)) and 0 <= time.time() - measured <= MAX_AGE_SECONDS
    return data["profile"] if fresh else None


def keep(name: str, known: dict[str, Any], measurement: Measurement) -> None:
    """Remembers `measurement` for this machine."""
    profile = json.loads(measurement.to_json())
    remember(name, {"identity": known, "measured": time.time(), "profile": profile})
