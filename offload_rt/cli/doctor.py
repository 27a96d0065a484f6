"""`offload-rt doctor`: one block to paste into an issue. It tries what it reports, and needs nothing optional.

    doctor                 everything
    doctor --nvme DIR      and a short probe of that folder
    doctor --brief         two lines: what is in use, and what is missing

Torch is imported to say what it can do; transformers is not.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import platform
import sys
from pathlib import Path

from offload_rt import __version__
from offload_rt.cli import doctor_folder, doctor_machine
from offload_rt.config import parse_nvme
from offload_rt.errors import OffloadError
from offload_rt.native import native_core, why_not
from planners.errors import format_bytes

_TRIED_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nvme", action="append", metavar="DIR", help="a folder to try; once per drive")
    parser.add_argument("--brief", action="store_true", help="only what is in use, in two lines")


def run(arguments: argparse.Namespace) -> int:
    folders = [drive.path for drive in parse_nvme(arguments.nvme)]
    lines = brief_lines() if arguments.brief else full_lines()
    for folder in folders:
        lines += _section("folder", doctor_folder.folder_lines(folder))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def brief_lines() -> list[str]:
    io, nf4 = io_in_use(), nf4_in_use()
    lines = [f"offload-rt {__version__}: NF4 by {nf4}; files by {io}"]
    if native_core() is None:
        lines.append(f"native core not in use ({why_not()}): everything works, slower")
    return lines


def full_lines() -> list[str]:
    return [
        *_section("offload-rt", [f"{__version__}, Python {platform.python_version()} ({sys.executable})"]),
        *_section("system", [doctor_machine.system()]),
        *_section("packages", [doctor_machine.packages()]),
        *_section("cpu", [doctor_machine.cpu()]),
        *_section("load", [doctor_machine.load(torch_threads())]),
        *_section("memory", [doctor_machine.memory()]),
        *_section("ulimit -l", [doctor_machine.locked_memory()]),
        *_section("gpu", doctor_machine.gpus()),
        *_section("torch", [torch_in_use()]),
        *_section("native core", [native_state()]),
        *_section("io_uring", [doctor_machine.io_uring_refusal() or "allowed"]),
        *_section("files by", [io_in_use()]),
        *_section("arenas", [registered_memory()]),
        *_section("NF4 by", [nf4_in_use()]),
        *_section("pinning", [pinnable_memory()]),
        *_section("GDS", ["not needed: reads land in host memory"]),
    ]


def native_state() -> str:
    core = native_core()
    if core is None:
        return f"not in use: {why_not()}"
    present = [name for name, here in core.isa().items() if here]
    return f"built; fast paths for {', '.join(present) or 'no instruction set of this machine'}"


def io_in_use() -> str:
    """Tried by reading a page of this file."""
    core = native_core()
    if core is None:
        return "aiofiles (no native core)"
    page = bytearray(64)
    try:
        with open(__file__, "rb") as file, core.Ring(depth=1) as ring:
            ring.wait(ring.read(file.fileno(), __file__, 0, page), 10.0)
            backend, reason = ring.backend, ring.fallback_reason
    except (OSError, RuntimeError, ValueError) as error:
        return f"nothing: the ring fails ({error})"
    if page != Path(__file__).read_bytes()[: len(page)]:
        return "nothing: the ring reads wrong bytes"
    return "io_uring" if backend == "io_uring" else f"a pool of threads (no io_uring: {reason})"


def registered_memory() -> str:
    """Tried on as much as a small arena has."""
    core = native_core()
    if core is None:
        return "not registered with the kernel (no native core)"
    memory = mmap.mmap(-1, _TRIED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with core.Ring(depth=1) as ring:
        try:
            ring.register_memory(memory)
        except OSError as error:
            return f"not registered with the kernel ({error}): reads work, at a little more processor time"
    return f"registered with the kernel: tried with {format_bytes(_TRIED_BYTES)}"


def pinnable_memory() -> str:
    """How much host memory the GPU's driver locks, tried in a child process up to 2 GiB, and half of what is free."""
    try:
        from offload_rt.memory import cudart, pinning
    except ImportError as error:
        return f"not tried: {error}"
    try:
        runtime = cudart.find_cuda_runtime()
    except (OSError, AttributeError) as error:
        return f"OFFLOAD_RT_CUDART is no CUDA runtime ({error})"
    if runtime is None:
        return "no CUDA runtime: host memory is not locked"
    ceiling = pinning.pin_ceiling(runtime, pinning.TRIED_BYTES)
    if not ceiling.ceiling_bytes and not _has_driver():
        return "no GPU driver: host memory is not locked, and need not be"
    if not ceiling.ceiling_bytes and not ceiling.reason:
        return "not tried how much host memory can be locked: too little is free"
    found = f"{format_bytes(ceiling.ceiling_bytes)} can be locked by {runtime.path}"
    if not ceiling.reason:
        return f"at least {found}"
    return f"only {found}, the rest is copied through a small locked ring, slower: {ceiling.reason}"


def _has_driver() -> bool:
    """Without it a CUDA runtime, which torch brings along, can do nothing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def nf4_in_use() -> str:
    """Tried by encoding and decoding a few weights."""
    try:
        import torch

        from offload_rt.quantized import codec
    except ImportError as error:
        return f"nothing: {error}"
    try:
        weights = torch.linspace(-1.0, 1.0, 128)
        decoded = codec.decode(codec.encode(weights), (128,), torch.float32)
        wrong = float((decoded - weights).abs().max())
        return codec.backend() if wrong < 0.2 else f"nothing: decoding is off by {wrong:.2g}"
    except (OffloadError, RuntimeError, ValueError) as error:
        return f"nothing: {error}"


def torch_threads() -> int | None:
    """As many as it computes with; None where it cannot be imported."""
    try:
        import torch
    except ImportError:
        return None
    return torch.get_num_threads()


def torch_in_use() -> str:
    try:
        import torch
    except ImportError as error:
        return f"cannot be imported: {error}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    seen = f"{torch.cuda.device_count()} GPU(s) usable" if torch.cuda.is_available() else "no GPU usable"
    return f"{torch.__version__}, {cuda}, {seen}, {torch.get_num_threads()} threads"


def _section(name: str, lines: list[str]) -> list[str]:
    return [f"{name + ':' if at == 0 else '':<13}{line}" for at, line in enumerate(lines)]
