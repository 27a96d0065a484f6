"""After a power loss at any moment, opening gives a committed step, whole, and not before the last acknowledged one.

write a, write b     body      sync sync    record     sync
---------------------------------------------------------------> the power may go at every |
|   |    |   |   |   |    |    |  |  |  |   |     |    |   |     and each write not yet synced may be
                                                                 there, lost or torn
"""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offload_rt.storage.commit_layout as commit_layout_module
import offload_rt.storage.commit_log as commit_log_module
from offload_rt.config import NvmePath
from offload_rt.errors import ConfigError, StoreCorrupt
from offload_rt.memory.arena import Arena
from offload_rt.storage.commit_layout import Layout, MutableExtent, make_log, read_layout
from offload_rt.storage.commit_log import CommitLog
from offload_rt.transfers.links import Links
from tests.conftest import SHARES_FIXTURES
from tests.power_loss import Killed, PlainIO, RecordingIO, every_outcome, random_outcome

PAGE = 4096
PAYLOAD_BYTES = 64
EXTENTS = [
    MutableExtent(name="a", length_bytes=PAGE),
    MutableExtent(name="b", length_bytes=2 * PAGE, drive=1),
    MutableExtent(name="c", length_bytes=PAGE, drive=1),
]
ARENA = Arena("test", 64 * PAGE)


@pytest.fixture
def folder():
    """In memory where there is such a folder: nothing here depends on a real drive."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="offload_rt-test-", dir=home) as folder:
        yield Path(folder)


def content(value, num_bytes):
    return random.Random(value).randbytes(num_bytes)


class Run:
    """A run on recorded drives, and what it was told: the states it committed, and when."""

    def __init__(self, folder, begin_bytes=None):
        """`begin_bytes`, by extent: where what is written of it begins, once something is."""
        self._new(folder)
        self.begin_bytes = begin_bytes or {}
        self.make(Links(io=PlainIO()))
        self._record({f / "state.bin": (f / "state.bin").read_bytes() for f in self.folders})
        self.open()

    def _new(self, folder):
        self.begin_bytes = {}
        self.folders = [folder / "one", folder / "two"]
        self.state = {extent.name: bytes(extent.length_bytes) for extent in EXTENTS}
        self.states = {0: (b"", dict(self.state))}
        self.begun, self.acknowledged = [(0, 0)], [(0, 0)]  # (moment, step)
        self.log = None

    def _record(self, base):
        self.io = RecordingIO(base)
        self.links = Links(io=self.io)

    def make(self, links, **options):
        drives = [NvmePath(path=folder) for folder in self.folders]
        make_log(drives, EXTENTS, links, payload_bytes=PAYLOAD_BYTES, **options)

    def laid_out(self, moment):
        """The sets of folders that may have a `log.json` after a crash at `moment`, with its content."""
        return [{folder: (folder / "log.json").read_bytes() for folder in self.folders}]

    def open(self):
        self.log = CommitLog(self.folders, self.links)
        step = self.log.committed.step
        self.state = dict(self.states[step][1])
        self.acknowledged.append((self.io.tick(), step))

    def write(self, name, value):
        begin = self.begin_bytes.get(name, 0)
        length = next(extent.length_bytes for extent in EXTENTS if extent.name == name) - begin
        slot = ARENA.acquire(length, name)
        self.state[name] = content(value, length)
        slot.buffer()[:] = self.state[name]
        self.log.write(name, slot, begin_bytes=begin)

    def drop(self):
        self.log.drop()
        self.state = dict(self.states[self.log.committed.step][1])

    def commit(self):
        step = max(self.states) + 1
        payload = f"step {step}".encode()
        self.states[step] = payload, dict(self.state)
        self.begun.append((self.io.tick(), step))
        self.log.commit(step, payload)
        self.acknowledged.append((self.io.tick(), step))

    def kill(self):
        self.io.finish()
        if self.log is not None:
            self.log.close()

    def allowed(self, moment):
        """The steps that opening may give after a crash at `moment`."""
        acknowledged = [step for when, step in self.acknowledged if when <= moment][-1]
        begun = max(step for when, step in self.begun if when <= moment)
        return {step for step in self.states if acknowledged <= step <= begun}

    def close(self):
        self.log.close()


class FirstStart(Run):
    """A run that is recorded from the first byte of making its log on. In the files lies garbage: nothing that was
    never written may be believed.

    one/log.json    ..........?????-------     . not there    - there
    two/log.json    .....????-------------     ? either
    one, two        make      first commit
    """

    def __init__(self, folder, written_first):
        self._new(folder)
        self.written_first = written_first
        sizes = Layout.of(EXTENTS, num_drives=2, payload_bytes=PAYLOAD_BYTES).file_bytes()
        self._record(
            {f / "state.bin": content(n, size) for n, (f, size) in enumerate(zip(self.folders, sizes, strict=True))}
        )
        self.named = []  # (begun, there, folder, log.json), the home's last
        self.kill_before_naming = None

    def start(self):
        """Makes the log and opens it. May be killed."""
        real = commit_layout_module._write_layout

        def write_layout(layout, number, folder):
            if number == self.kill_before_naming:
                raise Killed
            begun = self.io.tick()
            real(layout, number, folder)
            self.named.append((begun, self.io.tick(), folder, (folder / "log.json").read_bytes()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit_layout_module, "_write_layout", write_layout)
            self.make(self.links, written_first=self.written_first)
        self.open()

    def laid_out(self, moment):
        there = [{}]
        for begun, done, folder, text in self.named:
            if begun <= moment:
                there.append({**there[-1], folder: text})
            if done <= moment:
                there = there[-1:]
        return there


class Judge:
    """Opens what a crash left and says what is wrong with it, if anything."""

    def __init__(self, run):
        self.run = run
        self.links = Links(io=PlainIO())
        self.seen = set()
        self.num_opened = 0

    def verdict(self, images, moment):
        """Of what the drives hold: `images` of the files, and every set of layouts that there may be."""
        return next(filter(None, (self._verdict(images, moment, named) for named in self.run.laid_out(moment))), None)

    def _verdict(self, images, moment, named):
        allowed = self.run.allowed(moment)
        key = (hashlib.sha256(b"".join(images.values())).digest(), frozenset(allowed), frozenset(named))
        if key in self.seen:
            return None
        self.seen.add(key)
        self.num_opened += 1
        for path, image in images.items():
            Path(path).write_bytes(image)
        for folder in self.run.folders:
            (folder / "log.json").unlink(missing_ok=True)
        for folder, text in named.items():
            (folder / "log.json").write_bytes(text)
        try:
            log = CommitLog(self.run.folders, self.links)
        except StoreCorrupt as error:
            return f"at {moment}: does not open: {error}"
        except ConfigError as error:
            said_so = "no commit log here" in str(error) and self.run.folders[0] not in named
            return None if said_so else f"at {moment}: {error}"
        try:
            if log.committed.step not in allowed:
                return f"at {moment}: opens at step {log.committed.step}, allowed: {sorted(allowed)}"
            payload, state = self.run.states[log.committed.step]
            found = {}
            for extent in EXTENTS:
                slot = ARENA.acquire(len(state[extent.name]), "judge")
                log.read(extent.name, slot, begin_bytes=extent.length_bytes - slot.num_bytes).wait()
                found[extent.name] = bytes(slot.buffer())
            if (log.committed.payload, found) != (payload, state):
                return f"at {moment}: a mix, under the name of step {log.committed.step}"
        except StoreCorrupt as error:
            return f"at {moment}: {error}"
        finally:
            log.close()
        return None


def lose_power_everywhere(run, since=0):
    """All complaints about crashes at every moment from `since` on. Stops at the third."""
    judge, complaints = Judge(run), []
    for moment in range(since, run.io.now + 1):
        for images in every_outcome(*run.io.at(moment)):
            complaint = judge.verdict(images, moment)
            if complaint:
                complaints.append(complaint)
                if len(complaints) == 3:
                    return complaints, judge.num_opened
    return complaints, judge.num_opened


def some_steps(run):
    """Commits of everything, of one extent, of nothing; a step that was dropped and one that was done again."""
    run.write("a", 1), run.write("b", 2), run.write("c", 3)
    run.commit()
    run.write("b", 4)
    run.commit()
    run.write("a", 5), run.write("b", 6)
    run.drop()
    run.write("a", 7), run.write("b", 8)
    run.write("b", 9)
    run.commit()
    run.commit()
    run.write("c", 10)
    run.commit()


def test_a_power_loss_at_any_moment_leaves_a_committed_step_whole(folder):
    run = Run(folder)
    some_steps(run)
    run.close()
    complaints, num_opened = lose_power_everywhere(run)
    assert complaints == []
    assert num_opened > 500


NUM_SYNCED = {"after the data": 2, "after the record": 1}  # files, by a barrier of a commit


def test_a_power_loss_leaves_what_was_written_of_a_part_of_an_extent_whole(folder):
    run = Run(folder, begin_bytes={"b": PAGE})
    some_steps(run)
    run.close()
    complaints, num_opened = lose_power_everywhere(run)
    assert complaints == []
    assert num_opened > 300


def skip_barrier(which):
    """Breaks the protocol: every commit leaves out one of its two barriers."""
    real = commit_log_module.barrier

    def barrier(links, files, in_flight):
        if len(files) != NUM_SYNCED[which]:
            real(links, files, in_flight)

    return barrier


@pytest.mark.parametrize("which", NUM_SYNCED)
def test_without_either_barrier_a_power_loss_is_noticed(folder, monkeypatch, which):
    monkeypatch.setattr(commit_log_module, "barrier", skip_barrier(which))
    run = Run(folder)
    some_steps(run)
    run.close()
    assert lose_power_everywhere(run)[0]


def test_without_the_barrier_of_the_second_drive_a_power_loss_is_noticed(folder, monkeypatch):
    real = commit_log_module.barrier
    monkeypatch.setattr(commit_log_module, "barrier", lambda links, files, rest: real(links, files[:1], rest))
    run = Run(folder)
    some_steps(run)
    run.close()
    assert lose_power_everywhere(run)[0]


def test_a_commit_that_does_not_wait_for_its_writes_is_noticed(folder, monkeypatch):
    run = Run(folder)
    wait = run.links.wait
    monkeypatch.setattr(run.links, "wait", lambda transfer: wait(transfer) if transfer.num_bytes <= PAGE else None)
    run.write("b", 1)
    run.commit()
    monkeypatch.undo()
    run.close()
    assert lose_power_everywhere(run)[0]


NUM_OPERATIONS_OF_A_COMMIT = 9  # writes: 3 extents, body, record; syncs: 2 files, then 1; and one past the end
SOME_FIRST, ALL_FIRST = ("b",), ("a", "b", "c")
NUM_OPERATIONS_OF_MAKING = 7  # writes: 3 of zeros around the room of "b", body, record; syncs: 2 files
NUM_OPERATIONS_OF_A_START = NUM_OPERATIONS_OF_MAKING + 1 + NUM_OPERATIONS_OF_A_COMMIT  # opening syncs


def first_start(folder, written_first, kill_at=None, kill_before_naming=None):
    """Makes a log and commits twice; again from the beginning, or from where it is, if killed. Loses power then."""
    run, since = FirstStart(folder, written_first), 0
    run.io.kill_at, run.kill_before_naming = kill_at, kill_before_naming
    try:
        run.start()
        run.write("a", 1), run.write("b", 2), run.write("c", 3)
        run.commit()
    except Killed:
        run.kill()
        since = run.io.now
        if read_layout(run.folders) is None:
            run = FirstStart(folder, written_first)
            run.start()
            since = run.io.now  # what was before is that of a run that was not killed
        else:
            run.open()
        run.write("a", 4), run.write("b", 5)
        run.commit()
    run.io.kill_at = None
    run.write("b", 7)
    run.commit()
    run.close()
    return lose_power_everywhere(run, since)


@pytest.mark.parametrize("written_first", [SOME_FIRST, ALL_FIRST], ids=["one extent", "all extents"])
def test_a_power_loss_in_a_first_start_leaves_a_committed_state_or_none(folder, written_first):
    complaints, num_opened = first_start(folder, written_first)
    assert complaints == []
    assert num_opened > 500


@pytest.mark.parametrize(
    "kill_at", [pytest.param(at, marks=pytest.mark.full if at % 2 else ()) for at in range(NUM_OPERATIONS_OF_A_START)]
)
def test_killed_in_a_first_start_and_then_a_power_loss(folder, kill_at):
    complaints, num_opened = first_start(folder, SOME_FIRST, kill_at)
    assert complaints == []
    assert num_opened > 50


@pytest.mark.parametrize("number", [1, 0], ids=["before the first layout", "between the layouts"])
def test_killed_where_a_log_gets_its_layout_and_then_a_power_loss(folder, number):
    complaints, num_opened = first_start(folder, SOME_FIRST, kill_before_naming=number)
    assert complaints == []
    assert num_opened > 50


def test_a_log_that_is_named_before_it_is_durable_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(commit_layout_module, "barrier", lambda *_: None)
    assert "does not open" in first_start(folder, SOME_FIRST)[0][0]


def test_a_layout_that_the_home_gets_first_is_noticed(folder, monkeypatch):
    """Then it is read with a part missing, where nothing is missing but time."""
    monkeypatch.setattr(commit_layout_module, "reversed", lambda numbers: numbers, raising=False)
    assert first_start(folder, SOME_FIRST)[0]


@pytest.mark.parametrize("which", NUM_SYNCED)
def test_without_either_barrier_a_power_loss_in_a_first_start_is_noticed(folder, monkeypatch, which):
    monkeypatch.setattr(commit_log_module, "barrier", skip_barrier(which))
    assert first_start(folder, ALL_FIRST)[0]


def killed_then_lost(folder, kill_at):
    """Killed in a commit, opened again, two more steps, and power losses anywhere in that second life."""
    run = Run(folder)
    some_steps(run)
    since = run.io.now
    run.io.kill_at = kill_at
    try:
        run.write("a", 20), run.write("b", 21), run.write("c", 22)
        run.commit()
    except Killed:
        pass
    run.kill()
    run.open()
    for value in (30, 40):
        run.write("a", value), run.write("c", value + 2)
        run.commit()
    run.close()
    return lose_power_everywhere(run, since)


@pytest.mark.parametrize("kill_at", range(NUM_OPERATIONS_OF_A_COMMIT))
def test_killed_in_a_commit_and_then_a_power_loss(folder, kill_at):
    complaints, num_opened = killed_then_lost(folder, kill_at)
    assert complaints == []
    assert num_opened > 50


def test_building_on_a_record_that_was_not_synced_is_noticed(folder, monkeypatch):
    """What opening would be without [Note: opening syncs]."""
    reopen = Run.open

    def open_without_syncing(run):
        with monkeypatch.context() as patch:
            patch.setattr(commit_log_module, "barrier", lambda *_: None)
            reopen(run)

    monkeypatch.setattr(Run, "open", open_without_syncing)
    assert killed_then_lost(folder, kill_at=7)[0]


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from("abc"), st.integers(100, 1000)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("drop")),
    st.tuples(st.just("killed in"), st.integers(0, 12)),
)


def any_run(folder, actions, seed):
    """Does what it is told, loses power at random moments, and gives the first complaint.

    The moments come from a generator of their own: thousands of draws pass what hypothesis takes of one example.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=folder) as home:
        run = Run(Path(home))
        for action in actions:
            try:
                if action[0] == "write":
                    run.write(*action[1:])
                elif action[0] == "commit":
                    run.commit()
                elif action[0] == "drop":
                    run.drop()
                else:
                    run.io.kill_at = action[1]
            except Killed:
                run.kill()
                run.open()
        run.io.kill_at = None
        run.close()
        judge = Judge(run)
        for _ in range(40):
            moment = chance.randint(0, run.io.now)
            complaint = judge.verdict(random_outcome(*run.io.at(moment), chance), moment)
            if complaint:
                return complaint
    return None


RUNS = given(st.lists(ACTIONS, min_size=3, max_size=25), st.integers(0, 2**32 - 1))
HEALTH = {"deadline": None, "suppress_health_check": SHARES_FIXTURES}


@RUNS
@settings(max_examples=60, **HEALTH)
def test_any_run_with_any_kills_survives_a_power_loss(folder, actions, seed):
    assert any_run(folder, actions, seed) is None


@pytest.mark.full
@pytest.mark.timeout(1800)
@RUNS
@settings(max_examples=2000, **HEALTH)
def test_two_thousand_runs_with_kills_survive_a_power_loss(folder, actions, seed):
    assert any_run(folder, actions, seed) is None
