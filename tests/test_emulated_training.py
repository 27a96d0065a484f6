"""Layers that train, and adapters whose state is in tiers, behind emulated links: the same numbers, and the time that
their bytes take there.

link out   gradients of every block, once a step
link in    weights that stream, at each fetch; new weights of what stays in DEVICE
drives     state and new weights of what rests on NVMe, and a commit's own records
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_rt.memory.arena import Arena
from offload_rt.optimizer.gradients import Gradients
from offload_rt.transfers.links import Links as Connections
from offload_rt.transfers.throttle import Pipe, Throttle
from planners.plans.plan import StatePlacement, Tier
from planners.problems.hardware import Drive, Hardware, Links, named_hardware
from tests import adapter_tiers
from tests.full_parity import training_of
from tests.tiny_blocks import blocks, gradients_of
from tests.tiny_training import ON_NVME, SPLIT, Made, Plain, differences, engine, model, train

MIB = 1 << 20
IN_RATE, OUT_RATE, READ_RATE, WRITE_RATE = 2e9, 1e9, 1.5e9, 0.5e9
STEPS = range(2, 6)


def machine() -> Hardware:
    card = named_hardware("rtx4090")
    return replace(
        card,
        device=replace(card.device, memory_bytes=64 * MIB, reserve_bytes=0),
        host=replace(card.host, memory_bytes=64 * MIB),
        links=Links(host_to_device_bytes_per_second=IN_RATE, device_to_host_bytes_per_second=OUT_RATE, duplex=0.5),
        drives=(
            Drive(capacity_bytes=1 << 30, read_bytes_per_second=READ_RATE, write_bytes_per_second=WRITE_RATE),
        ),
        drive_mix=0.2,
    )  # fmt: skip


PLACES: dict[str, dict[str, Any]] = {
    "from HOST": {},
    "on NVME": {"nvme": True, "options": {"rest": Tier.NVME}},
    "on NVME, clipped": {"nvme": True, "options": {"rest": Tier.NVME}, "max_grad_norm": 1e6},
    "split": {"nvme": True, "options": {"rest": Tier.NVME, "state": replace(ON_NVME, in_memory=SPLIT)}},
    "gradients on NVME": {
        "nvme": True,
        "options": {
            "rest": Tier.NVME,
            "state": StatePlacement(
                in_memory=SPLIT, gradients=Tier.NVME, state_slots=2, weight_slots=1, gradient_slots=1
            ),
        },
    },
}  # fmt: skip


def counted(run: Made) -> dict[str, float]:
    """Seconds that links and drives worked so far, and bytes that moved; nothing is under way."""
    report = run.report()
    moved = {key: report[key] for key in ("bytes_read", "bytes_written")}
    return {**report["link_busy_seconds"], **moved, "fetched": fetched_bytes(run)}


def fetched_bytes(run: Made) -> int:
    return sum(executor.counters.fetched_bytes for executor in run._runtime.executors)


@pytest.mark.parametrize("place", PLACES)
def test_numbers_are_those_without_links_and_gradients_and_weights_take_their_time(place: str, tmp_path: Path) -> None:
    plain = Plain(model())
    expected = train(plain, range(6))
    with engine(model(), "emulated", tmp_path, **{**PLACES[place], "emulate": machine()}) as run:
        losses = train(run, range(2))
        before = counted(run)
        losses += train(run, STEPS)
        after = counted(run)
        assert losses == expected
        assert differences(plain.state(), run.state()) == []
        trained = training_of(run).blocks
    each = {name: (after[name] - before[name]) / len(STEPS) for name in after}
    gradients = sum(one.parameter.nbytes for block in trained for one in block.parameters)
    stay = sum(block.weights_bytes for block in trained if block.weights is None)
    assert gradients > stay > 0 and each["fetched"] > 0
    assert each["device_to_host"] == pytest.approx(gradients / OUT_RATE, rel=1e-6)
    assert each["host_to_device"] == pytest.approx((each["fetched"] + stay) / IN_RATE, rel=1e-6)
    assert each["ssd_read"] == pytest.approx(each["bytes_read"] / READ_RATE, rel=1e-6)
    assert each["ssd_write"] == pytest.approx(each["bytes_written"] / WRITE_RATE, rel=1e-6)
    assert (each["bytes_read"] > 0) is (place != "from HOST")


@pytest.mark.parametrize("way", ["host_to_device", "device_to_host"])
def test_a_step_is_over_when_its_gradients_and_new_weights_have_come(way: str, tmp_path: Path) -> None:
    slow = {f"{way}_bytes_per_second": 100e3}
    hardware = replace(machine(), links=replace(machine().links, **slow))
    with engine(model(), "emulated", tmp_path, emulate=hardware) as run:
        train(run, range(2))
        busy = run.report()["link_busy_seconds"][way]
        time.sleep(0.02)
        assert run.report()["link_busy_seconds"][way] == busy > 0.1, "something was under way when the step ended"


def test_a_block_waits_until_the_device_has_room_for_its_gradients() -> None:
    throttle = Throttle(machine())
    seconds: list[float] = []
    throttle.link = Pipe((1e6, 1e6), 1.0, clock=lambda: sum(seconds), sleep=seconds.append)
    made = blocks(3)
    num_bytes = made[0].weights_bytes
    links = Connections(throttle=throttle)
    for device_slots, gone in ((1, [1, 2, 3]), (2, [0, 1, 2])):
        gradients = Gradients(
            made, Arena("gradients", 1 << 20), None, links, accumulates=False, device_slots=device_slots
        )
        before = throttle.link.busy_seconds[1]
        left = []
        for block in made:
            gradients.add(block, gradients_of(block, 1.0), with_norms=True)
            left.append(round((throttle.link.busy_seconds[1] - before) * 1e6 / num_bytes))
        assert left == gone
        gradients.norms()  # which are known when all have come
        assert throttle.link.busy_seconds[1] - before == pytest.approx(3 * num_bytes / 1e6)
    links.close()


@pytest.mark.parametrize("place", ["in HOST", "on NVME"])
def test_gradients_of_adapters_go_to_where_their_state_is_and_new_weights_come_back(place: str, tmp_path: Path) -> None:
    """Once a step, however many micro-batches there were; and the bits are those of torch's optimizer in memory."""
    case = adapter_tiers.Case("llama", "bf16", "default", 2, 0.05, False, place)
    with adapter_tiers.make_engine(case, tmp_path, emulate=machine()) as run:
        running = adapter_tiers.Running(case, run)
        traces = running.steps(range(2))
        before = counted(run)
        traces += running.steps(range(2, adapter_tiers.STEPS))
        after = counted(run)
        trained = [one.parameter for block in adapter_tiers.training_of(run).blocks for one in block.parameters]
        assert run.plan.state is not None and not run.plan.state.on_device
    assert adapter_tiers.unequal(adapter_tiers.run_plain(case), traces) == []
    each = {name: (after[name] - before[name]) / (adapter_tiers.STEPS - 2) for name in after}
    adapters = sum(parameter.nbytes for parameter in trained)
    assert each["device_to_host"] == pytest.approx(adapters / OUT_RATE, rel=1e-6)
    assert each["host_to_device"] == pytest.approx((each["fetched"] + adapters) / IN_RATE, rel=1e-6)
    assert each["ssd_read"] == pytest.approx(each["bytes_read"] / READ_RATE, rel=1e-6)
    assert each["ssd_write"] == pytest.approx(each["bytes_written"] / WRITE_RATE, rel=1e-6)
    assert (each["bytes_read"] > 0) is (each["bytes_written"] > 0) is (place == "on NVME")


def test_a_step_of_adapters_waits_for_their_gradients_and_their_new_weights(tmp_path: Path) -> None:
    slow = Links(host_to_device_bytes_per_second=4e6, device_to_host_bytes_per_second=1e6, duplex=0.5)
    case = adapter_tiers.Case("llama", "bf16", "default", 1, None, False, "in HOST")
    with adapter_tiers.make_engine(case, tmp_path, emulate=replace(machine(), links=slow)) as run:
        adapter_tiers.Running(case, run).steps(range(1))
        busy = run.report()["link_busy_seconds"]
        adapters = sum(p.nbytes for p in run.trainable.values())
        assert busy["device_to_host"] == pytest.approx(adapters / 1e6, rel=1e-6), "under way when the step ended"
        assert busy["host_to_device"] >= adapters / 4e6 * (1 - 1e-6)
