"""Weights that train and rest by byte ranges over DEVICE, HOST and NVMe: the bits of plain PyTorch, and bytes as said.

one layer   |== DEVICE ==|-- HOST --|.. NVME ..|      all of it changes in a step; a commit holds its masters
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.memory.arena import Arena
from offload_rt.optimizer.parted_weights import PartedWeights
from offload_rt.optimizer.state import StateHome
from offload_rt.transfers.links import Links
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import Split, UpdateMode
from planners.plans.plan import StatePlacement, Tier
from tests.fake_device import FakeDevice
from tests.full_parity import (
    STEPS,
    Case,
    check_activations,
    make_engine,
    one_loss,
    one_step,
    run_engine,
    run_plain,
    scheduled,
    state_of,
    training_of,
)
from tests.parity import micro_batch
from tests.power_loss import PlainIO
from tests.test_full_parity import ieee_square_root  # noqa: F401 - a fixture of this module too
from tests.tiny_blocks import blocks

SHARES = {
    "all three": (0.3, 0.3), "DEVICE and NVME": (0.5, 0.0), "DEVICE and HOST": (0.4, 0.6), "HOST and NVME": (0.0, 0.4),
}  # fmt: skip
"""Of a layer that stays in DEVICE, and that rests in HOST; what is left rests on NVMe."""
ON_NVME = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=4, weight_slots=2)


def parted(case: Case, folder: Path, shares: str, **options: Any) -> Engine:
    """An engine for the case, whose place says nothing here: state on NVMe, weights in parts."""
    mode = UpdateMode.BACKWARD if case.clipping == "not" else UpdateMode.SPECULATIVE
    given = {"rest": Tier.NVME, "state": ON_NVME, "piece_elements": 4096, "update_mode": mode, **options}
    made = RuntimeOptions(**{"weight_shares": SHARES[shares], **given})
    return make_engine(replace(case, place="in place"), folder, nvme=True, host_memory="64MiB", options=made)


def unequal(want: list[Any], got: list[Any]) -> list[str]:
    assert len(want) == len(got)
    return [
        f"step {step}: {name}"
        for step, (a, b) in enumerate(zip(want, got, strict=True), 1)
        for name in b
        if not a[name].equal(b[name])
    ]


CASES = [
    (Case("llama", "bfloat16", "adamw", 4, "rarely", False, "", "each way"), "all three"),
    (Case("qwen", "float32", "adamw", 1, "not", True, "", "again"), "DEVICE and NVME"),
    (Case("llama", "float32", "adamw 8bit", 1, "rarely", False, ""), "DEVICE and HOST"),
    (Case("gpt2", "bfloat16", "lion", 1, "always", False, "", "put away"), "HOST and NVME"),
    (Case("moe", "bfloat16", "adamw", 1, "not", False, ""), "all three"),
    (Case("llama", "bfloat16", "adafactor", 2, "not", False, ""), "HOST and NVME"),
]


@pytest.mark.parametrize(("case", "shares"), CASES, ids=str)
def test_any_split_is_bit_equal_to_plain_pytorch(case: Case, shares: str, tmp_path: Path) -> None:
    with parted(case, tmp_path, shares, poison=True, record=case.accumulation == 1) as engine:
        assert unequal(run_plain(case), run_engine(case, engine)) == []
        training = training_of(engine)
        splits = {parts.split for parts in training.home.parted.values()}
        for split in splits:
            here = (split.device_bytes > 0, split.host_bytes > 0, split.nvme_bytes > 0)
            assert here == ("all" in shares or "DEVICE" in shares, "all" in shares or "HOST" in shares,
                            "all" in shares or "NVME" in shares)  # fmt: skip
        assert len(training.home.parted) == sum(len(ring.blocks) for ring in engine.plan.rings) > 0
        report = engine.report()
        assert report["training"]["num_clipped"] == {"not": 0, "rarely": 1, "always": STEPS}[case.clipping]
        assert (report["training"]["num_ahead_of_norm"] > 0) == (case.clipping != "always")
        assert report["prefetch_misses"] == 0
        check_activations(case, engine)
        recorder = engine._runtime.recorder
        assert recorder is None or [str(race) for race in recorder.check()] == []


@pytest.mark.full
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("clipping", ["not", "rarely"])
@pytest.mark.parametrize("mode", [UpdateMode.AFTER, None])
@pytest.mark.parametrize("in_memory", [0, 3])
def test_every_split_is_bit_equal_in_every_mode(
    shares: str, dtype: str, clipping: str, mode: UpdateMode | None, in_memory: int, tmp_path: Path
) -> None:
    case = Case("qwen", dtype, "adamw", 1, clipping, False, "")
    state = replace(ON_NVME, in_memory={"model.layers.1": in_memory, "model.layers.2": 1} if in_memory else {})
    options = {"state": state, **({} if mode is None else {"update_mode": mode})}
    with parted(case, tmp_path, shares, poison=True, **options) as engine:
        assert unequal(run_plain(case), run_engine(case, engine)) == []


def test_bytes_are_those_of_the_parts(tmp_path: Path) -> None:
    """A step fetches each layer twice and writes each once: what it moves is what rests there."""
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "")
    counted = {}
    for shares in (None, *SHARES):
        (tmp_path / str(shares)).mkdir()
        options = {"weight_shares": None} if shares is None else {}
        with parted(case, tmp_path / str(shares), shares or "all three", layer_inputs=Tier.HOST, **options) as engine:
            run_engine(case, engine, 0, 2)
            ring = engine.plan.rings[0]
            splits = [parts.split for parts in training_of(engine).home.parted.values()]
            before = engine._runtime.links.counters
            before = (before.bytes_read, before.bytes_written, engine.report()["fetches"])
            engine.backward(one_loss(engine, 2, 0))
            engine.step()
            training_of(engine).commits.finish()
            after = engine._runtime.links.counters
            after = (after.bytes_read, after.bytes_written, engine.report()["fetches"])
            counted[shares] = [b - a for a, b in zip(before, after, strict=True)], splits, len(ring.blocks)
    (whole_read, whole_written, whole_fetches), _, num_blocks = counted[None]
    for shares in SHARES:
        (read, written, fetches), splits, _ = counted[shares]
        assert len(splits) == num_blocks and len(set(splits)) == 1 and fetches == whole_fetches
        in_memory = splits[0].device_bytes + splits[0].host_bytes
        assert in_memory > 0
        assert written == whole_written - num_blocks * in_memory, shares
        assert read == whole_read - fetches * in_memory, shares


def test_a_run_goes_on_where_its_weights_are_cut_otherwise_or_not_at_all(tmp_path: Path) -> None:
    """On the same log, whose extents then hold what another plan wrote: nobody believes it."""
    case = Case("llama", "bfloat16", "adamw", 1, "rarely", False, "")
    expected = run_plain(case)
    found: list[Any] = []
    for step, shares in enumerate(["all three", "HOST and NVME", None, "DEVICE and NVME", "DEVICE and HOST"]):
        options = {"weight_shares": None} if shares is None else {}
        with parted(case, tmp_path, shares or "all three", **options) as engine:
            assert engine.optimizer is not None
            scheduler = scheduled(engine.optimizer)
            engine.track("scheduler", scheduler)
            if step:
                assert engine.committed is not None and engine.committed["step"] == step
                engine.load_checkpoint(engine.commit_folder)
            found.append(one_step(case, engine, scheduler, step))
            assert bool(training_of(engine).home.parted) == (shares is not None)
    assert unequal(expected, found) == []


def test_a_step_that_is_taken_back_has_the_old_weights_in_all_parts(tmp_path: Path) -> None:
    case = Case("llama", "bfloat16", "adamw", 1, "rarely", False, "")
    with parted(case, tmp_path, "all three") as engine:
        training = training_of(engine)
        run_engine(case, engine, 0, 2)
        before = state_of(training)
        engine.backward(one_loss(engine, 3, 0))
        assert training.ahead.blocks
        training.before_forward()
        assert not training.ahead.blocks
        after = state_of(training)
        assert all(before[name][i].equal(after[name][i]) for name in before for i in (0, 1))


def test_parts_on_a_late_device_are_bit_equal_and_ordered(tmp_path: Path) -> None:
    case = Case("llama", "bfloat16", "adamw", 1, "rarely", False, "")
    expected = run_plain(case)
    for shares in ("all three", "DEVICE and HOST"):
        (tmp_path / shares).mkdir()
        device = FakeDevice(late_seconds=0.0005, kernels_are_late=False)
        with parted(case, tmp_path / shares, shares, device=device, record=True, poison=True, num_slots=2) as engine:
            assert unequal(expected, run_engine(case, engine)) == []
            home = training_of(engine).home
            assert home.landing is not None and home.landing.num_copies > 0
            assert all(parts.resident is not None and parts.resident.on_device for parts in home.parted.values())
            recorder = engine._runtime.recorder
            assert recorder is not None and [str(race) for race in recorder.check()] == []
        device.close()


@pytest.mark.parametrize("shares", ["all three", "DEVICE and HOST"])
def test_parts_that_an_evaluation_reads_between_backward_and_step_change_behind_it(shares: str, tmp_path: Path) -> None:
    """Nothing but the copies themselves orders them before the update: no gradient comes of these weights."""
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, "")
    device = FakeDevice(late_seconds=0.0005, kernels_are_late=False)
    options = {"device": device, "record": True, "num_slots": 2, "update_mode": UpdateMode.AFTER}
    with parted(case, tmp_path, shares, **options) as engine:
        for step in range(2):
            engine.backward(one_loss(engine, step, 0))
            with torch.no_grad():
                engine(**micro_batch(9, 0))
            engine.step()
        recorder = engine._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
    device.close()


def test_what_rests_in_host_changes_when_nothing_reads_it_any_more() -> None:
    """A device may be behind with its copy of the old weights while the new ones go to the log and to HOST."""
    (block,) = blocks(1)
    arena = Arena("weights of one block", 3 * 4096)
    host, room = arena.acquire(4096, "host"), arena.acquire(8192, "room")
    host.tensor(torch.uint8, (4096,)).fill_(1)
    room.tensor(torch.uint8, (8192,)).fill_(2)
    found, written = [], []
    parts = PartedWeights(
        split=Split(device_bytes=0, host_bytes=4096, nvme_bytes=4096), resident=None, host=host,
        settle=lambda: found.append(int(host.tensor(torch.uint8, (4096,))[0])),
    )  # fmt: skip
    log: Any = SimpleNamespace(write=lambda name, slot, begin_bytes: written.append((slot.num_bytes, begin_bytes)))
    home = StateHome(log=log, links=Links(io=PlainIO()), parted={block.name: parts})
    home.write_weights(block, parts.room(room))
    assert found == [1] and int(host.tensor(torch.uint8, (4096,))[0]) == 2
    assert written == [(4096, 4096)]
