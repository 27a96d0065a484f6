"""Which share of the updates the optimiser gives to a device: by the prices of both sides, and no bit changes.

processor slow   | CPU, CPU, DEVICE, DEVICE, DEVICE |     state of both sides is stepped at the same time
processor fast   | CPU, CPU, CPU, CPU, CPU          |     so is a slow one that copies hold up as long
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from offload_rt import arguments
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.meter import CPU, DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.plans import planning_training
from offload_rt.plans.asked import Asked
from offload_rt.plans.device_share import GAIN, with_balanced_share, with_the_best_share
from offload_rt.plans.plan_check import check_plan
from offload_rt.plans.plan_choice import RULE, choose
from offload_rt.plans.planning import optimal
from offload_rt.plans.planning_training import questions
from offload_rt.plans.training_seconds import TrainingSeconds
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import Workload, find_workload
from planners.optimiser.expand import _in_pieces
from planners.plans.placement import Tier, UpdateMode, UpdatePlace
from planners.problems.hardware import Drive, Hardware, Host, Links, named_hardware
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import DeviceSteps, Problem
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.simulate import simulate
from planners.simulator.validate import check, check_busy, check_replay
from tests.fake_device import FakeDevice
from tests.full_parity import NORMS, OPTIMIZERS, Case, build, make_engine, run_engine, run_plain, training_of
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.planner_cases import plan_of, problem
from tests.test_device_full import LATE
from tests.test_device_updates import moved_a_step
from tests.test_full_parity import ieee_square_root  # noqa: F401 - a fixture of this module too
from tests.test_planning_training import train

LINK = 1e8
"""Bytes a second: of 3e6 parameters the state, with its gradients, one way."""
SLOW, MIDDLING, FAST = 1e6, 7e6, 1e9
"""Parameters that the processor steps in a second."""
KIB = 1 << 10
H, N = Tier.HOST, Tier.NVME


@dataclass(frozen=True)
class Machine:
    """What is asked about, and where state rests then, and whether the device is to get a share."""

    steps_per_second: float
    beside_copies: float
    host_kib: int
    state: set[Tier]
    mode: UpdateMode
    shared: bool

    @property
    def hardware(self) -> Hardware:
        card = named_hardware("rtx4090")
        links = Links(host_to_device_bytes_per_second=LINK, device_to_host_bytes_per_second=LINK, duplex=1.0)
        host = Host(
            memory_bytes=self.host_kib * KIB, adamw_params_per_second=1e9, adamw_beside_copies=self.beside_copies
        )
        drive = Drive(capacity_bytes=1 << 30, read_bytes_per_second=1e9, write_bytes_per_second=1e9)
        return replace(card, links=links, host=host, drives=(drive,) if N in self.state else ())

    def seconds(self, workload: Workload, *_: object) -> TrainingSeconds:
        """That nobody measured."""
        return TrainingSeconds(
            layers={draft.name: MeasuredSeconds(forward=1e-4, backward=2e-4) for draft in workload.layers},
            head=MeasuredSeconds(forward=1e-4, backward=0.0), embeddings={}, steps_per_second=self.steps_per_second,
            deliveries_per_second=float("inf"), arrivals_per_second=1e10,
        )  # fmt: skip


MACHINES = {
    "slow": Machine(SLOW, 1.0, 65536, {H}, UpdateMode.AFTER, shared=True),
    "fast": Machine(FAST, 1.0, 65536, {H}, UpdateMode.AFTER, shared=False),
    "middling": Machine(MIDDLING, 1.0, 65536, {H}, UpdateMode.AFTER, shared=True),
    "middling, and copies hold it up": Machine(MIDDLING, 0.01, 65536, {H}, UpdateMode.AFTER, shared=False),
    "slow, state on both": Machine(SLOW, 1.0, 1400, {H, N}, UpdateMode.AFTER, shared=True),
    "slow, state on NVMe": Machine(SLOW, 1.0, 900, {N}, UpdateMode.SPECULATIVE, shared=True),
}  # fmt: skip


def asked_about(machine: Machine, folder: Path, optimizer: str = "adamw") -> tuple[Workload, StreamingProblem]:
    """All parameters of a fresh model, on a device with streams that has the machine's memory."""
    config = EngineConfig(
        batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=NORMS["rarely"], device="cpu",
        host_memory_bytes=machine.host_kib * KIB,
        nvme=(NvmePath(path=folder, capacity_bytes=1 << 30),) if N in machine.state else (),
    )  # fmt: skip
    device = FakeDevice()
    device.close()
    model = build(Case("llama", "bfloat16", optimizer, 1, "rarely", False, "in place"))
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    workload = find_workload(model, None, config, made, RuntimeOptions(piece_elements=4096, device=device))
    return workload, streaming_problem(workload)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if N in MACHINES[name].state else name for name in MACHINES]
)
def test_the_device_has_a_share_where_that_saves_time(name: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    workload, streaming = asked_about(machine, tmp_path)
    asked = Asked(questions=tuple(questions(workload, streaming, machine.hardware, machine.seconds(workload))))
    plan, answered = asked.best(workload, streaming)
    assert {update.tier for entry in plan.classes for update in entry.updates} == machine.state
    assert plan.update_mode is machine.mode and plan.state is not None
    assert bool(plan.state.on_device) == machine.shared
    items = plan.peak_bytes["device"]
    assert ("optimizer state stepped there" in items) == machine.shared and "state updated on the device" not in items
    question, freedoms = answered.questions[answered.answered]
    found, question = with_the_best_share(question, streaming, freedoms)
    check(question, found)
    alone, _ = optimal(question, streaming, replace(freedoms, device_updates=False))
    seconds, others = (float(one.predicted["step_seconds"]) for one in (found, alone))
    assert seconds < (1 - GAIN) * others if machine.shared else seconds == others
    slower = answered.measured({CPU: 2.0}).question.workload.device_steps
    before = question.workload.device_steps
    assert slower is not None and before is not None
    assert slower.cpu_seconds_per_param == 2 * before.cpu_seconds_per_param > 0
    summing = (one.workload.summing_seconds_per_param for one in (answered.measured({CPU: 2.0}).question, question))
    assert next(summing) == 2 * next(summing) > 0


@pytest.mark.parametrize(
    ("rate", "beside_copies", "num_pieces"),
    [(SLOW, 1.0, 9), (MIDDLING, 1.0, 5), (FAST, 1.0, 0), (MIDDLING, 0.5, 7), (MIDDLING, 0.01, 0)],
)
def test_the_rules_plan_has_both_sides_done_at_the_same_time(
    rate: float, beside_copies: float, num_pieces: int, tmp_path: Path
) -> None:
    """Of ten pieces of a layer; what copies hold up has to be made good by the device."""
    machine = replace(MACHINES["slow"], beside_copies=beside_copies)
    card = machine.hardware
    card = replace(card, host=replace(card.host, adamw_params_per_second=rate))
    workload, streaming = asked_about(machine, tmp_path)
    rule = plan_streaming(streaming)
    plan, choice, asked = choose(workload, streaming, rule, card)
    assert plan.state is not None and rule.state is not None and not rule.state.on_device
    assert (
        choice.chosen == RULE and asked is None and choose(workload, streaming, rule, card, why_not="told")[0] is rule
    )
    assert choose(workload, streaming, rule, None)[0] is rule
    sizes = streaming.training
    assert sizes is not None
    if not num_pieces:
        assert plan is rule
        return
    layer = next(block for block in sizes.blocks if block.name == "model.layers.0")
    assert (plan.state.on_device[layer.name], len(layer.pieces)) == (num_pieces, 10)
    check_plan(plan, streaming, workload)
    assert plan.predicted_bytes(Tier.DEVICE) - rule.predicted_bytes(Tier.DEVICE) == plan.state.device_bytes(sizes) > 0
    full = replace(streaming, device_capacity_bytes=plan.predicted_bytes(Tier.DEVICE) - 1)
    assert with_balanced_share(rule, workload, full, card) is rule, "for want of a byte"


def test_the_rules_plan_gives_the_device_nothing_of_state_on_a_drive_nor_of_what_it_cannot_step(tmp_path: Path) -> None:
    for machine, optimizer in ((MACHINES["slow, state on NVMe"], "adamw"), (MACHINES["slow"], "adamw 8bit")):
        workload, streaming = asked_about(machine, tmp_path, optimizer)
        rule = plan_streaming(streaming)
        card = replace(machine.hardware, host=replace(machine.hardware.host, adamw_params_per_second=SLOW))
        assert with_balanced_share(rule, workload, streaming, card) is rule


@pytest.mark.full
@pytest.mark.parametrize(("name", "micro_batches"), [*((name, 1) for name in MACHINES), ("slow", 2)])
def test_the_device_gets_the_updates_that_it_makes_sooner_and_no_bit_changes(
    name: str, micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, case = MACHINES[name], Case("llama", "bfloat16", "adamw", micro_batches, "rarely", False, "in place")
    expected = run_plain(case)
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    monkeypatch.setattr(arguments, "calibrated", lambda *_: machine.hardware)
    monkeypatch.setattr(planning_training, "measured_seconds", machine.seconds)
    with make_engine(
        case, tmp_path, plan="optimise", nvme=N in machine.state, host_memory=f"{machine.host_kib}KiB",
        options=RuntimeOptions(poison=True, device=device, piece_elements=4096, record=True),
    ) as engine:  # fmt: skip
        plan, training = engine.plan, training_of(engine)
        for step, (want, got) in enumerate(zip(expected, run_engine(case, engine), strict=True), 1):
            assert [f"step {step}: {name}" for name in got if not torch.equal(want[name], got[name])] == []
        recorder, meter = engine._runtime.recorder, engine._runtime.links.meter
        assert recorder is not None and [str(race) for race in recorder.check()] == []
        before, done = meter.reading(), training.stepper.device_counters.num_pieces_on_device
        train(engine, 2)
        moved = meter.reading().since(before).moved_bytes
        num_pieces, *_ = moved_a_step(training, plan)
        assert training.stepper.device_counters.num_pieces_on_device - done == 2 * num_pieces
        assert (num_pieces > 0) == machine.shared
        drafts = {draft.name: draft.spec.stored_bytes for draft in engine._runtime.made_of.workload.drafts}
    device.close()
    # New weights that land are counted with what lies between them in a block.
    landing = [b for b in training.blocks if b.name in plan.resident and b.name in drafts]
    between = sum(drafts[b.name] - 2 * sum(trained.num_elements for trained in b.parameters) for b in landing)
    for resource, more in ((HOST_TO_DEVICE, between), (DEVICE_TO_HOST, 0)):
        assert moved[resource] / 2 == pytest.approx(plan.predicted["busy_seconds"][resource] * LINK - more, abs=1)


def stepped_there(p: Problem, **changes: float) -> Problem:
    """The problem of a runtime whose device steps pieces with gradients that come from HOST."""
    steps = DeviceSteps(**{"num_slots": 3, "slot_bytes": 1 << 20, "cpu_seconds_per_param": 1e-9, **changes})
    return replace(p, workload=replace(p.workload, device_steps=steps))


@pytest.mark.parametrize("mode", UpdateMode)
def test_work_and_memory_of_updates_on_the_device_are_what_the_plan_says(mode: UpdateMode) -> None:
    plain = problem(full=True, commit_every=5)
    p = stepped_there(plain)
    shares = {(H, UpdatePlace.CPU): 0.2, (H, UpdatePlace.DEVICE): 0.3, (N, UpdatePlace.CPU): 0.1,
              (N, UpdatePlace.DEVICE): 0.4}  # fmt: skip
    plan, before = plan_of(p, mode=mode, updates=shares), plan_of(plain, mode=mode, updates=shares)
    replay = simulate(p, plan, keep_events=True)
    check_busy(p, plan, replay)
    check_replay(replay)
    assert all(live <= replay.peak_bytes[tier] + 1 for tier, live in replay.live_bytes.items())
    params = 0.7 * p.workload.trainable_params
    other = simulate(plain, before).busy_seconds
    rate = p.hardware.links.host_to_device_bytes_per_second
    for resource in (HOST_TO_DEVICE, DEVICE_TO_HOST):
        more = (replay.busy_seconds[resource] - other[resource]) * rate
        assert more == pytest.approx(p.workload.gradient_bytes_per_param * params, rel=1e-3)
    assert replay.busy_seconds[CPU] - other[CPU] == pytest.approx(1e-9 * params, rel=1e-3)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({(H, UpdatePlace.CPU): 1.0}, [(8, H, "cpu")]),
        ({(H, UpdatePlace.CPU): 0.5, (H, UpdatePlace.DEVICE): 0.5}, [(4, H, "cpu"), (4, H, "device")]),
        ({(H, UpdatePlace.DEVICE): 1.0}, [(8, H, "device")]),
        ({(H, UpdatePlace.CPU): 0.3, (N, UpdatePlace.CPU): 0.7}, [(2, H, "cpu"), (6, N, "cpu")]),
        ({(H, UpdatePlace.DEVICE): 0.3, (N, UpdatePlace.CPU): 0.7}, [(2, H, "cpu"), (4, N, "cpu"), (2, N, "device")]),
        ({(H, UpdatePlace.CPU): 0.6, (N, UpdatePlace.DEVICE): 0.4}, [(4, H, "cpu"), (4, N, "device")]),
        ({(H, UpdatePlace.DEVICE): 0.6, (N, UpdatePlace.DEVICE): 0.3, (N, UpdatePlace.CPU): 0.1},
         [(4, H, "device"), (4, N, "device")]),
    ],
)  # fmt: skip
def test_shares_become_pieces_of_which_the_first_rest_in_memory_and_the_last_are_the_devices(
    shares: dict[tuple[Tier, UpdatePlace], float], expected: list[tuple[int, Tier, str]]
) -> None:
    """Of four pieces of two parameters each."""
    p = stepped_there(problem(full=True))
    entry = replace(p.workload.classes[1], trainable_params=8, state_cuts=tuple((2 * n, 4096 * n) for n in range(5)))
    found = _in_pieces(entry, {(*key, False): share for key, share in shares.items()})
    assert [(update.params, update.tier, update.place.value) for update in found] == expected
