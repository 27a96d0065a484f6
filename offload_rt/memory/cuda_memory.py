"""What a process holds of a GPU's memory: in torch's allocator, and beside it. Nothing here has run without a stand-in
for `torch.cuda` but on a GPU.

[Note: beside the allocator]
A CUDA context, kernels, which are loaded at their first use, and what libraries take by themselves are in no count of
torch's: some 500 MiB. A budget of device memory is for these too, since the card must have room for them. The driver
says what each process has of a GPU (NVML); where it does not, in containers and on WSL2, what is in use of the card and
not torch's is taken for it, which is too much where others use the card. Products need workspaces for each thread and
stream, of cuBLAS and of cuBLASLt, up to 32 MiB, which torch allocates and keeps: they are the allocator's, from
`settle` on. Micro-batches that go through the layers together have a thread each: what one takes is measured
(`thread_bytes`).

[Note: fragmentation]
What a plan leaves to torch's allocator are tensors of many sizes that come and go; arenas are one allocation each, and
cannot be torn. Freed memory whose segments fit nothing makes the allocator reserve more than is in use. Segments that
grow (`expandable_segments`) do not do that, but that is a setting of the whole process: `offload-rt train`, which has a
process of its own, turns it on, an engine in a user's process does not. A `torch.cuda.MemPool` would be ours alone, but
has the same segments of fixed sizes, takes the allocations of one thread only, where a backward pass has another, and
what is free in it is of no use outside. So an engine looks before each call of the model: where the allocator has
reserved more than the budget has room for, freed memory goes back to the driver (`keep_within`).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from offload_rt.errors import ConfigError, OutOfDeviceMemory
from planners.errors import format_bytes

logger = logging.getLogger("offload_rt")

KERNELS_BYTES = 128 << 20
"""For kernels that are loaded after `settle`; a guess until a GPU has measured it."""

REFUSED = (torch.OutOfMemoryError, OutOfDeviceMemory)
"""What is raised where a GPU has no room: whoever tells something else of any other error lets these pass."""

WORKSPACE_BYTES = 32 << 20
"""The most that one of CUDA's libraries takes for a thread and stream."""

LOADING_CALLS = 4
"""Of a model, in which kernels are loaded: what lies beside the allocator is asked for again before each."""

_of_a_thread: dict[torch.device, int] = {}
"""What `thread_bytes` found: a second thread may have what the first has left."""


def settle(device: torch.device) -> None:
    """Makes CUDA and cuBLAS take what they keep, for the calling thread and that of its backward passes. Blocks. Raises
    `OutOfDeviceMemory`.
    """
    try:
        one = torch.ones(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.ones(64, device=device, dtype=torch.bfloat16)
        torch.addmm(bias, one, one.mm(one)).sum().backward()  # type: ignore[no-untyped-call]  # with a bias by cuBLASLt
        torch.cuda.current_stream(device).synchronize()
    except torch.OutOfMemoryError:
        raise no_room(device, "workspaces of CUDA's libraries", WORKSPACE_BYTES) from None


def thread_bytes(device: torch.device) -> int:
    """What libraries keep for each thread more that runs calls and their backward passes, as `turns` has them, on the
    stream that is current; none on the CPU. Blocks. One thread's stays taken.
    """
    if device.type == "cpu":
        return 0
    if device not in _of_a_thread:
        stream = torch.cuda.current_stream(device)

        def run() -> None:
            with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
                settle(device)

        settle(device)
        before_bytes = torch.cuda.memory_allocated(device) + bytes_beside_allocator(device)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
        after_bytes = torch.cuda.memory_allocated(device) + bytes_beside_allocator(device)
        _of_a_thread[device] = max(0, after_bytes - before_bytes)
    return _of_a_thread[device]


def bytes_beside_allocator(device: torch.device) -> int:
    """See [Note: beside the allocator]. Takes milliseconds."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    used_bytes = total_bytes - free_bytes
    ours = _processes(device).get(os.getpid())
    if ours is not None:
        used_bytes = min(used_bytes, ours)
    return max(0, used_bytes - torch.cuda.memory_reserved(device))


def seen_of(device: torch.device) -> dict[str, int | None]:
    """What `bytes_beside_allocator` is made of, for whoever wonders: bytes of the card in use, of this process by the
    driver (None where it does not say), of torch's allocator. Behind `settle`. Blocks.
    """
    settle(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {
        "card_bytes": total_bytes, "card_used_bytes": total_bytes - free_bytes,
        "process_bytes": _processes(device).get(os.getpid()), "reserved_bytes": torch.cuda.memory_reserved(device),
        "beside_allocator_bytes": bytes_beside_allocator(device),
    }  # fmt: skip


def capacity_bytes(device: torch.device, budget_bytes: int | None, model_bytes: int) -> int:
    """What a plan may place in the GPU's memory: of a budget, or of what is free less a tenth, where there is none.

    model_bytes: of what torch has allocated there, the model's, which is the plan's. Raises ConfigError where the
    budget has no room for what is there already.
    """
    settle(device)
    if budget_bytes is None:
        cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (int(torch.cuda.mem_get_info(device)[0]) + cached_bytes) * 9 // 10
    left_bytes = budget_bytes - beside_plan_bytes(device, model_bytes)
    if left_bytes <= 0:
        beside_bytes, others_bytes = bytes_beside_allocator(device), _others_bytes(device, model_bytes)
        raise ConfigError(
            f"device_memory: {format_bytes(budget_bytes)} is less than what this process has of {device} already: "
            f"{format_bytes(beside_bytes)} of CUDA's own, {format_bytes(others_bytes)} of tensors and workspaces; "
            f"{format_bytes(KERNELS_BYTES)} are for kernels to come"
        )
    return left_bytes


def beside_plan_bytes(device: torch.device, model_bytes: int) -> int:
    """What a budget has to have room for beside a plan: CUDA's own, kernels to come, tensors and workspaces that are
    there already. Behind `settle`.
    """
    return bytes_beside_allocator(device) + KERNELS_BYTES + _others_bytes(device, model_bytes)


def _others_bytes(device: torch.device, model_bytes: int) -> int:
    return max(0, torch.cuda.memory_allocated(device) - model_bytes)


def give_back_freed(device: torch.device) -> None:
    """Gives what torch's allocator holds of freed memory back to the driver. Waits for the GPU."""
    with torch.cuda.device(device):
        torch.cuda.empty_cache()


class Bound:
    """Keeps what the process holds of one GPU within a budget. See [Note: fragmentation]."""

    def __init__(self, device: torch.device) -> None:
        self.num_trims = 0
        self._device = device
        self._beside_bytes = bytes_beside_allocator(device)
        self._num_calls = 0

    def keep_within(self, budget_bytes: int) -> None:
        """Gives freed memory back to the driver if there is more than `budget_bytes`; waits for the GPU then."""
        if self._num_calls < LOADING_CALLS:
            self._num_calls += 1
            self._beside_bytes = bytes_beside_allocator(self._device)
        if torch.cuda.memory_reserved(self._device) + self._beside_bytes <= budget_bytes:
            return
        self._beside_bytes = bytes_beside_allocator(self._device)  # kernels were loaded meanwhile
        give_back_freed(self._device)
        self.num_trims += 1
        if self.num_trims == 1:
            logger.warning(
                "torch's allocator had reserved more than device_memory has room for; freed memory goes back to the "
                "driver each time, which waits for the GPU. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the "
                "environment keeps it from that"
            )


def no_room(device: torch.device, what: str, wanted_bytes: int) -> OutOfDeviceMemory:
    """What is said where the allocator has refused `wanted_bytes` for `what`: what is free, who has the rest."""
    free_bytes, total_bytes = map(int, torch.cuda.mem_get_info(device))
    allocated_bytes, reserved_bytes = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    beside_bytes = bytes_beside_allocator(device)
    others_bytes = max(0, total_bytes - free_bytes - reserved_bytes - beside_bytes)
    processes = _processes(device)
    others = {pid: num_bytes for pid, num_bytes in processes.items() if pid != os.getpid()}
    holders = [f"{_command(pid)} (pid {pid}) has {format_bytes(size)}" for pid, size in sorted(others.items())]
    if not holders and others_bytes:
        holders = [f"{format_bytes(others_bytes)} are other processes'"]
    if os.getpid() not in processes:
        holders.append("the driver does not say which processes have how much")
    fits_bytes = free_bytes + reserved_bytes + beside_bytes
    return OutOfDeviceMemory(
        f"{what}: {format_bytes(wanted_bytes)} of {device} are asked for, and {format_bytes(free_bytes)} of its "
        f"{format_bytes(total_bytes)} are free: this process has {format_bytes(allocated_bytes)} of tensors, "
        f"{format_bytes(reserved_bytes - allocated_bytes)} that torch's allocator keeps, {format_bytes(beside_bytes)} "
        f"beside it; {'; '.join(holders) or 'nobody else has any'}. End what else uses the GPU, or give device_memory= "
        f"less than {format_bytes(fits_bytes)}",
        wanted=wanted_bytes,
        free=free_bytes,
    )


def _command(pid: int) -> str:
    """The name of a process; that it is one, where it is not ours to see."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process"


def _processes(device: torch.device) -> dict[int, int]:
    """By process, what the driver says that it has of the GPU. Empty where the driver, or NVML, does not say."""
    found: dict[int, int] = {}
    with contextlib.suppress(Exception):  # pynvml has errors of its own, and may be missing
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.usedGpuMemory:
                    found[process.pid] = int(process.usedGpuMemory)
        finally:
            nvml.nvmlShutdown()
    return found
