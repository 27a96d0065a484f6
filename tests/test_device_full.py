"""All parameters trained on a device whose copies are asynchronous: every bit as in plain PyTorch, every use ordered.

The device is that of `fake_device`: its copies are late, its kernels torch runs in the calling thread. So what uses a
gradient before it came to HOST computes with NaN, and a forward that does not wait for its new weights with old ones.
Kernels that are late themselves are at the end.

    compute    backward 5 | backward 4          | ..                      [wait] forward 1 of the next step
    to_host               | gradients 5 -> HOST | ..                      /
    updates                                     | sum, norm, step 5 | .. /
    to_device                                                  | weights in place
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan, StatePlacement, Tier
from tests.fake_device import FakeDevice
from tests.full_parity import STEPS, Case, check_activations, make_engine, one_loss, run_engine, run_plain, training_of
from tests.parity import micro_batch
from tests.test_full_parity import ieee_square_root  # noqa: F401 - a fixture of this module too

LATE = 0.0005
ON_NVME = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=4, weight_slots=2)

PLACES: dict[str, dict[str, Any]] = {
    "from HOST": {},
    "from HOST, committed": {"nvme": True, "commit_every": 2},
    "on NVME": {"nvme": True, "rest": Tier.NVME, "piece_elements": 4096},
    "weights in HOST, state on NVME": {"nvme": True, "rest": Tier.HOST, "state": ON_NVME, "piece_elements": 8192,
                                       "update_mode": True},
    "gradients on NVME": {
        "nvme": True, "rest": Tier.NVME, "piece_elements": 8192,
        "state": replace(ON_NVME, gradients=Tier.NVME, state_slots=2, gradient_slots=1),
    },
}  # fmt: skip


def engine_on(device: FakeDevice, case: Case, folder: Path, plan: Plan | str = "auto", **options: Any) -> Engine:
    place = dict(PLACES[case.place])
    arguments: dict[str, Any] = {name: place.pop(name) for name in ("nvme", "commit_every") if name in place}
    if place.pop("update_mode", False):
        place["update_mode"] = UpdateMode.BACKWARD if case.clipping == "not" else UpdateMode.SPECULATIVE
    defaults = {"poison": True, "layer_inputs": Tier.HOST, "num_slots": 2, "device": device}
    arguments["options"] = RuntimeOptions(**{**defaults, **place, **options})
    return make_engine(replace(case, place="in place"), folder, host_memory="64MiB", plan=plan, **arguments)


def check(case: Case, folder: Path, plan: Plan | str = "auto", **options: Any) -> Plan:
    """Runs the case, compares everything, and returns the plan."""
    expected = run_plain(case)
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    with engine_on(device, case, folder, plan, **options) as engine:
        found = run_engine(case, engine)
        for step, (want, got) in enumerate(zip(expected, found, strict=True), 1):
            assert [f"step {step}: {name}" for name in got if not torch.equal(want[name], got[name])] == []
        training, report, recorder = training_of(engine), engine.report(), engine._runtime.recorder
        assert report["training"]["num_steps"] == STEPS
        assert report["training"]["num_clipped"] == {"not": 0, "rarely": 1, "always": STEPS}[case.clipping]
        assert (report["training"]["num_ahead_of_norm"] > 0) == ("NVME" in case.place and case.clipping != "always")
        assert training.home.landing is not None and training.home.landing.num_copies > 0
        assert device.to_host.num_copies >= STEPS * sum(len(block.parameters) for block in training.blocks)
        assert not any("state" in name for name in device.locked)
        check_activations(case, engine)
        if recorder is not None:
            assert recorder.operations
            assert [str(race) for race in recorder.check()] == []
        plan_made: Plan = engine.plan
    device.close()
    return plan_made


CASES = [
    Case("qwen", "bfloat16", "adamw", 2, "rarely", True, "from HOST, committed"),
    Case("gpt2", "float32", "lion", 1, "not", False, "on NVME", "put away"),
    Case("llama", "bfloat16", "adamw 8bit", 4, "rarely", False, "on NVME", "each way"),
    Case("moe", "bfloat16", "adamw", 1, "rarely", True, "weights in HOST, state on NVME", "each way"),
    Case("llama", "bfloat16", "adafactor", 2, "always", False, "gradients on NVME"),
    Case("qwen", "float32", "adamw bf16", 1, "not", False, "gradients on NVME"),
]


@pytest.mark.parametrize(
    "case", [*CASES[1:5], *(pytest.param(case, marks=pytest.mark.full) for case in (CASES[0], CASES[5]))], ids=str
)
def test_full_fine_tuning_on_a_late_device_is_bit_equal_to_plain_pytorch(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, record=case.accumulation == 1)


def test_layers_that_stay_in_the_device_are_stepped_in_place(tmp_path: Path) -> None:
    """Once with what the rule makes, whose layers come from HOST; then with all of them resident."""
    case = Case("llama", "bfloat16", "adamw", 1, "rarely", False, "from HOST")
    plan = check(case, tmp_path, record=True)
    layers = tuple(name for ring in plan.rings for name in ring.blocks)
    assert layers
    check(case, tmp_path, replace(plan, resident=(*plan.resident, *layers), rings=()))


def test_weights_that_an_evaluation_reads_between_backward_and_step_change_behind_it(tmp_path: Path) -> None:
    """Nothing but the copies themselves orders them before the update: no gradient comes of these weights."""
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "from HOST")
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    with engine_on(device, case, tmp_path, record=True) as engine:
        for step in range(2):
            engine.backward(one_loss(engine, step, 0))
            with torch.no_grad():
                engine(**micro_batch(9, 0))
            engine.step()
        recorder = engine._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
        assert any(operation.name.startswith("step ") and operation.writes for operation in recorder.operations)
    device.close()
