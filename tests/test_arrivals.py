"""Gradients out of a device and new weights into it, on a device whose kernels are late too.

compute    backward 5 | backward 4          | ..                      [wait] forward 1 of the next step
to_host               | gradients 5 -> HOST | ..                      /
updates                                     | sum, norm, step 5 | .. /
to_device                                                  | weights in place
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.meter import CPU
from offload_rt.optimizer.arrivals import Arrivals, largest_arrival_bytes
from offload_rt.optimizer.landing import Landing
from offload_rt.optimizer.pieces import TrainedBlock, TrainedParameter, trained_block
from offload_rt.optimizer.rules import AdamWRule
from offload_rt.tiering.tiers import HostResidence
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST, Recorder
from offload_rt.transfers.streams import COMPUTE
from tests.fake_device import FakeDevice, FakeStream

SIZE = 3000
LATE = 0.003


class Bench:
    """A device with late kernels, and blocks of two parameters."""

    def __init__(self, *, staged: bool = False) -> None:
        self.device = FakeDevice(late_seconds=LATE)
        self.recorder = Recorder(compute=COMPUTE)
        self.links = Links(recorder=self.recorder, device=self.device)
        self.blocks = [block(f"b{number}") for number in range(4)]
        self.staging = Arena("staging", 2 * 16384, poison=True) if staged else None
        self.arrivals = Arrivals(self.links, self.staging, 16384)
        self.waiting = Arena("gradients", 4 * 16384, poison=True)
        self.slots = {each.name: self.waiting.acquire(16384, each.name) for each in self.blocks}
        self.taken: list[tuple[str, dict[int, torch.Tensor]]] = []

    def gradients(self, value: float) -> dict[int, torch.Tensor]:
        """Tensors that a late kernel fills; until then they hold something else."""
        found = {index: torch.full((SIZE,), -1.0, dtype=torch.bfloat16) for index in range(2)}
        self.device.compute.give(lambda: [tensor.fill_(value + index) for index, tensor in found.items()])
        return found

    def places(self, name: str) -> dict[int, Slot]:
        return {index: self.slots[name].part(8192 * index, 2 * SIZE) for index in range(2)}

    def start(self, number: int, value: float):  # type: ignore[no-untyped-def]
        each = self.blocks[number]

        def take(arrived) -> None:  # type: ignore[no-untyped-def]
            self.taken.append((each.name, {index: tensor.clone() for index, tensor in arrived.items()}))

        return self.arrivals.start(each, self.gradients(value), self.places(each.name), take)

    def close(self) -> None:
        self.device.compute.record().wait()
        self.links.close()
        self.device.close()
        assert [str(race) for race in self.recorder.check()] == []


def block(name: str) -> TrainedBlock:
    parameters = [
        TrainedParameter(f"{name}.{index}", nn.Parameter(torch.zeros(SIZE, dtype=torch.bfloat16)), None)
        for index in range(2)
    ]
    return trained_block(name, parameters, AdamWRule("float32"), accumulates=False)


@pytest.mark.parametrize("staged", [False, True])
def test_gradients_are_those_that_late_kernels_have_computed(staged: bool) -> None:
    bench = Bench(staged=staged)
    arrivals = [bench.start(number, 10.0 * number) for number in range(4)]
    for arrival in arrivals:
        arrival.settle(bench.links.wait)
        arrival.settle(bench.links.wait)  # once is enough, twice does no harm
    assert [name for name, _ in bench.taken] == ["b0", "b1", "b2", "b3"]
    for number, (_, found) in enumerate(bench.taken):
        assert all(torch.all(found[index] == 10.0 * number + index) for index in range(2))
    assert bench.device.to_host.num_copies == 8
    assert bench.device.to_host.num_records == 4, "one event a block, however many gradients it has"
    if not staged:
        slot = bench.slots["b3"]
        assert torch.all(slot.tensor(torch.bfloat16, (SIZE,), 8192) == 31.0)
    bench.close()


def test_what_is_done_with_gradients_that_arrived_keeps_the_processor_busy_as_planned() -> None:
    bench, now = Bench(), [0.0]
    bench.links.meter.clock = lambda: now[0]

    def take(arrived) -> None:  # type: ignore[no-untyped-def]
        now[0] += 5.0

    each = bench.blocks[0]
    arrival = bench.arrivals.start(each, bench.gradients(1.0), bench.places(each.name), take)
    arrival.settle(bench.links.wait)
    assert bench.links.reading().busy_seconds[CPU] == 5.0
    bench.close()


def test_what_was_begun_of_a_copy_that_failed_is_over_when_its_memory_is_let_go_of(monkeypatch) -> None:
    bench = Bench()
    copy, given = FakeStream._copy, []

    def failing(stream: FakeStream, source: torch.Tensor, destination: torch.Tensor) -> None:
        if given:
            raise KeyboardInterrupt
        copy(stream, source, destination)
        given.append(destination.view(torch.bfloat16))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FakeStream, "_copy", failing)
        bench.start(0, 7.0)
    assert torch.all(given[0] == 7.0)
    bench.start(1, 8.0).settle(bench.links.wait)
    bench.device.compute.record().wait()
    bench.links.close()
    bench.device.close()


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_the_gradients_of_one_block_are_under_way_at_most_while_the_next_ones_are_computed() -> None:
    bench = Bench()
    bench.device.to_host.hold()
    bench.start(0, 0.0)
    second = in_thread(lambda: bench.start(1, 10.0))
    second.join(0.1)
    assert second.is_alive(), "the device's memory would hold the gradients of as many blocks as the host is ahead"
    bench.device.to_host.resume()
    second.join(10)
    assert not second.is_alive()
    bench.arrivals.drop()
    bench.close()


def test_staging_is_used_again_when_what_came_through_it_was_taken() -> None:
    bench = Bench(staged=True)
    for number in range(4):
        bench.start(number, 10.0 * number)
    assert [name for name, _ in bench.taken] == ["b0", "b1"]  # two slots: the third and fourth waited for these
    bench.arrivals.drop()
    assert bench.staging is not None
    bench.close()


def test_arrivals_that_failed_say_so_to_everybody_and_are_forgotten() -> None:
    bench = Bench()
    arrival = bench.start(0, 0.0)
    arrival.wait()
    broken = OffloadError("the device is lost")
    bench.device.to_host.error = broken
    arrival = bench.start(1, 10.0)
    for _ in range(2):
        with pytest.raises(OffloadError, match="the device is lost"):
            arrival.settle(bench.links.wait)
    assert bench.taken == []
    bench.arrivals.drop()
    bench.device.to_host.error = None
    bench.start(2, 20.0).settle(bench.links.wait)
    bench.device.compute.record().wait()
    bench.links.close()
    bench.device.close()


def test_room_for_arriving_gradients_is_that_of_all_parameters_in_their_dtype() -> None:
    assert largest_arrival_bytes([block("b")]) == 12288  # two of 6000 bytes, each from a 64-byte boundary on, in pages


def test_new_weights_come_behind_the_last_use_and_before_the_next() -> None:
    """Kernels look at the weights when they run. Each new value is asked for long before the one that it replaces was
    used.
    """
    bench = Bench()
    landing = Landing(Arena("landing", 2 * 8192), 8192, bench.links)
    weights = torch.zeros(SIZE, dtype=torch.bfloat16)
    seen: list[tuple[float, float]] = []

    def use() -> None:
        seen.append((float(weights.min()), float(weights.max())))

    for value in range(6):
        bench.device.compute.give(use)
        with landing.room_for(weights) as new:
            new.fill_(value + 1)
        if value % 2:
            landing.order()
    landing.order()
    bench.device.compute.give(use)
    bench.device.compute.record().wait()
    low, high = seen[-1]
    assert low == high == 6.0
    for step, (_, high) in enumerate(seen[:-1]):
        assert high <= step, "a kernel saw weights that were asked for behind it"
    for step in (2, 4):  # those that were ordered
        assert seen[step] == (float(step), float(step))
    assert landing.num_copies == bench.device.to_device.num_copies == 6
    bench.close()


def test_no_weights_land_where_rounding_them_failed() -> None:
    bench = Bench()
    landing = Landing(Arena("landing", 2 * 8192), 8192, bench.links)
    weights = torch.zeros(SIZE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out of luck"), landing.room_for(weights):
        raise ValueError("out of luck")
    assert landing.num_copies == bench.device.to_device.num_copies == 0
    bench.close()


def test_weights_in_host_change_when_no_copy_of_them_is_under_way() -> None:
    bench = Bench()
    arena = bench.device.arena("slots", 2 * 8192, poison=True)
    rests = Arena("weights", 8192).acquire(8192, "b0")
    residence = HostResidence(rests, bench.links)
    seen: list[tuple[float, float]] = []
    for value in (1.0, 2.0, 3.0):
        residence.settle()
        rests.tensor(torch.float32, (2048,)).fill_(value)
        bench.recorder.use("step", writes=[rests.range], lane=HOST)
        slot = arena.acquire(8192, "b0")
        residence.fetch(slot).wait()
        view = slot.tensor(torch.float32, (2048,))
        bench.recorder.use("layer 0", reads=[slot.range])
        bench.device.compute.give(lambda view=view: seen.append((float(view.min()), float(view.max()))))
        del slot, view
    bench.device.compute.record().wait()
    assert seen == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    bench.close()
