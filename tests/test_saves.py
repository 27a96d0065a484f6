"""What is saved of full fine-tuning outside its steps: whole steps, and a commit without a copy where that serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload_rt.errors import CheckpointError, CheckpointVerifyError, ConfigError, OffloadError, StoreCorrupt
from offload_rt.optimizer.by_name import export_state
from tests.conftest import flip
from tests.full_parity import Case, make_engine, one_loss, state_of, training_of
from tests.tiny_training import adamw_of_groups, batch, differences, engine, model, train


def test_a_checkpoint_between_backward_and_step_holds_the_last_whole_step(tmp_path: Path) -> None:
    case = Case("llama", "float32", "adamw", 1, "rarely", False, "on NVME")
    (tmp_path / "drive").mkdir()
    (tmp_path / "other").mkdir()
    with make_engine(case, tmp_path / "drive") as engine:
        for step in range(2):
            engine.backward(one_loss(engine, step, 0))
            engine.step()
        before = state_of(training_of(engine))
        engine.backward(one_loss(engine, 3, 0))
        assert training_of(engine).ahead.blocks
        engine.save_checkpoint(tmp_path / "copy")
        names = sorted(path.name for path in engine.commit_folder.iterdir())
        engine.save_checkpoint(engine.commit_folder)
        assert sorted(path.name for path in engine.commit_folder.iterdir()) == names
        assert engine.committed is not None and engine.committed["step"] == 2
        assert engine.report()["training"]["waits_because"] == "state was saved between backward and step"
    with make_engine(case, tmp_path / "other") as engine:
        engine.load_checkpoint(tmp_path / "copy")
        after = state_of(training_of(engine))
    assert all(torch.equal(before[name][i], after[name][i]) for name in before for i in (0, 1))
    with make_engine(case, tmp_path / "drive") as engine:
        assert engine.committed is not None and engine.committed["step"] == 2
        engine.load_checkpoint(engine.commit_folder)
        after = state_of(training_of(engine))
    assert all(torch.equal(before[name][i], after[name][i]) for name in before for i in (0, 1))


def test_without_commits_there_is_nothing_committed(tmp_path: Path) -> None:
    with make_engine(Case("qwen", "float32", "adamw", 1, "not", False, "in place"), tmp_path) as engine:
        assert engine.committed is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw 8bit", "adafactor", "sgd"])
def test_a_checkpoint_becomes_safetensors_by_parameter_name(optimizer: str, tmp_path: Path) -> None:
    with make_engine(Case("llama", "bfloat16", optimizer, 1, "not", False, "on NVME"), tmp_path) as engine:
        for step in range(2):
            engine.backward(one_loss(engine, step, 0))
            engine.step()
        training = training_of(engine)
        assert any(len(block.pieces) > 1 for block in training.blocks)
        expected = state_of(training)
        engine.save_checkpoint(tmp_path / "saved")
    export_state(tmp_path / "saved", tmp_path / "out")
    found = {path.stem: load_file(path) for path in (tmp_path / "out").iterdir()}
    assert set(found["master"]) == set(expected)
    for name, (master, weight) in expected.items():
        assert torch.equal(found["master"][name], master) and torch.equal(master.to(weight.dtype), weight)
    moments = {
        "adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "adafactor": {"row_var", "col_var", "variance"},
        "adamw 8bit": {f"{name}.{part}" for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "absmax")},
    }  # fmt: skip
    assert set(found) == {"master"} | moments[optimizer]
    if optimizer in ("adamw", "sgd"):
        for state in moments[optimizer]:
            assert all(found[state][name].shape == master.shape for name, (master, _) in expected.items())
            assert all(bool(tensor.any()) for tensor in found[state].values())


def test_what_is_no_checkpoint_or_was_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint of full fine-tuning"):
        export_state(tmp_path, tmp_path / "out")
    with make_engine(Case("llama", "float32", "adamw", 1, "not", False, "in place"), tmp_path) as engine:
        engine.save_checkpoint(tmp_path / "saved")
    with pytest.raises(ConfigError, match="exists"):
        export_state(tmp_path / "saved", tmp_path)
    flip(tmp_path / "saved/state.bin", 5000)
    with pytest.raises(CheckpointVerifyError, match="has checksum"):
        export_state(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_could_not_read_all_of_its_commit_refuses_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rests in memory may be the commit's in part, or what a drive has made of it."""
    with engine(model(), "SPECULATIVE, split", tmp_path) as run:
        train(run, range(2))
        run.save_checkpoint(run.commit_folder)
        expected, io = run.state(), run._runtime.links.io
        start = io.start

        def flips(kind, file, offset_bytes, buffer):  # type: ignore[no-untyped-def]
            waiting = start(kind, file, offset_bytes, buffer)

            def wait(timeout_seconds: float) -> None:
                waiting(timeout_seconds)
                if kind == "read":
                    buffer[0] ^= 64

            return wait

        with monkeypatch.context() as patched:
            patched.setattr(io, "start", flips)
            with pytest.raises(StoreCorrupt, match="checksum"):
                run.load_checkpoint(run.commit_folder)
        for goes_on in (lambda: run(**batch(2)), lambda: run.save_checkpoint(run.commit_folder)):
            with pytest.raises(OffloadError, match="loading .* failed; go on from the last commit"):
                goes_on()
        run.load_checkpoint(run.commit_folder)
        assert differences(expected, run.state()) == []


def test_a_checkpoint_of_other_groups_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    place = "SPECULATIVE, split"
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with engine(model(), place, tmp_path / "one") as run:
        train(run, range(1))
        run.save_checkpoint(tmp_path / "saved")
    with engine(model(), place, tmp_path / "other", optimizer=adamw_of_groups) as run:
        train(run, range(1))
        with pytest.raises(ConfigError, match="groups are not those of this run"):
            run.load_checkpoint(tmp_path / "saved")
        train(run, range(1, 2))
        assert run.step_number == 2
