"""Who may open a commit log, and when: not before a killed run's writes are over."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offload_rt.errors import StorageFull, StorageTimeout, StoreInUse
from offload_rt.native import native_core
from offload_rt.storage import drive_files
from offload_rt.storage.commit_layout import read_layout
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.drive_files import FolderLock, close_fenced, open_fenced
from offload_rt.transfers.links import Links
from tests.conftest import forked_child, open_descriptors
from tests.power_loss import PlainIO
from tests.tiny_logs import arena as arena
from tests.tiny_logs import folders as folders
from tests.tiny_logs import links as links
from tests.tiny_logs import make, write

ROOT = Path(__file__).resolve().parents[1]


def test_a_second_run_is_refused_until_the_first_is_closed(folders, links):
    log = make(folders, links)
    with pytest.raises(StoreInUse, match=f"pid {os.getpid()} "):
        CommitLog(folders, links)
    log.close()
    CommitLog(folders, links).close()


def test_a_lock_that_a_full_drive_does_not_take_is_no_other_runs(disk_folder, monkeypatch):
    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(drive_files.os, "pwrite", full)
        with pytest.raises(StorageFull, match="lock: the lock cannot be written .*ENOSPC") as raised:
            FolderLock(disk_folder)
    assert open_descriptors() == before
    FolderLock(disk_folder).close()
    del raised


def test_a_forked_child_does_not_keep_a_closed_log_locked(folders, links):
    log = make(folders, links)
    with forked_child():
        log.close()
        CommitLog(folders, links, patience_seconds=0).close()


HOLDER = """
import os, signal, sys
from pathlib import Path
from offload_rt.storage.drive_files import FolderLock, open_fenced
folder = Path(sys.argv[1])
lock, file = FolderLock(folder), open_fenced(folder / "state.bin", 0)
end, other = os.pipe()
if os.fork() == 0:  # stands for the kernel, that holds the file of a request which is under way
    lock._file.close()
    os.close(other)
    print("under way", flush=True)
    sys.stdin.read()
    os._exit(0)
os.close(end)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_runs_writes_in_flight_are_waited_for(folders, links):
    """The lock file is free at once; the file that is written to is not. See [Note: lock lifetime]."""
    make(folders, links).close()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folders[0])],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "under way\n"
    process.wait()
    with pytest.raises(StoreInUse, match="state.bin: a process that is gone left writes under way"):
        CommitLog(folders, links, patience_seconds=0.05)
    process.stdin.close()  # the write arrives
    CommitLog(folders, links).close()


WRITER = """
import fcntl, mmap, os, sys
from pathlib import Path
from offload_rt.storage.drive_files import FolderLock, open_fenced
from offload_rt.native import native_core
lock, file = FolderLock(Path(sys.argv[1])), open_fenced(Path(sys.argv[1]) / "data", 0)
ring, memory = native_core().Ring(backend="io_uring"), mmap.mmap(-1, 256 << 20)
ring.write(file.fd, file.path, 0, memory)
print("under way", flush=True)
sys.stdin.read()
"""


@pytest.mark.full
def test_io_urings_writes_outlive_a_killed_process_and_its_lock_file(disk_folder):
    """What the fence is for, on the real thing; how long it takes is the drive's business."""
    if native_core() is None or not native_core().io_uring_available()[0]:
        pytest.skip("no io_uring here")
    seen = 0
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(disk_folder)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout.readline() == "under way\n"
            time.sleep(0.03)
            process.kill()
            process.wait()
        FolderLock(disk_folder).close()  # free at once
        try:
            close_fenced(open_fenced(disk_folder / "data", 0.0))
        except StoreInUse:
            seen += 1
            close_fenced(open_fenced(disk_folder / "data", 60.0))
    if not seen:
        pytest.skip("the drive was faster than the end of a process")


def test_a_fence_that_is_free_is_passed_at_once(disk_folder):
    file = open_fenced(disk_folder / "f", 0.0)
    with pytest.raises(StoreInUse):
        open_fenced(disk_folder / "f", 0.0)
    close_fenced(file)
    close_fenced(open_fenced(disk_folder / "f", 0.0))


def test_closing_waits_for_what_is_under_way_and_keeps_the_file_where_it_cannot(folders, links, arena):
    folders = folders[:1]  # so that there is one sync, and it must not get lost
    log = make(folders, links)
    stuck = set()
    start = links.io.start

    def slow(kind, file, offset, buffer):
        start(kind, file, offset, buffer)

        def wait(seconds):
            if kind in stuck:
                raise StorageTimeout("still under way")

        return wait

    links.io.start = slow
    write(log, arena, "a", 1)
    for kind in ("write", "sync"):
        stuck.add(kind)
        with pytest.raises(StorageTimeout):
            log.close() if kind == "write" else log.commit(1)
        with pytest.raises(StorageTimeout):
            log.close()
        with pytest.raises(StoreInUse):
            CommitLog(folders, Links(io=PlainIO()))
        stuck.clear()
    log.close()
    assert read_layout(folders) is not None
