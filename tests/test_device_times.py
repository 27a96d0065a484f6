"""What a device says of its copies and kernels: by a clock that only they move, whatever threads do.

compute    | span ....... [stall ...] ...... |     the clock of each stream is what it was busy for, and what it
to_device       [copy 8 s]                         waited for; a copy takes a second for each byte that it moves
to_host              [copy 8 s]
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt import arguments
from offload_rt._engine import Engine
from offload_rt.layers.turns import Turns
from offload_rt.meter import COMPUTE, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE, Reading
from offload_rt.plans import planning_training
from offload_rt.running import drift
from offload_rt.running.replanning import ADOPT_STEPS, WINDOW_STEPS
from offload_rt.running.steps import WARM_STEPS, StepMeter
from offload_rt.transfers import device_times
from offload_rt.transfers.device_times import EVERY_STEPS, DeviceTimes, overlap_seconds
from offload_rt.transfers.streams import Copier
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import Tier, UpdateMode
from tests.fake_device import FakeDevice
from tests.full_parity import Case, make_engine, one_loss
from tests.test_device_share import LINK, SLOW, Machine

NUM_BYTES = 8


class Bench:
    """A device whose copies take a second for each byte, and one engine's copier."""

    def __init__(self, duplex: float = 1.0) -> None:
        self.device = FakeDevice(kernels_are_late=False, reports_late_seconds=0.0)
        for stream in (self.device.to_device, self.device.to_host):
            stream.bytes_per_second = 1.0
        self.times = DeviceTimes(self.device, num_layers=1, duplex=duplex)
        self.copier = Copier(self.device, timed=lambda *what: self.times.timed(*what[:3]))

    def begin(self) -> None:
        """The first step that is timed."""
        while self.times._sample is None:
            self.times.step_ends()

    def copy(self, *, inward: bool, num_bytes: int = NUM_BYTES) -> Any:
        ends = [(torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8))]
        copy = self.copier.start("copy", ends, inward=inward)
        self.copier.wait(copy, 20.0)
        return copy

    def pass_all(self) -> None:
        """Blocks until the device has done all that it was given."""
        for stream in (self.device.to_device, self.device.to_host, self.device.updates):
            stream.record().wait()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with benches() as made:
        yield made


@contextmanager
def benches(duplex: float = 1.0) -> Iterator[Bench]:
    made = Bench(duplex)
    yield made
    made.copier.close()
    made.device.close()


def test_copies_computing_and_updates_have_the_seconds_that_the_device_notes(bench: Bench) -> None:
    bench.begin()
    compute = bench.device.compute
    bench.times.enter()
    compute.seconds += 3
    with bench.times.stalled():
        arrived = bench.copy(inward=True)
        bench.copier.order(arrived, 20.0)
        with bench.times.stalled():  # of the same time
            compute.seconds += 1
    compute.seconds += 2
    bench.times.leave()
    bench.copy(inward=False, num_bytes=2 * NUM_BYTES)

    def kernel() -> None:
        bench.device.updates.seconds += 0.5

    bench.copier.run("step", kernel, [])
    bench.pass_all()
    found = bench.times.step_ends()
    assert found is not None
    assert found.seconds_per_byte == {HOST_TO_DEVICE: 1.0, DEVICE_TO_HOST: 1.0}
    assert found.seconds == {COMPUTE: 5.0, DEVICE_UPDATE: 0.5}


@pytest.mark.parametrize("duplex", [0.0, 0.5, 1.0])
def test_copies_both_ways_at_once_are_charged_what_they_would_take_alone(duplex: float) -> None:
    """Each is slower by what a link shares, all of the time."""
    with benches(duplex) as bench:
        for stream in (bench.device.to_device, bench.device.to_host):
            stream.bytes_per_second = (1 + duplex) / 2
        bench.begin()
        for inward in (True, False):  # by clocks that do not know of one another, at the same time
            bench.copy(inward=inward)
        bench.pass_all()
        found = bench.times.step_ends()
        assert found is not None
        assert found.seconds_per_byte == pytest.approx({HOST_TO_DEVICE: 1.0, DEVICE_TO_HOST: 1.0})


@pytest.mark.parametrize(
    ("one", "other", "seconds"),
    [
        ([], [], 0.0),
        ([(0, 2)], [(2, 3)], 0.0),
        ([(0, 4)], [(1, 2), (3, 5)], 2.0),
        ([(-3, -1), (0, 4)], [(-2, 1)], 2.0),
        ([(0, 1), (1, 2)], [(0, 2)], 2.0),
    ],
)
def test_intervals_overlap(one: list[tuple[float, float]], other: list[tuple[float, float]], seconds: float) -> None:
    assert overlap_seconds(one, other) == overlap_seconds(other, one) == seconds


def test_one_step_in_two_is_timed_with_marks_that_are_made_once_and_nobody_waits(bench: Bench) -> None:
    made, recorded = bench.device.num_marks, []
    for _ in range(4 * EVERY_STEPS):
        bench.times.step_ends()
        recorded.append(bench.times._sample is not None)
        bench.copy(inward=True)
        bench.pass_all()
    assert recorded == [False, True] * 4 and bench.device.num_marks == made
    assert len(bench.times._moving) + len(bench.times._computing) >= 2 * device_times.PAIRS_PER_LAYER - 1
    bench.times.step_ends()
    bench.begin()
    before = bench.times.newest
    bench.device.to_device.bytes_per_second = 0.5
    bench.device.to_device.hold()
    ends = [(torch.zeros(NUM_BYTES, dtype=torch.uint8), torch.zeros(NUM_BYTES, dtype=torch.uint8))]
    under_way = bench.copier.start("copy", ends, inward=True)
    for _ in range(2 * EVERY_STEPS):
        assert bench.times.step_ends() is before, "the device has not passed the marks"
    bench.device.to_device.resume()
    bench.copier.wait(under_way, 20.0)
    bench.pass_all()
    found = bench.times.step_ends()
    assert found is not None and found.seconds_per_byte[HOST_TO_DEVICE] == 2.0


def test_what_there_are_no_marks_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of copies the first ones say what a byte takes; computing is not known where a stall may be missing."""
    monkeypatch.setattr(device_times, "PAIRS_PER_LAYER", 2)
    with benches() as bench:
        bench.begin()
        bench.times.enter()
        for _ in range(3):
            with bench.times.stalled():
                bench.device.compute.seconds += 1
            bench.copy(inward=True)
        bench.times.leave()
        bench.pass_all()
        found = bench.times.step_ends()
        assert found is not None and found.seconds_per_byte == {HOST_TO_DEVICE: 1.0} and found.seconds == {}


@pytest.mark.parametrize("which", ["begin", "end"])
def test_a_mark_that_cannot_be_made_says_nothing_and_the_next_steps_are_timed(
    which: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("CUDA error")

    num_marks = len(bench.times._moving), len(bench.times._computing)
    bench.begin()
    bench.copy(inward=True)
    for pairs, timed in (
        (bench.times._moving, lambda: bench.copy(inward=True)),
        (bench.times._computing, lambda: [bench.times.enter(), bench.times.leave()]),
    ):
        with monkeypatch.context() as now:
            now.setattr(getattr(pairs[-1], which), "record", refuses)
            with pytest.raises(RuntimeError, match="CUDA error"):
                timed()
            bench.times._threads.clear()
    bench.pass_all()
    found = bench.times.step_ends()
    assert found is not None and found.seconds_per_byte == {HOST_TO_DEVICE: 1.0} and found.seconds == {}
    assert (len(bench.times._moving), len(bench.times._computing)) == num_marks
    bench.begin()
    bench.times.enter()
    bench.device.compute.seconds += 3
    bench.times.leave()
    found = bench.times.step_ends()
    assert found is not None and found.seconds == {COMPUTE: 3.0}


def test_an_evaluation_and_threads_that_run_no_model_say_nothing_of_computing(bench: Bench) -> None:
    bench.begin()
    bench.times.enter()
    bench.device.compute.seconds += 3
    bench.times.leave()
    found = bench.times.step_ends(counts=False)
    assert found is not None and found.seconds == {}
    bench.begin()
    bench.times.enter()

    def wait() -> None:
        with bench.times.stalled():
            bench.device.compute.seconds += 1

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    bench.times.leave()
    found = bench.times.step_ends()
    assert found is not None and found.seconds == {COMPUTE: 1.0}
    bench.times.forget()
    assert bench.times.newest is None


def test_a_steady_step_has_the_devices_seconds_beside_what_it_moved(bench: Bench) -> None:
    moved = {HOST_TO_DEVICE: 0}
    meter = StepMeter(lambda: Reading(moved_bytes=dict(moved)), times=bench.times)
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: computed(3.0))
    hooks = meter.attach(model)

    def computed(seconds: float) -> None:
        bench.device.compute.seconds += seconds

    def step(num_bytes: int) -> None:
        out = model(torch.ones(1, 2))
        bench.copy(inward=True, num_bytes=num_bytes)
        moved[HOST_TO_DEVICE] += 2 * num_bytes  # of which half is timed
        out.register_hook(lambda _: computed(4.0))
        out.sum().backward()
        with torch.no_grad():
            bench.pass_all()
        with meter.updating():
            pass

    for _ in range(WARM_STEPS + 4):
        step(NUM_BYTES)
    steady = meter.steady()
    assert steady is not None
    assert steady.resources.busy_seconds == {HOST_TO_DEVICE: 2.0 * NUM_BYTES, COMPUTE: 7.0}
    meter.begin_again()
    assert bench.times.newest is None
    for hook in hooks:
        hook.remove()


def test_an_evaluation_between_two_steps_is_no_computing_of_either(bench: Bench) -> None:
    meter = StepMeter(Reading, times=bench.times)
    model = nn.Linear(2, 2)
    compute, computing = bench.device.compute, [3.0]

    def computed(*_: object) -> None:
        with bench.times.stalled():
            compute.seconds += 1
        compute.seconds += computing[0]

    model.register_forward_hook(computed)
    hooks = meter.attach(model)
    for _ in range(WARM_STEPS + 4):
        computing[0] = 100.0
        with torch.no_grad():
            model(torch.ones(1, 2))
        computing[0] = 3.0
        model(torch.ones(1, 2)).sum().backward()
        with meter.updating():
            pass
    assert [step.resources.busy_seconds[COMPUTE] for step in meter.steps] == [3.0] * 4
    assert len(bench.times._computing) >= device_times.PAIRS_PER_LAYER - 3, "an evaluation takes no marks"
    for hook in hooks:
        hook.remove()


def test_a_stall_of_any_micro_batch_that_takes_turns_is_no_computing(bench: Bench) -> None:
    """Each has its thread, of which one runs at a time."""
    meter = StepMeter(Reading, times=bench.times)
    model, turns = nn.Linear(2, 2), Turns()

    def computed(*_: object) -> None:
        turns.pass_on()
        with bench.times.stalled():
            bench.device.compute.seconds += 1
        bench.device.compute.seconds += 3
        turns.pass_on()

    model.register_forward_hook(computed)
    hooks = meter.attach(model)

    def forward() -> torch.Tensor:
        return model(torch.ones(1, 2)).sum()

    for _ in range(WARM_STEPS + 2):
        losses = turns.run([forward] * 3)
        turns.run([loss.backward for loss in losses])
        with meter.updating():
            pass
    assert [step.resources.busy_seconds[COMPUTE] for step in meter.steps] == [9.0] * 2
    turns.close()
    for hook in hooks:
        hook.remove()


@pytest.mark.full
def test_a_slower_link_is_seen_and_another_plan_follows_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device steps a share, as long as state gets there soon: its copies then take fifty times as long."""
    machine = Machine(SLOW, 1.0, 65536, {Tier.HOST}, UpdateMode.AFTER, shared=True)
    monkeypatch.setattr(arguments, "calibrated", lambda *_: machine.hardware)
    monkeypatch.setattr(planning_training, "measured_seconds", machine.seconds)
    monkeypatch.setattr(drift, "CPU", "what is by the clock of this machine")
    case, losses = Case("llama", "bfloat16", "adamw", 1, "rarely", False, "in place"), []
    for replan in (False, True):
        device = FakeDevice(kernels_are_late=False, reports_late_seconds=0.0)
        with make_engine(
            case, tmp_path, plan="optimise", host_memory=f"{machine.host_kib}KiB",
            options=RuntimeOptions(device=device, piece_elements=4096, replan=replan),
        ) as engine:  # fmt: skip
            for stream in (device.to_device, device.to_host):
                stream.bytes_per_second = LINK / 50
            first, num_marks = engine.plan, device.num_marks
            losses.append(list(trained(engine, WARM_STEPS + EVERY_STEPS + WINDOW_STEPS + ADOPT_STEPS + 2)))
            decisions = engine.report()["replanning"]["decisions"]
            assert first.state is not None and first.state.on_device
            assert (engine.plan != first) == replan and device.num_marks == num_marks
            if replan:
                assert engine.plan.state is not None and not engine.plan.state.on_device
                assert [one["result"] for one in decisions] == ["changed"]
                assert decisions[0]["because"] == ", ".join(
                    f"{link} takes 50.00 times as long as planned" for link in (HOST_TO_DEVICE, DEVICE_TO_HOST)
                )
        device.close()
    assert losses[0] == losses[1]


def trained(engine: Engine, num_steps: int) -> Iterator[float]:
    for step in range(num_steps):
        loss = one_loss(engine, step % 3, 0)
        engine.backward(loss)
        engine.step()
        yield loss.item()
