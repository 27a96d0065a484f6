"""The store: written once, found again, verified, locked, and never a silent wrong byte.

<drive>/offload_rt-<key>/  OFFLOAD_RT_STORE | lock | weights.bin | manifest.json
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offload_rt.storage.store as store_module
from offload_rt.cli.main import main
from offload_rt.config import NvmePath
from offload_rt.errors import ConfigError, OffloadError, StorageError, StorageFull, StoreCorrupt, StoreInUse
from offload_rt.memory.arena import Arena
from offload_rt.native import native_core
from offload_rt.storage.drive_files import MARKER
from offload_rt.storage.drives import DriveProfile
from offload_rt.storage.durable import write_atomically
from offload_rt.storage.store import Store
from offload_rt.tensor_spec import TensorSpec, layout_block
from offload_rt.transfers.file_io import AiofilesIO, file_io
from offload_rt.transfers.links import Links
from tests.conftest import SHARES_FIXTURES, flip, forked_child, open_descriptors
from tests.durable import Durable

ROOT = Path(__file__).resolve().parents[1]
PAGE = 4096
SIZES = [1, 1000, 4096, 4097, 100_000]


def content(index, size):
    return ((torch.arange(size) * 31 + index * 7) % 253).to(torch.uint8)


def specs(sizes=SIZES):
    return [
        layout_block(f"b{i}", [TensorSpec(name=f"b{i}.w", shape=(size,), dtype="U8")]) for i, size in enumerate(sizes)
    ]


@pytest.fixture
def links():
    links = Links(io=AiofilesIO())
    yield links
    links.close()


@pytest.fixture
def drive(disk_folder):
    return NvmePath(path=disk_folder)


def fill(store, sizes=SIZES):
    builder = store.build(specs(sizes))
    for index, spec in enumerate(specs(sizes)):
        builder.write(spec, [(0, content(index, sizes[index]))])
    builder.finish()


def read(store, links, name):
    spec = next(s for s in store.specs if s.name == name)
    slot = Arena("a", spec.stored_bytes).acquire(spec.stored_bytes, name)
    links.wait(store.read(name, slot))
    store.verify(name, slot)
    return slot.tensor(torch.uint8, (spec.stored_bytes,)).clone()


def check_content(store, links, sizes=SIZES):
    for index, size in enumerate(sizes):
        data = read(store, links, f"b{index}")
        assert torch.equal(data[:size], content(index, size))
        assert not data[size:].any(), "the padding is not zero"


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_what_is_built_reads_back(drive, links):
    store = Store([drive], "key", links)
    assert not store.complete
    fill(store)
    assert store.complete
    check_content(store, links)
    assert store.stored_bytes == sum(s.stored_bytes for s in specs()) == links.counters.bytes_written
    store.close()


def test_blocks_larger_than_the_staging_pieces_are_whole(drive, links, monkeypatch):
    monkeypatch.setattr(store_module, "STAGING_BYTES", 2 * PAGE)
    sizes = [2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 9 * PAGE + 5]
    store = Store([drive], "key", links)
    fill(store, sizes)
    check_content(store, links, sizes)
    store.close()


def test_pieces_with_gaps_are_laid_where_they_belong(drive, links):
    spec = layout_block(
        "b", [TensorSpec(name="x", shape=(5,), dtype="U8"), TensorSpec(name="y", shape=(3,), dtype="F32")]
    )
    store = Store([drive], "key", links)
    builder = store.build([spec])
    offset = spec.tensors[1].offset_bytes
    builder.write(spec, [(0, torch.full((5,), 9, dtype=torch.uint8)), (offset, torch.tensor([1.0, 2.0, 3.0]))])
    builder.finish()
    data = read(store, links, "b")
    assert data[:5].tolist() == [9] * 5 and not data[5:offset].any()
    assert data[offset : offset + 12].view(torch.float32).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="behind"):
        Store([drive], "key2", links).build([spec]).write(spec, [(64, torch.ones(3)), (0, torch.ones(1))])
    store.close()


def test_reopening_finds_it_and_writes_nothing(drive, links, disk_folder):
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    before = {p: p.stat().st_mtime_ns for p in disk_folder.rglob("*") if p.name != "lock" and p.is_file()}
    written = links.counters.bytes_written
    again = Store([drive], "key", links)
    assert again.complete
    check_content(again, links)
    again.close()
    assert links.counters.bytes_written == written
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_key_is_another_store(drive, links):
    first, second = Store([drive], "k1", links), Store([drive], "k2", links)
    fill(first)
    assert not second.complete
    first.close()
    second.close()


@pytest.mark.parametrize("position", [0, 999, 50_000, 99_999])
def test_a_corrupt_byte_is_found_and_named(drive, links, disk_folder, position):
    store = Store([drive], "key", links)
    fill(store)
    offset = sum(s.stored_bytes for s in specs()[:4])
    flip(disk_folder / "offload_rt-key" / "weights.bin", offset + position)
    read(store, links, "b3")
    for _ in range(2):
        with pytest.raises(StoreCorrupt) as raised:
            read(store, links, "b4")
        assert "block b4" in str(raised.value) and f"offset {offset}" in str(raised.value)
        assert "offload-rt clean" in str(raised.value)
    store.close()


def test_the_debug_switch_verifies_every_read(drive, links, disk_folder, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_VERIFY", "all")
    store = Store([drive], "key", links)
    fill(store)
    read(store, links, "b0")
    flip(disk_folder / "offload_rt-key" / "weights.bin", 0)
    with pytest.raises(StoreCorrupt):
        read(store, links, "b0")
    store.close()


def test_truncated_weights_are_found_when_it_opens(drive, links, disk_folder):
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    path = disk_folder / "offload_rt-key" / "weights.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StoreCorrupt, match="weights.bin"):
        Store([drive], "key", links)
    path.unlink()
    with pytest.raises(StoreCorrupt, match="weights.bin"):
        Store([drive], "key", links)


def test_a_tampered_manifest_is_refused(drive, links, disk_folder):
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    path = disk_folder / "offload_rt-key" / "manifest.json"
    data = json.loads(path.read_text())
    data["body"]["blocks"][0]["extent"]["offset_bytes"] = PAGE
    path.write_text(json.dumps(data))
    with pytest.raises(StoreCorrupt, match="does not match its own checksum"):
        Store([drive], "key", links)


@pytest.mark.parametrize("broken", ["manifest.json", "weights.bin"])
def test_what_an_error_says_to_do_about_a_broken_store_helps(drive, links, disk_folder, broken):
    store = Store([drive], "0123456789abcdef", links)
    fill(store)
    store.close()
    (disk_folder / "offload_rt-0123456789abcdef" / broken).write_text("{}")
    with pytest.raises(StoreCorrupt, match="the state of training") as raised:
        Store([drive], "0123456789abcdef", links)
    command = str(raised.value).split("`")[1].split()
    assert command[0] == "offload-rt" and main(command[1:]) == 0
    store = Store([drive], "0123456789abcdef", links)
    fill(store)
    store.close()


@pytest.mark.parametrize(
    "number, words",
    [(errno.EIO, "dmesg"), (errno.EROFS, "read-only"), (errno.ENOSPC, "offload-rt clean"), (errno.EINTR, "")],
)
def test_a_failed_write_says_what_its_number_means(number, words):
    error = StorageError("write failed", path="/p", offset=4096, wanted=10, done=2, errno=number)
    name = errno.errorcode[number]
    assert str(error).startswith(f"/p: write failed (2 of 10 bytes at offset 4096) (errno {number}, {name})")
    assert error.errno == number and (str(error).endswith(f"{name})") if not words else words in str(error))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "5", '{"body": 5}', "{" * 50, '{"sha256": ""}', "\x00", "9" * 5000]
)
def test_a_manifest_that_is_none_is_refused(drive, links, disk_folder, text):
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    (disk_folder / "offload_rt-key" / "manifest.json").write_text(text)
    with pytest.raises(StoreCorrupt, match="manifest.json"):
        Store([drive], "key", links)


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=SHARES_FIXTURES)
def test_a_damaged_manifest_never_opens(drive, links, disk_folder, data):
    path = disk_folder / "offload_rt-fuzz" / "manifest.json"
    if not path.exists():
        store = Store([drive], "fuzz", links)
        fill(store)
        store.close()
        (disk_folder / "whole").write_bytes(path.read_bytes())
    whole = (disk_folder / "whole").read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(damaged), data.draw(st.integers(0, len(damaged)))]))
    path.write_bytes(bytes(damaged[:cut]))
    try:
        same = json.loads(path.read_bytes()) == json.loads(whole)
    except ValueError:
        same = False
    try:
        store = Store([drive], "fuzz", links)
    except StoreCorrupt:
        assert not same
    else:
        store.close()
        assert same


def test_an_unfinished_build_is_built_again(drive, links):
    store = Store([drive], "key", links)
    builder = store.build(specs())
    builder.write(specs()[0], [(0, content(0, SIZES[0]))])
    with pytest.raises(ValueError, match="never written"):
        builder.finish()
    builder.close()
    store.close()
    again = Store([drive], "key", links)
    assert not again.complete
    fill(again)
    check_content(again, links)
    again.close()


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_a_store_built_again_over_other_drives_and_killed_is_not_taken_for_whole(disk_folder, links):
    """The manifest of the old build must not outlive its bytes: on two drives, then one (killed), then two again."""
    drives = [NvmePath(path=disk_folder / name) for name in ("one", "two")]
    for drive in drives:
        drive.path.mkdir()
    store = Store(drives, "key", links)
    fill(store)
    store.close()
    store = Store(drives[:1], "key", links)
    assert not store.complete
    builder = store.build(specs())
    builder.close()  # killed before the first block
    store.close()
    again = Store(drives, "key", links)
    if not again.complete:
        fill(again)
    check_content(again, links)
    again.close()


def test_a_manifest_is_off_the_drive_before_the_bytes_that_it_speaks_of_are(drive, links, monkeypatch):
    store = Store([drive], "key", links)
    fill(store)
    durable, found = Durable(monkeypatch), []

    def preallocate(file, num_bytes, real=store_module.preallocate):
        found.append("manifest.json" in durable.names_in(store.folders[0]))
        real(file, num_bytes)

    monkeypatch.setattr(store_module, "preallocate", preallocate)
    store.build(specs()).close()
    assert found == [False]
    store.close()


def test_the_same_drives_in_another_order_are_no_corruption(disk_folder, links):
    drives = [NvmePath(path=disk_folder / name) for name in ("one", "two")]
    for drive in drives:
        drive.path.mkdir()
    for order in (drives, drives[::-1], drives):
        store = Store(order, "key", links)
        if not store.complete:
            fill(store)
        check_content(store, links)
        store.close()


def test_blocks_alternate_between_two_drives(disk_folder, links):
    drives = [NvmePath(path=disk_folder / name) for name in ("one", "two")]
    for drive in drives:
        drive.path.mkdir()
    store = Store(drives, "key", links)
    fill(store)
    check_content(store, links)
    sizes = [(d.path / "offload_rt-key" / "weights.bin").stat().st_size for d in drives]
    stored = [s.stored_bytes for s in specs()]
    assert sizes == [sum(stored[0::2]), sum(stored[1::2])]
    store.close()


LARGE = [4 << 20, 100, (5 << 20) + 5]


@pytest.fixture
def unequal(disk_folder, monkeypatch):
    """Two drives, the first three times as fast; the profiles can be changed."""
    drives = [NvmePath(path=disk_folder / name) for name in ("fast", "slow")]
    for drive in drives:
        drive.path.mkdir()
    speeds = {"fast": 3e9, "slow": 1e9}
    monkeypatch.setattr(
        store_module, "drive_profile",
        lambda folder, io: DriveProfile(read_bytes_per_second=speeds[folder.parent.name]),
    )  # fmt: skip
    return drives, speeds


def weights_files(drives):
    return [drive.path / "offload_rt-key" / "weights.bin" for drive in drives]


@pytest.mark.parametrize("io", ["auto", "aiofiles"])
def test_a_block_lies_on_drives_by_their_speed_and_reads_the_same(unequal, io):
    drives, speeds = unequal
    links = Links(io=file_io(io))
    store = Store(drives, "key", links)
    fill(store, LARGE)
    check_content(store, links, LARGE)
    fast, slow = (path.stat().st_size for path in weights_files(drives))
    assert fast / slow == pytest.approx(3, rel=0.05)
    before = links.counters.num_transfers
    read(store, links, "b0")
    assert links.counters.num_transfers - before == 2, "not read from both"
    read(store, links, "b1")
    assert links.counters.num_transfers - before == 3
    store.close()
    # Whatever the drives measure later, the store says where its bytes are.
    speeds.update(fast=1e9, slow=7e9)
    again = Store(drives, "key", links)
    assert again.complete
    check_content(again, links, LARGE)
    again.close()
    links.close()


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_byte_in_any_stripe_is_found(unequal, links, which):
    drives, _ = unequal
    store = Store(drives, "key", links)
    fill(store, LARGE)
    store.close()
    path = weights_files(drives)[which]
    flip(path, 12345)
    again = Store(drives, "key", links)
    with pytest.raises(StoreCorrupt, match=f"{path}.*block b0.*offload-rt clean.*fast.*slow"):
        read(again, links, "b0")
    again.close()


@pytest.mark.parametrize("which", [0, 1])
def test_a_stripe_that_is_cut_short_is_found_when_opening(unequal, links, which):
    drives, _ = unequal
    store = Store(drives, "key", links)
    fill(store, LARGE)
    store.close()
    path = weights_files(drives)[which]
    os.truncate(path, path.stat().st_size - PAGE)
    with pytest.raises(StoreCorrupt, match=str(path)):
        Store(drives, "key", links)


def test_a_small_drive_takes_what_it_may_and_the_other_the_rest(unequal, links):
    drives, _ = unequal
    small = NvmePath(path=drives[0].path, capacity_bytes=4 << 20)
    store = Store([small, drives[1]], "key", links)
    fill(store, LARGE)
    check_content(store, links, LARGE)
    fast, slow = (path.stat().st_size for path in weights_files(drives))
    assert 2 << 20 < fast <= 4 << 20
    assert fast + slow >= sum(LARGE)
    store.close()


def test_drives_that_are_too_small_together_are_full_before_anything_is_written(unequal, links):
    drives, _ = unequal
    small = [NvmePath(path=drive.path, capacity_bytes=4 << 20) for drive in drives]
    store = Store(small, "key", links)
    with pytest.raises(StorageFull, match="nothing was written"):
        store.build(specs(LARGE))
    assert [path.exists() for path in weights_files(drives)] == [False, False]
    store.close()


def test_a_store_of_the_version_before_is_built_again(drive, links, monkeypatch):
    monkeypatch.setattr(store_module, "STORE_VERSION", store_module.STORE_VERSION - 1)
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    monkeypatch.undo()
    again = Store([drive], "key", links)
    assert not again.complete
    fill(again)
    check_content(again, links)
    again.close()


def test_the_store_asks_a_drive_as_its_profile_says(drive, monkeypatch):
    if native_core() is None:
        pytest.skip("the native extension is not built")
    monkeypatch.setattr(store_module, "drive_profile", lambda folder, io: DriveProfile(depth=3, io_bytes=16 * PAGE))
    links = Links(io=file_io())
    store = Store([drive], "key", links)
    fill(store, [64 * PAGE])
    before = links.io.counters()["requests"]
    read(store, links, "b0")
    counters = links.io.counters()
    assert counters["requests"] - before == 4
    assert counters["max_in_flight"] <= 3
    store.close()
    links.close()


def test_the_same_folder_twice_is_a_mistake_of_the_caller(drive, links):
    with pytest.raises(ConfigError, match="nvme"):
        Store([drive, drive], "key", links).close()


def test_no_blocks_are_no_error(drive, links):
    store = Store([drive], "key", links)
    store.build([]).finish()
    store.close()


HOLDER = """
import signal, sys
from pathlib import Path
from offload_rt.config import NvmePath
from offload_rt.storage.drives import DriveProfile
from offload_rt.storage.store import Store
from offload_rt.transfers.links import Links
store = Store([NvmePath(path=Path(sys.argv[1]))], "key", Links())
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(disk_folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(disk_folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_store_that_another_process_holds_names_it_and_is_free_once_that_is_killed(drive, links, holder):
    with pytest.raises(StoreInUse, match=rf"by another run \(pid {holder.pid} "):
        Store([drive], "key", links)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    Store([drive], "key", links).close()


def test_two_in_one_process_exclude_each_other_until_closed(drive, links):
    first = Store([drive], "key", links)
    with pytest.raises(StoreInUse, match=rf"an engine of this process \(pid {os.getpid()} .* until engine\.close\("):
        Store([drive], "key", links)
    first.close()
    Store([drive], "key", links).close()


def test_a_forked_child_does_not_keep_a_closed_store_locked(drive, links):
    store = Store([drive], "key", links)
    with forked_child():
        store.close()
        Store([drive], "key", links).close()


def test_a_failed_start_leaves_no_lock_and_no_descriptor(drive, links, disk_folder):
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    (disk_folder / "offload_rt-key" / "manifest.json").write_text("{")
    before = open_descriptors()
    with pytest.raises(StoreCorrupt):
        Store([drive], "key", links)
    assert set(os.listdir("/proc/self/fd")) == before
    shutil.rmtree(disk_folder / "offload_rt-key")
    Store([drive], "key", links).close()


def test_a_missing_folder_is_named(disk_folder, links):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        Store([NvmePath(path=disk_folder / "nowhere")], "key", links)
    (disk_folder / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a folder"):
        Store([NvmePath(path=disk_folder / "file")], "key", links)
    assert files_below(disk_folder) == ["file"]


@pytest.fixture
def as_nobody(disk_folder):
    """Root may write everywhere; for the length of a test we are somebody else."""
    if os.geteuid() != 0:
        yield
        return
    disk_folder.chmod(0o755)
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_read_only_folder_is_a_storage_error(disk_folder, links, as_nobody):
    if os.geteuid() != 65534:
        disk_folder.chmod(0o555)
    with pytest.raises(StorageError, match="read-only, or no permission") as raised:
        Store([NvmePath(path=disk_folder)], "key", links)
    assert str(disk_folder) in raised.value.path
    assert files_below(disk_folder) == []


def test_a_store_whose_lock_may_not_be_written_is_a_storage_error(drive, links, disk_folder):
    if os.geteuid() != 0:
        pytest.skip("needs to become another user")
    store = Store([drive], "key", links)
    fill(store)
    store.close()
    disk_folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match="lock"):
            Store([drive], "key", links)
    finally:
        os.seteuid(0)


def test_too_little_capacity_is_found_before_the_first_byte(disk_folder, links):
    need = sum(s.stored_bytes for s in specs())
    store = Store([NvmePath(path=disk_folder, capacity_bytes=need - 1)], "key", links)
    with pytest.raises(StorageFull, match="allowed by nvme="):
        store.build(specs())
    assert links.counters.bytes_written == 0
    assert not (disk_folder / "offload_rt-key" / "weights.bin").exists()
    store.close()
    store = Store([NvmePath(path=disk_folder, capacity_bytes=need)], "key", links)
    fill(store)
    check_content(store, links)
    store.close()


def test_a_drive_that_fills_up_is_reported_and_leaves_nothing_behind(drive, links, disk_folder, monkeypatch):
    import errno

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = Store([drive], "key", links)
    before = open_descriptors()
    with pytest.raises(StorageFull) as raised:
        store.build(specs())
    assert raised.value.errno == errno.ENOSPC
    assert set(os.listdir("/proc/self/fd")) == before, "the builder kept a descriptor"
    store.close()


def test_a_foreign_folder_is_left_as_it_is(drive, links, disk_folder):
    foreign = disk_folder / "offload_rt-key"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not ours"):
        Store([drive], "key", links)
    assert files_below(disk_folder) == ["offload_rt-key", "offload_rt-key/thesis.txt"]
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_becomes_ours_and_says_so(drive, links, disk_folder):
    (disk_folder / "offload_rt-key").mkdir()
    Store([drive], "key", links).close()
    assert (disk_folder / "offload_rt-key" / MARKER).exists()


def test_a_build_that_fails_waits_for_its_writes_before_it_closes_the_file(drive, disk_folder, monkeypatch):
    """A write in flight goes to a number; once that is closed, it is the next file's number."""
    monkeypatch.setattr(store_module, "STAGING_BYTES", PAGE)
    links = Links(io=AiofilesIO(), delay_seconds=0.3, seed=0)
    links._random.uniform = lambda low, high: 0.2
    store = Store([drive], "key", links)
    spec = layout_block("b", [TensorSpec(name="w", shape=(3 * PAGE,), dtype="U8")])
    builder = store.build([spec])

    def pieces():
        yield 0, torch.full((PAGE,), 0xAB, dtype=torch.uint8)
        raise ConfigError("the source broke off")

    with pytest.raises(ConfigError, match="broke off"):
        builder.write(spec, pieces())
    builder.close()
    innocent = disk_folder / "innocent"
    innocent.write_bytes(bytes(2 * PAGE))
    fds = [os.open(innocent, os.O_RDWR) for _ in range(8)]  # takes the number over
    links.close()
    for fd in fds:
        os.close(fd)
    store.close()
    assert innocent.read_bytes() == bytes(2 * PAGE), "a late write went into another file"


def test_pieces_do_not_starve_for_staging_memory(drive, links, monkeypatch):
    """Two pieces are all there is: the one in flight must be back before the next is asked for."""
    monkeypatch.setattr(store_module, "STAGING_BYTES", PAGE)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        store = Store([drive], "key", links)
        fill(store, [200 * PAGE])
        check_content(store, links, [200 * PAGE])
        store.close()
    finally:
        sys.setswitchinterval(interval)


def test_a_file_is_replaced_whole_or_not_at_all(disk_folder, monkeypatch):
    path = disk_folder / "f"
    write_atomically(path, b"old")

    def killed(*arguments):
        raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert files_below(disk_folder) == ["f"]


def test_a_file_is_on_the_drive_before_it_gets_its_name(disk_folder, monkeypatch):
    path, durable, found = disk_folder / "f", Durable(monkeypatch), []

    def replace(partial, *arguments, real=os.replace):
        found.append(durable.missing(partial))
        real(partial, *arguments)

    monkeypatch.setattr(os, "replace", replace)
    write_atomically(path, b"new")
    assert found == [[]]
    assert durable.has_name(path)


def test_blocks_are_on_their_drives_before_a_manifest_speaks_of_them(disk_folder, links, monkeypatch):
    drives = [NvmePath(path=disk_folder / name) for name in ("one", "two")]
    for drive in drives:
        drive.path.mkdir()
    durable, found = Durable(monkeypatch), []

    def write(path, content, real=store_module.write_atomically):
        for folder in store.folders:
            assert (folder / "weights.bin").stat().st_size > 0
            found.extend(durable.missing(folder / "weights.bin"))
            found.extend(str(each) for each in (folder, folder / "weights.bin") if not durable.has_name(each))
        real(path, content)

    monkeypatch.setattr(store_module, "write_atomically", write)
    store = Store(drives, "key", links)
    fill(store)
    assert found == []
    assert durable.has_name(store.folders[0] / "manifest.json")
    store.close()


@pytest.mark.parametrize("fails", ["fdatasync", "fsync"])
def test_a_drive_that_cannot_sync_is_named_and_its_store_is_none(fails, drive, links, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    store = Store([drive], "key", links)
    builder = store.build(specs([PAGE]))
    builder.write(specs([PAGE])[0], [(0, content(0, PAGE))])
    with monkeypatch.context() as patched:
        patched.setattr(os, fails, broken)
        with pytest.raises(StorageError, match=f"{drive.path}.*cannot be made durable .*EIO"):
            builder.finish()
    builder.close()
    assert not (store.folders[0] / "manifest.json").exists()
    store.close()


def test_every_store_error_is_one_of_ours():
    assert all(issubclass(kind, OffloadError) for kind in (StoreCorrupt, StoreInUse, StorageError, StorageFull))
