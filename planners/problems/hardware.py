"""What a machine offers: memory and rates of its device, host, links and drives; profiles by name and from files.

The built-in profiles are data-sheet figures times what is usually achieved of them; a measured file is better. All
rates are sustained ones, in SI units. A CPU profile is unified: DEVICE and HOST are one tier.

Sources: data sheets of the vendors; bandwidth of PCIe as measured in practice (a 4.0 x16 card moves 20 to 25 GB/s each
way, a 5.0 x16 card about 50).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from planners.units import MAX_BYTES, JsonFile, ProblemError, nearest, parse_rate, parse_size

HARDWARE_SCHEMA = "offload-hardware/1"
MIN_BUDGET_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where blocks compute."""

    memory_bytes: int
    reserve_bytes: int
    """What a plan may not use: the driver's context, the allocator's slack."""
    matmul_flops_per_second: float
    """Achieved in large 16-bit products."""
    attention_forward_efficiency: float
    """Rate of causal attention's useful FLOPs, as a share of `matmul_flops_per_second`."""
    attention_backward_efficiency: float
    memory_bytes_per_second: float
    """Achieved by element-wise operations."""
    nf4_decode_bytes_per_second: float
    """16-bit bytes that decoding NF4 produces."""
    adamw_params_per_second: float
    operation_seconds: float
    """Fixed cost of one operation: launch, submission, completion."""
    num_threads: int = 0
    """That compute, where it is a CPU: each takes memory of its own in attention's backward. 0 where it is none."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The processor and its memory."""

    memory_bytes: int
    adamw_params_per_second: float
    adamw_beside_copies: float = 1.0
    """Share of that rate which is left while links copy both ways: they use the same memory."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Between HOST and DEVICE."""

    host_to_device_bytes_per_second: float
    device_to_host_bytes_per_second: float
    duplex: float
    """1: both directions run at full rate together; 0: they share one."""


@dataclass(frozen=True, kw_only=True)
class Drive:
    """One SSD. Several are striped over."""

    capacity_bytes: int
    read_bytes_per_second: float
    write_bytes_per_second: float
    endurance_bytes: int = 0
    """Rated bytes written over its life; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine."""

    name: str
    device: Device
    host: Host
    links: Links
    drives: tuple[Drive, ...] = ()
    drive_mix: float = 0.2
    """As `Links.duplex`, for reading and writing together."""
    max_drive_read_bytes_per_second: float = 1e14
    """What the drives' common bus lets through."""
    max_drive_write_bytes_per_second: float = 1e14
    unified: bool = False
    """DEVICE and HOST are one tier (no GPU)."""

    @property
    def nvme_bytes(self) -> int:
        return sum(drive.capacity_bytes for drive in self.drives)

    @property
    def read_bytes_per_second(self) -> float:
        return min(self.max_drive_read_bytes_per_second, sum(d.read_bytes_per_second for d in self.drives))

    @property
    def write_bytes_per_second(self) -> float:
        return min(self.max_drive_write_bytes_per_second, sum(d.write_bytes_per_second for d in self.drives))

    @property
    def endurance_bytes(self) -> int:
        """Rated writes of all drives, which stripes wear evenly; 0 if one of them is not known."""
        known = [drive.endurance_bytes for drive in self.drives]
        return sum(known) if all(known) else 0

    def to_json(self) -> str:
        return json.dumps({"schema": HARDWARE_SCHEMA, **asdict(self)}, indent=1)


_RATE = (1e6, 1e15)
_DEVICE_LIMITS = {
    "memory_bytes": (1, MAX_BYTES),
    "reserve_bytes": (0, MAX_BYTES),
    "matmul_flops_per_second": (1e6, 1e19),
    "attention_forward_efficiency": (0.001, 2.0),
    "attention_backward_efficiency": (0.001, 2.0),
    "memory_bytes_per_second": _RATE,
    "nf4_decode_bytes_per_second": _RATE,
    "adamw_params_per_second": (1e3, 1e15),
    "operation_seconds": (0.0, 1.0),
    "num_threads": (0, 1 << 16),
}
_HOST_LIMITS = {
    "memory_bytes": (0, MAX_BYTES),
    "adamw_params_per_second": (1e3, 1e15),
    "adamw_beside_copies": (0.01, 1.0),
}
_LINK_LIMITS = {
    "host_to_device_bytes_per_second": _RATE,
    "device_to_host_bytes_per_second": _RATE,
    "duplex": (0.0, 1.0),
}
_DRIVE_LIMITS = {
    "capacity_bytes": (1, MAX_BYTES),
    "read_bytes_per_second": _RATE,
    "write_bytes_per_second": _RATE,
    "endurance_bytes": (0, 1 << 70),
}
_TOP = ("schema", "name", "device", "host", "links", "drives", "drive_mix", "max_drive_read_bytes_per_second",
        "max_drive_write_bytes_per_second", "unified", "measured")  # fmt: skip
"""`measured` is how steady the numbers were, where they were measured: for people, not for plans."""


def load_hardware(path: Path | str) -> Hardware:
    """Reads what `Hardware.to_json` writes. `ProblemError` names path, line and key."""
    return read_hardware(JsonFile.load(path))


def read_hardware(file: JsonFile) -> Hardware:
    """As `load_hardware`, from a file that was opened."""
    data = file.data
    if data.get("schema") != HARDWARE_SCHEMA:
        raise file.error(("schema",), f"expected {HARDWARE_SCHEMA!r}, got {data.get('schema')!r}")
    for key in data:
        if key not in _TOP:
            raise file.error((key,), f"unknown key; {nearest(key, _TOP)}")
    for key in ("device", "host", "links"):
        if key not in data:
            raise file.error((), f"has no key {key!r}")
    drives = data.get("drives", [])
    if not isinstance(drives, list):
        raise file.error(("drives",), f"expected a list, got {type(drives).__name__}")
    unified = data.get("unified", False)
    if not isinstance(unified, bool):
        raise file.error(("unified",), f"expected true or false, got {unified!r}")
    if not isinstance(data.get("measured", {}), dict):
        raise file.error(("measured",), f"expected an object, got {type(data['measured']).__name__}")
    name = data.get("name", Path(file.path).stem)
    if not isinstance(name, str):
        raise file.error(("name",), f"expected a text, got {name!r}")
    optional = {
        key: float(file.number((key,), data[key], low=low, high=high))
        for key, low, high in (
            ("drive_mix", 0.0, 1.0),
            ("max_drive_read_bytes_per_second", *_RATE),
            ("max_drive_write_bytes_per_second", *_RATE),
        )
        if key in data
    }
    device: Device = file.section(("device",), Device, _DEVICE_LIMITS)
    if device.reserve_bytes >= device.memory_bytes:
        raise file.error(("device", "reserve_bytes"), "leaves nothing of memory_bytes")
    host: Host = file.section(("host",), Host, _HOST_LIMITS)
    if unified and host.memory_bytes:
        raise file.error(("host", "memory_bytes"), "must be 0 where HOST and DEVICE are one tier (unified)")
    return Hardware(
        name=name,
        device=device,
        host=host,
        links=file.section(("links",), Links, _LINK_LIMITS),
        drives=tuple(file.record(("drives",), drive, Drive, _DRIVE_LIMITS) for drive in drives),
        unified=unified,
        **optional,
    )


def parse_drive(text: str) -> Drive:
    """A drive from `SIZE`, `SIZE@READr/WRITEw` in GB/s, and `,tbw=SIZE`: `2TB@7.0r/5.0w,tbw=1200TB`."""
    body, _, wear = text.partition(",")
    size, at, rates = body.partition("@")
    read, write = 3.5e9, 2.5e9
    if at:
        first, slash, second = rates.partition("/")
        if not (slash and first.endswith("r") and second.endswith("w")):
            raise ProblemError(f"nvme: cannot read the rates in {text!r}; write, say, '2TB@7.0r/5.0w'")
        read, write = parse_rate(first[:-1], field="nvme"), parse_rate(second[:-1], field="nvme")
    capacity = parse_size(size, field="nvme")
    key, equals, value = wear.partition("=")
    if wear and (key != "tbw" or not equals):
        raise ProblemError(f"nvme: unknown setting {wear!r} in {text!r}; allowed: tbw=SIZE")
    # 600 full writes is what most consumer drives are rated for.
    endurance = parse_size(value, field="nvme: tbw") if wear else 600 * capacity
    return Drive(
        capacity_bytes=capacity,
        read_bytes_per_second=read,
        write_bytes_per_second=write,
        endurance_bytes=endurance,
    )


_GB, _TFLOPS = 10**9, 1e12
_PCIE = {"3x16": 12.0, "4x8": 12.5, "4x16": 22.0, "5x8": 24.0, "5x16": 50.0}
"""GB/s each way, achieved."""

_GPUS = {
    # name: memory GB, memory GB/s, dense bf16 TFLOP/s by data sheet, share achieved, PCIe, host memory GB, drives
    "rtx3060": (12, 360, 25.6, 0.85, "4x16", 32, 1),
    "rtx3090": (24, 936, 71.0, 0.85, "4x16", 64, 1),
    "rtx4060ti": (16, 288, 44.0, 0.85, "4x8", 32, 1),
    "rtx4080": (16, 717, 97.5, 0.85, "4x16", 64, 1),
    "rtx4090": (24, 1008, 165.2, 0.85, "4x16", 64, 1),
    "rtx5090": (32, 1792, 209.5, 0.85, "5x16", 128, 1),
    "a100": (80, 2039, 312.0, 0.75, "4x16", 512, 4),
    "h100": (80, 3350, 989.0, 0.65, "5x16", 1024, 4),
    "laptop": (8, 256, 30.0, 0.8, "4x8", 32, 1),
}
_ADAMW_BYTES_PER_PARAM = 30
"""Read and written for one parameter: gradient, master and moments, 16-bit weight."""
_CPU_ADAMW = {"laptop": 0.7e9, "a100": 4e9, "h100": 5e9}
_GEN4_DRIVE = Drive(
    capacity_bytes=2 * 10**12,
    read_bytes_per_second=6.8e9,
    write_bytes_per_second=5.0e9,
    endurance_bytes=1200 * 10**12,
)


def hardware_names() -> list[str]:
    return sorted([*_GPUS, "cpu"])


def named_hardware(name: str) -> Hardware:
    """A built-in profile: the card, and a host and drives that are usual with it. `ProblemError` if unknown."""
    key = name.lower().replace("-", "").replace("_", "").replace(" ", "").removeprefix("geforce").removeprefix("nvidia")
    if key == "cpu":
        return _cpu()
    if key not in _GPUS:
        raise ProblemError(f"gpu: unknown {name!r}; {nearest(key, hardware_names())}")
    memory, bandwidth, tflops, share, pcie, host, drives = _GPUS[key]
    link = _PCIE[pcie] * _GB
    return Hardware(
        name=key,
        device=Device(
            memory_bytes=memory * 2**30,
            reserve_bytes=2**30,
            matmul_flops_per_second=tflops * share * _TFLOPS,
            attention_forward_efficiency=0.8,
            attention_backward_efficiency=0.65,
            memory_bytes_per_second=0.85 * bandwidth * _GB,
            nf4_decode_bytes_per_second=0.5 * bandwidth * _GB,
            adamw_params_per_second=0.8 * bandwidth * _GB / _ADAMW_BYTES_PER_PARAM,
            operation_seconds=30e-6,
        ),
        host=Host(memory_bytes=host * 2**30, adamw_params_per_second=_CPU_ADAMW.get(key, 1.2e9)),
        links=Links(host_to_device_bytes_per_second=link, device_to_host_bytes_per_second=link, duplex=0.8),
        drives=(_GEN4_DRIVE,) * drives,
    )


def _cpu() -> Hardware:
    """A desktop without a GPU: sixteen cores with AVX-512 or AMX-less bf16, two channels of memory."""
    copies = 40e9
    return Hardware(
        name="cpu",
        device=Device(
            memory_bytes=32 * 2**30,
            reserve_bytes=2 * 2**30,
            matmul_flops_per_second=1.0e12,
            attention_forward_efficiency=0.5,
            attention_backward_efficiency=0.4,
            memory_bytes_per_second=copies,
            nf4_decode_bytes_per_second=10e9,
            adamw_params_per_second=0.9e9,
            operation_seconds=20e-6,
            num_threads=16,
        ),
        host=Host(memory_bytes=0, adamw_params_per_second=0.9e9),
        links=Links(host_to_device_bytes_per_second=copies, device_to_host_bytes_per_second=copies, duplex=0.0),
        drives=(_GEN4_DRIVE,),
        unified=True,
    )


def with_budgets(
    hardware: Hardware,
    *,
    device_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    drives: tuple[Drive, ...] | None = None,
) -> Hardware:
    """`hardware` with what the user said instead. `ProblemError` where a budget contradicts the machine.

    A device budget is of managed bytes, so that nothing of it is reserved. Where memory is one tier, a host budget
    makes two of it, as it does in training.
    """
    device, host = hardware.device, hardware.host
    for field, size in (("device_memory", device_memory_bytes), ("host_memory", host_memory_bytes)):
        if size is not None and size < MIN_BUDGET_BYTES:
            raise ProblemError(f"{field}: {size} bytes is no budget; is the unit missing, as in '{size}GiB'?")
    if device_memory_bytes is not None:
        if device_memory_bytes > device.memory_bytes:
            raise ProblemError(
                f"device_memory: {device_memory_bytes} bytes is more than {hardware.name} has, {device.memory_bytes}"
            )
        device = replace(device, memory_bytes=device_memory_bytes, reserve_bytes=0)
    if host_memory_bytes is not None:
        host = replace(host, memory_bytes=host_memory_bytes)
        if hardware.unified:
            left_bytes = hardware.device.memory_bytes - host_memory_bytes
            least_bytes = device.reserve_bytes + 1 if device_memory_bytes is None else device_memory_bytes
            if left_bytes < least_bytes:
                raise ProblemError(
                    f"host_memory: {host_memory_bytes} bytes, and {least_bytes} of device memory, are more than the "
                    f"{hardware.device.memory_bytes} that {hardware.name} has of both"
                )
            if device_memory_bytes is None:
                device = replace(device, memory_bytes=left_bytes)
    return replace(
        hardware, device=device, host=host, drives=hardware.drives if drives is None else drives,
        unified=hardware.unified and host_memory_bytes is None,
    )  # fmt: skip
