"""Pieces stepped on the device, one after the other, on a device all of whose streams are late.

to_device   | state a, gradients a | state b, gradients b | ...
updates                            | step a              | step b
to_host                                     | state a     | ...
compute     | uses weights | ..                              | uses new weights
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from offload_rt.errors import OffloadError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.job import Job
from offload_rt.optimizer.on_device import DeviceUpdates, stepping_bytes
from offload_rt.optimizer.pieces import MASTER, Piece, Segment, TrainedBlock, TrainedParameter, trained_block
from offload_rt.optimizer.rules import AdamWRule, Scalars, Update
from offload_rt.tensor_spec import BlockSpec, TensorSpec, layout_block
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.streams import COMPUTE
from tests.fake_device import FakeDevice

SIZE = 3000
LATE = 0.003
NUMBERS = itertools.count()


class AddingRule:
    """Adds the gradient to the master; the weight is the new master. Fails where `fails` is set."""

    def __init__(self) -> None:
        self.fails = False

    def launch(self, of: Update) -> tuple[Callable[[], None], Scalars]:
        def run() -> None:
            if self.fails:
                raise OffloadError("the kernel is lost")
            of.master.add_(of.grad.float(), alpha=of.grad_scale)
            assert of.weight is not None
            of.weight.copy_(of.master)

        return run, {"step": of.step}


class Bench:
    """Blocks of one piece, of two parameters; their state and gradients are in HOST, their weights in the parameters,
    or, with `streams`, in slots of HOST.
    """

    def __init__(self, *, num_slots: int = 2, num_blocks: int = 6, streams: bool = False) -> None:
        self.device = FakeDevice(late_seconds=LATE)
        self.recorder = Recorder(compute=COMPUTE)
        self.links = Links(recorder=self.recorder, device=self.device)
        self.blocks = [block(f"b{number}", streams=streams) for number in range(num_blocks)]
        slot_bytes = stepping_bytes(self.blocks)
        self.rule = AddingRule()
        arena = self.device.arena("stepped", num_slots * slot_bytes, poison=False)
        self.updates = DeviceUpdates(self.rule, arena, slot_bytes, self.links)
        self.state = [self._filled("state", each.pieces[0].num_bytes, 0.0) for each in self.blocks]
        self.gradients = [
            self._filled("gradients", each.gradients.stored_bytes, float(number + 1), torch.bfloat16)
            for number, each in enumerate(self.blocks)
        ]
        self.weights = [
            self._filled("weights", each.weights.stored_bytes, -1.0) if each.weights is not None else None
            for each in self.blocks
        ]

    def _filled(self, name: str, num_bytes: int, value: float, dtype: torch.dtype = torch.float32) -> Slot:
        slot = Arena(f"{name} {next(NUMBERS)}", num_bytes).acquire(num_bytes, name)
        slot.tensor(dtype, (num_bytes // dtype.itemsize,)).fill_(value)
        return slot

    def submit(self, number: int) -> Job:
        each = self.blocks[number]
        return Job(
            block=each, pieces=each.pieces, gradients=self.gradients[number], arrivals=(), used=self.updates.here(),
            present=frozenset((0, 1)), grad_scale=1.0,
        )  # fmt: skip

    def start(self, number: int, job: Job | None = None) -> None:
        job = self.submit(number) if job is None else job
        piece = job.block.pieces[0]
        self.updates.start(job, piece, self.state[number], self.weights[number], partial(update_of, job.block))

    def settle(self) -> tuple[Piece, Slot]:
        return self.updates.settle(self.links.wait)

    def master(self, number: int) -> tuple[float, float]:
        """Its least and its greatest element."""
        found = [
            self.state[number].tensor(torch.float32, spec.shape, spec.offset_bytes)
            for segment in self.blocks[number].pieces[0].segments
            for spec in segment.state
            if spec.name == MASTER
        ]
        return float(min(one.min() for one in found)), float(max(one.max() for one in found))

    def close(self) -> None:
        self.device.compute.record().wait()
        self.links.close()
        self.device.close()
        assert [str(race) for race in self.recorder.check()] == []


def block(name: str, *, streams: bool) -> TrainedBlock:
    spec = layout_block(name, [TensorSpec(name=f"{name}.{i}", shape=(SIZE,), dtype="BF16") for i in range(2)])
    parameters = [
        TrainedParameter(one.name, nn.Parameter(torch.zeros(SIZE, dtype=torch.bfloat16)), one if streams else None)
        for one in spec.tensors
    ]
    weights: BlockSpec | None = spec if streams else None
    return trained_block(name, parameters, AdamWRule("float32"), weights=weights, accumulates=False)


def update_of(
    of: TrainedBlock, segment: Segment, state: dict[str, torch.Tensor], gradient: torch.Tensor, new: torch.Tensor
) -> Update:
    return Update(
        master=state.pop(MASTER), weight=new, grad=gradient, grad_scale=1.0, state=state, scalars={}, step=1, group={}
    )


@pytest.mark.parametrize("num_slots", [1, 2, 6])
def test_each_piece_is_stepped_with_its_own_state_and_gradients(num_slots: int) -> None:
    bench = Bench(num_slots=num_slots, streams=True)
    for number in range(6):
        if bench.updates.num_under_way == num_slots:
            bench.settle()
        bench.start(number)
    while bench.updates.num_under_way:
        bench.settle()
    for number, weights in enumerate(bench.weights):
        assert bench.master(number) == (number + 1.0, number + 1.0)
        assert weights is not None
        spec = bench.blocks[number].weights
        assert spec is not None
        for tensor in spec.tensors:
            assert torch.all(weights.tensor(torch.bfloat16, (SIZE,), tensor.offset_bytes) == number + 1)
    counters = bench.updates.counters
    piece_bytes, weight_bytes = bench.blocks[0].pieces[0].num_bytes, 4 * SIZE
    assert counters.num_pieces_on_device == bench.device.updates.num_launches == 6
    assert counters.bytes_to_device == counters.bytes_to_host == 6 * (piece_bytes + weight_bytes)
    bench.close()


def test_weights_change_in_place_behind_their_last_use_and_before_the_next() -> None:
    bench = Bench(num_blocks=1)
    weights = [trained.parameter.detach() for trained in bench.blocks[0].parameters]
    seen: list[list[float]] = []

    def use() -> None:
        seen.append(sorted({float(edge) for one in weights for edge in (one.min(), one.max())}))

    for _ in range(3):
        bench.device.compute.hold()
        bench.device.compute.give(use)
        bench.start(0)
        bench.device.to_device.record().wait()
        time.sleep(5 * LATE)  # all that the update needs is there, but for the last use
        bench.device.compute.resume()
        bench.settle()
    bench.device.compute.give(use)
    bench.device.compute.record().wait()
    assert seen == [[0.0], [1.0], [2.0], [3.0]]
    assert bench.updates.counters.bytes_to_host == 3 * bench.blocks[0].pieces[0].num_bytes
    bench.close()


def test_an_update_waits_for_nothing_that_compute_was_given_after_its_block_was_submitted() -> None:
    bench = Bench()
    job = bench.submit(0)
    bench.device.compute.record().wait()  # its gradients have come, so compute is past its backward
    bench.device.compute.hold()
    bench.device.compute.give(lambda: None)
    bench.start(0, job)
    bench.settle()
    assert bench.master(0) == (1.0, 1.0)
    bench.device.compute.resume()
    bench.close()


def test_an_update_that_fails_says_so_and_leaves_nothing_under_way() -> None:
    bench = Bench()
    bench.start(0)
    bench.settle()
    bench.rule.fails = True
    with pytest.raises(OffloadError, match="the kernel is lost"), bench.updates.dropped_unless_done():
        bench.start(1)
        bench.start(2)
        bench.settle()
    assert bench.updates.num_under_way == 0
    assert [bench.master(number) for number in range(3)] == [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    with pytest.raises(OffloadError, match="b3/0: an update on the device failed, and may still use its memory"):
        bench.start(3)
    bench.device.compute.record().wait()
    bench.links.close()
    bench.device.close()


def test_an_update_that_cannot_be_given_leaves_its_slot_to_the_next() -> None:
    bench = Bench(num_slots=1)
    launch, refused = bench.rule.launch, ArithmeticError("no such update")

    def refuse(of: Update) -> tuple[Callable[[], None], Scalars]:
        raise refused

    bench.rule.launch = refuse  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(ArithmeticError, match="no such update"), bench.updates.dropped_unless_done():
            bench.start(0)
    bench.rule.launch = launch  # type: ignore[method-assign]
    bench.start(0)
    bench.settle()
    assert bench.master(0) == (1.0, 1.0)
    bench.close()


def test_a_cpu_device_has_no_updates_of_its_own() -> None:
    with pytest.raises(ValueError, match="DEVICE is RAM here"):
        DeviceUpdates(AddingRule(), Arena("stepped", 4096), 4096, Links())
