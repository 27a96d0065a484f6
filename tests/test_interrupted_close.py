"""Ctrl-C while an engine is closed, or made: everything is closed all the same, as its process may go on."""

from __future__ import annotations

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.closing import all_close
from offload_rt.errors import StorageTimeout, StoreInUse
from offload_rt.layers.executor import RingExecutor
from offload_rt.optimizer.gradients import Gradients
from offload_rt.optimizer.stepper import Stepper
from offload_rt.running.replanning import Replanner
from offload_rt.storage.commit_log import CommitLog
from offload_rt.storage.store import Store
from offload_rt.transfers.links import Links
from offload_rt.wiring.runtime_assembly import RuntimeAssembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Tier
from tests.conftest import build_plain

CLOSINGS = [
    (Replanner, "close"),
    (RingExecutor, "drain"),
    (Stepper, "close"),
    (Gradients, "clear"),
    (CommitLog, "close"),
    (Links, "close"),
    (Store, "close"),
]


def made(folder):
    """Some of its layers rest in a store, the others' state in a log."""
    model = build_plain(num_layers=3).requires_grad_(True)
    model.layers[0].requires_grad_(False)
    return Engine(
        model, batch_size=2, seq_len=8, lr=1e-2, nvme=folder, host_memory="64MiB", commit_every=1,
        options=RuntimeOptions(rest=Tier.NVME),
    )  # fmt: skip


def step(engine):
    engine.backward(engine(torch.ones(2, 8, 8)).square().mean())
    engine.step()


def interrupt(monkeypatch, kind, name):
    """Its first call: Ctrl-C comes when it is about to wait. Returns what has been."""
    work, calls = getattr(kind, name), []

    def interrupted(part, *arguments, **options):
        calls.append(part)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return work(part, *arguments, **options)

    monkeypatch.setattr(kind, name, interrupted)
    return calls


@pytest.mark.parametrize(("kind", "name"), CLOSINGS, ids=[kind.__name__ for kind, _ in CLOSINGS])
def test_an_engine_whose_end_is_interrupted_leaves_its_last_step_committed_and_its_files_free(
    kind, name, disk_folder, monkeypatch
):
    engine = made(disk_folder)
    step(engine)
    with monkeypatch.context() as now:
        calls = interrupt(now, kind, name)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
        assert calls
    assert not any("_apply" in vars(module) for module in engine.model.modules()), "no guard is left"
    with made(disk_folder) as other:  # while somebody holds the first one
        other.load_checkpoint(other.commit_folder)
        assert other.step_number == 1
        step(other)


def test_an_engine_whose_drive_hangs_keeps_its_files_and_says_so(disk_folder, monkeypatch):
    engine = made(disk_folder)
    runtime = engine._runtime
    with monkeypatch.context() as now:
        now.setattr(runtime.links.io, "close", lambda: (_ for _ in ()).throw(StorageTimeout("under way")))
        with pytest.raises(StorageTimeout, match="under way"):
            engine.close()
    with pytest.raises(StoreInUse):  # what is under way may still be written
        made(disk_folder)
    runtime.links.close()
    runtime.links.is_stuck = False
    runtime._close_files()
    made(disk_folder).close()


@pytest.mark.parametrize(
    ("kind", "name"), [(RuntimeAssembly, "_attach"), (Engine, "summary")], ids=["assembly", "engine"]
)
def test_an_engine_whose_making_is_interrupted_leaves_its_files_free(kind, name, disk_folder, monkeypatch):
    with monkeypatch.context() as now:
        interrupt(now, kind, name)
        closed = interrupt(now, Links, "close")
        with pytest.raises(KeyboardInterrupt) as raised:
            made(disk_folder)
        assert len(closed) == 2, "interrupted, too"
    with made(disk_folder) as engine:
        step(engine)
    assert raised.tb is not None, "which holds what there was of the first one"


def test_every_step_is_taken_once_more_where_it_was_interrupted_and_the_last_error_is_raised():
    taken = []

    def ends(name, *errors):
        left = list(errors)

        def close():
            taken.append(name)
            if left:
                raise left.pop(0)

        return close

    steps = [
        ends("a", KeyboardInterrupt()), ends("b", KeyboardInterrupt(), KeyboardInterrupt("again")),
        ends("c", OSError("one")), ends("d"),
    ]  # fmt: skip
    with pytest.raises(OSError, match="one") as raised:
        all_close(*steps)
    assert taken == ["a", "a", "b", "b", "c", "d"]
    assert str(raised.value.__context__) == "again"
