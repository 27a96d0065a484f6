"""SIGKILL at any point, inside write-back and inside a commit too: what is resumed is bit-equal to never killed."""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from offload_rt.memory.arena import Arena
from offload_rt.native import native_core
from offload_rt.storage.commit_log import CommitLog
from offload_rt.transfers.file_io import file_io
from offload_rt.transfers.links import Links
from tests.killed_run import SIZES, drives, expected, make

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs():
    """Starts runs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in [str(ROOT), *sys.path] if path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killed_run"],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


def kill_many(runs, folder, backend, num_kills, seed):
    """Kills a run `num_kills` times, half of them at a random time and half at a random operation."""
    make(folder)
    os.mkfifo(folder / "pipe")
    draw = random.Random(seed)
    states, step, in_the_middle = {}, 0, 0
    for number in range(num_kills):
        by_itself = number % 2 == 0
        runs.stdin.write(f"{backend} {draw.randrange(3, 60) if by_itself else -1} {folder}\n")
        runs.stdin.flush()
        with open(folder / "pipe", "rb", buffering=0) as pipe:
            (process,) = struct.unpack("<q", pipe.read(8))
            if not by_itself:
                time.sleep(draw.uniform(0, 0.15))
                os.kill(-process, signal.SIGKILL)
            heard = [number for (number,) in struct.iter_unpack("<q", pipe.readall())]
        assert runs.stdout.readline() == "gone\n"
        acknowledged = heard[-1] if heard else step
        step, cut_off = check(drives(folder), states, acknowledged)
        in_the_middle += cut_off
    return step, in_the_middle


def check(folders, states, acknowledged):
    """Opens what a kill left, as the next run does. Its step, and whether the kill was inside a commit."""
    links = Links(io=file_io("threads" if native_core() else "aiofiles"))
    arena = Arena("check", sum(SIZES.values()))
    log = CommitLog(folders, links)
    try:
        step = log.committed.step
        assert step in (acknowledged, acknowledged + 1)
        values, payload = expected(states, step)
        assert step == 0 or log.committed.payload == payload
        for name, size in SIZES.items():
            slot = arena.acquire(size, name)
            links.wait(log.read(name, slot))
            assert np.array_equal(np.frombuffer(slot.buffer(), np.uint32), values[name]), (name, step)
            del slot
        return step, log.ignored is not None or step > acknowledged
    finally:
        log.close()
        links.close()


def backends():
    if native_core() is None:
        return ["aiofiles"]
    return ["io_uring", "threads", "aiofiles"] if native_core().io_uring_available()[0] else ["threads", "aiofiles"]


@pytest.mark.parametrize("backend", backends())
def test_killed_seven_times_it_goes_on_as_if_it_had_not_been(runs, disk_folder, backend):
    step, _ = kill_many(runs, disk_folder, backend, 7, seed=7)
    assert step > 0


@pytest.mark.full
@pytest.mark.parametrize("backend", backends())
def test_killed_a_hundred_times_it_goes_on_as_if_it_had_not_been(runs, disk_folder, backend):
    step, in_the_middle = kill_many(runs, disk_folder, backend, 100, seed=100)
    assert step > 100
    assert in_the_middle > 3, "no kill fell into a commit"
