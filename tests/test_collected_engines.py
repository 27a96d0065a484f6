"""What nobody closed and nobody sees any more goes when it is collected: its files are closed, its locks free."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time
import weakref

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import StoreInUse
from offload_rt.native import native_core
from offload_rt.storage.drive_files import FolderLock, open_fenced, open_file
from offload_rt.transfers.file_io import Descriptor, file_io
from tests.conftest import build_lora, build_plain, language_batch, open_descriptors


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def build_full():
    return build_plain(num_layers=2).requires_grad_(True)


def is_locked(folder):
    """Of a folder's lock. In a frame of its own: pytest keeps what an error has seen."""
    try:
        FolderLock(folder).close()
    except StoreInUse:
        return True
    return False


def made(model, folder):
    return Engine(model, batch_size=2, seq_len=16, lr=1e-2, nvme=folder, commit_every=1)


def settles(is_so):
    """Whether it comes to be so: a thread may still be about to let go of the last thing that it did."""
    for _ in range(200):
        if is_so():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("build", [lambda: build_lora(num_layers=1), build_full], ids=["adapters", "all parameters"])
def test_an_engine_that_is_collected_leaves_no_descriptor_and_no_lock(disk_folder, build):
    build()  # what libraries log the first time holds their callers' frames, and a model, as long as pytest keeps it
    before = open_descriptors()
    engine = made(build(), disk_folder)
    folders = [path.parent for path in disk_folder.glob("*/lock")]
    batch = language_batch(0) if hasattr(engine.model, "peft_config") else {"x_BTF": torch.randn(2, 4, 8)}
    found = engine(**batch)
    engine.backward(found.loss if hasattr(found, "loss") else found.square().mean())
    engine.step()
    assert all(is_locked(folder) for folder in folders)
    del engine, found
    assert settles(lambda: open_descriptors() == before), open_descriptors() ^ before
    assert folders and not any(is_locked(folder) for folder in folders)


def test_the_next_engine_collects_the_one_that_has_the_store(disk_folder, without_collector):
    """Two cells of a notebook: `engine` is another one's name then, the first one's cycles are still there."""
    made(build_full(), disk_folder)
    made(build_full(), disk_folder).close()


def test_a_scheduler_that_outlives_an_engine_does_not_keep_it(disk_folder):
    build_lora(num_layers=1)  # see above
    engine = made(build_lora(num_layers=1), disk_folder)
    scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    folders, seen = [path.parent for path in disk_folder.glob("*/lock")], weakref.ref(engine)
    del engine
    gc.collect()
    assert seen() is None and folders and not any(is_locked(folder) for folder in folders)
    scheduler.optimizer.step()  # nobody's


def test_one_that_somebody_still_sees_keeps_its_store(disk_folder):
    with made(build_lora(num_layers=1), disk_folder) as engine:
        with pytest.raises(StoreInUse, match="this process"):
            made(build_lora(num_layers=1), disk_folder)
        assert engine(**language_batch(0)).loss.isfinite()


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_an_operation_under_way_keeps_the_descriptor_open(tmp_path, backend):
    core = native_core()
    if core is None or (backend == "io_uring" and not core.io_uring_available()[0]):
        pytest.skip("no native core, or no io_uring here")
    (tmp_path / "f").write_bytes(b"content")
    ring = core.Ring(backend=backend)

    def begun():
        owner = Descriptor(os.open(tmp_path / "f", os.O_RDWR))
        read = ring.read(owner.fd, "f", 0, bytearray(7), owner=owner)
        return weakref.ref(owner), owner.fd, [read, ring.sync(owner.fd, "f", owner=owner)]

    owner, fd, tickets = begun()
    ring.wait(tickets[0], 60)
    assert owner() is not None and os.fstat(fd)
    ring.wait(tickets[1], 60)
    assert owner() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("backend", ["io_uring", "threads", "aiofiles"])
def test_nobody_has_to_wait_for_what_keeps_a_file_open(tmp_path, backend):
    core = native_core()
    if backend != "aiofiles" and (core is None or (backend == "io_uring" and not core.io_uring_available()[0])):
        pytest.skip("no native core, or no io_uring here")
    io, file = file_io(backend), open_file(tmp_path / "f", writable=True)
    owner = weakref.ref(file.owner)
    io.start("write", file, 0, memoryview(mmap.mmap(-1, mmap.PAGESIZE)))  # nobody ever waits for it
    del file
    if backend != "aiofiles":  # whose thread may be through
        assert owner() is not None
    io.close()
    gc.collect()
    assert owner() is None and (tmp_path / "f").stat().st_size == mmap.PAGESIZE


def test_a_file_that_was_closed_is_not_closed_again(tmp_path):
    file = open_file(tmp_path / "f", writable=True)
    file.close()
    other = os.open(tmp_path / "f", os.O_RDWR)
    assert other == file.fd
    file.close()
    del file
    gc.collect()
    os.close(other)


def test_a_forked_child_that_collects_them_leaves_the_parents_locks(tmp_path):
    lock, file = FolderLock(tmp_path), open_fenced(tmp_path / "state", 0.0)
    child = os.fork()
    if child == 0:
        del lock, file
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(StoreInUse):
        FolderLock(tmp_path)
    with pytest.raises(StoreInUse):
        open_fenced(tmp_path / "state", 0.0)
    lock.close()
    file.close()


def test_an_engine_of_all_parameters_is_collected_with_its_thread_and_its_parameters():
    gc.collect()
    before = set(threading.enumerate())
    engine = Engine(build_plain(num_layers=2).requires_grad_(True), batch_size=2, seq_len=16, lr=1e-2)
    engine.backward(engine(torch.randn(2, 4, 8)).square().mean())
    engine.step()
    seen = [weakref.ref(engine), *(weakref.ref(parameter) for parameter in engine.model.parameters())]
    threads = set(threading.enumerate()) - before
    assert any(thread.name == "offload_rt-updates" for thread in threads)
    del engine
    gc.collect()
    assert not any(each() is not None for each in seen)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
