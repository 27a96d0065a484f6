"""The cuts of a plan are noted in what is saved: whoever goes on with others is told, whoever has the same is not."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import CheckpointError
from offload_rt.plans.cuts import cuts_of, warn_of_other_cuts
from offload_rt.running.rehearsal import _by_the_rule
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import StatePlacement, Tier
from planners.rule.streaming_problem import Cuts
from tests.conftest import build_base, build_lora, language_batch

IN_TIERS = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2)


def engine(kind: str, folder: Path, options: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    model = build_lora("llama") if "adapters" in kind else build_base("llama", torch.float32).requires_grad_(True)
    if kind == "adapters in tiers":
        options = {**options, "state": IN_TIERS}
    folder.mkdir(exist_ok=True)
    return Engine(model.train(), batch_size=2, seq_len=8, nvme=folder, lr=1e-2, options=RuntimeOptions(**options))


@pytest.mark.parametrize("kind", ["adapters", "adapters in tiers", "all"])
def test_a_checkpoint_and_a_commit_made_with_other_cuts_say_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiled = {"head_chunk_tokens": 4}
    with engine(kind, tmp_path / "one", tiled) as run:
        run.backward(run(**language_batch(0, 2, 8)).loss)
        run.step()
        run.save_checkpoint(tmp_path / "saved")
        folders = [tmp_path / "saved"]
        if kind != "adapters":
            run.save_checkpoint(run.commit_folder)
            folders.append(run.commit_folder)
    caplog.set_level(logging.WARNING, logger="offload_rt")
    for number, (options, warns) in enumerate([(tiled, False), ({}, True)]):
        for folder in folders[: 1 if kind == "all" else 2]:
            with engine(kind, tmp_path / f"other {number}", options) as run:
                caplog.clear()
                run.load_checkpoint(folder)
                assert (
                    "the loss by 4 tokens, layers at once) than this plan has (the loss at once" in caplog.text
                ) == warns
                assert ("other cuts" in caplog.text) == warns and run.step_number == 1


def test_a_run_that_goes_on_keeps_its_cuts_where_a_rehearsal_plans_again_or_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that was measured to take a hundred times as much would be cut into tiles."""
    torch.manual_seed(0)
    with Engine(build_lora("llama").train(), batch_size=2, seq_len=64, nvme=tmp_path, lr=1e-2) as run:
        runtime, made_of = run._runtime, run._runtime.made_of
        head, plan_again = made_of.problem.loss_head, made_of.plan_again
        assert head is not None and plan_again is not None
        problem = replace(made_of.problem, loss_head=replace(head, bytes_per_token=100 * head.bytes_per_token))
        free = plan_again(problem)
        assert _by_the_rule(runtime, problem, plan_again) == (problem, free), "a run that begins has none to keep"
        assert cuts_of(free, made_of.workload) != runtime.cuts
        run.backward(run(**language_batch(0, 2, 64)).loss)
        run.step()
        asked, kept = _by_the_rule(runtime, problem, plan_again)
        assert cuts_of(kept, made_of.workload) == asked.cuts == runtime.cuts and "other cuts" not in caplog.text
        less = replace(problem, device_capacity_bytes=free.predicted_bytes(Tier.DEVICE))
        asked, other = _by_the_rule(runtime, less, plan_again)
        assert cuts_of(other, made_of.workload) == cuts_of(free, made_of.workload) and asked == less
        assert "step 1: was made with other cuts" in caplog.text


def test_what_are_no_cuts_is_a_bad_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    cuts = Cuts(head_chunk_tokens=None, chunk_tokens=None, layer_major=None)
    warn_of_other_cuts(None, cuts, of="an older one")
    assert caplog.text == ""
    with pytest.raises(CheckpointError, match="a folder: cuts have"):
        warn_of_other_cuts({"chunks": 3}, cuts, of="a folder")
