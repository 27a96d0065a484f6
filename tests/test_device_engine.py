"""An engine on a device whose copies are asynchronous: every bit as in plain PyTorch, and every use ordered.

The device is that of `fake_device`, whose kernels torch runs in the calling thread; `test_streams` has late ones. With
poisoned memory and late copies, what does not wait for its weights computes with NaN.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import DecodeScope, Tier
from tests.fake_device import FakeDevice
from tests.parity import STEPS, Case, build, engine_of, run_plain, run_steps
from tests.test_parity import differences

CASES = [
    Case("llama", "nf4", 1, True, False, "from NVME"),
    Case("llama", "bf16", 2, False, True, "from HOST"),
    Case("qwen", "nf4", 2, False, False, "from HOST"),
    Case("gpt2", "nf4", 1, False, False, "from NVME"),
    Case("moe", "fp32", 1, True, False, "from NVME"),
    Case("plain", "nf4", 1, False, False, "from HOST"),
]


def engine_on(device: FakeDevice, case: Case, folder: Path, **options) -> Engine:
    defaults = {"layer_inputs": Tier.HOST, "num_slots": 2, "stream_edges": True, "record": True, "poison": True}
    return engine_of(
        case, device="cpu", host_memory="64MiB", nvme=folder if case.place == "from NVME" else None,
        options=RuntimeOptions(**{**defaults, "device": device, **options}),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_on_a_late_device_is_bit_equal_to_plain_pytorch(case: Case, tmp_path: Path) -> None:
    device = FakeDevice(late_seconds=0.002, kernels_are_late=False)
    with engine_on(device, case, tmp_path) as engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(run_plain(case), found) == []
        report, recorder = engine.report(), engine._runtime.recorder
        fetches = sum(executor.counters.num_fetches for executor in engine._runtime.executors)
    micro_batches = STEPS * case.accumulation
    assert recorder is not None and [str(race) for race in recorder.check()] == []
    # Every fetch is a copy in, so are the rows of a lookup, every layer's input is one out and one in; nothing is
    # resident.
    lookups = 0 if report["lookups"] is None else report["lookups"]["num_pieces"]
    assert (lookups > 0) == (case.family != "llama")  # whose embedding is tied to its head
    if case.family != "plain" or not case.checkpointing:
        assert device.to_host.num_copies == 4 * micro_batches
        assert device.to_device.num_copies == fetches + 4 * micro_batches + lookups
    assert report["prefetch_misses"] == 0
    assert report["layer_inputs_not_put_away"] == 0
    assert (report["bytes_read"] > 0) == (case.place == "from NVME")
    assert "decoded weights" in device.arenas
    device.close()


@pytest.mark.parametrize("place", ["from HOST", "from NVME"])
def test_what_is_resident_comes_by_copies_too_through_no_memory_that_no_plan_has(place: str, tmp_path: Path) -> None:
    case = Case("qwen", "nf4", 1, False, False, place)  # whose embedding and head are two blocks
    device = FakeDevice(late_seconds=0.002, kernels_are_late=False)
    with engine_on(device, case, tmp_path, stream_edges=None, layer_inputs=Tier.DEVICE) as engine:
        assert len(engine.plan.resident) == 2
        assert device.to_device.num_copies >= 2
        planned, holdings = engine.plan.peak_bytes["host"], engine._runtime.tiers.account(Tier.HOST).holdings
        assert all(num_bytes <= planned.get(owner, 0) for owner, num_bytes in holdings.items()), holdings
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(run_plain(case), found) == []
        assert device.to_host.num_copies == 0
        assert engine._runtime.recorder is not None and engine._runtime.recorder.check() == []
    device.close()


def test_a_steady_step_makes_no_arena_and_leases_the_same(tmp_path: Path) -> None:
    case = Case("llama", "nf4", 1, False, False, "from NVME")
    device = FakeDevice(kernels_are_late=False)
    with engine_on(device, case, tmp_path, decode_scope=DecodeScope.LAYER) as engine:
        counts = []
        for _ in range(3):
            run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
            counts.append((device.to_device.num_copies, device.to_host.num_copies, len(device.arenas)))
        (first, second, third) = counts
        assert third[2] == first[2]
        assert (third[0] - second[0], third[1] - second[1]) == (second[0] - first[0], second[1] - first[1])
        assert third[1] - second[1] == 4 * STEPS
    device.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused_with_what_was_found(device: str) -> None:
    with pytest.raises(ConfigError, match=r"torch .* finds no GPU here; allowed: 'cpu', 'auto'"):
        Engine(build(CASES[0]), device=device)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: 'auto', 'cpu', 'cuda', 'cuda:N'"):
        Engine(build(CASES[0]), device="tpu")
