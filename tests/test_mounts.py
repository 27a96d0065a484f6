"""What the kernel tells of a folder's file system and drives: a tree of /sys is made for each arrangement.

/sys/dev/block/8:3 -> ../../devices/pci0/block/sda/sda3        a partition: its parent is the drive
/sys/dev/block/253:1 -> ../../devices/virtual/block/dm-1       LVM or encryption: what it is on is in slaves/
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import offload_rt
from offload_rt.storage import mounts
from offload_rt.storage.mounts import doubts_about, rotating_drives
from tests.conftest import build_plain


class Sysfs:
    """A machine with a spinning drive, a fast one, and what lies on them; the tests' folders are on one of these."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._patch = root / "sys", monkeypatch
        (self.root / "dev" / "block").mkdir(parents=True)
        (root / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2\n")
        monkeypatch.setattr(mounts, "SYSFS", self.root)
        monkeypatch.setattr(mounts, "CPUINFO", root / "cpuinfo")
        for number, name, spins in ((0, "sda", True), (16, "nvme0n1", False), (32, "sdb", True)):
            drive = self.device(f"8:{number}", f"pci0/block/{name}")
            (drive / "queue").mkdir()
            (drive / "queue" / "rotational").write_text(f"{int(spins)}\n")
            part = self.device(f"8:{number + 1}", f"pci0/block/{name}/{name}1")
            (part / "partition").write_text("1\n")

    def device(self, number: str, place: str, on: tuple[str, ...] = ()) -> Path:
        folder = self.root / "devices" / place
        (folder / "slaves").mkdir(parents=True)
        for below in on:
            (folder / "slaves" / below).symlink_to(next((self.root / "devices").rglob(below)))
        (self.root / "dev" / "block" / number).symlink_to(folder)
        return folder

    def folder_is_on(self, number: str, kind: str = "ext4") -> None:
        major, minor = map(int, number.split(":"))
        real = os.stat

        def stat(path: object, **options: object) -> os.stat_result:
            found = list(real(path, **options))  # type: ignore[call-overload]
            found[2] = os.makedev(major, minor)
            return os.stat_result(found)

        self._patch.setattr(mounts, "file_system_of", lambda folder: (kind, "a source"))
        self._patch.setattr(mounts, "os", type("os", (), {"stat": stat, "major": os.major, "minor": os.minor}))


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    return Sysfs(tmp_path, monkeypatch)


def test_drives_are_found_through_partitions_device_mapper_and_raid(sysfs: Sysfs, tmp_path: Path) -> None:
    sysfs.device("253:0", "virtual/block/dm-0", on=("sda1",))
    sysfs.device("253:1", "virtual/block/dm-1", on=("dm-0",))
    sysfs.device("253:2", "virtual/block/dm-2", on=("nvme0n1",))
    sysfs.device("9:0", "virtual/block/md0", on=("sda", "nvme0n1", "sdb1"))
    for number, spinning in {
        "8:0": ["sda"], "8:1": ["sda"], "8:16": [], "8:17": [], "253:0": ["sda"], "253:1": ["sda"], "253:2": [],
        "9:0": ["sda", "sdb"], "7:7": [],
    }.items():  # fmt: skip
        sysfs.folder_is_on(number)
        assert rotating_drives(tmp_path) == spinning, number
        assert [doubt.split(":")[0] for doubt in doubts_about(tmp_path)] == [f"drive {name} spins" for name in spinning]


def test_what_a_virtual_drive_says_is_not_repeated(sysfs: Sysfs, tmp_path: Path) -> None:
    sysfs.folder_is_on("8:1")
    assert doubts_about(tmp_path)
    mounts.CPUINFO.write_text("flags : fpu hypervisor avx2\n")
    assert not doubts_about(tmp_path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tmpfs", "is in memory"), ("nfs4", "is no drive's own"), ("9p", "is no drive's own"),
        ("fuse.sshfs", "is no drive's own"), ("overlay", "is a container's own"), ("ext4", ""), ("xfs", ""),
    ],
)  # fmt: skip
def test_file_systems_that_are_no_drives_are_named(sysfs: Sysfs, tmp_path: Path, kind: str, words: str) -> None:
    sysfs.folder_is_on("8:17", kind)
    assert [f"{kind} {words}" in doubt for doubt in doubts_about(tmp_path)] == ([True] if words else [])


@pytest.mark.parametrize("number", ["8:1", "8:17"])
def test_an_engine_says_what_speaks_against_a_folder(
    sysfs: Sysfs, tmp_path: Path, number: str, caplog: pytest.LogCaptureFixture
) -> None:
    sysfs.folder_is_on(number)
    model = build_plain()
    for parameter in model.layers[:-1].parameters():
        parameter.requires_grad_(False)
    with offload_rt.engine(model, device="cpu", device_memory="50MiB", nvme=tmp_path):
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [f"nvme {tmp_path}: drive sda spins" in line for line in said] == ([True] if number == "8:1" else [])


def test_a_folder_that_is_not_there_spins_on_nothing(tmp_path: Path) -> None:
    assert rotating_drives(tmp_path / "nowhere") == []
