"""Updates on the device for a share of the parameters: the bits of the CPU's, every use ordered, every byte charged.

The device is that of `fake_device`: its copies and its updates are late, on threads of their own, so that whatever is
not waited for meets the state, the gradient or the weights of another piece. [Note: updates on the device]:

    CPU         | step 1      | step 2      | step 3      |
    to_device   | state a, gradients a | state b, gradients b | ...
    updates                            | step a              | step b
    to_host                                     | state a     | ...
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.dtypes import torch_dtype
from offload_rt.errors import BudgetExceeded, ConfigError
from offload_rt.optimizer import on_device
from offload_rt.optimizer.on_device import DeviceAdamW, stepping_bytes
from offload_rt.optimizer.pieces import Piece, step_order
from offload_rt.optimizer.rules import AdamWRule
from offload_rt.optimizer.training import FullTraining
from offload_rt.wiring.runtime_options import DEVICE_SLOTS, RuntimeOptions
from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan, Tier
from planners.plans.training_state import TrainedSize, TrainingSizes
from tests.fake_device import FakeDevice
from tests.full_parity import STEPS, Case, make_engine, one_step, run_engine, run_plain, scheduled, training_of
from tests.interpreter import interpreted
from tests.test_device_full import LATE, ON_NVME, PLACES, engine_on
from tests.test_full_parity import ieee_square_root  # noqa: F401 - a fixture of this module too

SPLIT = "split over HOST and NVME"


@pytest.fixture(autouse=True)
def split_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every block the first pieces rest in HOST and the last ones on NVMe; the device steps some of both."""
    blocks = {f"model.layers.{number}": 2 for number in range(4)}
    state = replace(ON_NVME, in_memory=blocks, state_slots=2)
    monkeypatch.setitem(PLACES, SPLIT, {"nvme": True, "rest": Tier.NVME, "state": state})


def moved_a_step(training: FullTraining, plan: Plan) -> tuple[int, int, int]:
    """Pieces that the device steps, bytes to it and bytes back, in a step that is done once."""
    state = plan.state
    assert state is not None
    num_pieces = to_device = to_host = 0
    for block in training.blocks:
        resident = block.weights is None or block.name in plan.resident
        for piece in block.pieces[len(block.pieces) - state.on_device.get(block.name, 0) :]:
            num_pieces += 1
            to_device += piece.num_bytes
            to_host += piece.num_bytes
            for segment in piece.segments:
                count = segment.end - segment.begin
                to_device += count * torch_dtype(block.gradients.tensors[segment.parameter].dtype).itemsize
                to_host += 0 if resident else count * block.parameters[segment.parameter].parameter.element_size()
    return num_pieces, to_device, to_host


def check(case: Case, folder: Path, plan: Plan | str = "auto", **options: Any) -> Plan:
    """Runs the case with updates on the device, compares everything, and returns the plan."""
    expected = run_plain(case)
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    with engine_on(device, case, folder, plan, **{"piece_elements": 4096, **options}) as engine:
        found = run_engine(case, engine)
        for step, (want, got) in enumerate(zip(expected, found, strict=True), 1):
            assert [f"step {step}: {name}" for name in got if not torch.equal(want[name], got[name])] == []
        training, report, recorder = training_of(engine), engine.report()["training"], engine._runtime.recorder
        moved = report["num_pieces_on_device"], report["bytes_to_device"], report["bytes_to_host"]
        once = moved_a_step(training, engine.plan)
        if case.family == "moe":  # experts without tokens are not stepped
            assert moved[0] > STEPS
        elif report["num_redone"]:
            assert case.clipping == "rarely"
            assert all(STEPS * each < found <= (STEPS + 1) * each for each, found in zip(once, moved, strict=True))
        else:
            assert moved == tuple(STEPS * each for each in once)
        assert device.updates.num_launches == moved[0] > 0
        assert report["num_pieces"] >= moved[0]
        ahead = "NVME" in case.place and case.clipping != "always" and engine.plan.update_mode is not UpdateMode.AFTER
        assert (report["num_ahead_of_norm"] > 0) == ahead
        assert "pieces on the device" in engine.summary()
        assert "optimizer state" not in device.locked, "the CPU's share is locked in memory for nothing"
        if recorder is not None:
            steps = [operation for operation in recorder.operations if operation.name.startswith("step ")]
            assert len([step for step in steps if step.lane.startswith("transfer")]) == moved[0]
            assert [str(race) for race in recorder.check()] == []
        plan_made: Plan = engine.plan
    device.close()
    return plan_made


CASES = [
    (Case("llama", "bfloat16", "adamw", 1, "rarely", True, "from HOST"), {"record": True}),
    (Case("qwen", "float32", "adamw bf16", 2, "always", False, "from HOST, committed"), {"device_share": 1.0}),
    (Case("llama", "bfloat16", "adamw", 1, "rarely", False, SPLIT), {"device_share": 0.8}),
    (Case("llama", "float32", "adamw", 1, "not", True, SPLIT), {"update_mode": UpdateMode.AFTER, "record": True}),
    (Case("moe", "bfloat16", "adamw", 1, "rarely", True, "weights in HOST, state on NVME"), {"device_share": 1.0}),
    (Case("qwen", "bfloat16", "adamw", 2, "not", False, "gradients on NVME"), {"record": True}),
]


MORE_CASES = [
    (Case("llama", "bfloat16", "adamw", 1, "rarely", False, "on NVME"), {"record": True}),
    (Case("gpt2", "float32", "adamw", 2, "rarely", True, "on NVME"), {"device_share": 0.3}),
    (Case("llama", "bfloat16", "adamw bf16", 1, "not", False, "on NVME"), {"device_share": 1.0}),
    (Case("llama", "bfloat16", "adamw", 3, "rarely", False, SPLIT), {"device_share": 0.8}),
]
"""The same by other ways. The first one is what the kernel for GPUs steps, below."""


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *(pytest.param(*one, id=str(one[0])) for one in CASES),
        *(pytest.param(*one, id=str(one[0]), marks=pytest.mark.full) for one in MORE_CASES),
    ],
)
def test_updates_on_the_device_are_bit_equal_to_plain_pytorch(
    case: Case, options: dict[str, Any], tmp_path: Path
) -> None:
    check(case, tmp_path, **{"device_share": 0.5, **options})


def test_weights_that_the_device_holds_are_stepped_in_place(tmp_path: Path) -> None:
    """All layers resident, where the rule's plan has them come from HOST: nothing lands."""
    case = Case("llama", "bfloat16", "adamw", 1, "rarely", False, "from HOST")
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    with engine_on(device, case, tmp_path, piece_elements=4096, device_share=1.0) as engine:
        plan = engine.plan
    device.close()
    layers = tuple(name for ring in plan.rings for name in ring.blocks)
    check(case, tmp_path, replace(plan, resident=(*plan.resident, *layers), rings=()), record=True)


def test_the_kernel_for_gpus_gives_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, in place of its plain twin; from state on NVMe, in bfloat16, clipped once."""
    adam = interpreted("offload_rt.adamw.adam_triton", monkeypatch)
    if tuple(map(int, adam.triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip(f"the interpreter of Triton {adam.triton.__version__} rounds tl.fma twice, 3.9's once")
    rule = DeviceAdamW("cpu")
    rule.step = adam.step
    monkeypatch.setattr(on_device, "DeviceAdamW", lambda device: rule)
    check(Case("llama", "bfloat16", "adamw", 1, "rarely", False, "on NVME"), tmp_path, device_share=0.5, record=True)
    assert adam.counters.stepped_elements > 0


def test_what_the_device_stepped_the_cpu_goes_on_with(tmp_path: Path) -> None:
    """A log is the same whoever steps: a run goes on from it without a device, bit for bit."""
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "on NVME")
    expected = run_plain(case)
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    with engine_on(device, case, tmp_path, piece_elements=4096, device_share=0.5) as engine:
        run_engine(case, engine, steps=2)
        assert engine.report()["training"]["num_pieces_on_device"] > 0
    device.close()
    with make_engine(case, tmp_path) as engine:
        assert engine.optimizer is not None
        scheduler = scheduled(engine.optimizer)
        engine.track("scheduler", scheduler)
        assert engine.committed["step"] == 2
        engine.load_checkpoint(engine.commit_folder)
        found = [one_step(case, engine, scheduler, step) for step in range(2, STEPS)]
    for want, got in zip(expected[2:], found, strict=True):
        assert [name for name in got if not torch.equal(want[name], got[name])] == []


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_checkpoint_of_state_in_memory_goes_from_a_device_to_one(share: float, tmp_path: Path) -> None:
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "from HOST")
    expected = run_plain(case)
    devices = [FakeDevice(late_seconds=LATE, kernels_are_late=False) for _ in range(2)]
    with engine_on(devices[0], case, tmp_path, piece_elements=4096, device_share=share, record=True) as engine:
        run_engine(case, engine, steps=2)
        engine.save_checkpoint(tmp_path / "saved")
        recorder = engine._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
    with engine_on(devices[1], case, tmp_path, piece_elements=4096, device_share=share, record=True) as engine:
        assert engine.optimizer is not None
        scheduler = scheduled(engine.optimizer)
        engine.track("scheduler", scheduler)
        one_step(case, engine, scheduler, 0)
        engine.load_checkpoint(tmp_path / "saved")
        found = [one_step(case, engine, scheduler, step) for step in range(2, STEPS)]
        recorder = engine._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
    for want, got in zip(expected[2:], found, strict=True):
        assert [name for name in got if not torch.equal(want[name], got[name])] == []
    for device in devices:
        device.close()


def placed(plan: Plan, **changes: Any) -> Plan:
    assert plan.state is not None
    return replace(plan, state=replace(plan.state, **changes))


def test_what_the_device_cannot_step_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "from HOST")
    device = FakeDevice(kernels_are_late=False)
    with engine_on(device, case, tmp_path) as engine:
        plan = engine.plan
    layer = "model.layers.0"
    for there, message in (
        ({"head": 1}, "state of 'head' stepped on the device, which is no block that trains"),
        ({layer: 2}, f"2 pieces of state of '{layer}' stepped on the device, which has 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_on(device, case, tmp_path, placed(plan, on_device=there, device_slots=1))
    there = placed(plan, on_device={layer: 1}, device_slots=1)
    with pytest.raises(ConfigError, match="1 pieces of state are stepped on the device, but device='cpu' is the CPU"):
        make_engine(case, tmp_path, host_memory="64MiB", plan=there)
    device.close()


@pytest.mark.parametrize("optimizer", ["adamw 8bit", "lion"])
def test_an_optimizer_without_an_update_on_the_device_is_refused(optimizer: str, tmp_path: Path) -> None:
    device = FakeDevice(kernels_are_late=False)
    with pytest.raises(ConfigError, match="is not stepped on a device, AdamW with float32 or bfloat16 moments is"):
        engine_on(device, Case("llama", "bfloat16", optimizer, 1, "not", False, "from HOST"), tmp_path, device_share=1)
    device.close()


def test_a_gpu_without_triton_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"needs Triton \(No module named .*adam_triton\): pip install"):
        on_device.device_rule(AdamWRule("float32"), "cuda:0")


def test_slots_in_device_memory_are_charged(tmp_path: Path) -> None:
    """A budget that is exactly met, and one byte less."""
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "from HOST")
    device = FakeDevice(kernels_are_late=False)
    with engine_on(device, case, tmp_path, device_share=1.0) as engine:
        plan, account = engine.plan, engine._runtime.tiers.account(Tier.DEVICE)
        blocks = training_of(engine).blocks
    assert plan.state is not None
    item = "optimizer state stepped there"
    assert account.holdings[item] == plan.peak_bytes["device"][item] == DEVICE_SLOTS * stepping_bytes(blocks)
    largest = max((p for b in blocks for p in b.pieces), key=lambda piece: piece.num_bytes)
    elements = sum(segment.end - segment.begin for segment in largest.segments)
    assert stepping_bytes(blocks) >= largest.num_bytes + 4 * elements, "state, gradients and new weights"
    make = {"host_memory": "64MiB", "options": RuntimeOptions(device=device, layer_inputs=Tier.HOST, num_slots=2)}
    make_engine(case, tmp_path, plan=plan, device_memory=account.used_bytes, **make).close()
    with pytest.raises(BudgetExceeded, match="device memory"):
        make_engine(case, tmp_path, plan=plan, device_memory=account.used_bytes - 1, **make)
    device.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_device": {"layers.0": 0}, "device_slots": 1}, "pieces of layers.0 stepped on the device must be a whole"),
        ({"on_device": {"layers.0": 1}}, "1 pieces are stepped on the device through 0 device_slots"),
        ({"device_slots": 2}, "0 pieces are stepped on the device through 2 device_slots"),
        ({"device_slots": -1}, "device_slots must be a whole number of at least 0"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ON_NVME, **changes)


def test_a_share_is_whole_pieces_of_every_block_and_part_of_the_plan() -> None:
    blocks = tuple(
        TrainedSize(name=name, pieces=(4096,) * count, gradient_bytes=0, weight_bytes=0)
        for name, count in (("a", 4), ("b", 1), ("c", 3))
    )
    sizes = TrainingSizes(blocks=blocks, clips=False, commits_each_step=True, stepping_bytes=8192)
    for share, counts in ((0.0, {}), (0.2, {"a": 1, "c": 1}), (0.5, {"a": 2, "b": 1, "c": 2}), (1.0, [4, 1, 3])):
        state = ON_NVME.stepped_on_device(sizes, share, slots=3)
        assert state.on_device == (counts if isinstance(counts, dict) else dict(zip("abc", counts, strict=True)))
        assert state.device_bytes(sizes) == (3 * 8192 if counts else 0)
        plan = Plan(fingerprint="", planner="", resident=(), rings=(), state=state)
        assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=r"a share of 1\.5"):
        ON_NVME.stepped_on_device(sizes, 1.5, slots=3)


def test_the_device_steps_its_pieces_among_those_of_the_cpu() -> None:
    pieces = [Piece(str(number), (), 4096) for number in range(6)]
    assert [p.name for p in step_order(pieces, {"4", "5"})] == ["4", "0", "5", "1", "2", "3"]
    assert [p.name for p in step_order(pieces, set())] == list("012345")
    assert [p.name for p in step_order(pieces, set("012345"))] == list("012345")
