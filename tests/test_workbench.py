"""Where a profile runs: what is timed there is timed awake, and what is over soon, several times in one."""

from __future__ import annotations

import time

import pytest
import torch

from offload_rt.layers.discover import find_blocks
from offload_rt.profiling import workbench
from offload_rt.profiling.block_profile import call_of, profile_layer
from offload_rt.profiling.edge_profile import profile_head
from offload_rt.profiling.workbench import AWAKE_SECONDS, Workbench
from tests.conftest import build_lora
from tests.fake_device import FakeDevice

WORK_SECONDS, LOOK_SECONDS, ASLEEP = 1e-4, 8e-4, 5.0


@pytest.mark.parametrize("on_a_device", [True, False])
def test_a_device_is_timed_awake_and_by_more_than_a_look_at_the_clock(
    on_a_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs more than the work; until it had `AWAKE_SECONDS` of work, the device takes five times as long."""
    device = FakeDevice(kernels_are_late=False) if on_a_device else None
    clock, runs = [0.0], []

    def work() -> None:
        runs.append(clock[0])
        clock[0] += WORK_SECONDS * (ASLEEP if on_a_device and clock[0] < AWAKE_SECONDS else 1.0)

    def now() -> float:
        clock[0] += LOOK_SECONDS
        return clock[0]

    with Workbench(device) as place, monkeypatch.context() as patch:
        patch.setattr(place, "now", now)
        patch.setattr(workbench, "median_seconds", lambda work, clock=now: plain(work, clock))
        found = place.median_seconds(work)
        place.wake(work)
    if on_a_device:
        assert WORK_SECONDS <= found < 1.2 * WORK_SECONDS
        device.close()
    else:
        assert found == pytest.approx(WORK_SECONDS + LOOK_SECONDS) and len(runs) == 1 + workbench.RUNS


plain = workbench.median_seconds


def test_a_layer_is_profiled_as_it_trains_whatever_the_model_does_now() -> None:
    """Dropout of adapters saves its masks; a model comes as it evaluates from where it was loaded."""
    model = build_lora("llama", dropout=0.1)
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    kept = [profile_layer(model.train(mode), draft, batch_size=2, seq_len=64).kept for mode in (True, False)]
    assert not any(module.training for module in model.modules())
    assert None not in kept and len({(each.saved_bytes, each.small_bytes) for each in kept}) == 1


def test_products_are_timed_with_numbers_that_are_not_all_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes less power for those, and is faster than in training."""
    spreads, linear = [], torch.nn.functional.linear

    def spied(inputs: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        spreads.extend(float(tensor.detach().float().std()) for tensor in (inputs, weight) if not tensor.is_meta)
        return linear(inputs, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    with torch.device("meta"):
        model = build_lora("llama")
    state = torch.get_rng_state()
    profile_head(hidden_size=8, vocabulary=32, num_tokens=16, tile_tokens=16, dtype=torch.bfloat16)
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    num_of_head = len(spreads)
    profile_layer(model, draft, batch_size=2, seq_len=8)
    assert len(spreads) > num_of_head > 0 and min(spreads) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert call_of(model, draft.modules[0], 2, 8).hidden.float().std() > 0


def test_the_clock_is_read_when_all_is_over_that_a_device_was_given_to_compute() -> None:
    device, over = FakeDevice(), []
    with Workbench(device) as place:
        for number in range(3):
            device.compute.give(lambda: (time.sleep(0.02), over.append(None)))
            place.now()
            assert len(over) == number + 1
    device.close()


def test_what_a_profile_puts_away_for_a_device_is_within_the_budget_of_ram(caplog: pytest.LogCaptureFixture) -> None:
    """Twice what a layer saves, which a device would lock."""
    model, device = build_lora("llama"), FakeDevice(kernels_are_late=False)
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    found = []
    for host_bytes in (64 << 20, 1 << 12):
        with Workbench(device, host_bytes) as place:
            found.append(profile_layer(model, draft, batch_size=2, seq_len=64, bench=place).kept)
    assert found[0] is not None and found[1] is None
    assert "could not be measured" in caplog.text and "host memory: profile, swapped needs" in caplog.text
    device.close()


def test_what_a_profile_has_made_is_given_back_though_somebody_sees_it() -> None:
    device = FakeDevice(kernels_are_late=False)
    with Workbench(device, 1 << 20) as place:
        seen = place.arena("layer", 4096).acquire(4096, "layer").tensor(torch.uint8, (4096,)).fill_(7)
    assert not seen.any(), "its pages are the system's again"
    device.close()
