"""What one run committed to its log, another goes on from whose state rests elsewhere: to the bit, or a typed error."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import CheckpointError, StoreCorrupt, StoreInUse
from offload_rt.layers import discover
from offload_rt.optimizer import pieces as optimizer_pieces
from offload_rt.tensor_spec import layout_block
from offload_rt.wiring.runtime_options import RuntimeOptions
from tests import tiny_training
from tests.adapter_tiers import ON_NVME, STEPS, Case, Running, make_engine, run_plain, training_of, unequal
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, Trace, run_steps
from tests.test_adapter_tiers import ONE
from tests.tiny_training import Plain, differences, train

ELSEWHERE = ("memory", "in HOST", "on NVME, commits of every third")
"""The last cuts its state into other pieces, on another drive."""


def committed(case: Case, folder: Path, **arguments: Any) -> Path:
    """A folder with the commit of two steps."""
    folder.mkdir()
    with make_engine(case, folder, "on NVME", **arguments) as engine:
        Running(case, engine).steps(range(2))
        return engine.commit_folder


@pytest.mark.parametrize(
    ("optimizer", "place"),
    [
        ("default", "in HOST"), ("default", ELSEWHERE[2]), ("adamw 8bit", "memory"), ("sgd", "in HOST"),
        *[pytest.param(name, "memory", marks=pytest.mark.full) for name in ("default", "adafactor")],
        *[pytest.param(name, place, marks=pytest.mark.full) for name in ("lion", "adamw bf16") for place in ELSEWHERE],
    ],
)  # fmt: skip
def test_a_commit_of_adapters_goes_on_where_their_state_is_elsewhere(
    optimizer: str, place: str, tmp_path: Path
) -> None:
    case = Case("llama", "bf16", optimizer, 1, None, True, "")
    expected = run_plain(case)
    folder = committed(case, tmp_path / "one")
    (tmp_path / "other").mkdir()
    with make_engine(case, tmp_path / "other", place) as engine:
        running = Running(case, engine)
        running.steps(range(1))
        engine.load_checkpoint(folder)
        assert engine.step_number == 2
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []


def wide(folder: Path, piece_elements: int | None) -> Engine:
    """An engine for adapters whose largest parameters are cut into ranges; with None, their state is in memory."""
    folder.mkdir()
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(r=80, target_modules=["up_proj"]))
    options = {} if piece_elements is None else {"state": ON_NVME, "piece_elements": piece_elements}
    return Engine(
        model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=folder, lr=1e-2, options=RuntimeOptions(**options)
    )


@pytest.mark.parametrize("pieces", [4096, None])
def test_parameters_that_were_cut_are_cut_otherwise_or_put_together(pieces: int | None, tmp_path: Path) -> None:
    def steps(engine: Engine, numbers: range) -> list[Trace]:
        return run_steps(1, engine, engine.backward, engine.trainable, engine.step, numbers)

    with wide(tmp_path / "straight", None) as engine:
        expected = steps(engine, range(3))
    with wide(tmp_path / "begun", 8192) as engine:
        cut = {
            segment.end - segment.begin
            for block in training_of(engine).blocks
            for p in block.pieces
            for segment in p.segments
        }
        steps(engine, range(2))
        folder = engine.commit_folder
    assert max(parameter.numel() for parameter in engine.trainable.values()) > max(cut) == 8192
    with wide(tmp_path / "other", pieces) as engine:
        engine.load_checkpoint(folder)
        assert unequal(expected[2:], steps(engine, range(2, 3))) == []


def test_commits_of_adapters_in_memory_go_on_in_a_log_and_come_back(tmp_path: Path) -> None:
    expected = run_plain(ONE, steps=4)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with make_engine(ONE, tmp_path / "one", "memory", nvme=True, commit_every=1) as engine:
        Running(ONE, engine).steps(range(1))
        folder = engine.commit_folder
    with make_engine(ONE, tmp_path / "other", "on NVME") as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(folder)
        assert unequal(expected[1:2], running.steps(range(1, 2))) == []
        log = engine.commit_folder
    with make_engine(ONE, tmp_path / "one", "memory", nvme=True, commit_every=1) as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(log)
        assert unequal(expected[2:], running.steps(range(2, 4))) == []


def test_a_log_on_two_drives_is_found_on_both_or_said_to_be_half(tmp_path: Path) -> None:
    drives: Any = [tmp_path / "drives" / name for name in ("a", "b")]
    expected = run_plain(ONE)
    for drive in drives:
        drive.mkdir(parents=True)
    with make_engine(ONE, drives, "on NVME") as engine:
        assert {extent.drive for extent in training_of(engine).home.log.layout.extents} == {0, 1}  # type: ignore[union-attr]
        Running(ONE, engine).steps(range(2))
        folder = engine.commit_folder
    with make_engine(ONE, tmp_path, "memory") as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(folder)  # whose other part is where it was made
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []
    drives[1].rename(tmp_path / "moved")
    drives[1] = tmp_path / "moved"
    with make_engine(ONE, tmp_path, "memory") as engine:
        running = Running(ONE, engine)
        before = running.steps(range(1))
        with pytest.raises(CheckpointError, match="lies on 2 drives, of which 1 are here; give nvme= all of them"):
            engine.load_checkpoint(folder)
        assert unequal(expected, before + running.steps(range(1, STEPS))) == [], "nothing was changed"
    with make_engine(ONE, drives, "memory", nvme=True) as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(folder)
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []


def test_a_log_of_adapters_that_cannot_be_taken_over_changes_nothing(tmp_path: Path) -> None:
    expected = run_plain(ONE)
    lion, other, damaged = (replace(ONE, optimizer="lion"), replace(ONE, family="gpt2"), ONE)
    logs = {
        "was written by offload_rt.optim.Lion, this run has torch.*AdamW": committed(lion, tmp_path / "lion"),
        "trains other parameters than this run": committed(other, tmp_path / "gpt2"),
        "checksum": committed(damaged, tmp_path / "damaged"),
        "written by an earlier version": committed(ONE, tmp_path / "earlier"),
    }
    with open(logs["checksum"] / "state.bin", "r+b") as file:
        file.seek(-6000, 2)
        torch.randint(0, 256, (6000,), dtype=torch.uint8).numpy().tofile(file)
    (logs["written by an earlier version"] / "layout.json").unlink()
    with make_engine(ONE, tmp_path, "memory") as engine:
        running = Running(ONE, engine)
        before = running.steps(range(1))
        for why, folder in logs.items():
            with pytest.raises((CheckpointError, StoreCorrupt), match=why):
                engine.load_checkpoint(folder)
        assert unequal(expected, before + running.steps(range(1, STEPS))) == []


@pytest.mark.parametrize(
    "place", ["in place", pytest.param("from HOST", marks=pytest.mark.full), "BACKWARD, tight", "AFTER"]
)
def test_a_commit_of_all_parameters_goes_on_in_another_place(place: str, tmp_path: Path) -> None:
    twin = Plain(tiny_training.model(dropout=0.2))
    expected = train(twin, range(5))
    folder = log_of_two_steps(tmp_path / "before")
    (tmp_path / "after").mkdir()
    with tiny_training.engine(tiny_training.model(dropout=0.2), place, tmp_path / "after") as run:
        train(run, range(5, 6))
        run.load_checkpoint(folder)
        assert run.step_number == 2
        assert train(run, range(2, 5)) == expected[2:]
        assert differences(twin.state(), run.state()) == []


def log_of_two_steps(folder: Path, **arguments: Any) -> Path:
    """The commit folder of a run that trained all parameters."""
    folder.mkdir()
    with tiny_training.engine(tiny_training.model(dropout=0.2), "BACKWARD, split", folder, **arguments) as run:
        train(run, range(2))
        found: Path = run.commit_folder
    return found


def test_a_log_of_all_parameters_that_cannot_be_taken_over_changes_nothing(tmp_path: Path) -> None:
    twin = Plain(tiny_training.model(dropout=0.2))
    expected = train(twin, range(3))
    sgd = log_of_two_steps(tmp_path / "sgd", optimizer=torch.optim.SGD, lr=1e-3)
    (tmp_path / "used").mkdir()
    with (
        tiny_training.engine(tiny_training.model(dropout=0.2), "in place", tmp_path) as run,
        tiny_training.engine(tiny_training.model(dropout=0.2), "BACKWARD", tmp_path / "used") as user,
    ):
        losses = train(run, range(1))
        with pytest.raises(
            CheckpointError, match="was written by torch.optim.sgd.SGD, this run has AdamW moments=float"
        ):
            run.load_checkpoint(sgd)
        with pytest.raises(StoreInUse):
            run.load_checkpoint(user.commit_folder)
        empty = user.commit_folder
        user.close()
        with pytest.raises(CheckpointError, match="no step has been committed"):
            run.load_checkpoint(empty)
        assert losses + train(run, range(1, 3)) == expected
        assert differences(twin.state(), run.state()) == []


def goes_on(folder: Path) -> tiny_training.Made:
    """An engine whose state and weights rest in the log that an earlier version may have left in `folder`."""
    return tiny_training.engine(tiny_training.model(dropout=0.2), "BACKWARD", folder)


def two_steps_of_an_earlier_version(folder: Path) -> list[int]:
    """Trains all parameters, commits and saves; returns `offsets_of`."""
    with goes_on(folder) as run:
        train(run, range(2))
        run.save_checkpoint(folder / "saved")
        return offsets_of(run)


def offsets_of(run: Engine) -> list[int]:
    """Where the tensors of a layer lie."""
    return [tensor.offset_bytes for tensor in run._runtime.made_of.workload.draft("layers.0").spec.tensors]


def test_weights_that_lie_otherwise_in_a_log_are_made_anew_of_masters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Plain(tiny_training.model(dropout=0.2))
    expected = train(twin, range(4))
    with monkeypatch.context() as earlier:
        earlier.setattr(discover, "layout_block", partial(layout_block, alignment_bytes=512))
        before = two_steps_of_an_earlier_version(tmp_path)
    with goes_on(tmp_path) as run:
        assert offsets_of(run) != before
        run.load_checkpoint(run.commit_folder)
        assert train(run, range(2, 4)) == expected[2:]
        assert differences(twin.state(), run.state()) == []


def test_state_that_lies_otherwise_is_refused_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Plain(tiny_training.model(dropout=0.2))
    expected = train(twin, range(2))
    with monkeypatch.context() as earlier:
        earlier.setattr(optimizer_pieces, "STATE_ALIGNMENT_BYTES", 256)
        two_steps_of_an_earlier_version(tmp_path)
    with pytest.raises(CheckpointError, match="holds the state of .* parameters otherwise than this run"):
        goes_on(tmp_path)
    (tmp_path / "other").mkdir()
    with goes_on(tmp_path / "other") as run:
        losses = train(run, range(1))
        with pytest.raises(CheckpointError, match="holds the state of .* parameters otherwise than this run"):
            run.load_checkpoint(tmp_path / "saved")
        assert losses + train(run, range(1, 2)) == expected, "nothing was changed"


def test_a_log_with_weights_of_other_lengths_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(discover, "layout_block", partial(layout_block, alignment_bytes=4096))
        two_steps_of_an_earlier_version(tmp_path)
    with pytest.raises(CheckpointError, match="holds other extents than this run, first: weights/layers.0"):
        goes_on(tmp_path)
