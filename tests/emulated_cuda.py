"""What runs on a GPU, on a machine without one: an emulated "cuda". A plugin: `pytest -p tests.emulated_cuda`.

The device itself is `emulated_cuda.cc`, which says what is like a GPU and what is not. Here it is compiled, loaded
ahead of torch, and put behind `torch.cuda`, whose functions ask a library that a build for CPUs does not have. Triton's
kernels run in its interpreter. It holds for the whole process, so tests that want it run in one of their own.

Settings of the environment: OFFLOAD_EMULATED_LATE_US, by how much copies are late at most; OFFLOAD_EMULATED_BYTES, the
device's memory; OFFLOAD_EMULATED_DEVICES, how many there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOURCE = Path(__file__).with_suffix(".cc")
BUILT = Path(__file__).parent.parent / "native" / "build"
CONTEXT_BYTES = 300 << 20
"""What a CUDA context takes of a device, beside what is allocated there."""


def compiled() -> Path:
    """The library, compiled where it was not yet: a quarter of a minute, less where nothing is optimised, which is all
    that it has to gain here. Several processes may ask at once.
    """
    version = importlib.metadata.version("torch")
    place = importlib.util.find_spec("torch")
    assert place is not None and place.origin is not None
    folder = Path(place.origin).parent
    name = hashlib.sha256(SOURCE.read_bytes() + version.encode() + str(folder).encode()).hexdigest()[:16]
    library = BUILT / f"emulated_cuda-{name}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        whole = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-shared", "-fPIC", f"-isystem{folder}/include",
                str(SOURCE), "-o", str(whole), f"-L{folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}/lib",
            ],
            check=True,
        )  # fmt: skip
        whole.rename(library)
    return library


def _load() -> ctypes.CDLL:
    assert "torch" not in sys.modules, "torch has looked for its devices already"
    path = compiled()
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    os.environ["OFFLOAD_RT_CUDART"] = str(path)
    for function in (library.emulated_set_stream, library.emulated_stream):
        function.restype = ctypes.c_int64
    library.emulated_set_stream.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.emulated_sleep.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.emulated_hold.argtypes, library.emulated_hold.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_void_p
    library.emulated_let_go.argtypes = [ctypes.c_void_p]
    library.emulated_limit.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.emulated_lockable.argtypes, library.emulated_lockable.restype = [ctypes.c_uint64], ctypes.c_uint64
    library.emulated_resume.argtypes = [ctypes.c_void_p]
    library.emulated_memory.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    return library


_library = _load()
BYTES = int(os.environ.get("OFFLOAD_EMULATED_BYTES", 2 << 30))
"""Of a device's memory that can be allocated."""
for _device in range(_library.emulated_device_count()):
    _library.emulated_limit(_device, BYTES)

import torch  # noqa: E402  # behind the library

MEMORY = ("allocated", "reserved", "peak_allocated", "peak_reserved", "num_device_alloc", "num_allocations", "limit")


def _index(device: Any = None) -> int:
    if device is None:
        return int(_library.emulated_device())
    if isinstance(device, int):
        return device if device >= 0 else int(_library.emulated_device())
    index = torch.device(device).index
    return int(_library.emulated_device()) if index is None else index


def _memory(device: Any = None) -> SimpleNamespace:
    found = (ctypes.c_uint64 * len(MEMORY))()
    _library.emulated_memory(_index(device), found)
    return SimpleNamespace(**dict(zip(MEMORY, map(int, found), strict=True)))


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **handle: int) -> Stream:
        if handle:
            return super().__new__(cls, **handle)
        return super().__new__(cls, device=torch.device("cuda", _index(device)), priority=priority)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event


class Event:
    """torch's own takes no event of a derived class."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._event = torch.Event(torch.device("cuda", _index()), enable_timing=enable_timing, blocking=blocking)

    def record(self, stream: torch.Stream | None = None) -> None:
        self._event.record(current_stream() if stream is None else stream)

    def wait(self, stream: torch.Stream | None = None) -> None:
        self._event.wait(current_stream() if stream is None else stream)

    def query(self) -> bool:
        return self._event.query()

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return self._event.elapsed_time(end._event)


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    return Stream(stream_id=int(_library.emulated_stream(index)), device_index=index, device_type=1)


@contextlib.contextmanager
def stream(entered: torch.Stream | None) -> Iterator[None]:
    """As `torch.cuda.stream`: sets the device too."""
    if entered is None:
        yield
        return
    index = entered.device.index
    with device(index):
        before = _library.emulated_set_stream(index, entered.stream_id)
        try:
            yield
        finally:
            _library.emulated_set_stream(index, before)


@contextlib.contextmanager
def waits() -> Iterator[list[tuple[str, int, list[str]]]]:
    """What host threads wait for inside: "device", "stream", "event", "number" (`item`), and copies that block, "to
    device" and "to host", with their bytes; and by which lines of Python, outermost first.
    """
    found: list[tuple[str, int, list[str]]] = []

    def tell(what: bytes, num_bytes: int) -> None:
        stack = [
            f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if frame.filename != __file__
        ]
        found.append((what.decode(), num_bytes, stack))

    called = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint64)(tell)
    _library.emulated_tell(called)
    try:
        yield found
    finally:
        _library.emulated_tell(None)


@contextlib.contextmanager
def lockable(num_bytes: int) -> Iterator[None]:
    """So much host memory, beside what is locked already, can be locked by `cudaHostRegister` inside."""
    _library.emulated_lockable(_library.emulated_lockable(0) + num_bytes)
    try:
        yield
    finally:
        _library.emulated_lockable(2**64 - 1)


@contextlib.contextmanager
def contexts() -> Iterator[set[tuple[int, str, str]]]:
    """Calls inside, of any thread, that give a device a context, 300 to 500 MiB of a GPU's memory, if it has none yet:
    the device's number, the call, and by which line of Python.
    """
    found: set[tuple[int, str, str]] = set()

    def tell(call: bytes, index: int) -> None:
        lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if f.filename != __file__]
        found.add((index, call.decode(), lines[-1] if lines else "no line of Python"))

    called = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int)(tell)
    _library.emulated_tell_touched(called)
    try:
        yield found
    finally:
        _library.emulated_tell_touched(None)


@contextlib.contextmanager
def held(stopped: torch.Stream) -> Iterator[None]:
    """What the stream is given meanwhile does not begin before the end."""
    gate = _library.emulated_hold(stopped.device.index, stopped.stream_id)
    try:
        yield
    finally:
        _library.emulated_resume(gate)


class device:  # torch's name
    """As `torch.cuda.device`."""

    def __init__(self, chosen: Any) -> None:
        self._index = _index(chosen) if chosen is not None else None

    def __enter__(self) -> None:
        self._before = _library.emulated_set_device(self._index) if self._index is not None else None

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            _library.emulated_set_device(self._before)


def _device_of(tensor: torch.Tensor) -> device:
    return device(tensor.device.index if tensor.is_cuda else None)


def _properties(chosen: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="emulated GPU", total_memory=BYTES + CONTEXT_BYTES, major=9, minor=0,
        multi_processor_count=4, uuid=f"emulated-{_index(chosen)}", L2_cache_size=32 << 20,
        shared_memory_per_block_optin=227 << 10, regs_per_multiprocessor=65536, warp_size=32,
    )  # fmt: skip


def _statistics(chosen: Any = None) -> dict[str, int]:
    memory = _memory(chosen)
    return {
        "num_device_alloc": memory.num_device_alloc, "allocation.all.allocated": memory.num_allocations,
        "allocated_bytes.all.current": memory.allocated, "allocated_bytes.all.peak": memory.peak_allocated,
        "reserved_bytes.all.current": memory.reserved, "reserved_bytes.all.peak": memory.peak_reserved,
        "num_alloc_retries": 0, "num_ooms": 0,
    }  # fmt: skip


def _mem_get_info(chosen: Any = None) -> tuple[int, int]:
    memory = _memory(chosen)
    return BYTES - memory.reserved, BYTES + CONTEXT_BYTES


def _set_fraction(fraction: float, chosen: Any = None) -> None:
    _library.emulated_limit(_index(chosen), int(fraction * (BYTES + CONTEXT_BYTES)))


_random = torch.ops.emulated_cuda  # states and seeds of the devices' generators


def _num_devices() -> int:
    return int(_library.emulated_device_count())


STANDS_FOR = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: _library.emulated_init(),
    "_lazy_init": lambda: _library.emulated_init(),
    "_is_in_bad_fork": lambda: False,
    "device_count": _num_devices,
    "current_device": _index,
    "set_device": lambda chosen: _library.emulated_set_device(_index(chosen)),
    "device": device,
    "device_of": _device_of,
    "Stream": Stream,
    "Event": Event,
    "stream": stream,
    "StreamContext": stream,
    "current_stream": current_stream,
    "default_stream": lambda chosen=None: Stream(stream_id=0, device_index=_index(chosen), device_type=1),
    "is_current_stream_capturing": lambda: False,
    "set_stream": lambda entered: _library.emulated_set_stream(entered.device.index, entered.stream_id),
    "synchronize": lambda chosen=None: _library.emulated_synchronize(_index(chosen)),
    "_sleep": lambda cycles: _library.emulated_sleep(_index(), cycles // 2000),
    "get_device_name": lambda chosen=None: _properties(chosen).name,
    "get_device_properties": _properties,
    "get_device_capability": lambda chosen=None: (9, 0),
    "get_arch_list": lambda: ["sm_90"],
    "is_bf16_supported": lambda *chosen, **otherwise: True,
    "memory_allocated": lambda chosen=None: _memory(chosen).allocated,
    "memory_reserved": lambda chosen=None: _memory(chosen).reserved,
    "max_memory_allocated": lambda chosen=None: _memory(chosen).peak_allocated,
    "max_memory_reserved": lambda chosen=None: _memory(chosen).peak_reserved,
    "reset_peak_memory_stats": lambda chosen=None: _library.emulated_reset_peaks(_index(chosen)),
    "memory_stats": _statistics,
    "mem_get_info": _mem_get_info,
    "set_per_process_memory_fraction": _set_fraction,
    "empty_cache": lambda: _library.emulated_empty_cache(_index()),
    "manual_seed": lambda seed: _random.seed(seed, _index()),
    "manual_seed_all": lambda seed: [_random.seed(seed, index) for index in range(_num_devices())],
    "get_rng_state": lambda chosen="cuda": _random.rng_state(_index(chosen)),
    "get_rng_state_all": lambda: [_random.rng_state(index) for index in range(_num_devices())],
    "set_rng_state": lambda state, chosen="cuda": _random.set_rng_state(state, _index(chosen)),
    "set_rng_state_all": lambda states: [_random.set_rng_state(state, i) for i, state in enumerate(states)],
}
for name, stands in STANDS_FOR.items():
    assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
    setattr(torch.cuda, name, stands)
torch.cuda._initialized = True  # torch's checkpointing looks at this before it keeps a device's random numbers
torch._C._cuda_getCurrentRawStream = lambda index: int(_library.emulated_stream(index))  # type: ignore[attr-defined]

_new_storage = torch.UntypedStorage.__new__


def _storage(kind: Any, *arguments: Any, device: Any = None, **rest: Any) -> torch.UntypedStorage:
    """Of device memory too, which is what copies of tensors and tensors that were saved ask for."""
    if device is None or torch.device(device).type != "cuda":
        return _new_storage(kind, *arguments, **rest, **({} if device is None else {"device": device}))
    (num_bytes,) = arguments
    return torch.empty(num_bytes, dtype=torch.uint8, device=device).untyped_storage()


torch.UntypedStorage.__new__ = _storage  # type: ignore[method-assign,assignment]

_resize = torch.UntypedStorage.resize_


def _resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """Of device memory too, where all of it is let go of."""
    if storage.device.type != "cuda" or size:
        return _resize(storage, size)
    _library.emulated_let_go(storage._cdata)
    return storage


torch.UntypedStorage.resize_ = _resized  # type: ignore[method-assign,assignment]

from triton.runtime.interpreter import GridExecutor  # noqa: E402  # imports torch

from tests.interpreter import interpret  # noqa: E402  # imports torch

_one_kernel = threading.RLock()  # the interpreter has variables of its own
_run = GridExecutor.__call__


def _where_it_is(_: GridExecutor, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[list[Any], dict]:
    """Device memory, as the interpreter sees memory. It would copy it."""
    return [_on_host(one) for one in arguments], {name: _on_host(one) for name, one in options.items()}


def _on_host(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor) or not argument.is_cuda:
        return argument
    storage = argument.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_like(argument, device="cpu")
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    seen = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=argument.dtype).set_(seen, argument.storage_offset(), argument.shape, argument.stride())


def _launch(self: GridExecutor, *arguments: Any, **options: Any) -> None:
    with _one_kernel:
        for one in (*arguments, *options.values()):
            if isinstance(one, torch.Tensor) and one.is_cuda:
                assert one.device.index == _index(), f"launched on cuda:{_index()}, a tensor is on {one.device}"
        _library.emulated_launch(_index())
        _run(self, *arguments, **options)


GridExecutor._init_args_hst = _where_it_is
GridExecutor._restore_args_dev = lambda *_: None
GridExecutor.__call__ = _launch
interpret(pytest.MonkeyPatch())


def _histc(values: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """Of integers too, which the CPU's kernel does not count and a GPU's does: mixtures of experts ask for it."""
    found = torch.histc(values.cpu().double(), bins, min, max)
    return found.to(device=values.device, dtype=values.dtype)


_kernels = torch.library.Library("aten", "IMPL")  # noqa: TOR901
_kernels.impl("histc", _histc, "CUDA")
