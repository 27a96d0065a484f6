"""Memory that runs low while a run trains: said before the kernel acts, in a file that outlives the process."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import psutil
import pytest

from offload_rt.cli.report import collect, lines
from offload_rt.memory import process_memory
from offload_rt.memory.memory_groups import MemoryGroup, memory_groups
from offload_rt.memory.process_memory import MemoryLeft, memory_left
from offload_rt.training import loop
from offload_rt.training.memory_watch import LOW_SHARE, MemoryWatch
from offload_rt.training.run_folder import RunFolder
from tests.test_training_loop import run

GIB = 1 << 30
REPORT = {"base_bytes": 400, "holdings": {"device": {"slots": 3 * GIB, "slack": 0}, "nvme": {"weights": 99 * GIB}}}


class Machine:
    """Of 100 GiB."""

    def __init__(self) -> None:
        self.left = 50.0

    def __call__(self) -> MemoryLeft:
        return MemoryLeft(left_bytes=int(self.left * GIB), total_bytes=100 * GIB, of="RAM")


def test_low_memory_is_written_once_again_at_half_of_it_and_again_when_it_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine()
    watch = MemoryWatch(tmp_path / "memory.jsonl", left=machine, resident=lambda: 7 * GIB)
    watch.note(12, REPORT)
    assert LOW_SHARE == 0.02
    with caplog.at_level(logging.WARNING, logger="offload_rt"):
        for machine.left in (50, 2, 1.9, 1.5, 0.96, 0.9, 0.4, 1.9, 3.9, 1.9, 4.1, 1.9):
            watch.look()
    written = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [round(line["left_bytes"] / GIB, 2) for line in written] == [1.9, 0.9, 0.4, 1.9]
    assert all(line["step"] == 12 and line["resident_bytes"] == 7 * GIB for line in written)
    assert all(line["holdings"] == REPORT["holdings"] and line["base_bytes"] == 400 for line in written)
    assert [record.getMessage() for record in caplog.records][0] == (
        "memory ran low behind step 12: 1.9 GiB left of 100 GiB (RAM), this process had 7 GiB; "
        "most for device slots 3 GiB"
    )


def test_a_run_is_watched_and_says_afterwards_that_memory_was_low(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, out = Machine(), tmp_path / "out"

    class Watch(MemoryWatch):
        def __init__(self, path: Path) -> None:
            super().__init__(path, left=machine)

    monkeypatch.setattr(loop, "MemoryWatch", Watch)
    run(out, steps=2)
    assert not (out / "memory.jsonl").exists() and not RunFolder(out).low_memory()
    assert not [thread for thread in threading.enumerate() if thread.name == "offload_rt-memory"]
    machine.left = 1.0
    run(out, steps=3, resume=True)
    machine.left = 50.0
    _, _, shown = run(out, steps=4, resume=True)
    assert [line for line in shown if line.startswith("before, memory ran low behind step 0: 1 GiB left")]
    (out / "report.json").unlink()  # a stand-in's
    assert "1 time(s); memory ran low" in dict(lines(collect(out)))["low memory"]


def test_a_watch_that_fails_says_so_and_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    machine.left = 1.0
    with caplog.at_level(logging.WARNING, logger="offload_rt"):
        MemoryWatch(tmp_path / "none" / "memory.jsonl", left=machine).look()
    assert "memory.jsonl: cannot be written" in caplog.text

    def fails() -> MemoryLeft:
        raise RuntimeError("no /proc")

    watch = MemoryWatch(tmp_path / "memory.jsonl", left=fails)
    watch._is_over.wait = lambda timeout=None: False  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, logger="offload_rt"):
        watch._run()
    assert "memory is not watched any more: RuntimeError('no /proc')" in caplog.text


def test_limits_of_groups_and_their_parents_are_found_in_both_versions_less_files_that_can_be_dropped(
    tmp_path: Path,
) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "self"

    def group(path: str, **files: object) -> None:
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / path / f"memory.{name}").write_text(f"{text}\n")

    def found() -> list[tuple[int, int]]:
        return [(group.limit_bytes, group.left_bytes) for group in memory_groups(proc=proc, root=root)]

    assert found() == []
    proc.write_text("0::/outer/inner\n")
    assert found() == []
    group("outer/inner", max="max", current=400)
    group("outer", max=1000, current=900, stat="anon 5\ninactive_file 300\nactive_file 30\nfile_mapped 30")
    assert found() == [(1000, 400)]
    group("outer/inner", max=500)  # without a memory.stat
    assert found() == [(500, 100), (1000, 400)]
    proc.write_text("5:cpu,cpuacct:/x\n4:memory:/outer\n0::/\n")
    group("memory", limit_in_bytes=9223372036854771712, usage_in_bytes=77)
    assert found() == []
    group(
        "memory/outer",
        limit_in_bytes=2000,
        usage_in_bytes=2000,
        stat="active_file 3\ntotal_inactive_file 400\ntotal_active_file 110\ntotal_mapped_file 10",
    )
    assert found() == [(2000, 500)]
    proc.write_text("4:memory:/not/seen/in/a/container\n")
    group("memory", limit_in_bytes=100, usage_in_bytes=101)
    assert found() == [(100, 0)]


def test_what_is_left_is_the_least_of_ram_and_groups_and_a_tenth_of_it_is_no_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = memory_left()
    assert 0 < found.left_bytes <= found.total_bytes
    near, far = (MemoryGroup(limit_bytes=limit, used_bytes=400) for limit in (1000, 1 << 60))
    monkeypatch.setattr(process_memory, "memory_groups", lambda: iter([far, near, far]))
    assert memory_left() == MemoryLeft(left_bytes=600, total_bytes=1000, of="cgroup")
    assert process_memory.free_memory_bytes() == 540
    monkeypatch.setattr(process_memory, "memory_groups", lambda: iter([far]))
    assert memory_left().total_bytes == psutil.virtual_memory().total
