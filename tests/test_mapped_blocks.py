"""Blocks that leave no holes: where a plan is tight, large ones are mapped, for as long as its engine is open."""

import ctypes
import gc
import os
import subprocess
import sys

import pytest

from offload_rt.errors import OffloadError
from offload_rt.memory import mapped_blocks
from offload_rt.memory.heap import Base, HeapGuard, is_tight
from offload_rt.memory.mapped_blocks import BLOCKS_IN_HOLES, LEAST_MAPPED_BYTES, MOST_MAPPED_BYTES, MappedBlocks
from offload_rt.plans import workload_sizes
from offload_rt.wiring import model_assembly
from offload_rt.wiring.activation_assembly import TIGHT_DIVISOR
from tests.conftest import build_lora, language_batch

MIB = 1 << 20
TRIM, MAP = -1, -3

#   a layer's large results, and small ones that stay:   | large |s| large |s| ...    freed:   |.......|s|.......|s|
LAYER = """
import ctypes, os, sys
from offload_rt.memory.mapped_blocks import MappedBlocks
MIB = 1 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def made(num_bytes):
    address = libc.malloc(num_bytes)
    ctypes.memset(address, 1, num_bytes)
    return address

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

libc.free(made(24 * MIB))  # as in any process that has computed: glibc maps only what is larger from now on
mapped = MappedBlocks()
if sys.argv[1] == "tight":
    mapped.ask(8 * MIB)
before = resident_bytes()
large, small = [], []
for _ in range(32):
    large.append(made(MIB))
    small.append(made(96 * 1024))  # none that finds room in a hole that was there
for address in large:
    libc.free(address)
print((resident_bytes() - before) // MIB)
mapped.close()
"""


def holes_of_a_layer(how, **environment):
    ran = subprocess.run(
        [sys.executable, "-c", LAYER, how], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
    )  # fmt: skip
    return int(ran.stdout)


needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")


@needs_glibc
def test_a_layer_leaves_no_holes_where_a_plan_is_tight():
    assert holes_of_a_layer("tight") <= 4, "what stays is 3 MiB"
    assert holes_of_a_layer("roomy") >= 30, "otherwise nothing was shown"


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_THRESHOLD_": str(32 * MIB)}, {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={32 * MIB}"}],
    ids=lambda environment: next(iter(environment)),
)
def test_thresholds_that_the_process_was_started_with_stay(environment):
    assert holes_of_a_layer("tight", **environment) >= 30


@pytest.fixture
def calls(monkeypatch):
    """What the C library is told."""
    gc.collect()  # engines of other tests that nobody has closed
    monkeypatch.setattr(mapped_blocks, "_asked", type(mapped_blocks._asked)())
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    told = []
    monkeypatch.setattr(mapped_blocks, "_mallopt", lambda parameter, value: told.append((parameter, value)))
    return told


def test_the_tightest_engine_decides_and_the_last_one_puts_back(calls):
    first, second = MappedBlocks(), MappedBlocks()
    first.ask(64 * MIB)
    second.ask(16 * MIB)
    first.close()
    second.close()
    second.close()
    mapped_from = [value for parameter, value in calls if parameter == MAP]
    assert mapped_from == [4 * MIB, MIB, MIB, 32 * MIB]
    given_back_from = [value for parameter, value in calls if parameter == TRIM]
    assert given_back_from == [16 * MIB, 4 * MIB, 4 * MIB, 64 * MIB]
    assert first.least_bytes is second.least_bytes is None


def test_an_engine_that_nobody_closed_decides_nothing(calls):
    forgotten, other = MappedBlocks(), MappedBlocks()
    forgotten.ask(MIB)
    del forgotten
    gc.collect()
    other.ask(64 * MIB)
    assert calls[-2:] == [(MAP, 4 * MIB), (TRIM, 16 * MIB)]


def test_an_engine_that_is_collected_puts_back(calls):
    forgotten = MappedBlocks()
    forgotten.ask(MIB)
    del forgotten
    gc.collect()
    assert calls[-2:] == [(MAP, MOST_MAPPED_BYTES), (TRIM, 64 * MIB)]


def test_one_that_is_collected_while_another_asks_is_put_back_behind_it(calls, monkeypatch):
    """The collector runs where the lock is held."""
    forgotten, other, called = [MappedBlocks()], MappedBlocks(), mapped_blocks._mallopt
    forgotten[0].ask(MIB)

    def collecting(*arguments):
        if forgotten:
            assert mapped_blocks._lock.locked()
            forgotten.clear()
        called(*arguments)

    monkeypatch.setattr(mapped_blocks, "_mallopt", collecting)
    other.ask(64 * MIB)
    assert calls[-2:] == [(MAP, 4 * MIB), (TRIM, 16 * MIB)] and not mapped_blocks._lock.locked()
    other.close()
    assert calls[-2:] == [(MAP, MOST_MAPPED_BYTES), (TRIM, 64 * MIB)]


def test_blocks_are_mapped_from_sizes_that_the_c_library_takes(calls):
    blocks = MappedBlocks()
    for hole_bytes in (0, BLOCKS_IN_HOLES * LEAST_MAPPED_BYTES, BLOCKS_IN_HOLES * (LEAST_MAPPED_BYTES + 1), 1 << 40):
        blocks.ask(hole_bytes)
    mapped_from = [value for parameter, value in calls if parameter == MAP]
    assert mapped_from == [LEAST_MAPPED_BYTES, LEAST_MAPPED_BYTES, LEAST_MAPPED_BYTES + 1, MOST_MAPPED_BYTES]


def test_without_mallopt_nothing_is_asked(calls, monkeypatch):
    monkeypatch.setattr(mapped_blocks, "_mallopt", None)
    blocks = MappedBlocks()
    blocks.ask(MIB)
    assert blocks.least_bytes is None
    blocks.close()


def test_a_guard_asks_once_its_grant_is_tight(calls):
    assert [is_tight(slack, 64) for slack in (31, 32)] == [True, False]
    guard = HeapGuard(Base(0, 0), planned_bytes=0, arena_bytes=0, slack_bytes=32 * MIB, wanted_bytes=64 * MIB)
    assert calls == [] and guard.mapped.least_bytes is None
    guard.grant(31 * MIB)
    assert calls[0] == (MAP, 31 * MIB // BLOCKS_IN_HOLES)
    guard.close()
    assert calls[2] == (MAP, MOST_MAPPED_BYTES)


def tight_budget(roomy):
    """What the plan of an engine takes, with a third of its room for holes."""
    holdings = roomy.report()["holdings"]["device"]
    slack = roomy.plan.allocator_slack_bytes
    return sum(size for name, size in holdings.items() if not name.startswith("freed")) + slack // 3


def test_an_engine_asks_where_its_budget_is_tight_and_only_there(calls, make_engine, disk_folder):
    model = build_lora()
    roomy = make_engine(model, nvme=disk_folder, batch_size=2, seq_len=64)
    assert roomy.report()["allocator"]["mapped_from_bytes"] is None and calls == []
    roomy.close()
    tight = make_engine(
        build_lora(), nvme=disk_folder, batch_size=2, seq_len=64, device_memory=tight_budget(roomy)
    )  # fmt: skip
    assert tight.report()["allocator"]["mapped_from_bytes"] == calls[0][1] >= LEAST_MAPPED_BYTES
    tight.close()
    assert calls[-2] == (MAP, MOST_MAPPED_BYTES)


def test_an_engine_that_could_not_be_made_asks_for_nothing_any_more(calls, make_engine, disk_folder, monkeypatch):
    roomy = make_engine(build_lora(), nvme=disk_folder, batch_size=2, seq_len=64)
    roomy.close()
    with monkeypatch.context() as broken, pytest.raises(OffloadError, match="no such head") as kept:
        broken.setattr(model_assembly, "keep_head_input_contiguous", raises("no such head"))
        make_engine(build_lora(), nvme=disk_folder, batch_size=2, seq_len=64, device_memory=tight_budget(roomy))
    assert calls[0][1] < MOST_MAPPED_BYTES and calls[-2:] == [(MAP, MOST_MAPPED_BYTES), (TRIM, 2 * MOST_MAPPED_BYTES)]
    assert kept.tb is not None, "whoever has the error sees the engine's parts, and they ask for nothing"


def raises(message):
    def raising(*_):
        raise OffloadError(message)

    return raising


def test_results_lie_in_an_arena_from_a_smaller_size_on_where_a_budget_is_tight(make_engine, disk_folder, monkeypatch):
    """To the same bits: an arena spares the faults of blocks that are mapped anew for each result."""
    monkeypatch.setattr(workload_sizes, "PLACED_RESULTS", 64)

    def trained(device_memory):
        engine = make_engine(
            build_lora(), {"placed_bytes": 4096 * TIGHT_DIVISOR}, nvme=disk_folder, batch_size=2, seq_len=64,
            device_memory=device_memory,
        )  # fmt: skip
        loss = engine(**language_batch(0, rows=2, tokens=64)).loss
        engine.backward(loss)
        found = {"loss": loss.detach()} | {name: p.grad.clone() for name, p in engine.trainable.items()}
        engine.close()
        return engine, found

    roomy, expected = trained(None)
    tight, found = trained(tight_budget(roomy))
    assert roomy.report()["transients"]["num_placed"] == 0 < tight.report()["transients"]["num_placed"]
    assert [name for name in expected if not expected[name].equal(found[name])] == []
