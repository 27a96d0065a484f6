"""`doctor`'s look at the machine: what it is, what limits it, what its kernel allows. Reads `/proc` and `/sys`.

Every function returns text for a person and never raises for a file that a container hides. No torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from importlib import metadata
from pathlib import Path

from offload_rt.memory.cudart import is_wsl
from offload_rt.memory.memory_groups import memory_groups
from planners.errors import format_bytes

_IO_URING_SETUP = 425
"""The system call's number, the same on x86-64 and arm64."""
PACKAGES = (
    "torch", "transformers", "peft", "safetensors", "numpy", "highspy", "aiofiles", "psutil", "nvidia-ml-py",
    "bitsandbytes",
)  # fmt: skip


def system() -> str:
    """Distribution, kernel, and what they run in."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    text = f"{name}, kernel {platform.release()}, {platform.machine()}"
    places = [place for place, found in (("WSL", is_wsl()), ("a container", _in_container())) if found]
    return text + (f", in {' and '.join(places)}" if places else "")


def _in_container() -> bool:
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return True
    root_types = [line.split()[2] for line in _text("/proc/mounts").splitlines() if line.split()[1] == "/"]
    if "overlay" in root_types:
        return True
    return any(word in _text("/proc/1/cgroup") for word in ("docker", "kubepods", "containerd", "lxc"))


def packages() -> str:
    """Versions, without importing anything."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def cpu() -> str:
    model, flags = platform.machine(), set()
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    wanted = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    isa = " ".join(name for name in wanted if name in flags) or "no vector extensions found"
    return f"{model}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, {isa}"


def load(num_threads: int | None) -> str:
    """What others leave of the cores; `num_threads` are torch's, None where it cannot be imported."""
    try:
        average = os.getloadavg()[0]
    except OSError:
        return "not known"
    num_cores = os.cpu_count() or 1  # of the machine, whose load it is, also where this process may use a few
    text = f"{average:.1f} on {num_cores} cores in the last minute"
    if average < num_cores:
        return text
    text += ": others compute too, and steps take longer than measured on a quiet machine"
    if num_threads is not None and num_threads > 1:
        text += f"; torch's {num_threads} threads wait for each other then, try OMP_NUM_THREADS={num_threads // 2}"
    return text


def memory() -> str:
    """RAM and the smallest limit that a control group sets below it."""
    sizes = {}
    for line in _text("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            sizes[key] = int(value.split()[0]) * 1024
    text = f"{format_bytes(sizes.get('MemTotal', 0))}, {format_bytes(sizes.get('MemAvailable', 0))} available"
    text += f", swap {format_bytes(sizes.get('SwapTotal', 0))}"
    limit = min((group.limit_bytes for group in memory_groups()), default=None)
    return text + (", no cgroup limit" if limit is None else f", cgroup limit {format_bytes(limit)}")


def locked_memory() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    soft_text, hard_text = (
        "unlimited" if value == resource.RLIM_INFINITY else format_bytes(value) for value in (soft, hard)
    )
    return f"{soft_text} (hard limit {hard_text})"


def gpus() -> list[str]:
    """Names, memory and driver, as the driver tells; one line that says why where there is none."""
    try:
        import pynvml
    except ImportError as error:
        return [f"none seen: {error}"]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [f"none seen: {error}"]
    try:
        lines = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory_bytes = pynvml.nvmlDeviceGetMemoryInfo(handle)
            lines.append(
                f"{_name(pynvml.nvmlDeviceGetName(handle))}, {format_bytes(memory_bytes.total)} "
                f"({format_bytes(memory_bytes.free)} free), "
                f"driver {_name(pynvml.nvmlSystemGetDriverVersion())}, {_pcie(pynvml, handle)}"
            )
        return lines or ["none seen: the driver reports no device"]
    except pynvml.NVMLError as error:
        return [f"the driver fails: {error}"]
    finally:
        pynvml.nvmlShutdown()


def _pcie(pynvml: object, handle: object) -> str:
    """Of what is possible now: an idle link reports a lower generation."""
    generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)  # type: ignore[attr-defined]
    width = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)  # type: ignore[attr-defined]
    return f"PCIe {generation} x{width}"


def _name(text: str | bytes) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def io_uring_refusal() -> str:
    """Empty if the kernel gives this process a ring; otherwise why not. Tried with the system call itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    fd = libc.syscall(_IO_URING_SETUP, ctypes.c_uint(1), params)
    if fd >= 0:
        os.close(fd)
        return ""
    reason = os.strerror(ctypes.get_errno())
    switch = _text("/proc/sys/kernel/io_uring_disabled").strip()
    if switch not in ("", "0"):
        return f"{reason}; kernel.io_uring_disabled is {switch}"
    return f"{reason}; a container's seccomp filter often forbids it"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
