"""Measures this machine in less than a minute: the hardware profile that the planner reads, with its spread.

Each number is the median over passes of one thing that training really does (`bench`): copies by `links.Links`,
drives at the request size that `drives` chose for them, NF4 by `codec`, AdamW by `cpu_adam`, products and attention by
torch. Quartiles say how steady the machine was. On the CPU, DEVICE and HOST are one tier. With a GPU, AdamW is
timed on both: the processor steps what rests in HOST.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offload_rt.adamw import cpu_adam
from offload_rt.cache import recall, remember
from offload_rt.errors import ConfigError, OffloadError, StorageError, StorageFull
from offload_rt.profiling.bench import (
    DEVICES,
    Bench,
    Cpu,
    Gpu,
    Sizes,
    Spread,
    TorchDevice,
    adamw,
    adamw_on_device,
    attention,
    copies,
    drive,
    element_wise,
    matmul,
    nf4_decode,
    small_operations,
)
from offload_rt.quantized import codec
from offload_rt.storage.drives import MAX_AGE_SECONDS, drive_identity, drive_profile
from offload_rt.transfers.device_cuda import find_device
from offload_rt.transfers.links import Links
from planners.errors import format_bytes
from planners.problems.hardware import Device, Drive, Hardware, Host, read_hardware
from planners.problems.hardware import Links as LinkRates
from planners.units import JsonFile

RESERVE = 0.1
"""Of memory: the process, and what else runs."""


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


def measure(device: str, folders: tuple[Path, ...], sizes: Sizes | None = None) -> Measurement:
    """Measures everything; blocks for it. ConfigError for what cannot be measured, StorageFull without room."""
    sizes = sizes or Sizes()
    begin = time.perf_counter()
    found = device_named(device)
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
    on_device = stepped if found.unified else bench.rate("AdamW on the device params/s", adamw_on_device(bench))
    operations = bench.rate("small operations/s", small_operations(bench))
    with copies(bench) as ways:
        into = bench.rate("host to device B/s", ways["host_to_device"])
        back = bench.rate("device to host B/s", ways["device_to_host"])
        both = bench.rate("both ways B/s", ways["both_ways"])
    beside = 1.0 if found.unified else _share_beside_copies(bench, stepped, both)
    measured, mixes = [], []
    for folder in folders:
        one, mix = _measure_drive(bench, folder)
        measured.append(one)
        mixes.append(mix)
    memory, ram = found.memory_bytes(), Cpu().memory_bytes()
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
            adamw_params_per_second=on_device,
            operation_seconds=min(1.0, 1 / operations),
            num_threads=torch.get_num_threads() if found.unified else 0,
        ),
        host=Host(
            memory_bytes=0 if found.unified else ram, adamw_params_per_second=stepped, adamw_beside_copies=beside
        ),
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


def device_named(name: str) -> TorchDevice:
    """As `EngineConfig.device` has it, or "auto". Raises ConfigError for what cannot be calibrated, or is not there."""
    name = find_device(name) if name == "auto" else name
    kind, _, number = name.partition(":")
    if kind not in DEVICES or (number and kind != "cuda"):
        raise ConfigError(f"device: {name!r} cannot be calibrated yet; allowed: {', '.join(DEVICES)}, cuda:N")
    return Gpu(name) if number else DEVICES[kind]()


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


def _share_beside_copies(bench: Bench, stepped: float, both: float) -> float:
    """Of `stepped`, AdamW's rate on the processor, what is left while copies run both ways, `both` bytes in a second.

    So many parameters are stepped that it takes longer than the copies.
    """
    step, params = adamw(bench)
    copied_seconds = 2 * bench.sizes.copy_bytes / both
    times = max(1, math.ceil(copied_seconds * stepped / params))

    def several() -> None:
        for _ in range(times):
            step()

    with copies(bench, several) as ways:
        run, _ = ways["both_ways"]
        rate = bench.rate("AdamW beside copies params/s", (run, times * params))
    held_up_seconds = times * params * (1 / rate - 1 / stepped)
    return _within(1 - held_up_seconds / copied_seconds, 0.01, 1.0)


def _together(both: float, one: float, other: float) -> float:
    """What two directions gain by running together: 0 if they take turns, 1 if neither notices the other.

    `both` is their common rate for as many bytes each way.
    """
    return _within(both * (0.5 / one + 0.5 / other) - 1, 0.0, 1.0)


def _within(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def identity(device: str, folders: tuple[Path, ...]) -> dict[str, Any]:
    """What a measurement is good for: device, memory, threads, software, drives."""
    found = device_named(device)
    return {
        "device": found.which(),
        "model": [found.describe(), Cpu().describe()],
        "memory_bytes": found.memory_bytes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "paths": [codec.backend(device=found.name), cpu_adam.backend()],
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


def cache_name(known: dict[str, Any]) -> str:
    """Under which the profile of the machine that is `known` is remembered."""
    return f"calibration-{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]}"


def calibrated(device: str, folders: tuple[Path, ...]) -> Hardware | None:
    """The profile that was measured on this machine within a month, or None."""
    known = identity(device, folders)
    profile = remembered(cache_name(known), known)
    return None if profile is None else read_hardware(JsonFile(cache_name(known), json.dumps(profile)))


def keep(name: str, known: dict[str, Any], measurement: Measurement) -> None:
    """Remembers `measurement` for this machine."""
    profile = json.loads(measurement.to_json())
    remember(name, {"identity": known, "measured": time.time(), "profile": profile})
