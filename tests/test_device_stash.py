"""Tensors put away by a device's own copies, with kernels that are late: in HOST, and by way of HOST on NVMe."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from offload_rt.errors import StorageError
from offload_rt.memory.arena import Arena
from offload_rt.storage.scratch import Scratch
from offload_rt.tiering.device_stash import DeviceStash
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.streams import COMPUTE
from tests.fake_device import FakeDevice
from tests.waiting import Waiting

SIZE = 3000
ROOM = 8192
"""What one tensor takes of an arena."""
LATE = 0.002
PLACES = ("HOST", "NVME")


class Bench:
    """A stash whose window is that of two tensors."""

    def __init__(self, place: str, folder: Path, *, num_kept: int = 8, window: int = 2, late_seconds: float = LATE):
        self.device = FakeDevice(late_seconds=late_seconds)
        self.recorder = Recorder(compute=COMPUTE)
        self.links = Links(recorder=self.recorder, device=self.device)
        self.scratch = Scratch(folder, num_kept * ROOM, self.links) if place == "NVME" else None
        self.arena = Arena("stash", (num_kept if self.scratch is None else 2 * window + 2) * ROOM, poison=True)
        self.stash = DeviceStash(self.arena, self.links, window_bytes=window * SIZE * 2, scratch=self.scratch)
        self.seen: list[tuple[float, float]] = []

    def compute(self, value: float) -> torch.Tensor:
        """A tensor that a late kernel makes."""
        made = torch.full((SIZE,), -1.0, dtype=torch.bfloat16)
        self.device.compute.give(lambda: made.fill_(value))
        return made

    def use(self, tensor: torch.Tensor) -> None:
        self.device.compute.give(lambda: self.seen.append((float(tensor.min()), float(tensor.max()))))

    def close(self) -> None:
        self.device.compute.record().wait()
        self.links.close()
        if self.scratch is not None:
            self.scratch.close()
        self.device.close()
        assert [str(race) for race in self.recorder.check()] == []


def in_thread(call) -> threading.Thread:  # type: ignore[no-untyped-def]
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("place", PLACES)
def test_late_kernels_see_what_late_kernels_made(place: str, tmp_path: Path) -> None:
    bench = Bench(place, tmp_path)
    for step in range(3):
        away = [bench.stash.put(bench.compute(10 * step + value)) for value in range(6)]
        for stashed in reversed(away):
            assert stashed is not None
            bench.use(stashed.load())
            stashed.release()
        del away, stashed
    bench.close()
    assert bench.seen == [(10 * step + value,) * 2 for step in range(3) for value in reversed(range(6))]
    assert bench.arena.held_bytes() == 0
    assert bench.device.to_host.num_copies == bench.device.to_device.num_copies == 18
    assert bench.links.counters.bytes_written == (18 * ROOM if place == "NVME" else 0)


@pytest.mark.parametrize("place", PLACES)
def test_no_more_than_the_window_is_on_its_way_out_of_the_device(place: str, tmp_path: Path) -> None:
    bench = Bench(place, tmp_path)
    bench.device.to_host.hold()
    away = [bench.stash.put(bench.compute(value)) for value in range(2)]
    third = in_thread(lambda: away.append(bench.stash.put(bench.compute(2))))
    third.join(0.1)
    assert third.is_alive(), "a third tensor is held by a copy"
    bench.device.to_host.resume()
    third.join(10)
    assert not third.is_alive()
    bench.close()


@pytest.mark.parametrize("place", PLACES)
def test_what_comes_ahead_waits_until_what_leaves_has_made_room(place: str, tmp_path: Path) -> None:
    bench = Bench(place, tmp_path)
    away = [bench.stash.put(bench.compute(value)) for value in range(3)]
    bench.stash.links.finish(away[2]._saved)  # on NVMe it is read only when it was written
    bench.device.reports.hold()
    away += [bench.stash.put(bench.compute(value)) for value in (3, 4)]
    loading = Waiting(away[2].load)
    assert loading.still(), "two that leave fill the window"
    bench.device.reports.resume()
    bench.use(loading.result())
    assert sum(stashed._ahead is not None for stashed in away) == 2
    bench.close()
    assert bench.seen == [(2.0, 2.0)]


@pytest.mark.parametrize("place", PLACES)
def test_the_last_ones_come_back_before_the_first_is_asked_for_and_nobody_waits(place: str, tmp_path: Path) -> None:
    bench = Bench(place, tmp_path)
    bench.device.reports.hold()
    away = [bench.stash.put(bench.compute(value)) for value in range(2)]
    bench.stash.start_from(bench.stash.latest)
    assert [stashed._ahead for stashed in away] == [None, None], "two that leave fill the window"
    bench.device.reports.resume()
    for stashed in away:
        bench.links.finish(stashed._saved)
    away += [bench.stash.put(bench.compute(value)) for value in (2, 3)]
    for stashed in away:
        bench.links.finish(stashed._saved)
    for _ in range(2):
        bench.stash.start_from(bench.stash.latest)
        assert [number for number, stashed in enumerate(away) if stashed._ahead is not None] == [2, 3]
    for stashed in reversed(away):
        bench.use(stashed.load())
        bench.stash.start_from(bench.stash.latest)
        assert stashed._ahead is None, "it was used, and does not come a second time"
        stashed.release()
    bench.close()
    assert bench.seen == [(float(value),) * 2 for value in reversed(range(4))]
    assert bench.device.to_device.num_copies == 4


@pytest.mark.parametrize("place", PLACES)
def test_a_backward_begins_with_what_its_own_forward_had_put_away(place: str, tmp_path: Path) -> None:
    """Two forwards, whose backwards come in their order: what the second one put away would fill the window."""
    bench = Bench(place, tmp_path)
    first = [bench.stash.put(bench.compute(value)) for value in range(3)]
    latest = bench.stash.latest
    second = [bench.stash.put(bench.compute(value)) for value in (3, 4)]
    for stashed in (*first, *second):
        bench.links.finish(stashed._saved)
    bench.stash.start_from(latest)
    assert [stashed._ahead is not None for stashed in (*first, *second)] == [False, True, True, False, False]
    for stashed in (*reversed(first), *reversed(second)):
        bench.use(stashed.load())
        stashed.release()
    bench.close()
    assert bench.seen == [(float(value),) * 2 for value in (2, 1, 0, 4, 3)]


@pytest.mark.parametrize("place", PLACES)
def test_no_more_than_the_window_comes_ahead_in_whatever_order_tensors_are_wanted(place: str, tmp_path: Path) -> None:
    bench = Bench(place, tmp_path)
    away = [bench.stash.put(bench.compute(value)) for value in range(8)]
    for index in (7, 4, 1):  # each would fetch two of its own
        bench.use(away[index].load())
        ahead = [number for number, stashed in enumerate(away) if stashed._ahead is not None]
        assert ahead == [5, 6]
    held = away[6]._ahead  # a GPU's allocator knows its streams, the fake one's does not
    away[6].release()  # nobody wanted it
    bench.use(away[3].load())
    assert [number for number, stashed in enumerate(away) if stashed._ahead is not None] == [2, 5]
    bench.close()
    assert held is not None and bench.seen == [(float(index),) * 2 for index in (7, 4, 1, 3)]


@pytest.mark.parametrize("place", PLACES)
def test_what_backward_wants_next_is_fetched_as_far_as_the_window_goes(place: str, tmp_path: Path) -> None:
    bench = Bench(place, tmp_path)
    away = [bench.stash.put(bench.compute(value)) for value in range(5)]
    loaded = [away[4].load()]  # held: a GPU's allocator knows its streams, the fake one's does not
    assert bench.links.counters.bytes_copied == (5 + 3) * 2 * SIZE
    loaded.append(away[3].load())
    assert bench.links.counters.bytes_copied == (5 + 4) * 2 * SIZE
    for index in (0, 1, 2):  # another order than foreseen
        bench.use(away[index].load())
    bench.close()
    assert bench.seen == [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)]


def test_a_place_on_the_drive_is_used_again_only_when_it_was_written_and_read(tmp_path: Path) -> None:
    """Room for two: each tensor takes the place of the one that was released before it."""
    bench = Bench("NVME", tmp_path, num_kept=2)
    for value in range(10):
        stashed = bench.stash.put(bench.compute(value))
        assert stashed is not None
        if value % 3:  # others are never wanted again
            bench.use(stashed.load())
        stashed.release()
        del stashed
    bench.close()
    assert bench.seen == [(float(value),) * 2 for value in range(10) if value % 3]


def test_a_full_stash_says_so(tmp_path: Path) -> None:
    for place in PLACES:
        bench = Bench(place, tmp_path, num_kept=1)
        first = bench.stash.put(bench.compute(1.0))
        assert first is not None and bench.stash.put(bench.compute(2.0)) is None
        bench.use(first.load())
        bench.close()
        assert bench.seen == [(1.0, 1.0)]
    bench = Bench("NVME", tmp_path)
    assert bench.stash.put(torch.zeros(100 * SIZE)) is None
    bench.close()


def test_a_device_that_is_late_to_say_that_it_has_fetched_a_tensor_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    bench = Bench("HOST", tmp_path, num_kept=1, late_seconds=0.0)
    stashed = bench.stash.put(bench.compute(1.0))
    assert stashed is not None
    bench.stash.links.finish(stashed._saved)
    bench.device.reports.hold()
    bench.use(stashed.load())
    bench.device.compute.record().pass_by()
    stashed.release()
    second = Waiting(lambda: bench.stash.put(bench.compute(2.0)))
    assert second.still(), "its place is lent to a copy that may not be over"
    bench.device.reports.resume()
    bench.use(second.result().load())
    bench.close()
    assert bench.seen == [(1.0, 1.0), (2.0, 2.0)]


def test_a_write_that_fails_is_told_to_whoever_wants_the_tensor(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    bench = Bench("NVME", tmp_path)

    def fail(*args: object) -> None:
        raise StorageError("no space left", path="/p", errno=28)

    monkeypatch.setattr(bench.links, "write", fail)
    stashed = bench.stash.put(bench.compute(1.0))
    assert stashed is not None
    for _ in range(2):
        with pytest.raises(StorageError, match="no space left"):
            stashed.load()
    stashed.release()
    monkeypatch.undo()
    bench.close()


def test_what_the_device_did_not_copy_is_not_written_and_told_to_whoever_wants_it(tmp_path: Path) -> None:
    bench = Bench("NVME", tmp_path)

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    bench.device.to_host.give(fail)
    stashed = bench.stash.put(torch.ones(SIZE, dtype=torch.bfloat16))
    assert stashed is not None
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            stashed.load()
    assert bench.links.counters.bytes_written == 0
    stashed.release()
    bench.links.close()
    bench.device.close()
