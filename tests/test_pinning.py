"""Locked host memory against a made-up CUDA runtime, compiled here: it counts what it locks, and refuses."""

import gc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offload_rt.cli import doctor
from offload_rt.errors import PinningRefused
from offload_rt.memory import cudart, pinning
from offload_rt.memory.arena import Arena, Region
from offload_rt.memory.cudart import CudaRuntime, find_cuda_runtime, measure_ceiling
from offload_rt.memory.pinning import RING_BYTES, Ceiling, known_ceiling, pin, pin_ceiling, ring_bytes

PAGE = 4096
MIB = 1 << 20

# Like the real one under WSL2: a refusal stays the answer to everything until the error was read.
FAKE = r"""
#include <stdlib.h>
#include <string.h>
static struct { void* address; size_t size; } held[1024];
static size_t num_held, held_bytes; static int sticky, num_calls, device;
static size_t ceiling(void) {
  const char* text = getenv("FAKE_CUDA_CEILING");
  return text ? strtoull(text, 0, 10) : (size_t)-1;
}
int cudaHostRegister(void* address, size_t size, unsigned flags) {
  ++num_calls;
  if (getenv("FAKE_CUDA_CRASH")) abort();
  if (getenv("FAKE_CUDA_FREE_GPU") && device != atoi(getenv("FAKE_CUDA_FREE_GPU"))) return sticky = 2;
  if (sticky) return sticky;
  if (flags != 1 || size == 0 || (size_t)address % 4096) return sticky = 1;
  for (size_t i = 0; i < num_held; ++i)
    if ((char*)address < (char*)held[i].address + held[i].size && (char*)held[i].address < (char*)address + size)
      return sticky = 712;
  if (held_bytes + size > ceiling()) return sticky = 2;
  memset(address, 1, 1); ((char*)address)[size - 1] = 1;  /* it must be there */
  held[num_held].address = address; held[num_held++].size = size; held_bytes += size;
  return 0;
}
int cudaHostUnregister(void* address) {
  for (size_t i = 0; i < num_held; ++i)
    if (held[i].address == address) {
      held_bytes -= held[i].size; held[i] = held[--num_held];
      return 0;
    }
  return sticky = 713;
}
int cudaSetDevice(int chosen) { device = chosen; return 0; }
int cudaGetLastError(void) { int code = sticky; sticky = 0; return code; }
const char* cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "another error"; }
size_t fake_held_bytes(void) { return held_bytes; }
int fake_num_calls(void) { return num_calls; }
"""


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("cudart")
    (folder / "fake.c").write_text(FAKE)
    library = folder / "libcudart.so.99"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "fake.c")], check=True)
    return str(library)


@pytest.fixture
def runtime(fake_library, monkeypatch, tmp_path):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FAKE_CUDA_CEILING", raising=False)
    monkeypatch.setattr(pinning, "free_memory_bytes", lambda: 1 << 40)
    runtime = CudaRuntime(fake_library)
    assert held(runtime) == 0
    yield runtime
    if held(runtime):
        gc.collect()  # what a failure's traceback still holds
    assert held(runtime) == 0, "something stayed locked"


def held(runtime):
    import ctypes

    library = ctypes.CDLL(runtime.path)
    library.fake_held_bytes.restype = ctypes.c_size_t
    return library.fake_held_bytes()


# ---- finding it ----


def test_the_runtime_that_the_process_has_loaded_is_found(runtime, monkeypatch):
    monkeypatch.delenv("OFFLOAD_RT_CUDART", raising=False)
    assert runtime.path in cudart._loaded()
    assert find_cuda_runtime() is not None


def test_a_process_without_one_has_none(monkeypatch):
    code = (
        "import os; os.environ.pop('OFFLOAD_RT_CUDART', None)\n"
        "from offload_rt.memory import cudart; cudart._NAMES = ('libcudart.so.none',)\n"
        "import sys; print(cudart.find_cuda_runtime(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_the_environment_names_one_or_none(runtime, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CUDART", runtime.path)
    assert find_cuda_runtime().path == runtime.path
    monkeypatch.setenv("OFFLOAD_RT_CUDART", "")
    assert find_cuda_runtime() is None


# ---- locking ----


def flags_of(address):
    """Of the mapping that holds `address`, as the kernel names them."""
    here = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
                here = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif here and line.startswith("VmFlags:"):
                return line.split()[1:]
    return []


def test_locked_memory_is_not_passed_on_to_forked_processes(runtime):
    arena = Arena("a", 2 * MIB)
    assert "dc" not in flags_of(arena.region.address)
    pin(arena.region, runtime)
    assert "dc" in flags_of(arena.region.address), "not to be copied by a fork"


@pytest.mark.parametrize("num_bytes", [1, PAGE, 5 * MIB + PAGE])
def test_an_arena_is_locked_to_the_byte_until_its_last_view_is_gone(runtime, num_bytes):
    arena = Arena("a", num_bytes)
    pin(arena.region, runtime)
    assert held(runtime) == arena.num_bytes
    slot = arena.acquire(num_bytes, "x")
    del arena
    assert held(runtime) > 0, "unlocked under a lease"
    del slot
    assert held(runtime) == 0


def test_a_refusal_is_typed_and_spoils_nothing_after_it(runtime, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CEILING", str(MIB))
    large, small = Region(2 * MIB), Region(MIB)
    with pytest.raises(PinningRefused, match="2097152 bytes: CUDA error 2 .out of memory.") as raised:
        pin(large, runtime)
    assert raised.value.code == 2
    assert large.before_unmap == []
    pin(small, runtime)  # the error was read
    assert held(runtime) == MIB
    with pytest.raises(PinningRefused, match="712"):
        runtime.register(small.address, PAGE)


@pytest.mark.filterwarnings("error")  # also of what a finalizer raises
def test_a_driver_that_is_gone_before_the_memory_is_no_error(runtime):
    region = Region(PAGE)
    pin(region, runtime)
    runtime.unregister(region.address)
    del region


# ---- the ceiling ----


@pytest.mark.parametrize(
    "limit, ceiling, expected",
    [(8, None, 8), (8, 8, 8), (8, 5, 5), (8, 0, 0), (7, None, 7), (0, None, 0)],
)
def test_the_ceiling_is_found_and_everything_given_back(runtime, monkeypatch, limit, ceiling, expected):
    if ceiling is not None:
        monkeypatch.setenv("FAKE_CUDA_CEILING", str(ceiling * MIB + 5000))
    found, reason = measure_ceiling(runtime, limit * MIB, MIB)
    assert found == expected * MIB
    assert ("out of memory" in reason) == (expected < limit)


def test_the_ceiling_is_tried_in_a_child_once_per_boot(runtime, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CEILING", str(5 * MIB))
    found = pin_ceiling(runtime, 8 * MIB, step_bytes=MIB)
    assert found.ceiling_bytes == 5 * MIB
    assert "out of memory" in found.reason
    monkeypatch.setattr(pinning, "_ask_child", None)  # not asked again
    assert pin_ceiling(runtime, 100 * MIB, step_bytes=MIB) == found
    assert pin_ceiling(runtime, 2 * MIB).ceiling_bytes == 2 * MIB


def test_the_child_has_its_context_on_the_gpu_that_will_compute(runtime, monkeypatch, tmp_path):
    """The first one may be full, or somebody else's. From any folder: the child finds the package by itself."""
    monkeypatch.setenv("FAKE_CUDA_FREE_GPU", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pinning, "is_wsl", lambda: True)
    monkeypatch.setattr(pinning, "TRIED_BYTES", 4 * MIB)
    monkeypatch.setattr(pinning, "STEP_BYTES", MIB)
    refused = known_ceiling(runtime, 0)
    assert refused is not None and refused.ceiling_bytes == 0 and "out of memory" in refused.reason
    assert known_ceiling(runtime, 1) is None, "all that was tried was locked"


def test_a_search_without_refusal_says_nothing_about_more(runtime, monkeypatch):
    asked = []

    def ask(library, limit_bytes, step_bytes, gpu):
        asked.append(limit_bytes)
        return Ceiling(ceiling_bytes=limit_bytes)

    monkeypatch.setattr(pinning, "_ask_child", ask)
    for limit in (4, 4, 3, 8, 8):
        assert pin_ceiling(runtime, limit * MIB).ceiling_bytes == limit * MIB
    assert asked == [4 * MIB, 8 * MIB]


@pytest.mark.parametrize("content", ["", "[]", '{"boot": 1}', '{"boot": "BOOT", "library": "LIBRARY"}'])
def test_an_unreadable_cache_is_measured_again(runtime, monkeypatch, tmp_path, content):
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / "cache").mkdir()
    place = tmp_path / "cache" / "pinning.json"
    place.write_text(content.replace("BOOT", boot).replace("LIBRARY", runtime.path))
    monkeypatch.setattr(pinning, "_ask_child", lambda *rest: Ceiling(ceiling_bytes=7))
    assert pin_ceiling(runtime, 10).ceiling_bytes == 7


def test_a_child_that_dies_or_hangs_is_a_ceiling_of_zero(runtime, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_CRASH", "1")
    found = pinning._ask_child(runtime.path, MIB, MIB, 0)
    assert found.ceiling_bytes == 0
    assert "ended with -6" in found.reason
    monkeypatch.setattr(pinning, "CHILD_SECONDS", 0.001)
    assert "did not end" in pinning._ask_child(runtime.path, MIB, MIB, 0).reason


@pytest.mark.parametrize("free, asked", [(9 * MIB, 4 * MIB), (7 * MIB, 3 * MIB), (2 * MIB - 1, None)])
def test_no_more_than_half_of_what_is_free_is_tried(runtime, monkeypatch, free, asked):
    tried = []
    monkeypatch.setattr(pinning, "free_memory_bytes", lambda: free)
    monkeypatch.setattr(pinning, "TRIED_BYTES", 4 * MIB)
    monkeypatch.setattr(pinning, "STEP_BYTES", MIB)
    monkeypatch.setattr(pinning, "is_wsl", lambda: True)
    monkeypatch.setattr(
        pinning, "_ask_child",
        lambda _, limit_bytes, *rest: (tried.append(limit_bytes), Ceiling(ceiling_bytes=limit_bytes))[1],
    )  # fmt: skip
    for _ in range(2):
        assert known_ceiling(runtime, 0) is None
    assert tried == ([] if asked is None else [asked])


def test_a_ring_is_wanted_where_not_all_can_be_locked_and_is_below_the_ceiling():
    wanted = [ring_bytes(1 << 30, Ceiling(ceiling_bytes=n * MIB)) for n in (0, 1, 2, 40, 800, 1023, 1024)]
    assert wanted == [0, 0, MIB, 20 * MIB, RING_BYTES, RING_BYTES, 0]


def test_a_ceiling_is_known_where_a_refusal_was_met_and_looked_for_on_wsl_alone(runtime, monkeypatch):
    monkeypatch.setattr(pinning, "TRIED_BYTES", 4 * MIB)
    monkeypatch.setattr(pinning, "STEP_BYTES", MIB)
    assert known_ceiling(runtime, 0) is None
    monkeypatch.setattr(pinning, "is_wsl", lambda: True)
    monkeypatch.setenv("FAKE_CUDA_CEILING", str(3 * MIB))
    found = known_ceiling(runtime, 0)
    assert found is not None and found.ceiling_bytes == 3 * MIB and "out of memory" in found.reason
    monkeypatch.setattr(pinning, "is_wsl", lambda: False)
    assert known_ceiling(runtime, 0) == found, "remembered"


def test_a_search_that_met_no_refusal_knows_of_no_ceiling(runtime, monkeypatch):
    pin_ceiling(runtime, 4 * MIB, step_bytes=MIB)
    assert known_ceiling(runtime, 0) is None


@pytest.mark.parametrize("ceiling, said", [(None, "at least 2 GiB can"), (600 * MIB, "only 512 MiB can")])
def test_doctor_says_how_much_can_be_locked(runtime, monkeypatch, tmp_path, ceiling, said):
    if ceiling is not None:
        monkeypatch.setenv("FAKE_CUDA_CEILING", str(ceiling))
    monkeypatch.setenv("OFFLOAD_RT_CUDART", runtime.path)
    line = doctor.pinnable_memory()
    assert said in line
    assert ("out of memory" in line) == (ceiling is not None)
    monkeypatch.setattr(doctor, "_has_driver", lambda: False)
    assert said in doctor.pinnable_memory()
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(pinning, "free_memory_bytes", lambda: 100 * MIB)
    assert "too little is free" in doctor.pinnable_memory()
    monkeypatch.setenv("OFFLOAD_RT_CUDART", "/none.so")
    assert "is no CUDA runtime" in doctor.pinnable_memory()
    monkeypatch.setenv("OFFLOAD_RT_CUDART", "")
    assert doctor.pinnable_memory() == "no CUDA runtime: host memory is not locked"


def test_without_a_driver_doctor_says_so_and_nobody_remembers_that_nothing_could_be_locked(runtime, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CUDART", runtime.path)
    monkeypatch.setenv("FAKE_CUDA_CEILING", "0")
    monkeypatch.setattr(doctor, "_has_driver", lambda: False)
    assert doctor.pinnable_memory().startswith("no GPU driver")
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    assert doctor.pinnable_memory().startswith("only 0 B can")
    monkeypatch.delenv("FAKE_CUDA_CEILING")
    assert "at least 2 GiB can" in doctor.pinnable_memory()
