"""The places where activations are put away: together they hold of DEVICE memory what the plan charges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from offload_rt.config import EngineConfig, NvmePath
from offload_rt.plans.planning_tokens import ActivationSizes
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.tiering.device_stash import DeviceStash
from offload_rt.tiering.tiers import Tiers
from offload_rt.transfers.links import Links
from offload_rt.wiring import activation_assembly
from offload_rt.wiring.activation_assembly import ActivationsAssembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import find_workload
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.plan import Tier
from planners.rule.streaming import plan_streaming
from tests.conftest import build_lora
from tests.fake_device import FakeDevice

PAGE = 4096


def windows_of(folder: Path, activations: dict[str, ActivationPolicy] | None = None) -> tuple[int, dict[Tier, int]]:
    """What is charged of DEVICE memory for what is put away and fetched back, and what each tier's stash has of it."""
    device = FakeDevice(kernels_are_late=False)
    config = EngineConfig(host_memory_bytes=64 << 20, nvme=(NvmePath(path=folder),), seq_len=64)
    workload = find_workload(build_lora("llama"), None, config, options=RuntimeOptions(device=device))
    problem = streaming_problem(workload)
    tiers = Tiers(None, None, None, unified=False, poison=False, device=device)
    links = Links(device=device)
    plan = replace(plan_streaming(problem), activations=activations)
    made = ActivationsAssembly(workload, problem, plan, tiers, links, device)
    windows = {}
    for tier, stash in made.places().swapped.items():
        assert isinstance(stash, DeviceStash)
        windows[tier] = stash._window_bytes
    links.close()
    if made.scratch is not None:
        made.scratch.close()
    device.close()
    return tiers.account(Tier.DEVICE).holdings["swapped activations on their way"], windows


@pytest.mark.parametrize("staging_pages", [4, 16])
def test_what_is_on_its_way_to_two_tiers_shares_the_window_that_is_charged(
    staging_pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOST has what a drive leaves of it, half if as much waits there: all that goes to a drive passes its staging."""
    window_bytes = 8 * PAGE
    sizes = ActivationSizes(
        transient_bytes=PAGE, window_bytes=window_bytes, kept_bytes=0, staging_bytes=staging_pages * PAGE,
        swapped_bytes={Tier.HOST: 64 * PAGE, Tier.NVME: 64 * PAGE}, input_bytes={},
    )  # fmt: skip
    monkeypatch.setattr(activation_assembly, "sizes_of", lambda plan, batch_size: sizes)
    charged_bytes, windows = windows_of(tmp_path)
    assert charged_bytes == sum(windows.values()) == window_bytes
    assert windows[Tier.NVME] == min(staging_pages * PAGE, window_bytes) // 2


@pytest.mark.parametrize("tiers", [(Tier.HOST,), (Tier.NVME,), (Tier.HOST, Tier.NVME), (Tier.HOST,) * 3 + (Tier.NVME,)])
def test_a_plan_that_says_nothing_of_a_window_has_one_for_all_tiers(tiers: tuple[Tier, ...], tmp_path: Path) -> None:
    chunks = tuple(Chunk(num_tokens=64 // len(tiers), action=Action.SWAP, tier=tier) for tier in tiers)
    charged_bytes, windows = windows_of(tmp_path, {"LlamaDecoderLayer": ActivationPolicy(chunks=chunks)})
    assert charged_bytes == sum(windows.values()) > 0 and windows.keys() == set(tiers)
    for tier in windows:
        assert windows[tier] == pytest.approx(charged_bytes * tiers.count(tier) / len(tiers), abs=PAGE)
