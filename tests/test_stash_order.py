"""What is put away last is wanted first, and is on its way back as soon as it has left, whoever waits."""

import threading
import time

import pytest
import torch

from offload_rt.errors import StorageError, StorageTimeout
from offload_rt.memory.arena import Arena
from offload_rt.storage.drive_files import open_file
from offload_rt.storage.scratch import Scratch
from offload_rt.tiering.stash import HostStash, NvmeStash
from offload_rt.tokenwise import forward, middle
from offload_rt.transfers.file_io import AiofilesIO, OpenFile
from offload_rt.transfers.links import Links
from offload_rt.transfers.throttle import Pipe, Throttle
from offload_rt.transfers.transfer import Transfer
from planners.plans.activations import Action, ActivationPolicy, Chunk, Treatment
from planners.plans.placement import Tier
from planners.problems.hardware import named_hardware
from tests.tokenwise import batch, build, cut, policy, step

PAGE = 4096
NEAR = 3
"""Tensors that one operation saves are asked for in the order in which it saved them."""
AGAIN, AWAY = Treatment(action=Action.RECOMPUTE), Treatment(action=Action.SWAP, tier=Tier.HOST)


class Order:
    """Which tensor was put away when, and which was asked for."""

    def __init__(self, monkeypatch):
        self.num_put, self.asked = 0, []
        put = HostStash.put

        def numbered(stash, tensor):
            stashed, number = put(stash, tensor), self.num_put
            self.num_put += 1
            load = stashed.load
            stashed.load = lambda: (self.asked.append(number), load())[1]
            return stashed

        monkeypatch.setattr(HostStash, "put", numbered)


BY_GROUP = {"before": AWAY, "qkv": AWAY, "result": AWAY}
CHOSEN = {
    "whole": policy(1.0, 1),
    "4 chunks": policy(1.0, 4),
    "half of them": policy(0.5, 4),
    "up to attention": ActivationPolicy(chunks=(Chunk(num_tokens=5, action=Action.RECOMPUTE, **BY_GROUP),)),
    "without operands": ActivationPolicy(
        chunks=(Chunk(num_tokens=5, action=Action.SWAP, tier=Tier.HOST, qkv=AGAIN),)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "chosen"), [*(("llama", name) for name in CHOSEN), ("gpt2", "4 chunks"), ("cohere", "whole")]
)
def test_backward_asks_in_the_reverse_of_the_order_in_which_forward_put_away(architecture, chosen, monkeypatch):
    model = build(architecture)
    order = Order(monkeypatch)
    cut(model, CHOSEN[chosen], stash_bytes=16 << 20)
    step(model, batch())
    asked = list(dict.fromkeys(order.asked))
    assert len(asked) == order.num_put > 20
    place_of = {number: place for place, number in enumerate(sorted(asked, reverse=True))}
    assert max(abs(place - place_of[number]) for place, number in enumerate(asked)) < NEAR


ONE_CHUNK = ActivationPolicy(chunks=(Chunk(num_tokens=20, action=Action.RECOMPUTE, **BY_GROUP),))


@pytest.mark.parametrize(
    ("chosen", "module", "copying"),
    [(CHOSEN["without operands"], forward, "dense"), (ONE_CHUNK, middle, "_copied")],
)
def test_queries_keys_and_values_that_nobody_waits_for_are_not_copied(chosen, module, copying, monkeypatch):
    copied, model = [], build("gpt2")
    cut(model, chosen, stash_bytes=16 << 20)
    step(model, batch())  # which first tries a layer by other chunks
    monkeypatch.setattr(module, copying, lambda tensor, *order: copied.append(tensor) or tensor)
    step(model, batch())
    assert copied == []


class HeldWrites:
    """Writes that are under way until `let_go`, by whom they are looked at, and how often somebody has waited."""

    def __init__(self, io):
        self._start = io.start
        self.are_over = False
        self.num_waits = 0
        io.start = self.start

    def start(self, kind, file, offset_bytes, buffer):
        wait = self._start(kind, file, offset_bytes, buffer)
        if kind != "write":
            return wait

        def held(timeout_seconds):
            if not self.are_over:
                self.num_waits += timeout_seconds > 0
                if not timeout_seconds:
                    raise StorageTimeout("under way")
            wait(60.0)

        return held


@pytest.fixture
def six(disk_folder):
    """Six tensors of a page on a drive, their writes under way; what three of them have room for may be read ahead."""
    links = Links(io=AiofilesIO())
    writes = HeldWrites(links.io)
    scratch = Scratch(disk_folder, 8 * PAGE, links)
    stash = NvmeStash(scratch, Arena("staging", 16 * PAGE, poison=True), links, piece_bytes=PAGE, ahead_bytes=3 * PAGE)
    tensors = [torch.full((PAGE // 4,), float(number)) for number in range(6)]
    yield links, writes, tensors, [stash.put(tensor) for tensor in tensors], stash
    writes.are_over = True
    links.close()
    scratch.close()


def test_what_has_left_is_read_ahead_though_nobody_waited_for_it(six):
    links, writes, tensors, held, _ = six
    writes.are_over = True
    assert torch.equal(held[5].load(), tensors[5])
    assert links.counters.bytes_read == 4 * PAGE, "itself, and three ahead"
    for number in (4, 3, 2, 1, 0):
        assert torch.equal(held[number].load(), tensors[number])
    assert (links.counters.bytes_read, writes.num_waits) == (6 * PAGE, 0)


def test_the_last_ones_are_on_their_way_before_the_first_is_asked_for(six):
    links, writes, tensors, held, stash = six
    stash.start_from(stash.latest)
    assert (links.counters.bytes_read, writes.num_waits) == (0, 0), "they still leave"
    writes.are_over = True
    for _ in range(2):
        stash.start_from(stash.latest)
        assert links.counters.bytes_read == 3 * PAGE, "what three have room for, once"
    for number in reversed(range(6)):
        assert torch.equal(held[number].load(), tensors[number])
    stash.start_from(stash.latest)
    assert (links.counters.bytes_read, writes.num_waits) == (6 * PAGE, 0)


def test_nobody_waits_to_read_ahead_what_still_leaves_but_for_the_next_one(six):
    links, writes, tensors, held, _ = six
    assert torch.equal(held[5].load(), tensors[5])
    assert (links.counters.bytes_read, writes.num_waits) == (2 * PAGE, 2)


def test_what_was_given_up_is_read_ahead_anew(six):
    links, writes, tensors, held, stash = six
    writes.are_over = True
    held[5].load()
    stash.free_staging()
    assert torch.equal(held[4].load(), tensors[4])
    assert links.counters.bytes_read == 8 * PAGE, "four, which were given up but for one; and four again"
    for number in (3, 2, 1, 0):
        assert torch.equal(held[number].load(), tensors[number])
    assert links.counters.bytes_read == 9 * PAGE


def test_a_write_that_failed_is_over_and_raises_as_often_as_it_is_waited_for(disk_folder):
    links = Links(io=AiofilesIO())

    def fail(timeout_seconds):
        raise StorageError("write failed", path="f", errno=5)

    links.io.start = lambda *_: fail
    arena = Arena("a", PAGE)
    with open(disk_folder / "f", "wb") as opened:
        transfer = links.write(OpenFile("f", opened.fileno(), False), 0, arena.acquire(PAGE, "w"))
    assert transfer.is_over()
    for _ in range(2):
        with pytest.raises(StorageError, match="write failed"):
            transfer.wait()
    links.close()


def test_asking_whether_a_transfer_is_over_waits_for_no_emulated_drive(disk_folder):
    seconds = []
    throttle = Throttle(named_hardware("rtx4090"))
    throttle.drives = Pipe((1e3, 1e3), 1.0, clock=lambda: sum(seconds), sleep=seconds.append)
    links = Links(io=AiofilesIO(), throttle=throttle)
    arena, file = Arena("a", PAGE), open_file(disk_folder / "f", writable=True)
    transfer = links.write(file, 0, arena.acquire(PAGE, "w"))
    while links.io.outstanding() != "nothing":
        assert not transfer.is_over()
        time.sleep(0.001)
    assert not transfer.is_over() and seconds == [], "the drive is done, the emulated one not"
    seconds.append(5.0)
    assert transfer.is_over()
    transfer.wait()
    assert seconds == [5.0]
    links.close()


def test_a_transfer_that_somebody_waits_for_is_not_waited_for_to_ask():
    asked, go = threading.Event(), threading.Event()

    def wait(_):
        asked.set()
        assert go.wait(60)

    transfer = Transfer("one", 1, wait, (object(),))
    waiter = threading.Thread(target=transfer.wait)
    waiter.start()
    assert asked.wait(60) and not transfer.is_over()
    go.set()
    waiter.join()
    assert transfer.is_over()
