"""What a step took: delays put into one resource show up there, in its seconds and in which one binds."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from offload_rt._engine import Engine
from offload_rt.meter import COMPUTE, CPU, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE, SSD_READ, SSD_WRITE, Reading
from offload_rt.running import comparison
from offload_rt.running.steps import KEPT_STEPS, SETTLED_STEPS, WARM_STEPS, StepMeter
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Tier
from tests import tiny_training
from tests.conftest import PlainLayer, build_plain
from tests.test_planning import machine

MIB = 1 << 20
RATE = 5e4
"""Bytes a second of a slow drive: its reads take 0.8 s a step, computing 0.02 s."""
SLEEP = 0.004
"""Of each layer's forward and recompute, where computing is slow."""


class SlowLayer(PlainLayer):
    def forward(self, hidden_BTD):
        time.sleep(SLEEP)
        return super().forward(hidden_BTD)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Busy(nn.Module):
    """A model that takes a second of the clock, waits for as long as `read` says, and has a weight."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.ones(2))
        self.waited = 0.0

    def read(self):
        return Reading(stall_seconds={SSD_READ: self.waited}, moved_bytes={SSD_READ: int(8 * self.waited)})

    def forward(self, x):
        self.clock.now += 1.0
        self.waited += 0.25
        return SlowBackward.apply(self.weight * x, self.clock).sum()


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += 2.0
        if ctx.clock.now > 1e6:
            raise ValueError("broken")
        return gradient, None


@pytest.fixture
def rig():
    clock = Clock()
    model = Busy(clock)
    meter = StepMeter(model.read, clock=clock)
    meter.attach(model)
    return SimpleNamespace(clock=clock, model=model, meter=meter)


def one_step(rig, *, update=0.5, outside=4.0):
    rig.clock.now += outside
    rig.model(torch.ones(2)).backward()
    with rig.meter.updating():
        rig.clock.now += update


def test_a_step_is_computing_waits_and_update_without_the_callers_own_time(rig):
    for _ in range(WARM_STEPS + 3):
        one_step(rig)
    steady = rig.meter.steady()
    assert len(rig.meter.steps) == 3
    assert (steady.seconds, steady.outside_seconds) == (3.5, 4.0)
    assert steady.resources.busy_seconds == {COMPUTE: 2.75, DEVICE_UPDATE: 0.5}
    assert steady.resources.stall_seconds == {SSD_READ: 0.25} and steady.resources.moved_bytes == {SSD_READ: 2}


def test_accumulated_micro_batches_are_one_step(rig):
    for _ in range(WARM_STEPS + 1):
        for _ in range(2):
            rig.model(torch.ones(2)).backward()
        with rig.meter.updating():
            pass
    (step,) = rig.meter.steps
    assert step.seconds == 6.0 and step.resources.busy_seconds[COMPUTE] == 5.5


def test_a_closure_runs_the_model_before_the_update(rig):
    """An optimizer's step that calls its base's begins twice and is over twice; the first one that is over ends it."""
    for _ in range(WARM_STEPS + 1):
        rig.clock.now += 4.0
        rig.meter.begin_update()
        rig.meter.begin_update()
        rig.model(torch.ones(2)).backward()
        rig.clock.now += 0.5
        assert rig.meter.end_update() and not rig.meter.end_update()
    (step,) = rig.meter.steps
    assert (step.seconds, step.outside_seconds) == (3.5, 4.0)
    assert step.resources.busy_seconds == {COMPUTE: 2.75, DEVICE_UPDATE: 0.5}


def test_first_steps_failed_ones_and_those_with_an_evaluation_do_not_count(rig):
    assert rig.meter.steady() is None
    for _ in range(WARM_STEPS):
        one_step(rig)
    assert rig.meter.steady() is None
    rig.model(torch.ones(2)).backward()
    with torch.no_grad():
        rig.model(torch.ones(2))
    one_step(rig)
    with pytest.raises(KeyError), rig.meter.updating():
        raise KeyError
    rig.clock.now = 1e7
    with pytest.raises(ValueError, match="broken"):
        rig.model(torch.ones(2)).backward()
    rig.clock.now = 0.0
    one_step(rig)  # gives the pass up that never said that it was over
    assert not rig.meter.steps
    one_step(rig)
    assert rig.meter.steady().seconds == 3.5


def test_an_evaluation_between_two_steps_is_part_of_neither(rig):
    for _ in range(WARM_STEPS + 3):
        one_step(rig)
        for _ in range(2):
            rig.clock.now += 50.0
            with torch.no_grad():
                rig.model(torch.ones(2))
    steady = rig.meter.steady()
    assert len(rig.meter.steps) == 3
    assert (steady.seconds, steady.outside_seconds) == (3.5, 4.0)
    assert steady.resources.stall_seconds == {SSD_READ: 0.25} and steady.resources.moved_bytes == {SSD_READ: 2}


def test_what_a_steady_step_takes_is_said_once():
    clock, said = Clock(), []
    model = Busy(clock)
    rig = SimpleNamespace(clock=clock, model=model)
    rig.meter = StepMeter(model.read, clock=clock, on_settled=lambda: said.append(len(rig.meter.steps)))
    rig.meter.attach(model)
    for _ in range(WARM_STEPS + SETTLED_STEPS + 3):
        one_step(rig)
    assert said == [SETTLED_STEPS]
    rig.meter.begin_again()
    for _ in range(WARM_STEPS + SETTLED_STEPS):
        one_step(rig)
    assert said == [SETTLED_STEPS] * 2


def test_old_steps_make_room(rig):
    for number in range(WARM_STEPS + 2 * KEPT_STEPS):
        one_step(rig, update=0.5 if number < KEPT_STEPS else 1.0)
    assert len(rig.meter.steps) == KEPT_STEPS and rig.meter.steady().seconds == 4.0


def test_an_engine_logs_what_binds(tmp_path, caplog):
    with caplog.at_level("INFO", logger="offload_rt"):
        steady_step(build_plain(), tmp_path, num_steps=WARM_STEPS + SETTLED_STEPS)
    (said,) = [record.message for record in caplog.records if record.message.startswith("a step takes")]
    assert " binds" in said


def steady_step(model, folder, hardware=None, *, num_steps=WARM_STEPS + 3, **arguments):
    """What the report says after some steps of a model of plain layers, and the engine's plan."""
    x_BTF = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    with Engine(model, batch_size=2, seq_len=16, nvme=folder, lr=1e-3, emulate=hardware, **arguments) as engine:
        assert engine.report()["steady_step"] is None
        for _ in range(num_steps):
            engine(x_BTF).square().mean().backward()  # not through the engine: hooks see it
            engine.step()
        found = engine.report()["steady_step"]
        assert all(line in engine.summary() for line in comparison.lines(found))
        return found, engine.plan


def test_a_slow_drive_is_busy_for_its_bytes_over_its_rate_and_a_slow_layer_is_computing(tmp_path):
    hardware, streams = machine(64 * MIB, 64 * MIB), RuntimeOptions(fill=False)
    fast, _ = steady_step(build_plain(SlowLayer), tmp_path, hardware, options=streams)
    (drive,) = hardware.drives
    slow_drive = replace(drive, read_bytes_per_second=RATE)
    slow, plan = steady_step(build_plain(), tmp_path, replace(hardware, drives=(slow_drive,)), options=streams)
    for found in (fast, slow):
        assert found["binding"] == max(found["resources"], key=lambda name: found["resources"][name]["busy_seconds"])
    layers = next(ring for ring in plan.rings if ring.name == "layers")
    assert layers.rest is Tier.NVME
    read = slow["resources"][SSD_READ]
    assert read["bytes"] % layers.slot_bytes == 0 < read["bytes"], "whole layers, and nothing else"
    assert read["busy_seconds"] == pytest.approx(read["bytes"] / RATE, rel=0.02)
    assert fast["resources"][SSD_READ]["busy_seconds"] == pytest.approx(
        fast["resources"][SSD_READ]["bytes"] / drive.read_bytes_per_second, rel=0.02
    )
    # Each layer sleeps once in forward and once in backward.
    assert fast["resources"][COMPUTE]["busy_seconds"] >= 2 * 4 * SLEEP
    assert slow["seconds"] >= read["stall_seconds"] > 0


def test_layer_inputs_in_host_are_counted_both_ways(tmp_path):
    found, _ = steady_step(
        build_plain(), tmp_path, host_memory="64MiB", options=RuntimeOptions(layer_inputs=Tier.HOST)
    )  # fmt: skip
    each = 4 * 2 * 16 * 32 * 4  # layers x batch x tokens x width x 4 bytes
    for name in (HOST_TO_DEVICE, DEVICE_TO_HOST):
        resource = found["resources"][name]
        assert resource["busy_seconds"] > 0 and resource["bytes"] >= each
    assert found["resources"][DEVICE_TO_HOST]["stall_seconds"] >= found["resources"][DEVICE_TO_HOST]["busy_seconds"]


@pytest.mark.parametrize("place", ["BACKWARD", "SPECULATIVE, serial", "in place"])
def test_updates_of_state_are_the_processors_wherever_they_run(place, tmp_path):
    with tiny_training.engine(tiny_training.model(), place, tmp_path) as run:
        tiny_training.train(run, range(WARM_STEPS + 3))
        found = run.report()["steady_step"]["resources"]
    assert found[CPU]["busy_seconds"] > 0 and found[CPU]["stall_seconds"] > 0
    if "nvme" in tiny_training.PLACES[place]:
        assert found[SSD_WRITE]["busy_seconds"] > 0 and found[SSD_WRITE]["bytes"] > 0
        assert found[SSD_WRITE]["stall_seconds"] > 0, "a commit waits for its syncs"
    assert all(each["busy_seconds"] >= 0 for each in found.values())


def test_a_prediction_stands_beside_what_was_measured():
    resources = Reading(
        busy_seconds={COMPUTE: 2.0, SSD_READ: 3.0}, moved_bytes={SSD_READ: 4 * MIB}, stall_seconds={SSD_READ: 1.25}
    )
    predicted = {"step_seconds": 2.5, "busy_seconds": {COMPUTE: 2.4, SSD_READ: 1.0, SSD_WRITE: 0.0}}
    found = comparison.compared(3.5, 0.1, resources, 8, predicted)
    assert (found["binding"], found["predicted_binding"]) == (SSD_READ, COMPUTE)
    assert found["resources"][SSD_READ] == {
        "busy_seconds": 3.0, "predicted_seconds": 1.0, "stall_seconds": 1.25, "bytes": 4 * MIB,
    }  # fmt: skip
    assert SSD_WRITE not in found["resources"], "nothing was to be written, and nothing was"
    assert comparison.lines(found) == [
        "a steady step takes 3.500 s in the median of 8, 2.500 s predicted; ssd_read binds, compute was to",
        "  ssd_read       3.000 s busy, 1.000 s predicted, 4 MiB, computing waited 1.250 s for it",
        "  compute        2.000 s busy, 2.400 s predicted",
    ]
    assert comparison.in_short(found) == (
        "a step takes 3.500 s (+40% of the 2.500 s predicted); ssd_read binds, 3.000 s busy (+200% of the 1.000 s "
        "predicted); furthest off besides: compute, 2.000 s (-17% of the 2.400 s predicted)"
    )
    alone = comparison.compared(3.5, 0.1, resources, 8, {})
    assert alone["predicted_seconds"] is None and alone["predicted_binding"] is None
    assert "predicted" not in " ".join(comparison.lines(alone))
    assert comparison.in_short(alone) == "a step takes 3.500 s; ssd_read binds, 3.000 s busy"
    untimed = comparison.compared(3.5, 0.1, Reading(moved_bytes={HOST_TO_DEVICE: 1}), 8, {})
    assert untimed["binding"] is None and "not timed" in comparison.lines(untimed)[1]


def test_drives_that_were_idle_do_not_bind_where_nothing_else_was_timed():
    """A device streams from HOST: the drives' meter says 0, and what the device did nobody knows."""
    idle = Reading(busy_seconds={SSD_READ: 0.0, SSD_WRITE: 0.0}, moved_bytes={HOST_TO_DEVICE: 1})
    found = comparison.compared(3.5, 0.1, idle, 8, {"busy_seconds": {SSD_READ: 0.0}})
    assert (found["binding"], found["predicted_binding"]) == (None, None)
    assert comparison.in_short(found) == "a step takes 3.500 s"
