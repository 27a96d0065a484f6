"""One run at a time trains into a folder: who is refused is told by whom, and no end of a process keeps the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload_rt.cli.main import main
from offload_rt.errors import RunInUse, StorageError
from offload_rt.training.run_folder import RunFolder
from offload_rt.training.run_lock import RunLock
from tests.test_training_loop import FakeEngine, metrics_of, run

SOURCE = Path(__file__).resolve().parent.parent
HELD = rf"is in use by a run that trains into it \(pid {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d [\d:]{{8}} \w+\)"


def test_a_second_run_into_one_folder_is_refused_and_leaves_the_first_one_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, other = FakeEngine(), FakeEngine()

    def begin_another() -> None:
        for resume in (False, True):
            with pytest.raises(RunInUse, match=HELD):
                run(tmp_path / "out", other, resume=resume)
        assert main(["report", str(tmp_path / "out")]) == 0

    engine.after_step[3] = begin_another
    run(tmp_path / "out", engine)
    assert "steps:       2, " in capsys.readouterr().out, "who only looks is not refused"
    assert other.events == [] and [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert run(tmp_path / "out", resume=True)[1].step == 6 and not (tmp_path / "out" / "lock").exists()


def test_the_command_refuses_it_before_it_reads_data_or_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = ["train", "--model", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with RunFolder.locked(tmp_path / "out"):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert re.search(HELD, error) and error.count("\n") == 1 and "give --out another folder" in error
    assert main(command) == 2 and "without files that end in .jsonl" in capsys.readouterr().err, "it is free"
    assert not (tmp_path / "out").exists(), "nothing came into it"


def test_a_folder_that_was_made_for_nothing_goes_with_its_parents_and_others_stay(tmp_path: Path) -> None:
    RunLock(tmp_path / "a" / "b").close()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    RunLock(tmp_path / "a" / "b").close()
    (tmp_path / "a" / "file").touch()
    RunLock(tmp_path / "a").close()
    assert os.listdir(tmp_path / "a") == ["file"]


def test_a_lock_file_that_goes_while_it_is_taken_is_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    first, take = RunLock(tmp_path / "out"), fcntl.flock

    def flock(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", take)
        first.close()  # behind the second one's open: what it locks has no name any more
        (tmp_path / "out").mkdir()  # as somebody does who begins a run, too
        take(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = RunLock(tmp_path / "out")
    with pytest.raises(RunInUse):
        RunLock(tmp_path / "out")
    second.close()


HOLDER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from offload_rt.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:
    if sys.argv[3] == "closes":
        lock.close()  # gives nothing back: it is the parent's
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""


@pytest.mark.parametrize("child_does", ["closes", "nothing"])
def test_a_kill_gives_the_lock_back_though_a_child_lives_on(tmp_path: Path, child_does: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out"), str(SOURCE), child_does],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    child = int(process.stdout.readline())
    with pytest.raises(RunInUse, match=f"pid {process.pid} on "):
        RunLock(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(child, 0)
    RunLock(tmp_path / "out").close()
    process.stdin.close()


def test_whoever_keeps_the_lock_of_a_process_that_is_gone_is_not_called_by_its_number(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    text = (tmp_path / "lock").read_text()
    (tmp_path / "lock").write_text(re.sub(r"^pid \d+", "pid 99999999", text))
    with pytest.raises(RunInUse, match="no such process is here: one that it has started keeps the lock"):
        RunLock(tmp_path)
    lock.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: Any, caplog: Any, code: int) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    run(tmp_path / "out")
    assert "nothing keeps another run from training into the same folder" in caplog.text


def test_a_lock_that_cannot_be_had_is_an_error_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match=r"lock: cannot be made, and locked \(errno 21, EISDIR\)"):
        RunLock(tmp_path)


def test_a_run_whose_folder_is_removed_says_that_nothing_is_saved(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.after_step[3] = lambda: shutil.rmtree(tmp_path / "out")
    with pytest.raises(StorageError, match=r"out: step 3 was trained.*removed.*: nothing of this run is saved"):
        run(tmp_path / "out", engine, save_every=2)
    assert not (tmp_path / "out").exists(), "half a run would be called one"


def test_a_run_whose_folder_is_moved_says_from_what_it_goes_on_there(tmp_path: Path) -> None:
    straight, moved, engine = run(tmp_path / "straight")[0], tmp_path / "moved", FakeEngine()
    engine.after_step[5] = lambda: (tmp_path / "out").rename(moved)
    with pytest.raises(StorageError, match=rf"moved to {moved}: go on with --resume --out {moved}, from checkpoint-4"):
        run(tmp_path / "out", engine, save_every=2)
    assert not (tmp_path / "out").exists()
    assert run(moved, resume=True, save_every=2)[0].seen == straight.seen[4:]


def test_a_run_whose_lock_alone_is_removed_says_from_what_it_goes_on(tmp_path: Path) -> None:
    """As somebody does who takes the file for what a run that was killed has left."""
    engine = FakeEngine()
    engine.after_step[5] = lambda: (tmp_path / "out" / "lock").unlink()
    with pytest.raises(StorageError, match=r"left without its lock.*: go on with --resume, from checkpoint-4"):
        run(tmp_path / "out", engine, save_every=2)
    assert run(tmp_path / "out", resume=True, save_every=2)[1].step == 6
