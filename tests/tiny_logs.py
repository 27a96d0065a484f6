"""Small commit logs for tests: three extents, whose content a number stands for."""

import pytest

from offload_rt.config import NvmePath
from offload_rt.memory.arena import Arena
from offload_rt.storage.commit_layout import MutableExtent, make_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.transfers.links import Links
from tests.power_loss import PlainIO

PAGE = 4096
SIZES = {"a": PAGE, "b": 5 * PAGE, "c": 300 * PAGE}


@pytest.fixture
def links():
    links = Links(io=PlainIO())
    yield links
    links.close()


@pytest.fixture
def arena():
    return Arena("a", 4 << 20, poison=True)


@pytest.fixture
def folders(disk_folder):
    return [disk_folder / "one", disk_folder / "two"]


def extents(num_drives=1):
    return [
        MutableExtent(name=name, length_bytes=size, drive=index % num_drives)
        for index, (name, size) in enumerate(SIZES.items())
    ]


def make(folders, links, **options):
    make_log([NvmePath(path=folder) for folder in folders], extents(len(folders)), links, **options)
    return CommitLog(folders, links)


def content(name, value):
    return bytes((value * 7 + i) % 251 for i in range(251)) * (SIZES[name] // 251 + 1)


def write(log, arena, name, value):
    slot = arena.acquire(SIZES[name], name)
    slot.buffer()[:] = content(name, value)[: SIZES[name]]
    return log.write(name, slot)


def read(log, arena, name, **options):
    slot = arena.acquire(SIZES[name], name)
    log._links.wait(log.read(name, slot, **options))
    return bytes(slot.buffer())


def holds(log, arena, values):
    return all(read(log, arena, name) == content(name, value)[: SIZES[name]] for name, value in values.items())
