"""What the emulated device finds, and what it lets through. `test_emulated_cuda` runs this."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, OutOfDeviceMemory
from offload_rt.guards.integrity import CHECKED_STEPS
from offload_rt.memory.arena import Arena
from offload_rt.memory.cuda_memory import settle
from offload_rt.memory.pinning import Ceiling
from offload_rt.quantized import nf4_products
from offload_rt.transfers import device_cuda
from offload_rt.transfers.device_cuda import CudaDevice, find_device
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import Tier
from planners.plans.plan import DecodeScope
from tests import full_parity as full
from tests.changing_plans import propose, results
from tests.emulated_cuda import contexts, held, lockable, waits
from tests.parity import BATCH_SIZE, SEQ_LEN, Case, build, micro_batch
from tests.test_moving import placed

NUM_ELEMENTS = 1 << 16


@pytest.fixture
def host():
    """Locked memory of the host, full of ones."""
    device = CudaDevice(find_device("cuda"))
    arena = Arena("host", 4 * NUM_ELEMENTS)
    device.lock(arena.name, arena.region)
    ones = arena.acquire(4 * NUM_ELEMENTS, "ones").tensor(torch.float32, (NUM_ELEMENTS,))
    return ones.fill_(1)


def test_what_is_computed_is_what_the_cpu_computes():
    torch.manual_seed(0)
    layer, x_TD = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)), torch.randn(9, 32)
    found = []
    for device in ("cpu", "cuda"):
        layer = layer.to(device)
        layer.zero_grad()
        layer(x_TD.to(device)).log_softmax(-1).square().sum().backward()
        found.append([parameter.grad.cpu().clone() for parameter in layer.parameters()])
    torch.testing.assert_close(*found)


def test_tensors_of_two_devices_do_not_meet():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        nn.functional.embedding(torch.zeros(1, dtype=torch.long), torch.ones(3, 3, device="cuda"))


def test_a_copy_that_nothing_orders_is_not_there_yet(host):
    stream, there = torch.cuda.Stream(), torch.zeros(NUM_ELEMENTS, device="cuda")
    with held(stream):
        with torch.cuda.stream(stream):
            there.copy_(host, non_blocking=True)
        assert there.sum() == 0
    event = torch.cuda.Event()
    event.record(stream)
    torch.cuda.current_stream().wait_event(event)
    assert there.sum() == NUM_ELEMENTS


def test_memory_that_is_given_back_before_a_copy_has_read_it_is_poisoned(host):
    stream, gone = torch.cuda.Stream(), torch.full((NUM_ELEMENTS,), 2.0, device="cuda")
    with held(stream):
        with torch.cuda.stream(stream):
            host.copy_(gone, non_blocking=True)
        del gone
        gc.collect()
    stream.synchronize()
    assert torch.isnan(host).all()


def test_memory_that_is_given_back_on_its_own_stream_lasts_as_long_as_copies_there(host):
    gone = torch.full((NUM_ELEMENTS,), 2.0, device="cuda")
    with held(torch.cuda.current_stream()):
        host.copy_(gone, non_blocking=True)
        del gone
        gc.collect()
        assert host[0] == 1, "asynchronous"
    torch.cuda.synchronize()
    assert (host == 2).all()


def test_copies_to_pageable_memory_wait_for_their_stream():
    there = torch.ones(4, device="cuda")
    torch.cuda._sleep(20_000_000)
    assert torch.empty(4).copy_(there, non_blocking=True).tolist() == [1.0] * 4


def test_copies_of_pageable_memory_have_read_it_when_they_return():
    source, there = torch.ones(4), torch.zeros(4, device="cuda")
    with held(torch.cuda.current_stream()):
        there.copy_(source, non_blocking=True)
        source.fill_(2)
    assert there.tolist() == [1.0] * 4


def test_copies_are_given_to_tensors_that_were_made_in_inference_mode():
    """By a thread of ours, which is in no such mode: where blocks come from a drive, or through a ring."""
    device = CudaDevice(find_device("cuda"))
    slot = device.arena("a", NUM_ELEMENTS, poison=False).acquire(NUM_ELEMENTS, "x")
    source = torch.arange(NUM_ELEMENTS).to(torch.uint8)
    with torch.inference_mode():
        there = slot.tensor(torch.uint8, (NUM_ELEMENTS,))
    device.to_device.copy([(source, there)])
    device.to_device.record().wait()
    assert there.is_inference() and torch.equal(there.cpu(), source)


def test_the_device_has_random_numbers_of_its_own():
    torch.manual_seed(3)
    before, ones = torch.cuda.get_rng_state(), torch.ones(64, device="cuda")
    dropped = nn.functional.dropout(ones)
    assert not torch.equal(nn.functional.dropout(ones), dropped)
    torch.manual_seed(3)
    torch.rand(5)
    assert torch.equal(torch.cuda.get_rng_state(), before), "the CPU draws from its own"
    assert torch.equal(nn.functional.dropout(ones), dropped)


def test_who_waits_is_told():
    there = torch.ones(4, device="cuda")
    with waits() as found:
        there + there
        there.cpu()
        there.sum().item()
        torch.ones(4).cuda()
        torch.cuda.synchronize()
    assert [(what, num_bytes) for what, num_bytes, _ in found] == [
        ("to host", 16), ("number", 0), ("to device", 16), ("device", 0),
    ]  # fmt: skip
    assert all(stack[-1].startswith(__file__) for _, _, stack in found)


@pytest.mark.parametrize("layer_major", [False, True])
def test_a_steady_step_waits_for_the_device_once_a_micro_batch(layer_major, tmp_path):
    """For its loss. Who else waits are threads that the device's copies are behind. A traced one, too."""
    case = Case("llama", "bf16", 2, False, False, "from HOST")
    with Engine(
        build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=2, lr=1e-2, host_memory="256MiB",
        options=RuntimeOptions(num_slots=2, layer_inputs=Tier.HOST, stream_edges=True, layer_major=layer_major),
    ) as engine:  # fmt: skip
        if layer_major:
            engine.trace(tmp_path / "t.json", steps=2, wait=CHECKED_STEPS)  # the last of these does not come
        for step in range(CHECKED_STEPS + 1):
            with waits() as found:
                engine.train_batch([micro_batch(step, index) for index in range(2)])
        assert engine.report()["passed_on"] > 0 or not layer_major
    assert (tmp_path / "t.json").exists() == layer_major
    ours = [(what, stack) for what, _, stack in found if "transformers" not in stack[-1]]  # which looks at masks
    assert {what for what, _ in ours} == {"number", "event"}
    numbers = [stack[-1] for what, stack in ours if what == "number"]
    assert len(numbers) == 2 and all("integrity.py" in line for line in numbers)
    callers = ("_engine.py", "micro_batches.py", "loop_steps.py")
    events = [stack for what, stack in ours if what == "event"]
    assert not [stack for stack in events if any(caller in line for line in stack for caller in callers)]


RING = 64 << 10
"""Locked, of twice as much that can be: no arena of the runs below is as small as what is left."""


class FullRun(NamedTuple):
    found: list[dict[str, torch.Tensor]]
    engine: Engine
    """Closed."""
    report: dict[str, Any]
    """As it was before."""
    summary: str


def full_run(folder: Path) -> FullRun:
    """Weights come from HOST; gradients, layer inputs and half of the state go there and back."""
    case = full.Case("llama", "bfloat16", "adamw", 1, "not", False, "in place")
    options = RuntimeOptions(
        num_slots=2, layer_inputs=Tier.HOST, poison=True, record=True, piece_elements=1 << 15, device_share=0.5
    )
    with full.make_engine(
        case, folder, device="cuda", device_memory="1GiB", host_memory="256MiB", nvme=False, options=options
    ) as engine:
        return FullRun(full.run_engine(case, engine, steps=2), engine, engine.report(), engine.summary())


@pytest.fixture(scope="module")
def all_locked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    ran = full_run(tmp_path_factory.mktemp("locked"))
    gpu = ran.report["gpu"]
    assert gpu["pageable_bytes"] == gpu["through_ring_bytes"] == 0 < gpu["locked_bytes"]
    return ran.found


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_where_locking_has_a_ceiling_copies_go_through_a_ring_below_it(all_locked, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("offload_rt.memory.pinning.MIN_RING_BYTES", RING)
    monkeypatch.setattr("offload_rt.wiring.ring_assembly.MIN_RING_BYTES", RING)
    ceiling = Ceiling(ceiling_bytes=2 * RING, reason="tried")
    monkeypatch.setattr("offload_rt.transfers.device_cuda.known_ceiling", lambda runtime, gpu: ceiling)
    monkeypatch.setattr("offload_rt.wiring.workload.known_ceiling", device_cuda.known_ceiling)
    with lockable(2 * RING):
        ran = full_run(tmp_path / "ring")
    report, runtime = ran.report, ran.engine._runtime
    assert same(all_locked, ran.found) and [str(race) for race in runtime.recorder.check()] == []
    assert "CUDA error" not in caplog.text, "more was asked for than can be had"
    assert "stays pageable" in caplog.text and "only 128 KiB can be locked (tried)" in caplog.text
    assert report["gpu"]["through_ring_bytes"] > 0.9 * report["bytes_copied"] > 0
    host = runtime.tiers.account(Tier.HOST)
    assert host.holdings["locked ring"] == RING and host.capacity_bytes == 256 << 20
    assert runtime.made_of.problem.host_capacity_bytes == (256 << 20) - RING, "charged before there was a plan"
    assert "copies of it go through a locked ring" in ran.summary


def test_where_nothing_can_be_locked_copies_wait_and_it_is_said(all_locked, tmp_path, caplog):
    with lockable(0):
        ran = full_run(tmp_path / "none")
    assert same(all_locked, ran.found)
    assert "stays pageable" in caplog.text and "for want of a locked ring: locking" in caplog.text
    assert "`offload-rt doctor` has found" in caplog.text
    assert "locked ring" not in ran.engine._runtime.tiers.account(Tier.HOST).holdings
    assert ran.report["gpu"]["locked_bytes"] == 0 and "copies of it hold up the computation" in ran.summary


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="OFFLOAD_EMULATED_DEVICES is below 2")
def test_an_engine_on_another_gpu_than_the_current_one_touches_only_its_own(monkeypatch):
    """By no call of any thread: the other GPU may be full, or somebody else's. Nor by a child of ours."""
    asked = []
    for where in ("offload_rt.transfers.device_cuda", "offload_rt.wiring.workload"):
        monkeypatch.setattr(f"{where}.known_ceiling", lambda runtime, gpu: asked.append(gpu))
    gc.collect()
    with contexts() as found:
        with Engine(
            full.build(full.Case("llama", "bfloat16", "adamw", 1, "not", False, "in place")), batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN, lr=1e-2, device="cuda:1", device_memory="1GiB", host_memory="256MiB",
            options=RuntimeOptions(
                num_slots=2, layer_inputs=Tier.HOST, stream_edges=True, piece_elements=4096, device_share=0.5
            ),
        ) as engine:  # fmt: skip
            engine.train_batch([micro_batch(0, 0)])
            assert engine.report()["training"]["num_pieces_on_device"] > 0
        assert asked == [1, 1]
        del engine
        gc.collect()
    assert [one for one in found if one[0] == 0] == [] and torch.cuda.current_device() == 0
    calls = {call for _, call, _ in found}
    assert {"cudaMalloc", "cudaEventSynchronize", "cudaHostRegister", "cudaHostUnregister"} <= calls


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="OFFLOAD_EMULATED_DEVICES is below 2")
def test_products_on_another_gpu_than_the_current_one_are_timed_there():
    one = torch.ones(1, device="cuda:1")
    with contexts() as found:
        nf4_products._clock(one.device)(lambda: one + one)
    assert {index for index, call, _ in found if call == "cudaEventRecord"} == {1}


def test_tensors_of_the_device_are_copied_and_saved_with_it():
    there = torch.arange(3.0, device="cuda")
    saved = io.BytesIO()
    torch.save(there, saved)
    saved.seek(0)
    for found in (copy.deepcopy(there), torch.load(saved, weights_only=True)):
        assert found.is_cuda and found.data_ptr() != there.data_ptr() and found.tolist() == [0, 1, 2]


def test_freed_memory_is_kept_for_its_stream_and_counted():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.reset_peak_memory_stats()
    begun = torch.cuda.memory_allocated()
    for _ in range(3):
        torch.empty(NUM_ELEMENTS, device="cuda")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before + 1
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.empty(NUM_ELEMENTS, device="cuda")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before + 2
    assert torch.cuda.max_memory_allocated() - begun == 4 * NUM_ELEMENTS
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")


def test_a_model_that_a_trainer_spreads_over_gpus_is_refused_with_what_to_do():
    case = Case("plain", "bf16", 1, False, False, "from HOST")
    ids = torch.zeros(2, 4, dtype=torch.long, device="cuda")
    with Engine(
        build(case), batch_size=2, seq_len=4, device="cuda", device_memory="1GiB", host_memory="256MiB"
    ) as engine:
        assert torch.cuda.device_count() == 2
        with pytest.raises(ConfigError, match="DataParallel: .*CUDA_VISIBLE_DEVICES=0"):
            nn.DataParallel(engine.model)(input_ids=ids, labels=ids)


def test_what_a_gpu_has_no_room_for_is_refused_by_name():
    case = Case("llama", "bf16", 1, False, False, "from HOST")

    def made():
        return Engine(
            build(case).cuda(), device_memory="1GiB", host_memory="256MiB", batch_size=BATCH_SIZE, seq_len=SEQ_LEN,
            lr=1e-2, options=RuntimeOptions(num_slots=2),
        )  # fmt: skip

    def limit(more_bytes):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        all_bytes = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_bytes) / all_bytes)

    made().close()  # libraries have their workspaces from here on
    size = sum(p.numel() * p.element_size() for p in build(case).parameters())
    try:
        for more_bytes, what in ((0, "workspaces of CUDA's libraries"), (size + (128 << 10), "arena ring of layers")):
            limit(more_bytes)
            with pytest.raises(OutOfDeviceMemory, match=f"^{what}: .* of cuda:0 are asked for, .* device_memory= less"):
                made() if more_bytes else settle(torch.device("cuda", 0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with made() as engine:
        assert engine.train_batch([micro_batch(0, 0)]) > 0


def test_backward_passes_run_on_a_thread_of_the_device():
    threads = []
    x = torch.ones(3, device="cuda", requires_grad=True)
    x.register_hook(lambda gradient: threads.append(threading.get_ident()))
    x.sum().backward()
    assert threads and threads[0] != threading.get_ident()


def test_views_are_of_the_same_memory_and_repeats_are_whole():
    x = torch.arange(6.0, device="cuda").reshape(2, 3)
    assert x.repeat(2, 2).tolist() == x.cpu().repeat(2, 2).tolist()
    x.unfold(1, 2, 1).zero_()
    assert x.abs().sum() == 0


def test_each_thread_that_multiplies_has_a_workspace_and_leaves_it_to_the_next():
    stream, x, held = torch.cuda.Stream(), torch.ones(4, 4, device="cuda"), []

    def multiply():
        with torch.cuda.stream(stream):
            x @ x
        held.append(torch.cuda.memory_allocated())

    multiply()
    for _ in range(2):
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()
        while Path(f"/proc/self/task/{thread.native_id}").exists():  # it leaves its workspace behind Python's end of it
            time.sleep(0.001)
    assert 0 < held[1] - held[0] == held[2] - held[0]


def test_the_benchmark_measures_links_with_locked_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    gpu = importlib.import_module("gpu")
    *_, found = gpu.links(SimpleNamespace(smoke=True, rounds=1))
    assert gpu.GPU and len(found[gpu.RATE]) == 5
    assert (found["locked_bytes"], found["pageable_bytes"]) == (2 << 20, 0)
    assert found["memory"]["card_used_bytes"] > found["memory"]["reserved_bytes"] > 0


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_profiled_step_has_its_numbers_whether_or_not_its_trace_can_be_written(is_writable, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    gpu_step = importlib.import_module("gpu_step")
    trace = tmp_path / "trace.json.gz" if is_writable else tmp_path / "no such folder" / "trace.json.gz"
    x, done = torch.ones(4, 4, device="cuda"), []
    contender = SimpleNamespace(step=lambda batch: done.append(x @ x))
    found = gpu_step.profiled(contender, {}, str(trace), 2.0)
    assert len(done) == 1 and found["seconds_under_the_profiler"] > 0
    assert found["sees_gpu"] is False and set(found["busy_over_step"].values()) == {0.0} and found["hidden"] is None
    assert trace.exists() == is_writable == ("trace_error" not in found)


def test_a_change_of_plans_keeps_the_device_and_what_it_has_counted():
    """A plan and its twin, whose memory is as large: what was locked for the first one is given back."""
    case = Case("llama", "bf16", 1, False, False, "from HOST")
    with Engine(
        build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, lr=1e-2, host_memory="256MiB",
        options=RuntimeOptions(num_slots=2, layer_inputs=Tier.HOST, stream_edges=True),
    ) as engine:  # fmt: skip
        engine.train_batch([micro_batch(0, 0)])
        gpu, plan = engine.report()["gpu"], engine.plan
        assert gpu["locked_bytes"] > 0
        for step, proposed in enumerate((replace(plan, decode_scope=DecodeScope.LAYER), plan), 1):
            propose(engine, proposed)
            engine.train_batch([micro_batch(step, 0)])
        assert results(engine) == ["changed"] * 2 and engine.plan == plan
        after = engine.report()["gpu"]
        assert after["locked_bytes"] == gpu["locked_bytes"] and after["pageable_bytes"] == 0
        assert after["allocator_peak_bytes"] >= gpu["allocator_peak_bytes"]


@pytest.mark.parametrize("is_kept", [False, True])
def test_weights_move_on_a_gpu_and_who_keeps_a_state_dict_goes_on_seeing_them(is_kept):
    case, losses = Case("qwen", "bf16", 1, False, False, "from HOST"), []
    for changes in (False, True):
        torch.manual_seed(0)
        with Engine(
            build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, lr=1e-2, host_memory="256MiB",
            options=RuntimeOptions(num_slots=2, stream_edges=True),
        ) as engine:  # fmt: skip
            plans = [
                placed(engine, (1.0, 1.0, 0.5, 0.0), edges=Tier.DEVICE),
                placed(engine, (0.0, 0.6, 0.8, 1.0), edges=Tier.HOST),
            ]
            losses.append([engine.train_batch([micro_batch(0, 0)])])
            for step, plan in enumerate(plans, 1):
                if changes:
                    propose(engine, plan)
                seen = engine.model.state_dict() if changes and is_kept and step == 2 else {}
                seen = {name: (value, value.clone()) for name, value in seen.items() if name not in engine.trainable}
                losses[-1].append(engine.train_batch([micro_batch(step, 0)]))
            assert results(engine) == ["changed"] * len(plans) * changes
            assert bool(seen) is (changes and is_kept)
            assert all(torch.equal(value, before) for value, before in seen.values())
    assert losses[0] == losses[1]


def test_tensors_of_a_slot_leave_no_memory_of_pythons() -> None:
    """Torch keeps what an interface to memory was described with."""
    arena = CudaDevice("cuda").arena("a", 1 << 12, poison=False)
    slot = arena.acquire(1 << 12, "x")

    def blocks(num_tensors: int) -> int:
        for _ in range(num_tensors):
            slot.tensor(torch.uint8, (1000,), 512)
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks(1000)
    assert blocks(1000) - before < 100
