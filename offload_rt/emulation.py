"""`emulate=`: another machine's links and tier sizes, imposed on the CPU device.

DEVICE and HOST are two regions of RAM then, as large as the profile says, and transfers take the time of its links and
drives (`throttle`). What computes is this machine. Where a profile has one tier of memory, so has the emulation.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offload_rt.config import EngineConfig, NvmePath
from offload_rt.errors import ConfigError
from planners.problems.hardware import Hardware, load_hardware, named_hardware
from planners.units import ProblemError


def emulated_hardware(emulate: Hardware | str | Path) -> Hardware:
    """The machine that `emulate=` means: a profile, the name of one, or a file. Raises `ConfigError`."""
    if isinstance(emulate, Hardware):
        return emulate
    if not isinstance(emulate, (str, Path)):
        raise ConfigError(f"emulate: expected a hardware profile, its name or a file, got {type(emulate).__name__}")
    try:
        if isinstance(emulate, Path) or emulate.endswith(".json") or "/" in emulate:
            return load_hardware(emulate)
        return named_hardware(emulate)
    except ProblemError as error:
        raise ConfigError(f"emulate: {error} (a profile's file may be given as well)") from None


def emulated_config(config: EngineConfig, hardware: Hardware) -> EngineConfig:
    """The arguments with the machine's tier sizes as budgets. ConfigError where they contradict each other."""
    if config.device != "cpu":
        raise ConfigError("emulate: the machine is emulated on the CPU device; give device='cpu'")
    room = hardware.device.memory_bytes - hardware.device.reserve_bytes
    device = config.device_memory_bytes or room
    if device > room:
        raise ConfigError(f"device_memory: {device} bytes, but {hardware.name} has {room}")
    host = config.host_memory_bytes
    if hardware.unified and host is not None:
        raise ConfigError(f"host_memory: {hardware.name} has one tier of memory; give device_memory alone")
    if not hardware.unified:
        host = host or hardware.host.memory_bytes
        if host > hardware.host.memory_bytes:
            raise ConfigError(f"host_memory: {host} bytes, but {hardware.name} has {hardware.host.memory_bytes}")
    if config.nvme and not hardware.drives:
        raise ConfigError(f"nvme: {hardware.name} has no drive; give none, or another profile")
    each = hardware.nvme_bytes // max(1, len(config.nvme))
    drives = tuple(
        NvmePath(path=drive.path, capacity_bytes=min(each, drive.capacity_bytes or each)) for drive in config.nvme
    )
    return replace(config, device_memory_bytes=device, host_memory_bytes=host, nvme=drives)
