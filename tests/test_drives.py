"""The probe of a drive: what it chooses, what it remembers, and that nothing about it is ever an error."""

import errno
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from offload_rt.errors import StorageError
from offload_rt.native import native_core
from offload_rt.storage import drives
from offload_rt.storage.drives import (
    CANDIDATES,
    MIB,
    DriveProfile,
    choose,
    drive_identity,
    drive_profile,
    drive_weights,
)
from offload_rt.transfers.file_io import AiofilesIO, OpenFile, RingIO
from tests.conftest import open_descriptors

FAST = DriveProfile(depth=8, io_bytes=MIB, read_bytes_per_second=2e9, write_bytes_per_second=1e9)


@pytest.fixture
def io():
    if native_core() is None:
        pytest.skip("the native extension is not built")
    io = RingIO(native_core())
    yield io
    io.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def probes(monkeypatch):
    """Counts probes, and makes each give `FAST`."""
    calls = []

    def probe(folder, backend):
        calls.append((folder, backend))
        return FAST

    monkeypatch.setattr(drives, "probe", probe)
    return calls


def test_a_real_drive_is_probed_and_nothing_is_left_on_it(io, disk_folder):
    before = open_descriptors()
    profile = drives.probe(disk_folder, io.name)
    if not profile.read_bytes_per_second:
        pytest.skip("no O_DIRECT here")
    assert (profile.depth, profile.io_bytes) in CANDIDATES
    assert profile.write_bytes_per_second > 0
    assert list(disk_folder.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_drive_is_probed_once(io, cache, probes, disk_folder):
    assert [drive_profile(disk_folder, io) for _ in range(3)] == [FAST] * 3
    assert probes == [(disk_folder, io.name)]


def test_the_plain_twin_needs_no_probe(cache, probes, disk_folder):
    io = AiofilesIO()
    assert drive_profile(disk_folder, io) == DriveProfile()
    assert probes == []
    io.close()


def stored(identity, **changes):
    return json.dumps({"identity": identity, "measured": time.time(), "profile": asdict(FAST), **changes})


@pytest.mark.parametrize(
    "content",
    [
        lambda identity: "",
        lambda identity: "{",
        lambda identity: "[]",
        lambda identity: "null",
        lambda identity: "[" * 100_000,
        lambda identity: "{}",
        lambda identity: b"\xff\xfe",
        lambda identity: stored({**identity, "kernel": "another"}),
        lambda identity: stored(None),
        lambda identity: stored(identity, measured=time.time() - drives.MAX_AGE_SECONDS - 1),
        lambda identity: stored(identity, measured=time.time() + 3600),
        lambda identity: stored(identity, measured="yesterday"),
        lambda identity: stored(identity, measured=None),
        lambda identity: stored(identity, profile=None),
        lambda identity: stored(identity, profile={}),
        lambda identity: stored(identity, profile={**asdict(FAST), "depth": 0}),
        lambda identity: stored(identity, profile={**asdict(FAST), "depth": 8.5}),
        lambda identity: stored(identity, profile={**asdict(FAST), "io_bytes": 5000}),
        lambda identity: stored(identity, profile={**asdict(FAST), "io_bytes": True}),
        lambda identity: stored(identity, profile={**asdict(FAST), "read_bytes_per_second": float("nan")}),
        lambda identity: stored(identity, profile={**asdict(FAST), "read_bytes_per_second": -1}),
        lambda identity: stored(identity, profile={**asdict(FAST), "write_bytes_per_second": "fast"}),
    ],
)
def test_what_is_stale_or_unreadable_is_measured_again(io, cache, probes, disk_folder, content):
    drive_profile(disk_folder, io)
    (place,) = cache.iterdir()
    text = content(drive_identity(disk_folder, io.name))
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert drive_profile(disk_folder, io) == FAST
    assert len(probes) == 2
    drive_profile(disk_folder, io)
    assert len(probes) == 2, "what was measured again was not kept"


def test_a_cache_that_cannot_be_read_or_written_is_no_error(io, cache, probes, disk_folder):
    cache.write_text("a file where the folder should be")
    for _ in range(2):
        assert drive_profile(disk_folder, io) == FAST
    assert len(probes) == 2
    cache.unlink()
    drive_profile(disk_folder, io)
    (place,) = cache.iterdir()
    place.unlink()
    place.mkdir()
    assert drive_profile(disk_folder, io) == FAST
    assert sorted(entry.name for entry in cache.iterdir()) == [place.name], "a partial file was left"


def refused(*arguments, **keywords):
    raise OSError(errno.EINVAL, "refused")


def failing(*arguments):
    raise StorageError("write failed", path="/p", errno=errno.EIO)


class Full:
    f_bavail, f_frsize = 10, 4096


@pytest.mark.parametrize(
    "broken",
    [
        (drives.fcntl, "fcntl", refused),  # O_DIRECT
        (drives.os, "posix_fallocate", refused),
        (drives.os, "statvfs", lambda folder: Full()),
        (drives.os, "statvfs", refused),
        (drives.tempfile, "TemporaryFile", refused),
        (drives.Links, "write", failing),
        (drives.Links, "read", failing),
    ],
)
def test_what_cannot_be_probed_gets_the_defaults_and_is_asked_again(io, cache, disk_folder, monkeypatch, broken):
    monkeypatch.setattr(*broken)
    assert drive_profile(disk_folder, io) == DriveProfile()
    assert not cache.exists()
    assert list(disk_folder.iterdir()) == []


class ModelDrive:
    """A drive by arithmetic: each request takes `latency`, and all together move at most `bandwidth`."""

    def __init__(self, clock, latency, bandwidth):
        self.clock, self.latency, self.bandwidth = clock, latency, bandwidth
        self.moved = {"read": 0, "write": 0}
        self.io = self
        self.depth, self.io_bytes = 64, MIB

    def tune(self, file, depth, io_bytes):
        self.depth, self.io_bytes = depth, io_bytes

    def _move(self, kind, num_bytes):
        self.moved[kind] += num_bytes
        in_flight = self.depth * self.io_bytes
        self.clock[0] += num_bytes / min(self.bandwidth, in_flight / (self.latency + self.io_bytes / self.bandwidth))

    def read(self, file, offset, slot):
        self._move("read", slot.num_bytes)
        return self

    def write(self, file, offset, slot):
        self._move("write", slot.num_bytes)
        return self

    def wait(self):
        pass


@pytest.mark.parametrize(
    "latency, bandwidth, expected",
    [
        (100e-6, 2e9, (64, MIB)),  # a quick drive: much in flight is soon there
        (100e-6, 800e6, (32, MIB)),  # a slower one: 64 MiB would be in the way for 80 ms
        (100e-6, 450e6, (16, MIB)),
        (30e-3, 800e6, (32, MIB)),  # far away: less would not keep it busy
        (60e-3, 800e6, (64, MIB)),
    ],
)
def test_the_choice_fits_the_drive(monkeypatch, tmp_path, latency, bandwidth, expected):
    clock = [0.0]
    monkeypatch.setattr(drives.time, "perf_counter", lambda: clock[0])
    model = ModelDrive(clock, latency, bandwidth)
    with open(tmp_path / "file", "wb") as file:
        profile = drives._measure(model, OpenFile("file", file.fileno(), True))
    in_flight = profile.depth * profile.io_bytes
    assert in_flight == expected[0] * expected[1]
    assert profile.read_bytes_per_second >= 0.9 * bandwidth


def test_a_slow_drive_bounds_the_probe(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(drives.time, "perf_counter", lambda: clock[0])
    model = ModelDrive(clock, 1e-3, 10e6)
    with open(tmp_path / "file", "wb") as file:
        drives._measure(model, OpenFile("file", file.fileno(), True))
    least = 2 * drives.OPERATION_BYTES
    assert model.moved == {"write": least, "read": least}


def test_the_choice_is_deep_where_that_is_quick_and_shallow_where_it_is_not():
    fast = {(64, MIB): 2.0e9, (8, MIB): 2.1e9}
    assert choose(fast) == (64, MIB)
    assert choose({**fast, (64, MIB): 1.9e9}) == (8, MIB), "more than chance"
    assert choose({(64, MIB): 1e8, (8, MIB): 0.96e8}) == (8, MIB)
    assert choose({(64, MIB): 1e8, (8, MIB): 0.94e8}) == (64, MIB)
    assert choose({(32, MIB // 2): 1e9, (16, MIB): 1e9}) == (16, MIB)
    assert choose({(32, MIB // 2): 1e6, (16, MIB): 1e6}) == (16, MIB)


def test_unknown_speeds_weigh_the_same():
    slow = DriveProfile(read_bytes_per_second=1e9)
    assert drive_weights([FAST, slow]) == [2e9, 1e9]
    assert drive_weights([FAST, DriveProfile()]) == [1.0, 1.0]


def test_the_identity_tells_drives_and_back_ends_apart(disk_folder):
    here = drive_identity(disk_folder, "io_uring")
    assert here != drive_identity(disk_folder, "threads")
    assert here != drive_identity(Path("/proc"), "io_uring")
    assert here == drive_identity(disk_folder / "..", "io_uring")
