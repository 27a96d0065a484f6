"""A look at a log without its lock: what opening it would find, or nothing, or a typed error."""

import pytest

from offload_rt.errors import StorageError, StoreCorrupt
from offload_rt.memory.arena import Arena
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.commit_peek import peek
from offload_rt.transfers.links import Links
from tests.conftest import flip
from tests.power_loss import PlainIO
from tests.tiny_logs import SIZES, make, write


@pytest.fixture
def links():
    links = Links(io=PlainIO())
    yield links
    links.close()


def test_what_is_seen_is_what_opening_finds_while_another_holds_the_log(links, tmp_path):
    folders = [tmp_path / "home", tmp_path / "other"]
    assert peek(folders[0]) is None
    log = make(folders, links)
    assert peek(folders[0]) is None, "no step is in it"
    for step in (1, 2, 3):
        write(log, Arena("a", 4 << 20), next(iter(SIZES)), step)
        log.commit(step, f"step {step}".encode())
        seen = peek(folders[0])
        assert seen is not None
        assert (seen.step, seen.payload) == (log.committed.step, log.committed.payload) == (step, b"step %d" % step)
    assert peek(folders[1]) is None, "the records are at home"
    log.close()
    assert CommitLog(folders, links).committed.step == 3


def test_a_record_that_was_cut_off_leaves_the_one_before_and_two_are_a_typed_error(links, tmp_path):
    log = make([tmp_path / "home"], links)
    log.commit(1, b"one")
    log.commit(2, b"two")
    newest = log._place
    offsets = [log.layout.record_offset(place) for place in (newest, 1 - newest)]
    log.close()
    for offset, left in zip(offsets, (1, None), strict=True):
        flip(tmp_path / "home" / "state.bin", offset + 20)
        if left is not None:
            seen = peek(tmp_path / "home")
            assert seen is not None and (seen.step, seen.payload) == (1, b"one")
            continue
        with pytest.raises(StoreCorrupt, match="neither of the two commit records is valid: record 0: checksum"):
            peek(tmp_path / "home")
    (tmp_path / "home" / "state.bin").unlink()
    with pytest.raises(StorageError, match="ENOENT"):
        peek(tmp_path / "home")
