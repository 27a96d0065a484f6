"""What a GPU's budget is for, and how it is kept, with a stand-in for `torch.cuda` and for the driver."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt._engine import Engine
from offload_rt.cli import train
from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError
from offload_rt.memory import cuda_memory
from offload_rt.memory.cuda_memory import Bound, bytes_beside_allocator, capacity_bytes, no_room
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import find_workload
from planners.rule.filling import Fill
from planners.rule.streaming import plan_streaming
from tests.conftest import build_lora, build_plain
from tests.fake_device import FakeDevice

GPU = torch.device("cuda", 0)
MIB = 1 << 20
PID = 4711


class Card:
    """A GPU of 1000 MiB. What others have of it; what this process has: a context, and torch's allocator."""

    def __init__(self) -> None:
        self.others, self.context, self.reserved, self.allocated = 0, 300 * MIB, 0, 0
        self.num_emptied = 0
        self.settled: set[threading.Thread] = set()

    @property
    def free(self) -> int:
        return 1000 * MIB - self.others - self.context - self.reserved

    def settle(self, device: torch.device) -> None:
        """A thread has a workspace from torch's allocator, and a handle of the driver's memory, once."""
        if threading.current_thread() in self.settled:
            return
        if self.settled:
            assert not torch._C._is_multithreading_enabled(), "backward is this thread's, too"
            self.context += 2 * MIB
        self.settled.add(threading.current_thread())
        self.reserved, self.allocated = self.reserved + 20 * MIB, self.allocated + 16 * MIB

    def empty_cache(self) -> None:
        self.reserved = self.allocated
        self.num_emptied += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    replaced: dict[str, Callable[..., Any]] = {
        "mem_get_info": lambda device: (card.free, 1000 * MIB),
        "memory_reserved": lambda device: card.reserved,
        "memory_allocated": lambda device: card.allocated,
        "empty_cache": card.empty_cache,
        "get_device_properties": lambda device: SimpleNamespace(uuid="u"),
        "current_stream": lambda device: "compute",
        "stream": lambda stream: {"compute": nullcontext()}[stream],
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(cuda_memory, "settle", card.settle)
    monkeypatch.setattr(cuda_memory, "_of_a_thread", {})
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return card


def driver(card: Card, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver knows one process, by a number that this one may not have (in a container, say)."""
    nvml: Any = ModuleType("pynvml")
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-u": "handle"}[uuid]
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
        SimpleNamespace(pid=pid, usedGpuMemory=card.context + card.reserved),
        *([SimpleNamespace(pid=1, usedGpuMemory=card.others)] if card.others else []),
    ]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(cuda_memory.os, "getpid", lambda: PID)


def test_what_lies_beside_the_allocator_is_this_processs_where_the_driver_says_so(card: Card, monkeypatch) -> None:
    card.reserved = 100 * MIB
    assert bytes_beside_allocator(GPU) == 300 * MIB
    card.others = 200 * MIB
    assert bytes_beside_allocator(GPU) == 500 * MIB, "nobody says whose it is"
    driver(card, PID, monkeypatch)
    assert bytes_beside_allocator(GPU) == 300 * MIB
    driver(card, PID + 1, monkeypatch)
    assert bytes_beside_allocator(GPU) == 500 * MIB


def test_who_asks_for_more_than_is_free_is_told_who_has_it(card: Card, monkeypatch) -> None:
    card.reserved, card.allocated, card.others = 100 * MIB, 90 * MIB, 200 * MIB
    error = no_room(GPU, "arena layers", 500 * MIB)
    assert (error.wanted, error.free) == (500 * MIB, 400 * MIB) and isinstance(error, MemoryError)
    assert str(error) == (
        "arena layers: 500 MiB of cuda:0 are asked for, and 400 MiB of its 1000 MiB are free: this process has 90 MiB "
        "of tensors, 10 MiB that torch's allocator keeps, 500 MiB beside it; the driver does not say which processes "
        "have how much. End what else uses the GPU, or give device_memory= less than 1000 MiB"
    )
    driver(card, PID, monkeypatch)
    first = Path("/proc/1/comm").read_text().strip()
    said = str(no_room(GPU, "arena layers", 500 * MIB))
    assert f"300 MiB beside it; {first} (pid 1) has 200 MiB. End" in said and said.endswith("less than 800 MiB")
    card.others = 0
    assert "beside it; nobody else has any. End" in str(no_room(GPU, "arena layers", 700 * MIB))


def test_a_budget_is_for_the_context_and_for_tensors_of_others_too(card: Card) -> None:
    card.reserved, card.allocated = 100 * MIB, 90 * MIB
    # 300 of context, 128 for kernels, 16 of workspaces that come now; of what was there 50 are not the model's
    assert capacity_bytes(GPU, 600 * MIB, 40 * MIB) == (600 - 300 - 128 - 16 - 50) * MIB
    with pytest.raises(ConfigError, match="300 MiB of CUDA's own, 66 MiB of tensors and workspaces"):
        capacity_bytes(GPU, (365 + 128) * MIB, 40 * MIB)


def test_without_a_budget_it_is_what_is_free_of_the_card_and_of_the_allocator_less_a_tenth(card: Card) -> None:
    card.reserved, card.allocated = 100 * MIB, 90 * MIB
    assert capacity_bytes(GPU, None, 0) == (1000 - 300 - 120 + 14) * MIB * 9 // 10


def test_the_planner_is_told_what_is_left_of_a_gpus_budget(card: Card) -> None:
    config = EngineConfig(device="cuda:0", device_memory_bytes=500 * MIB, host_memory_bytes=64 * MIB)
    model: nn.Module = build_plain()
    workload = find_workload(model, None, config, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    assert streaming_problem(workload).device_capacity_bytes == (500 - 300 - 128 - 16) * MIB


def test_threads_of_micro_batches_that_go_together_are_booked_with_what_they_take(card: Card) -> None:
    config = EngineConfig(
        device="cuda:0", device_memory_bytes=600 * MIB, host_memory_bytes=64 * MIB, accumulation_steps=4
    )
    model: nn.Module = build_plain()
    workload = find_workload(model, None, config, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    problem = streaming_problem(workload)
    assert problem.thread_bytes == 18 * MIB, "a workspace and a handle"
    assert problem.device_capacity_bytes == (600 - 300 - 128 - 16 - 18) * MIB, "one thread's is there by now"
    rule = partial(plan_streaming, fill=Fill.NOTHING)
    plan = rule(problem)
    assert plan.layer_major and plan.peak_bytes["device"]["workspaces of other micro-batches"] == 3 * 18 * MIB
    assert streaming_problem(workload).thread_bytes == 18 * MIB, "also where a thread finds what another has left"
    tight = replace(problem, device_capacity_bytes=3 * 18 * MIB)
    assert rule(replace(tight, thread_bytes=0)).layer_major and not rule(tight).layer_major
    alone = find_workload(build_plain(), None, replace(config, accumulation_steps=1))
    assert streaming_problem(alone).thread_bytes == 0


def test_the_planner_may_take_layers_by_chunks_on_a_gpu(card: Card) -> None:
    config = EngineConfig(device="cuda:0", device_memory_bytes=500 * MIB, host_memory_bytes=64 * MIB, seq_len=512)
    problem = streaming_problem(find_workload(build_lora("llama"), None, config))
    assert problem.chunked is not None and problem.chunked.num_tokens == 512
    assert problem.passing_bytes == problem.layer_input_bytes > 0
    chunk_bytes = problem.layer_bytes(256) - problem.chunked.sequence_bytes
    assert chunk_bytes == (problem.activation_bytes - problem.passing_bytes) // 2 * 3 // 2, "charged by itself"


def test_freed_memory_goes_back_when_more_is_reserved_than_the_budget_has_room_for(card: Card, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    card.reserved, card.allocated = 200 * MIB, 50 * MIB
    bound = Bound(GPU)
    bound.keep_within(500 * MIB)
    assert (card.num_emptied, bound.num_trims) == (0, 0), "budget exactly met"
    bound.keep_within(500 * MIB - 1)
    assert (card.num_emptied, bound.num_trims, card.reserved) == (1, 1, 50 * MIB)
    bound.keep_within(500 * MIB - 1)
    assert card.num_emptied == 1


def test_kernels_that_the_first_calls_load_count_against_the_budget(card: Card, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    card.reserved, card.allocated = 200 * MIB, 50 * MIB
    bound = Bound(GPU)
    bound.keep_within(500 * MIB)
    card.context += 40 * MIB
    bound.keep_within(500 * MIB)
    assert (card.num_emptied, card.reserved) == (1, 50 * MIB)


def test_an_engine_keeps_its_device_within_the_budget_at_each_call() -> None:
    device = FakeDevice(kernels_are_late=False)
    arguments: dict[str, Any] = {"batch_size": 2, "seq_len": 6, "host_memory": "20MiB", "device_memory": "64MiB"}
    with Engine(build_plain(), device="cpu", options=RuntimeOptions(device=device), **arguments) as engine:
        for _ in range(2):
            engine(torch.randn(2, 6, 8))
    device.close()
    assert device.kept_within == [64 * MIB] * 2


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_a_training_process_of_our_own_lets_segments_grow_unless_told(before, after, monkeypatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    train._let_segments_grow()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == after
