"""Saving and resuming: exact, whole or not at all, and never a checkpoint that cannot be read again."""

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from offload_rt.checkpoint import state as state_module
from offload_rt.checkpoint import whole_folder
from offload_rt.checkpoint.state import FolderCommits, load_state, save_state
from offload_rt.checkpoint.values import restore_rng, rng_state
from offload_rt.errors import (
    CheckpointError,
    CheckpointVerifyError,
    ConfigError,
    OffloadError,
    StorageError,
    StorageFull,
)
from tests.conftest import EngineMaker, build_lora, build_plain, language_batch
from tests.durable import Durable
from tests.saved_state import is_complete

ROOT = Path(__file__).resolve().parents[1]
FILES = ["trainable.safetensors", "optimizer.safetensors", "state.pt"]


def some_training(steps=2, dtype=torch.float32, optimizer=torch.optim.AdamW, seed=0):
    torch.manual_seed(seed)
    trainable = {name: torch.nn.Parameter(torch.randn(5, 3).to(dtype)) for name in ("a.lora_A", "b.lora_B")}
    built = optimizer(list(trainable.values()))
    for step in range(steps):
        train(trainable, built, step)
    return trainable, built


def train(trainable, optimizer, step):
    for index, parameter in enumerate(trainable.values()):
        parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) + index)
    optimizer.step()


def extra(step=2):
    return {"step": step, "tracked": {}}


def values(trainable):
    return {name: p.detach().clone() for name, p in trainable.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    trainable, optimizer = some_training()
    save_state(tmp_path / "c", trainable, optimizer, extra())
    return tmp_path / "c"


def test_what_is_saved_loads_into_a_fresh_run_and_goes_on_exactly(saved):
    old, old_optimizer = some_training()
    new, new_optimizer = some_training(steps=0, seed=9)
    assert load_state(saved, new, new_optimizer) == extra()
    assert equal(values(new), values(old))
    for step in (2, 3):
        train(old, old_optimizer, step)
        train(new, new_optimizer, step)
    assert equal(values(new), values(old))
    assert names_in(saved) == sorted([*FILES, "COMPLETE"])
    assert is_complete(saved)


def make_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class FloatMoments(torch.optim.Optimizer):
    """Keeps an fp32 average of bf16 parameters' gradients, as mixed-precision optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p, dtype=torch.float32))
                average.mul_(0.9).add_(p.grad.float() * 0.1234567)
                p.add_(-group["lr"] * average.to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, make_sgd, FloatMoments, torch.optim.Adagrad])
def test_every_optimizers_state_comes_back_bit_for_bit(tmp_path, optimizer, dtype):
    old, old_optimizer = some_training(dtype=dtype, optimizer=optimizer)
    save_state(tmp_path / "c", old, old_optimizer, extra())
    new, new_optimizer = some_training(steps=0, dtype=dtype, optimizer=optimizer, seed=9)
    load_state(tmp_path / "c", new, new_optimizer)
    for name in old:
        before, after = old_optimizer.state[old[name]], new_optimizer.state[new[name]]
        assert before.keys() == after.keys()
        for key in before:
            if isinstance(before[key], torch.Tensor):
                assert before[key].dtype == after[key].dtype, key
                assert torch.equal(before[key], after[key]), key


def test_an_optimizer_that_has_not_stepped_and_groups_with_their_own_rates(tmp_path):
    trainable, _ = some_training(steps=0)
    first, second = trainable.values()
    groups = [{"params": [second], "lr": 0.5}, {"params": [first], "lr": 0.25}]
    optimizer = torch.optim.AdamW(groups)
    save_state(tmp_path / "c", trainable, optimizer, extra())
    optimizer.param_groups[0]["lr"] = 9.0
    load_state(tmp_path / "c", trainable, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_all_random_numbers_go_on_where_they_were(saved):
    trainable, optimizer = some_training()
    save_state(saved, trainable, optimizer, extra())
    expected = (torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    load_state(saved, trainable, optimizer)
    found = (torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn())
    assert torch.equal(expected[0], found[0]) and expected[1:] == found[1:]


def test_saving_over_an_old_one_replaces_it(saved):
    trainable, optimizer = some_training(steps=4)
    save_state(saved, trainable, optimizer, extra(4))
    new, new_optimizer = some_training(steps=0)
    assert load_state(saved, new, new_optimizer)["step"] == 4
    assert equal(values(new), values(trainable))
    assert names_in(saved.parent) == ["c"]


def test_a_save_takes_away_nothing_but_a_checkpoint(saved):
    trainable, optimizer = some_training(steps=4)
    (saved / "adapter_config.json").write_text("mine")
    (saved / "link").symlink_to("nowhere")
    save_state(saved, trainable, optimizer, extra(4))
    assert names_in(saved) == sorted([*FILES, "COMPLETE", "adapter_config.json", "link"])
    assert (saved / "adapter_config.json").read_text() == "mine" and is_complete(saved)
    model = saved.parent / "model"
    (model / "shards").mkdir(parents=True)
    with pytest.raises(ConfigError, match="model holds a folder, shards"):
        save_state(model, trainable, optimizer, extra(4))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        save_state(saved / "notes.txt", trainable, optimizer, extra(4))
    assert names_in(model) == ["shards"] and names_in(saved.parent) == ["c", "model"]
    log = saved.parent / "log"
    log.mkdir()
    (log / "log.json").write_text("mine")
    with pytest.raises(ConfigError, match="holds the commit log of a run"):  # `load_checkpoint` would read the log
        save_state(log, trainable, optimizer, extra(4))
    assert names_in(log) == ["log.json"]


def test_what_came_during_a_save_stays_and_so_does_what_a_killed_one_had_moved(saved, monkeypatch):
    trainable, optimizer = some_training(steps=4)
    (saved / "notes").write_text("mine")
    saved.rename(saved.with_name(".c.old-999999"))  # killed between two names, where they cannot be exchanged
    write = state_module._write

    def meanwhile(*arguments):
        (saved / "events").write_text("mine")
        write(*arguments)

    monkeypatch.setattr(state_module, "_write", meanwhile)
    save_state(saved, trainable, optimizer, extra(4))
    assert names_in(saved) == sorted([*FILES, "COMPLETE", "events", "notes"]) and names_in(saved.parent) == ["c"]


def test_a_save_through_a_link_replaces_what_it_leads_to(saved, tmp_path):
    """`adapter -> /other-drive/adapter`: the name stays a link, and nothing is moved from one drive to the other."""
    trainable, optimizer = some_training(steps=4)
    (saved / "notes").write_text("mine")
    for link, folder in (("there", saved), ("not yet", tmp_path / "d" / "new")):
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / link).symlink_to(folder)
        save_state(tmp_path / "links" / link, trainable, optimizer, extra(4))
        assert (tmp_path / "links" / link).is_symlink() and is_complete(folder)
        assert load_state(folder, *some_training(steps=0))["step"] == 4
    assert names_in(tmp_path / "links") == ["not yet", "there"] and names_in(tmp_path) == ["c", "d", "links"]
    assert (saved / "notes").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_files_of_others_stay_where_there_are_no_hard_links(saved, monkeypatch, code):
    """exFAT and some network drives have none; for files of other users the kernel may refuse them."""
    refused = []

    def link(*arguments, **options):
        refused.append(arguments)
        raise OSError(code, os.strerror(code))

    trainable, optimizer = some_training(steps=4)
    (saved / "notes").write_text("mine")
    (saved / "nowhere").symlink_to("nothing")
    monkeypatch.setattr(os, "link", link)
    save_state(saved, trainable, optimizer, extra(4))
    assert len(refused) == 2 and (saved / "notes").read_text() == "mine" and os.readlink(saved / "nowhere") == "nothing"
    assert load_state(saved, *some_training(steps=0))["step"] == 4 and names_in(saved.parent) == ["c"]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours runs after it."""


SYSTEM_CALLS = ["mkdir", "rename", "replace", "fsync", "rmdir", "unlink"]


def count_calls(save, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        for name in SYSTEM_CALLS:
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
        save()
    return len(calls)


def test_killed_anywhere_in_a_save_a_whole_checkpoint_is_under_its_name(tmp_path, monkeypatch):
    """A save is cut off before each system call that changes a folder: what loads is the old one or the new one."""
    old, old_optimizer = some_training(steps=2)
    new, new_optimizer = some_training(steps=4)
    folder = tmp_path / "c"
    save_state(folder, old, old_optimizer, extra(2))
    total = count_calls(lambda: save_state(folder, new, new_optimizer, extra(4)), monkeypatch)
    assert total > 4
    outcomes = []
    for cut in range(total):
        folder = tmp_path / str(cut) / "c"
        save_state(folder, old, old_optimizer, extra(2))
        left = [cut]

        def dying(*arguments, real, left=left, **keywords):
            if left[0] < 0:
                raise Killed  # what runs after the kill changes nothing
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            for name in SYSTEM_CALLS:
                patch.setattr(os, name, partial(dying, real=getattr(os, name)))
            with contextlib.suppress(Killed):
                save_state(folder, new, new_optimizer, extra(4))
        here, here_optimizer = some_training(steps=0)
        try:
            outcomes.append(load_state(folder, here, here_optimizer)["step"])
        except OffloadError as error:
            outcomes.append(f"cut at {cut}: {error}")
    assert set(outcomes) <= {2, 4}, [o for o in outcomes if isinstance(o, str)]
    assert outcomes == sorted(outcomes)


@pytest.mark.parametrize("place", ["first", "again", "names that cannot be exchanged"])
def test_a_checkpoint_is_on_the_drive_before_it_gets_its_name_and_that_is_when_a_save_returns(
    place, tmp_path, monkeypatch
):
    folder = tmp_path / "run" / "new" / "c"
    if place != "first":
        save_state(folder, *some_training(steps=2), extra(2))
    durable = Durable(monkeypatch)
    found = durable.at_rename(monkeypatch)
    if place != "again":
        monkeypatch.setattr(whole_folder, "_exchange", lambda one, other: False)
    save_state(folder, *some_training(steps=4), extra(4))
    assert found == [[]]
    assert durable.has_name(folder)
    if place == "first":
        assert [durable.has_name(each) for each in (folder.parent, folder.parent.parent)] == [True, True]


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_save_that_was_interrupted_does_not_stop_the_next_one(tmp_path, monkeypatch, cut):
    """Ctrl-C near the end of a save, and the same process saves again."""
    trainable, optimizer = some_training()
    for _ in range(3):
        save_state(tmp_path / "c", trainable, optimizer, extra())
        calls = []

        def interrupted(*arguments, real, calls=calls):
            calls.append(arguments)
            if len(calls) == cut:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "rename", partial(interrupted, real=os.rename))
            patch.setattr(whole_folder, "sync_folder", partial(interrupted, real=whole_folder.sync_folder))
            save_state(tmp_path / "c", trainable, optimizer, extra())


def test_the_next_save_takes_away_what_a_killed_one_left(tmp_path):
    trainable, optimizer = some_training()
    left = tmp_path / ".c.partial-999999"
    left.mkdir()
    (left / "state.pt").write_bytes(b"x")
    save_state(tmp_path / "c", trainable, optimizer, extra())
    assert names_in(tmp_path) == ["c"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damage_to_any_file_is_found_and_changes_nothing(saved, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    trainable, optimizer = some_training(steps=1, seed=5)
    before, rng = values(trainable), torch.get_rng_state()
    with pytest.raises((CheckpointVerifyError, CheckpointError), match=name.split(".")[0]):
        load_state(saved, trainable, optimizer)
    assert equal(values(trainable), before) and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", "5", '{"state.pt": 5}', '{"trainable.safetensors": {}}'])
def test_a_folder_without_a_good_marker_is_incomplete(saved, text):
    if text is None:
        (saved / "COMPLETE").unlink()
    else:
        (saved / "COMPLETE").write_text(text)
    trainable, optimizer = some_training()
    assert not is_complete(saved)
    with pytest.raises((CheckpointError, CheckpointVerifyError)):
        load_state(saved, trainable, optimizer)


def test_no_folder_is_named(tmp_path):
    trainable, optimizer = some_training()
    with pytest.raises(CheckpointError, match="nowhere"):
        load_state(tmp_path / "nowhere", trainable, optimizer)


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "groups"])
def test_what_does_not_fit_this_run_changes_nothing(saved, change):
    trainable, optimizer = some_training(steps=1, seed=5)
    if change == "groups":
        optimizer = torch.optim.AdamW([{"params": [p]} for p in trainable.values()])
    else:
        trainable = {
            "c.lora_A" if change == "name" and name == "a.lora_A" else name: torch.nn.Parameter(
                torch.zeros(3, 5)
                if change == "shape"
                else p.detach().clone().to(torch.bfloat16 if change == "dtype" else torch.float32)
            )
            for name, p in trainable.items()
        }
        optimizer = torch.optim.AdamW(list(trainable.values()))
    before, rng = values(trainable), torch.get_rng_state()
    with pytest.raises(CheckpointError):
        load_state(saved, trainable, optimizer)
    assert equal(values(trainable), before), "the parameters were changed all the same"
    assert torch.equal(torch.get_rng_state(), rng)


def test_too_little_space_is_found_before_the_first_byte(saved, monkeypatch):
    import shutil

    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    trainable, optimizer = some_training(steps=4)
    with pytest.raises(StorageFull, match="are free"):
        save_state(saved, trainable, optimizer, extra(4))
    monkeypatch.undo()
    assert load_state(saved, trainable, optimizer)["step"] == 2
    assert names_in(saved.parent) == ["c"]


LIMITED = """
import resource, signal, sys, torch
from functools import partial
from pathlib import Path
from offload_rt.checkpoint.state import save_state
from offload_rt.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
p = {"a": torch.nn.Parameter(torch.zeros(int(sys.argv[2])))}
extra = {"step": 4, "tracked": {"t": torch.zeros(int(sys.argv[3]))}}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(Path(sys.argv[1]), p, torch.optim.AdamW(p.values()), extra)
except StorageError as error:
    print("typed", error.errno)
"""


@pytest.mark.parametrize("sizes", [(100_000, 1), pytest.param((1, 100_000), marks=pytest.mark.full)])
def test_a_drive_that_is_full_in_the_middle_is_typed_and_leaves_the_old_one(saved, sizes):
    """A limit on file sizes stands for the full drive: it fails in the middle of a write."""
    command = [sys.executable, "-c", LIMITED, str(saved), *map(str, sizes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    trainable, optimizer = some_training()
    assert load_state(saved, trainable, optimizer)["step"] == 2
    assert names_in(saved.parent) == ["c"], "a half-written checkpoint was left"
    assert done.stdout.startswith("typed"), done.stderr[-300:]


def test_a_write_error_is_typed(saved, monkeypatch):
    def broken(path, content):
        raise StorageError("gone", path=str(path), errno=errno.EIO)

    monkeypatch.setattr(state_module, "write_atomically", broken)
    trainable, optimizer = some_training()
    with pytest.raises(StorageError):
        save_state(saved, trainable, optimizer, extra(9))
    monkeypatch.undo()
    assert load_state(saved, trainable, optimizer)["step"] == 2
    assert names_in(saved.parent) == ["c"]


class Tracked:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.mark.parametrize(
    "value", [np.float64(1.5), Path("/x"), np.arange(3), {1, 2}, torch.float32, Tracked(1), lambda: 0]
)
def test_what_could_not_be_read_again_is_refused_when_it_is_saved_and_not_when_it_is_needed(
    make_engine, tmp_path, value
):
    engine = make_engine(build_plain())
    tracked = Tracked(value)
    engine.track("thing", tracked)
    try:
        engine.save_checkpoint(tmp_path / "c")
    except OffloadError:
        assert not is_complete(tmp_path / "c")
        return
    engine.load_checkpoint(tmp_path / "c")
    assert str(tracked.value) == str(value)


def run(make_engine, folder, *, save_at=None, load=None, steps=5, at_end=lambda engine: None, **arguments):
    """Losses of each step and the parameters at the end; dropout and a schedule make every step depend on the past."""
    engine = make_engine(build_lora(dropout=0.3), bits=4, nvme=folder, max_grad_norm=1.0, **arguments)
    scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 1.0 / (1 + step))
    engine.track("scheduler", scheduler)
    torch.manual_seed(42)
    if load is not None:
        engine.load_checkpoint(load)
    losses = []
    while engine.step_number < steps:
        ids = torch.randint(3, 64, (2, 12))  # the data come from the generator too
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        scheduler.step()
        losses.append(loss.item())
        if engine.step_number == save_at:
            engine.save_checkpoint(folder / "checkpoint")
    at_end(engine)
    result = losses, {name: p.detach().clone() for name, p in engine.trainable.items()}
    engine.close()
    return result


def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(make_engine, disk_folder):
    losses, parameters = run(make_engine, disk_folder, save_at=2)
    resumed_losses, resumed = run(make_engine, disk_folder, load=disk_folder / "checkpoint")
    assert resumed_losses == losses[2:]
    assert equal(resumed, parameters)


def test_gradients_of_a_step_that_was_broken_off_are_not_in_the_first_one_behind_what_is_loaded(make_engine, tmp_path):
    def run(engine, *, breaks_off):
        for number in range(4):
            if breaks_off and number == 2:  # in the middle of a step
                engine.backward(engine(torch.ones(1, 5, 8)).square().mean())
                engine.load_checkpoint(tmp_path / "saved")
            for part in range(2):
                engine.backward(engine(torch.full((1, 5, 8), 0.1 * number + part)).square().mean())
            engine.step()
            if number == 1:
                engine.save_checkpoint(tmp_path / "saved")
        return [parameter.detach().clone() for parameter in engine.trainable.values()]

    one, other = (make_engine(build_plain(), accumulation_steps=2) for _ in range(2))
    assert all(map(torch.equal, run(one, breaks_off=False), run(other, breaks_off=True)))


def test_commits_are_written_beside_the_store_as_often_as_asked(make_engine, disk_folder):
    engine = make_engine(build_lora(dropout=0.0), nvme=disk_folder, commit_every=2)
    for step in range(3):
        engine.backward(engine(**language_batch(step)).loss)
        assert is_complete(engine.commit_folder) is (step >= 2)  # made by the forward
        engine.step()
    committed = engine.commit_folder
    engine.load_checkpoint(committed)
    assert engine.step_number == 2


def evaluate(engine):
    with torch.no_grad():
        engine(**language_batch(9))
    assert is_complete(engine.commit_folder)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    maker = EngineMaker()
    try:
        return run(maker, tmp_path_factory.mktemp("six"), steps=6)
    finally:
        maker.close()


def save_beside(engine):
    engine.save_checkpoint(engine.commit_folder.with_name("beside"))


@pytest.mark.parametrize(
    "steps, at_end",
    [
        (4, lambda engine: None),
        (4, evaluate),
        (4, save_beside),
        (5, lambda engine: None),  # the fifth forward makes it, whatever comes behind
        pytest.param(5, evaluate, marks=pytest.mark.full),
        pytest.param(5, save_beside, marks=pytest.mark.full),
    ],
)
def test_a_commit_has_the_scheduler_that_was_stepped_after_its_step(make_engine, disk_folder, six_steps, at_end, steps):
    losses, parameters = six_steps
    run(make_engine, disk_folder, steps=steps, commit_every=4, at_end=at_end)
    (commit,) = disk_folder.glob("*/commit")
    resumed_losses, resumed = run(make_engine, disk_folder, steps=6, load=commit)
    assert resumed_losses == losses[4:]
    assert equal(resumed, parameters)


def test_a_commit_has_what_was_tracked_and_the_random_numbers_as_they_were_when_its_step_returned(tmp_path):
    trainable, optimizer = some_training()
    position, drawn = {"number": 1}, torch.get_rng_state()
    commits = FolderCommits(
        trainable, optimizer, lambda: {"step": 1, "tracked": {"position": position}}, lambda values: values,
        every=1, folder=tmp_path / "commit",
    )  # fmt: skip
    commits.step_taken(1)
    position["number"] = 2  # the next batch is drawn before the next forward makes the commit
    torch.rand(1)
    commits.finish()
    found = load_state(tmp_path / "commit", *some_training(steps=0))
    assert found["tracked"] == {"position": {"number": 1}}
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_commit_that_cannot_be_made_is_told_by_the_forward_and_made_by_the_next(
    make_engine, disk_folder, monkeypatch
):
    engine = make_engine(build_lora(dropout=0.0), nvme=disk_folder, commit_every=1)
    engine.backward(engine(**language_batch(0)).loss)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_state", lambda *a: (_ for _ in ()).throw(StorageFull("full", path="x")))
        with pytest.raises(StorageFull):
            engine(**language_batch(1))
    engine(**language_batch(1))
    assert is_complete(engine.commit_folder)


def test_a_checkpoint_that_tracks_other_things_changes_nothing(make_engine, tmp_path):
    first = make_engine(build_plain())
    first.save_checkpoint(tmp_path / "c")
    engine = make_engine(build_plain(seed=3))
    with torch.no_grad():
        for parameter in engine.trainable.values():
            parameter.add_(1.0)
    engine.track("scheduler", Tracked(1))
    before = {name: p.detach().clone() for name, p in engine.trainable.items()}
    with pytest.raises(ConfigError, match="scheduler"):
        engine.load_checkpoint(tmp_path / "c")
    assert equal({name: p.detach() for name, p in engine.trainable.items()}, before)


def test_the_marker_holds_sizes_and_checksums(saved):
    marker = json.loads((saved / "COMPLETE").read_text())
    assert sorted(marker) == sorted(FILES)
    assert all(marker[name]["bytes"] == (saved / name).stat().st_size for name in FILES)


def test_random_numbers_of_gpus_go_on_where_there_are_as_many_or_fewer(monkeypatch, caplog):
    set_now = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: set_now.update({index: state}))
    for written, found, lost in ((1, [0], ""), (3, [0, 1], "of 1 GPUs do not go on")):
        set_now.clear()
        caplog.clear()
        restore_rng({**rng_state(), "cuda": [torch.tensor([number]) for number in range(written)]})
        assert [int(set_now[index]) for index in set_now] == found
        assert (lost in caplog.text) if lost else not caplog.text
