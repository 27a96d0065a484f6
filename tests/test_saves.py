"""What is saved of full fine-tuning outside its steps: whole steps, and a commit without a copy where that serves."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.full_parity import Case, make_engine, one_loss, state_of, training_of


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
        assert training_of(engine)._ahead
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
