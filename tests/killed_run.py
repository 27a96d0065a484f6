"""A run that commits in a loop and is made to be killed, and what it must have been doing. For test_commit_kill.

As a program it waits for lines `<backend> <operations until it kills itself, or -1> <folder>` and forks a run for each,
so that a kill costs milliseconds and not the import of torch. A run acknowledges in the folder's pipe: first its
process, negative, then each step that `commit` has returned for.
"""

import os
import pickle
import random
import signal
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np

from offload_rt.config import NvmePath
from offload_rt.memory.arena import Arena
from offload_rt.storage.commit_layout import MutableExtent, make_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.transfers.file_io import file_io
from offload_rt.transfers.links import Links

PAGE = 4096
SIZES = {"small": PAGE, "middle": 64 * PAGE, "large": 257 * PAGE}
EXTENTS = [
    MutableExtent(name=name, length_bytes=size, drive=index % 2) for index, (name, size) in enumerate(SIZES.items())
]


def drives(folder):
    return [folder / "one", folder / "two"]


def make(folder):
    links = Links(io=file_io("aiofiles"))
    make_log([NvmePath(path=drive) for drive in drives(folder)], EXTENTS, links)
    links.close()


class Training:
    """The arithmetic of a run: each step draws which extents change, and from what they were what they become."""

    def __init__(self, payload=b""):
        self.random = random.Random(0)
        if payload:
            self.random.setstate(pickle.loads(payload))

    def payload(self):
        return pickle.dumps(self.random.getstate())

    def changing(self):
        return {name: self.random.getrandbits(32) for name in SIZES if self.random.random() < 0.7}

    @staticmethod
    def changed(values, salt):
        values *= np.uint32(1664525)
        values += np.uint32(salt)
        np.bitwise_xor(values, np.arange(len(values), dtype=np.uint32), out=values)


def run(folders, links, acknowledge):
    """Goes on from the last commit, for ever. Every third step is tried with other numbers first, and dropped."""
    arena = Arena("run", 2 * sum(SIZES.values()))
    log = CommitLog(folders, links)
    training, step = Training(log.committed.payload), log.committed.step
    while True:
        step += 1
        changes = training.changing()
        for salt_error in (1, 0) if step % 3 == 0 else (0,):
            log.drop()
            for name, salt in changes.items():
                slot = arena.acquire(SIZES[name], name)
                links.wait(log.read(name, slot))
                training.changed(np.frombuffer(slot.buffer(), np.uint32), salt + salt_error & 0xFFFFFFFF)
                writing = log.write(name, slot)
                del slot
                if salt_error:
                    links.wait(writing)
        log.commit(step, training.payload())
        acknowledge(step)


def expected(states, step):
    """The state after `step` of a run that was never killed; `states` keeps the last one asked for."""
    if not states or states["step"] > step:
        states.update(step=0, training=Training(), values={n: np.zeros(s // 4, np.uint32) for n, s in SIZES.items()})
    while states["step"] < step:
        for name, salt in states["training"].changing().items():
            Training.changed(states["values"][name], salt)
        states["step"] += 1
    return states["values"], states["training"].payload()


def kill_after(links, num_operations):
    """SIGKILL in place of so many operations later."""
    start = links.io.start
    left = [num_operations]

    def starting(kind, file, offset_bytes, buffer):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return start(kind, file, offset_bytes, buffer)

    links.io.start = starting


def main():
    for line in sys.stdin:
        backend, operations, folder = line.split()
        child = os.fork()
        if child == 0:
            pipe = os.open(Path(folder) / "pipe", os.O_WRONLY)
            links = Links(io=file_io(backend))
            kill_after(links, int(operations))
            acknowledge = partial(acknowledge_in, pipe)
            acknowledge(-os.getpid())
            run(drives(Path(folder)), links, acknowledge)
        os.waitpid(child, 0)
        sys.stdout.write("gone\n")
        sys.stdout.flush()


def acknowledge_in(pipe, number):
    os.write(pipe, struct.pack("<q", number))


if __name__ == "__main__":
    main()
