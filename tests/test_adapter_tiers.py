"""Adapters whose optimizer state rests in HOST or on NVMe train as with torch's own optimizer in memory, to the bit."""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.errors import (
    CheckpointError,
    ConfigError,
    OffloadError,
    PlanInfeasible,
    StorageError,
)
from offload_rt.optimizer.in_memory import MemoryTraining
from offload_rt.plans import workload_sizes
from offload_rt.training.loop import train
from offload_rt.training.options import TrainingOptions
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan, Tier
from tests import parity
from tests.adapter_tiers import (
    IN_HOST,
    ON_NVME,
    OPTIMIZERS,
    PLACES,
    STEPS,
    Case,
    Running,
    build,
    make_engine,
    more_cases,
    pairwise_cases,
    run_plain,
    training_of,
    unequal,
)
from tests.fake_device import FakeDevice
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, Trace, in_turns, micro_batch, run_steps
from tests.test_optimizer_training import FailingIO
from tests.test_training_loop import make_batches
from tests.tiny_checkpoints import meta_model, new_model

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
@pytest.mark.parametrize("case", [case for case in more_cases() if case not in SELECTED], ids=str)
def test_tiered_adapters_are_bit_equal_for_every_three_choices(case: Case, tmp_path: Path) -> None:
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


def rank_24(folder: Path, *, device: FakeDevice | None = None, **arguments: Any) -> Engine:
    """An engine for adapters whose state is the largest item of the plan."""
    folder = folder / str(len(list(folder.iterdir())))
    folder.mkdir()
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(r=24, target_modules="all-linear"))
    options = RuntimeOptions(piece_elements=4096, device=device, fill=False)
    return Engine(model, bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=folder, options=options, **arguments)


def two_steps(engine: Engine) -> list[Trace]:
    with engine:
        return run_steps(ONE.accumulation, engine, engine.backward, engine.trainable, engine.step, range(2))


def test_the_rule_moves_state_only_where_memory_does_not_hold_it_beside_the_adapters(tmp_path: Path) -> None:
    places, expected = [], two_steps(rank_24(tmp_path))
    for budget in (3000, 2200, 1850, 1570):
        try:
            engine = rank_24(tmp_path, device_memory=f"{budget}KiB")
        except PlanInfeasible as error:
            places.append("infeasible")
            assert error.needs["device"] > budget << 10
            continue
        places.append("memory" if engine.plan.state is None else f"{engine.plan.state.state_slots} pieces")
        assert unequal(expected, two_steps(engine)) == []
        assert engine.plan.predicted_bytes(Tier.DEVICE) <= budget << 10
    assert places[0] == "memory" and places[-1] == "infeasible"
    slots = [int(place.split()[0]) for place in places if place.endswith("pieces")]
    assert len(slots) == 2 and slots == sorted(slots, reverse=True) and slots[0] == 8 and slots[-1] < 8
    with rank_24(tmp_path, device_memory="2200KiB", host_memory="16MiB") as engine:
        state = engine.plan.state
        assert state is not None and replace(state, in_memory=IN_HOST.in_memory) == IN_HOST
        training = engine.report()["training"]
        assert training["state_in_memory_bytes"] == training["state_bytes"] > 0
        assert unequal(expected, two_steps(engine)) == []


def test_what_is_free_is_asked_for_once_where_state_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question is about the same memory, however little was free by then."""
    free = itertools.chain([2300 << 10], itertools.repeat(1))
    monkeypatch.setattr(workload_sizes, "free_memory_bytes", lambda: next(free))
    with rank_24(tmp_path) as engine:
        assert engine.plan.state is not None
        assert engine._runtime.made_of.problem.device_capacity_bytes == 2300 << 10


def test_a_plan_file_may_say_where_state_rests_and_is_refused_where_it_has_no_effect(tmp_path: Path) -> None:
    with rank_24(tmp_path, device_memory="2200KiB") as engine:
        plan = engine.plan
    assert "optimizer state of adapters: 1.16 MiB on NVME; updates: after" in engine.summary()
    assert plan.state is not None
    expected = two_steps(rank_24(tmp_path))
    assert unequal(expected, two_steps(rank_24(tmp_path, plan=Plan.from_json(plan.to_json())))) == []
    for change, why in (
        ({"update_mode": UpdateMode.BACKWARD}, "updates wait for all"),
        ({"state": replace(plan.state, gradients=Tier.NVME, gradient_slots=1)}, "gradients of adapters stay with them"),
        ({"state": replace(plan.state, in_memory={"layers.7": 1})}, "layers.7"),
    ):
        with pytest.raises(ConfigError, match=why):
            rank_24(tmp_path, plan=replace(plan, **change))


@pytest.mark.parametrize(
    "optimizer, dtype, why",
    [
        (torch.optim.LBFGS, torch.float32, "does not step each parameter by itself"),
        (optim.AdamW, torch.bfloat16, "steps float32 adapters"),
        (torch.optim.SGD, torch.float16, "bfloat16 or float32 adapters"),
    ],
)
def test_state_that_cannot_be_tiered_is_refused_and_stays_in_memory_where_it_fits(
    optimizer: Any, dtype: torch.dtype, why: str, tmp_path: Path
) -> None:
    def make(**arguments: Any) -> Engine:
        model = parity.PlainModel().to(dtype)
        return Engine(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=tmp_path, optimizer=optimizer, **arguments)

    with pytest.raises(ConfigError, match=why):
        make(options=RuntimeOptions(state=ON_NVME))
    with pytest.raises(PlanInfeasible) as infeasible:
        make(device_memory="150KiB")
    assert why in str(infeasible.value.__cause__)
    if optimizer is optim.AdamW:  # nor are these stepped in memory
        with pytest.raises(ConfigError, match="steps float32 parameters"):
            make()
        return
    with make() as engine:
        assert isinstance(engine._training, MemoryTraining)


def test_gradients_are_where_torch_finds_them_and_the_optimizer_says_where_its_state_is(tmp_path: Path) -> None:
    with make_engine(ONE, tmp_path) as engine:
        assert engine.optimizer is not None
        engine.backward(engine(**micro_batch(0, 0)).loss)
        assert all(torch.equal(gradient, engine.trainable[name].grad) for name, gradient in engine.gradients())  # type: ignore[arg-type]
        assert torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 1.0) > 0
        engine.optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.any() for p in engine.trainable.values()), "as torch leaves them"
        engine.optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in engine.trainable.values())
        assert engine.optimizer.state_dict()["state"] == {}


def test_weights_that_somebody_changes_between_steps_are_the_ones_that_are_stepped(tmp_path: Path) -> None:
    """The copies in the pieces are for commits: a step begins with the parameters, as torch's does."""

    def go(trainable: Any, step: Any) -> None:
        for number in range(2):
            for index, parameter in enumerate(trainable.values()):
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) + index)
            step()
            with torch.no_grad():
                for parameter in trainable.values():
                    parameter.mul_(0.5)

    plain = {name: p for name, p in build(ONE).named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(plain.values()), lr=1e-2)
    go(plain, optimizer.step)
    with make_engine(replace(ONE, max_grad_norm=None), tmp_path) as engine:
        go(engine.trainable, engine.step)
        assert all(torch.equal(plain[name], parameter) for name, parameter in engine.trainable.items())
        engine.save_checkpoint(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "trainable.safetensors")
        assert all(torch.equal(plain[name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind, countdown", in_turns(["read", "write", "sync"], [0, 3]))
def test_a_failing_drive_is_told_and_leaves_a_committed_step(kind: str, countdown: int, tmp_path: Path) -> None:
    """`countdown`: operations of a kind before the one that fails."""
    expected = run_plain(ONE, steps=5)
    with contextlib.suppress(StorageError), make_engine(ONE, tmp_path) as engine:
        running = Running(ONE, engine)
        running.steps(range(2))
        FailingIO(engine, kind, countdown, errno.EIO)
        with pytest.raises(StorageError, match=re.escape(str(tmp_path))):
            running.steps(range(2, 4))
        engine.optimizer.zero_grad()  # type: ignore[union-attr]
        with contextlib.suppress(OffloadError):  # refused, or done again: never wrong
            done = engine.step_number
            assert unequal(expected[done:], running.steps(range(done, 5))) == []
    with make_engine(ONE, tmp_path) as engine:
        running = Running(ONE, engine)
        engine.load_checkpoint(engine.commit_folder)
        assert engine.step_number >= 1
        assert unequal(expected[engine.step_number :], running.steps(range(engine.step_number, 5))) == []


def test_a_checkpoint_of_another_optimizer_changes_nothing(tmp_path: Path) -> None:
    other = replace(ONE, optimizer="lion")
    with make_engine(other, tmp_path, "memory") as engine:
        Running(other, engine).steps(range(1))
        engine.save_checkpoint(tmp_path / "saved")
    with make_engine(ONE, tmp_path) as engine:
        running = Running(ONE, engine)
        expected = running.steps(range(1))
        with pytest.raises(CheckpointError, match="holds nothing as exp_avg_sq of .*lora_A"):
            engine.load_checkpoint(tmp_path / "saved")
        assert unequal(run_plain(ONE), expected + running.steps(range(1, STEPS))) == []


def test_a_model_on_the_meta_device_trains_as_with_state_in_memory(tmp_path: Path) -> None:
    new_model("llama").save_pretrained(tmp_path / "model")
    found = []
    for options in ({}, {"state": ON_NVME, "piece_elements": 512}, {"state": IN_HOST}):
        torch.manual_seed(0)
        with Engine(
            meta_model("llama"), checkpoint=tmp_path / "model", bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN,
            adapters=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), max_grad_norm=1.0,
            nvme=tmp_path, options=RuntimeOptions(**options), lr=1e-2,
        ) as engine:  # fmt: skip
            found.append(run_steps(ONE.accumulation, engine, engine.backward, engine.trainable, engine.step, range(3)))
            assert (engine.report()["training"] is not None) is bool(options)
            engine.save_pretrained(tmp_path / "adapter")
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in engine.trainable.items())
        for folder in tmp_path.glob("offload_rt-*"):  # IN_HOST would go on from it
            if (folder / "state.bin").exists():
                shutil.rmtree(folder)
    assert unequal(found[0], found[1]) == [] and unequal(found[0], found[2]) == []


def test_the_loop_goes_on_from_commits_of_adapters_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def go(name: str, steps: int, **options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        with make_engine(ONE, tmp_path / name) as engine:
            rate = {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}
            made = TrainingOptions(out=tmp_path / name / "run", steps=steps, **rate, **options)
            result = train(engine, make_batches(), made, console=Console(quiet=True))
            assert result.step == engine.step_number == steps
            assert result.checkpoint == engine.commit_folder
            return {name: parameter.detach().clone() for name, parameter in engine.trainable.items()}

    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    expected = go("straight", 4)
    go("stopped", 2)
    assert not list((tmp_path / "stopped" / "run").glob("checkpoint-*"))
    found = go("stopped", 4, resume=True)
    assert {name for name in expected if not torch.equal(expected[name], found[name])} == set()
