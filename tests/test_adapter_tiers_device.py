"""Adapters on a device whose optimizer state rests in HOST or on NVMe: stepped where they are, to the bit as in memory.

The device is that of `fake_device`, late with its copies and with its reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, OffloadError, PlanInfeasible
from offload_rt.optimizer.paged import PagedUpdates, rule_on_device
from offload_rt.optimizer.rules import TorchRule
from offload_rt.wiring.runtime_options import DEVICE_SLOTS, RuntimeOptions
from planners.plans.plan import StatePlacement, Tier
from planners.rule.attempts import PAGED_SLOTS
from tests.adapter_tiers import (
    IN_HOST,
    OPTIMIZERS,
    STEPS,
    Case,
    Running,
    build,
    make_engine,
    run_plain,
    training_of,
    unequal,
)
from tests.fake_device import FakeDevice
from tests.full_parity import groups_of
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.test_adapter_tiers import ONE, rank_24, two_steps

SPLIT = StatePlacement(in_memory={"adapters": 2}, gradients=Tier.HOST, state_slots=2)
PLACES: dict[str, dict[str, Any]] = {
    "in HOST": {"state": IN_HOST},
    "on NVME": {"state": StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=3), "piece_elements": 1024},
    "one slot": {"state": StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=1), "piece_elements": 1024},
    "split over HOST and NVME": {"state": SPLIT, "piece_elements": 1024},
}
CASES = [
    (Case("llama", "nf4", "default", 1, 0.05, False, "on NVME"), {"record": True, "poison": True}),
    (Case("gpt2", "bf16", "lion", 2, None, True, "one slot"), {"record": True, "poison": True}),
    (Case("llama", "bf16", "adafactor", 1, None, False, "split over HOST and NVME"), {"record": True}),
    (Case("plain", "bf16", "default", 1, None, False, "in HOST"), {"record": True}),
    (Case("qwen", "nf4", "adamw kernel", 2, 0.05, True, "in HOST"), {"record": True, "poison": True}),
    (Case("moe", "fp32", "sgd", 1, 0.05, False, "split over HOST and NVME"), {}),
]


def engine_on(device: FakeDevice, case: Case, folder: Path, **options: Any) -> Engine:
    given = {"device_share": 1.0, "layer_inputs": Tier.HOST, "num_slots": 2, **PLACES[case.place], **options}
    return Engine(
        build(case), bits=4 if case.weights == "nf4" else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cpu",
        accumulation_steps=case.accumulation, max_grad_norm=case.max_grad_norm, host_memory="64MiB",
        nvme=None if case.place == "in HOST" else folder, options=RuntimeOptions(**given, device=device),
        optimizer=lambda parameters: OPTIMIZERS[case.optimizer](groups_of(case, parameters)),  # type: ignore[arg-type]
    )  # fmt: skip


def late_device() -> FakeDevice:
    return FakeDevice(late_seconds=0.002, kernels_are_late=False)


@pytest.mark.parametrize(("case", "options"), CASES, ids=[str(case) for case, _ in CASES])
def test_state_passes_through_the_device_and_every_bit_is_that_of_the_optimizer_in_memory(
    case: Case, options: dict[str, Any], tmp_path: Path
) -> None:
    device = late_device()
    with engine_on(device, case, tmp_path, **options) as engine:
        assert unequal(run_plain(case), Running(case, engine).steps(range(STEPS))) == []
        training, report, recorder = training_of(engine), engine.report()["training"], engine._runtime.recorder
        (block,) = training.blocks
        assert report["num_pieces"] == report["num_pieces_on_device"] == STEPS * len(block.pieces)
        assert report["bytes_to_device"] == report["bytes_to_host"] == STEPS * block.state_bytes
        assert report["num_commits"] == (0 if case.place == "in HOST" else STEPS), "the last one is made by close"
        assert (report["state_in_memory_bytes"] > 0) == ("HOST" in case.place)
        assert "optimizer state stepped there" in device.arenas
        account = engine._runtime.tiers.account(Tier.DEVICE)
        slot_bytes = max(piece.num_bytes for piece in block.pieces)
        assert account.holdings["optimizer state stepped there"] == DEVICE_SLOTS * slot_bytes
        assert f"{len(block.pieces)} pieces on the device" in engine.summary()
        assert recorder is None or [str(race) for race in recorder.check()] == []
    device.close()


@pytest.mark.parametrize("place", ["in HOST", "on NVME"])
def test_a_checkpoint_goes_on_from_a_device_and_on_one(place: str, tmp_path: Path) -> None:
    case = Case("gpt2", "bf16", "default", 1, None, True, place)
    expected = run_plain(case)
    for name in ("device", "memory", "again"):
        (tmp_path / name).mkdir()
    device = late_device()
    with engine_on(device, case, tmp_path / "device") as engine:
        assert unequal(expected[:1], Running(case, engine).steps(range(1))) == []
        engine.save_checkpoint(tmp_path / "one")
    device.close()
    with make_engine(case, tmp_path / "memory", "memory") as engine:
        running = Running(case, engine)
        engine.load_checkpoint(tmp_path / "one")
        assert unequal(expected[1:2], running.steps(range(1, 2))) == []
        engine.save_checkpoint(tmp_path / "two")
    device = late_device()
    with engine_on(device, case, tmp_path / "again") as engine:
        running = Running(case, engine)
        running.steps(range(1))
        engine.load_checkpoint(tmp_path / "two")
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []
    device.close()


def test_a_run_on_a_device_goes_on_from_its_commit(tmp_path: Path) -> None:
    expected = run_plain(ONE)
    device = late_device()
    with engine_on(device, ONE, tmp_path) as engine:
        Running(ONE, engine).steps(range(2))
    device.close()
    device = late_device()
    with engine_on(device, ONE, tmp_path) as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(engine.commit_folder)
        assert engine.step_number == 2
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []
    device.close()


def test_an_update_that_fails_is_told_and_the_run_goes_on_from_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_plain(ONE)
    device = late_device()
    with pytest.raises(OffloadError, match="half-way"), engine_on(device, ONE, tmp_path) as engine:
        running = Running(ONE, engine)
        running.steps(range(1))
        updates = training_of(engine).stepper._on_device
        assert isinstance(updates, PagedUpdates)
        update_all, calls = updates._rule.update_all, []

        def fail_at_the_second(given: Any) -> Any:
            calls.append(given)
            if len(calls) == 2:
                raise ArithmeticError("the kernel is lost")
            return update_all(given)

        monkeypatch.setattr(updates._rule, "update_all", fail_at_the_second)
        with pytest.raises(ArithmeticError, match="the kernel is lost"):
            running.steps(range(1, 2))
        assert updates.num_under_way == 0 and len(updates._free) == updates.num_slots
        running.steps(range(1, 2))
    device.close()
    device = late_device()
    with engine_on(device, ONE, tmp_path) as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(engine.commit_folder)
        assert unequal(expected[1:], running.steps(range(1, STEPS))) == []
    device.close()


def test_the_rule_pages_where_a_device_does_not_hold_the_state(tmp_path: Path) -> None:
    expected = two_steps(rank_24(tmp_path))
    places = []
    for budget in (4000, 2700, 1200):
        device = late_device()
        try:
            engine = rank_24(tmp_path, device_memory=f"{budget}KiB", host_memory="64MiB", device=device)
        except PlanInfeasible:
            places.append("infeasible")
            continue
        state = engine.plan.state
        places.append("memory" if state is None else "paged")
        assert engine.plan.predicted_bytes(Tier.DEVICE) <= budget << 10
        if state is not None:
            (block,) = training_of(engine).blocks
            assert state.on_device == {"adapters": len(block.pieces)} and state.device_slots == PAGED_SLOTS
        assert unequal(expected, two_steps(engine)) == []
        device.close()
    assert places == ["memory", "paged", "infeasible"]


def test_what_cannot_be_stepped_on_a_device_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    device = late_device()
    with pytest.raises(ConfigError, match=r"all of them: give state on_device \{'adapters': 1\}"):
        engine_on(device, Case("llama", "nf4", "default", 1, None, False, "in HOST"), tmp_path, device_share=None)
    with pytest.raises(ConfigError, match="is not stepped on a device, AdamW with float32 or bfloat16 moments is"):
        engine_on(device, Case("llama", "nf4", "adamw 8bit", 1, None, False, "in HOST"), tmp_path)
    device.close()


def test_an_optimizer_that_keeps_scalars_on_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU AdamW's `step` stays with the CPU, and ASGD's `eta` does not; here all of them are the CPU's."""
    asgd, adamw, sgd = (
        TorchRule(kind, kind([torch.ones(1)], lr=1e-2).defaults)
        for kind in (torch.optim.ASGD, torch.optim.AdamW, torch.optim.SGD)
    )
    found = asgd.scalars_on(torch.device("cpu"))
    assert set(found) == {"step", "eta", "mu"}
    assert adamw.scalars_on(torch.device("cpu")) == ["step"] and sgd.scalars_on(torch.device("cpu")) == []
    assert adamw.scalars_on(torch.device("meta")) == [] and rule_on_device(adamw, "meta") is adamw
    monkeypatch.setattr(asgd, "scalars_on", lambda device: found)
    with pytest.raises(ConfigError, match=r"ASGD keeps .*eta.* in the device's memory"):
        rule_on_device(asgd, "meta")
