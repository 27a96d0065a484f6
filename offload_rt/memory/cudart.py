"""The three functions of the CUDA runtime that lock host memory, found at run time. No torch, no CUDA toolkit.

The library is the one that torch has loaded, or, in a process without torch, one that the dynamic linker finds. As a
program (`python -m offload_rt.memory.cudart LIBRARY LIMIT STEP GPU`) it finds how many bytes may be locked, by locking
them: in a process of its own, because on WSL2 and in containers a refusal can spoil every later request of the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import sys
from pathlib import Path

from offload_rt.errors import PinningRefused

PORTABLE = 1
"""cudaHostRegisterPortable: locked for every device."""
_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


class CudaRuntime:
    """`cudaHostRegister` and `cudaHostUnregister` of one library. Thread-safe, as they are."""

    def __init__(self, path: str) -> None:
        """Raises `OSError` where there is no such library, and `AttributeError` where it is not the CUDA runtime."""
        self.path = path
        library = self._library = ctypes.CDLL(path)
        self._register = library.cudaHostRegister
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._unregister = library.cudaHostUnregister
        self._unregister.argtypes = [ctypes.c_void_p]
        self._last_error = library.cudaGetLastError
        self._describe = library.cudaGetErrorString
        self._describe.argtypes = [ctypes.c_int]
        self._describe.restype = ctypes.c_char_p

    def set_device(self, index: int) -> None:
        """Makes GPU `index` the calling thread's: calls that name none make a context there. `PinningRefused`."""
        self._check(self._library.cudaSetDevice(index), f"choosing GPU {index}")

    def register(self, address: int, num_bytes: int) -> None:
        """Locks memory for direct transfers. Blocks while pages are faulted in. Raises `PinningRefused`."""
        self._check(self._register(address, num_bytes, PORTABLE), f"locking {num_bytes} bytes")

    def unregister(self, address: int) -> None:
        """Undoes `register`. Raises `PinningRefused`."""
        self._check(self._unregister(address), "unlocking")

    def _check(self, code: int, what: str) -> None:
        if code == 0:
            return
        self._last_error()  # a refusal stays the answer to whoever asks next, until it is read
        reason = self._describe(code)
        raise PinningRefused(
            f"{what}: CUDA error {code} ({reason.decode(errors='replace') if reason else 'unknown'})", code=code
        )


def find_cuda_runtime() -> CudaRuntime | None:
    """The CUDA runtime of this process, or None. `OFFLOAD_RT_CUDART` names another library; empty, none."""
    chosen = os.environ.get("OFFLOAD_RT_CUDART")
    if chosen is not None:
        return CudaRuntime(chosen) if chosen else None
    for path in (*_loaded(), *_NAMES):
        try:
            return CudaRuntime(path)
        except (OSError, AttributeError):
            continue
    return None


def is_wsl() -> bool:
    """Whether Linux runs inside of Windows."""
    return "microsoft" in platform.release().lower()


def _loaded() -> list[str]:
    """CUDA runtimes that this process has mapped, each once."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return list(dict.fromkeys(re.findall(r"(/\S*/libcudart[^/\s]*\.so[.\d]*)$", maps, re.MULTILINE)))


def measure_ceiling(runtime: CudaRuntime, limit_bytes: int, step_bytes: int) -> tuple[int, str]:
    """(bytes that could be locked at once, why no more): locks `step_bytes` at a time up to `limit_bytes`.

    Everything is given back. For a process of its own, see above.
    """
    held: list[tuple[mmap.mmap, int]] = []
    reason = ""
    while len(held) * step_bytes < limit_bytes:
        memory = mmap.mmap(-1, step_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        try:
            runtime.register(address, step_bytes)
        except PinningRefused as error:
            reason = str(error)
            break
        held.append((memory, address))
    for _, address in held:
        runtime.unregister(address)
    return min(len(held) * step_bytes, limit_bytes), reason


def main(library: str, limit_bytes: str, step_bytes: str, gpu: str) -> None:
    runtime = CudaRuntime(library)
    runtime.set_device(int(gpu))
    ceiling_bytes, reason = measure_ceiling(runtime, int(limit_bytes), int(step_bytes))
    sys.stdout.write(json.dumps({"ceiling_bytes": ceiling_bytes, "reason": reason}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
