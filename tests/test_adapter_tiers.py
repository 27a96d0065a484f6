"""Adapters whose optimizer state rests in HOST or on NVMe train as with torch's own optimizer in memory, to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload_rt.errors import ConfigError
from tests.adapter_tiers import (
    OPTIMIZERS,
    PLACES,
    STEPS,
    Case,
    Running,
    all_cases,
    make_engine,
    pairwise_cases,
    run_plain,
    training_of,
    unequal,
)

SELECTED = pairwise_cases()
ONE = Case("llama", "nf4", "default", 1, 0.05, False, "on NVME")


def check(case: Case, folder: Path) -> None:
    expected = run_plain(case)
    with make_engine(case, folder) as engine:
        assert unequal(expected, Running(case, engine).steps(range(STEPS))) == []
        training, report = training_of(engine), engine.report()["training"]
        (block,) = training.blocks
        assert report["num_pieces"] == STEPS * len(block.pieces)
        assert len(block.pieces) < len(block.parameters), "small parameters share pieces"
        if "HOST" in case.place:
            assert report["state_in_memory_bytes"] == report["state_bytes"]
            assert report["num_read_ahead"] == report["num_read_on_demand"] == 0
        else:
            assert report["state_in_memory_bytes"] == 0
            on_demand = report["num_read_on_demand"]
            assert report["num_read_ahead"] == report["num_pieces"] - on_demand > 0
            assert on_demand == 0 or case.place == "stress", "one slot is being written when the next piece is wanted"
            assert engine.report()["bytes_written"] >= STEPS * report["state_bytes"]
        recorder = engine._runtime.recorder
        assert recorder is None or [str(race) for race in recorder.check()] == []
    every = {"in HOST": 0, "in HOST, committed": 2, "on NVME, commits of every third": 3}.get(case.place, 1)
    first = 1 if PLACES[case.place].get("nvme") else 0
    assert engine.report()["training"]["num_commits"] == first + (STEPS // every if every else 0)


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_tiered_adapters_are_bit_equal_to_adapters_in_memory(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in all_cases()[::7] if case not in SELECTED], ids=str)
def test_tiered_adapters_are_bit_equal_in_more_cells(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


WAYS = [("memory", "on NVME"), ("on NVME", "memory"), ("in HOST", "on NVME"), ("on NVME", "in HOST"),
        ("on NVME", "on NVME"), ("memory", "in HOST, committed"), ("in HOST", "memory")]  # fmt: skip


@pytest.mark.parametrize(
    "optimizer, begun, goes_on",
    [
        pytest.param(optimizer, *way, marks=[] if (i + j) % 7 == 0 else pytest.mark.full)
        for (i, optimizer), (j, way) in itertools.product(enumerate(OPTIMIZERS), enumerate(WAYS))
    ],
)
def test_a_checkpoint_goes_on_wherever_state_is_placed(
    optimizer: str, begun: str, goes_on: str, tmp_path: Path
) -> None:
    case = Case("gpt2", "bf16", optimizer, 1, None, True, "")
    expected = run_plain(case)
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    with make_engine(case, tmp_path / "one", begun) as engine:
        assert unequal(expected[:2], Running(case, engine).steps(range(2))) == []
        engine.save_checkpoint(tmp_path / "saved")
    with make_engine(case, tmp_path / "other", goes_on) as engine:
        running = Running(case, engine)
        running.steps(range(1))
        engine.load_checkpoint(tmp_path / "saved")
        assert engine.step_number == 2
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []


def test_a_checkpoint_has_the_same_bytes_wherever_state_was(tmp_path: Path) -> None:
    """torch's state by parameter name, as one in memory writes it; a state of zeros is not there before a step."""
    case = Case("llama", "bf16", "adamw 8bit", 1, None, False, "")
    for place in ("memory", "on NVME"):
        with make_engine(case, tmp_path, place) as engine:
            engine.save_checkpoint(tmp_path / place / "0")
            Running(case, engine).steps(range(2))
            engine.save_checkpoint(tmp_path / place / "2")
    for step, file in itertools.product("02", ("trainable.safetensors", "optimizer.safetensors")):
        one, other = (load_file(tmp_path / place / step / file) for place in ("memory", "on NVME"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert (len(one) > 0) == (step == "2" or file.startswith("trainable"))


def test_a_run_goes_on_from_its_commit_folder_with_the_scheduler_of_the_next_step(tmp_path: Path) -> None:
    expected = run_plain(ONE)
    with make_engine(ONE, tmp_path) as engine:
        Running(ONE, engine).steps(range(2))
    with make_engine(ONE, tmp_path) as engine:
        with pytest.raises(ConfigError, match="holds step 2 of an earlier run.*load_checkpoint"):
            engine(**{"input_ids": torch.zeros(1, 4, dtype=torch.long)})
        running = Running(ONE, engine)
        engine.load_checkpoint(engine.commit_folder)
        assert engine.committed is not None and engine.committed["step"] == engine.step_number == 2
        assert unequal(expected[2:], running.steps(range(2, STEPS))) == []
