"""Adapters whose state does not fit beside them, as the optimiser plans it: its numbers, its bytes, its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.errors import ConfigError
from offload_rt.meter import SSD_READ, SSD_WRITE
from offload_rt.optimizer.adapters import AdapterTraining
from offload_rt.plans import asked, plan_choice, planning, planning_adapters
from offload_rt.plans.planning_adapters import measured_rate
from offload_rt.profiling import calibrate
from offload_rt.running import rehearsal
from offload_rt.storage.commit_record import RECORD_BYTES, body_bytes
from offload_rt.tensor_spec import align_up
from offload_rt.wiring import adapter_draft
from offload_rt.wiring.adapter_draft import with_adapter_state
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import find_workload
from planners.errors import PlanInfeasible
from planners.plans.placement import Tier, UpdateMode
from planners.plans.plan import Plan
from planners.plans.vocabulary import TILE_SLOTS
from planners.problems.hardware import Hardware
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from tests import test_planning
from tests.conftest import build_base, language_batch
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.test_planning import SECONDS
from tests.test_planning_tiles import HEAD, NUM_TILES, TILE_ROWS, VOCABULARY, WIDTH

KIB, PAGE = 1 << 10, 4096
MAX_NORM = 0.05
OPTIONS = RuntimeOptions(piece_elements=2048)
STEPS = 3
RATE = 1e9
"""Parameters a second that are stepped, as the planner is told."""


@dataclass(frozen=True)
class Budget:
    """Memory in KiB, where a `host` of 0 makes one tier; and where the state rests then."""

    device: int
    host: int
    state: tuple[Tier, ...]
    nvme: bool = True
    commit_every: int | None = None
    emulated: bool = False
    """Drives and links are as slow as the profile says, not those of this machine."""


D, H, N = Tier
BUDGETS = {
    "in HOST, no drive": Budget(900, 4096, (H,), nvme=False),
    "in HOST": Budget(900, 4096, (H,)),
    "in HOST, committed": Budget(900, 4096, (H,), commit_every=2),
    "split": Budget(900, 450, (H, N)),
    "split, behind a link": Budget(900, 450, (H, N), emulated=True),
    "on NVME": Budget(900, 277, (N,)),
    "split, one tier": Budget(980, 0, (D, N)),
    "on NVME, one tier": Budget(920, 0, (N,), emulated=True),
}
QUICK = ("split, behind a link",)


def build(**sizes: int) -> nn.Module:
    """Equal at every call; with adapters that are large beside its layers."""
    torch.manual_seed(5)
    config = LoraConfig(r=16, lora_dropout=0.1, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(build_base("llama", torch.bfloat16, **sizes), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return optim.AdamW(parameters, lr=1e-2)


def machine(budget: Budget) -> Hardware:
    return test_planning.machine(budget.device * KIB, budget.host * KIB)


@pytest.fixture(autouse=True)
def unmeasured_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: SECONDS)
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: 1e9)
    monkeypatch.setattr(planning_adapters, "measured_rate", lambda *_: RATE)
    monkeypatch.setattr(rehearsal, "ROOM", 0)  # of nothing: these budgets are for weights and state


def not_beside(problem: StreamingProblem, **given: Any) -> Plan:
    """The rule's plans but for those with state beside adapters: on one tier it finds room where whole pages of these
    tiny blocks leave the optimiser none.
    """
    if problem.training is None:
        raise PlanInfeasible(tier="device", need_bytes=2, have_bytes=1, phase="a step", ways_out=[])
    return plan_streaming(problem, **given)


def engine(budget: Budget, folder: Path, sizes: dict[str, int] | None = None, **arguments: Any) -> Engine:
    """On this machine, of which nothing but the budget's memory may be used, or on one that has no more."""
    folder.mkdir(exist_ok=True)
    folders = (folder.resolve(),) if budget.nvme else ()
    known = calibrate.identity("cpu", folders)
    calibrate.keep(calibrate.cache_name(known), known, calibrate.Measurement(machine(budget), {}, 1.0))
    given = {"plan": "optimise", "device_memory": budget.device * KIB, "host_memory": budget.host * KIB or None}
    if budget.emulated:
        given["emulate"] = machine(budget)
    return Engine(
        build(**sizes or {}), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=MAX_NORM,
        nvme=folder if budget.nvme else None, commit_every=budget.commit_every, optimizer=adamw,
        **{"options": OPTIONS, **given, **arguments},
    )  # fmt: skip


Trace = list[list[torch.Tensor]]


def train(forward: Any, backward: Callable[[Any], None], step: Callable[[], None], trainable: Any, first: int) -> Trace:
    """Losses and adapters of some steps."""
    found = []
    for number in range(first, first + STEPS):
        torch.manual_seed(number)
        loss = forward(**language_batch(number, BATCH_SIZE, SEQ_LEN)).loss
        backward(loss)
        step()
        found.append([loss.detach(), *(p.detach().clone() for p in trainable)])
    return found


def run(of: Engine, first: int = 0) -> Trace:
    return train(of, of.backward, of.step, list(of.trainable.values()), first)


def run_plain() -> Trace:
    model = build()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trainable)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return train(model, lambda loss: loss.backward(), step, trainable, 0)


def unequal(one: Trace, other: Trace) -> list[int]:
    """Steps, from 0, that are not the same to the bit."""
    pairs = enumerate(zip(one, other, strict=True))
    return [step for step, (a, b) in pairs if not all(map(torch.equal, a, b))]


def moved(of: Engine) -> dict[str, float]:
    """Bytes that drives were given so far, and emulated ones."""
    report, throttle = of.report(), of._runtime.links.throttle
    emulated = {} if throttle is None else throttle.moved_bytes()
    return {"read": report["bytes_read"], "written": report["bytes_written"], **emulated}


def commit_bytes(of: Engine) -> int:
    """What a commit writes besides state: its record, and the body that this vouches for."""
    assert isinstance(of._training, AdapterTraining)
    log = of._training.home.log
    if log is None:
        return 0
    return RECORD_BYTES + align_up(body_bytes(len(log.names), len(log.committed.payload)), PAGE)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in BUDGETS]
)
def test_state_that_does_not_fit_beside_adapters_is_planned_to_the_same_bits_within_budgets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, file = BUDGETS[name], tmp_path / "plan.json"
    monkeypatch.setattr(asked, "plan_streaming", not_beside)
    with engine(budget, tmp_path / "nvme") as optimised:
        plan, sizes = optimised.plan, optimised._runtime.made_of.problem.training
        assert plan.planner == "optimiser" and plan.update_mode is UpdateMode.AFTER and plan.state is not None
        assert tuple(u.tier for u in plan.entry("adapters").updates if u.params) == budget.state
        assert plan.state.is_all_in_memory(sizes) is (N not in budget.state)
        found = run(optimised)
        every = budget.commit_every or 1
        before = moved(optimised)
        for number in range(2):
            run(optimised, STEPS * (1 + number))
        after, report = moved(optimised), optimised.report()
        committed = commit_bytes(optimised) / every if report["training"]["num_commits"] > 1 else 0
        assert (committed > 0) is (N in budget.state or budget.commit_every is not None)
        num_trained = sum(p.numel() for p in optimised.trainable.values())
        file.write_text(plan.to_json())
    each = {key: (after[key] - before[key]) / (2 * STEPS) for key in after}
    busy, drive = plan.predicted["busy_seconds"], test_planning.DRIVES[0]
    assert each["written"] == pytest.approx(busy["ssd_write"] * drive.write_bytes_per_second + committed, abs=1)
    assert each["read"] == pytest.approx(busy["ssd_read"] * drive.read_bytes_per_second, abs=1)
    assert not budget.emulated or (each[SSD_WRITE], each[SSD_READ]) == (each["written"], each["read"])
    stepping = num_trained / RATE
    if budget.emulated and budget.host:  # the state is on the other side of the link than adapters and gradients
        links = machine(budget).links
        stepping += 4 * num_trained / links.device_to_host_bytes_per_second
        stepping += 4 * num_trained / links.host_to_device_bytes_per_second
    assert busy["cpu" if budget.host else "device_update"] == pytest.approx(stepping)
    assert report["memory"]["device"] <= budget.device * KIB and report["memory"]["host"] <= budget.host * KIB
    assert [each for each in report["peaks"]["over"] if each["phase"] == "step"] == []
    with engine(budget, tmp_path / "rule", plan="auto", emulate=None, device_memory="64MiB") as ruled:
        assert ruled.plan.planner == "fixed streaming rule" and ruled.plan.state is None
        assert unequal(found, run(ruled)) == []
    assert unequal(found, run_plain()) == []
    with engine(budget, tmp_path / "again", plan=file) as again:
        assert again.plan == plan


@pytest.mark.parametrize(
    "budget",
    [pytest.param(Budget(4500, 16384, (H,)), marks=pytest.mark.full), Budget(4800, 0, (N,))],
    ids=["in HOST", "on NVME, one tier"],
)
def test_a_head_goes_by_tiles_beside_state_in_tiers_with_the_bits_of_the_rules_tiles(
    budget: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "profile_head", lambda **_: HEAD)
    monkeypatch.setattr(asked, "plan_streaming", not_beside)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    with engine(budget, tmp_path / "nvme", sizes) as optimised:
        plan, cuts = optimised.plan, optimised._runtime.cuts
        assert plan.planner == "optimiser" and plan.head_tiles is not None and plan.state is not None
        assert tuple(u.tier for u in plan.entry("adapters").updates if u.params) == budget.state
        assert plan.head_tiles.rest is (H if budget.host else N)
        found, report = run(optimised), optimised.report()
        tiles = next(ring for ring in optimised._runtime.executors if ring.ring.name == "tiles")
        assert tiles.counters.num_fetches == NUM_TILES + (2 * STEPS - 1) * (NUM_TILES - TILE_SLOTS)
    assert report["memory"]["device"] <= budget.device * KIB and report["prefetch_misses"] == 0
    by_tiles = replace(OPTIONS, stream_edges=True, head_tile_rows=TILE_ROWS)
    roomy = {"plan": "auto", "device_memory": "64MiB", "options": by_tiles}
    with engine(budget, tmp_path / "rule", sizes, **roomy) as ruled:
        assert ruled.plan.planner == "fixed streaming rule" and ruled.plan.state is None
        assert ruled._runtime.cuts == cuts
        assert unequal(found, run(ruled)) == []


def test_what_does_not_fit_in_tiers_either_says_what_is_short_there(tmp_path: Path) -> None:
    for budget, tier in ((Budget(900, 100, ()), "host"), (Budget(700, 0, ()), "device")):
        with pytest.raises(PlanInfeasible, match=f"of {tier} memory") as found:
            engine(budget, tmp_path)
        beside = found.value.__cause__
        assert isinstance(beside, PlanInfeasible) and str(beside) != str(found.value)


def test_plans_say_one_thing_of_state(tmp_path: Path) -> None:
    budget = BUDGETS["split"]
    with engine(budget, tmp_path) as optimised:
        plan = optimised.plan
    assert plan.state is not None
    broken = replace(plan, state=replace(plan.state, in_memory={"adapters": 1}))
    with pytest.raises(ConfigError, match="classes place state so"):
        engine(budget, tmp_path, plan=broken)


@pytest.mark.parametrize("name", ["split", pytest.param("on NVME, one tier", marks=pytest.mark.full)])
def test_auto_weighs_the_optimisers_tiers_against_the_rules(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drives are said to be so slow that writing state is most of a step."""
    budget, found = replace(BUDGETS[name], emulated=False), {}
    slow = replace(test_planning.DRIVES[0], write_bytes_per_second=1e6)
    monkeypatch.setattr(adapter_draft, "plan_streaming", not_beside)
    monkeypatch.setattr(test_planning, "DRIVES", (slow,))
    for gain, chosen in ((-10.0, plan_choice.OPTIMISER), (1.0, plan_choice.RULE)):
        monkeypatch.setattr(plan_choice, "GAIN", gain)
        with engine(budget, tmp_path / chosen, plan="auto") as chooses:
            report = chooses.report()
            choice, written = report["plan_choice"], report["training"]["expected_bytes_written_per_step"]
            assert choice["chosen"] == chooses.plan.planner == chosen, choice["why"]
            assert chooses.plan.state is not None
            seconds = choice["rule_step_seconds" if chosen == plan_choice.RULE else "optimised_step_seconds"]
            assert 1 < seconds * slow.write_bytes_per_second / written < 2
            found[chosen] = run(chooses)
    assert unequal(*found.values()) == []


def test_auto_commits_adapters_as_often_as_by_the_rules_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers on the drive there would be room for all state, no commit, and a step in a third of the time."""
    monkeypatch.setattr(adapter_draft, "plan_streaming", not_beside)
    monkeypatch.setattr(plan_choice, "GAIN", -10.0)
    slow = replace(test_planning.DRIVES[0], write_bytes_per_second=1e6)
    monkeypatch.setattr(test_planning, "DRIVES", (slow,))
    with engine(replace(BUDGETS["split"], host=620), tmp_path, plan="auto") as chooses:
        choice, state = chooses.report()["plan_choice"], chooses.plan.state
        assert choice["chosen"] == plan_choice.OPTIMISER, choice["why"]
        assert state is not None and 0 < state.in_memory["adapters"] < 16
        run(chooses)
        assert chooses.report()["training"]["num_commits"] >= STEPS


@pytest.mark.parametrize("with_a_drive", [False, True])
def test_timing_how_fast_adapters_are_stepped_leaves_them_as_they_are(with_a_drive: bool, tmp_path: Path) -> None:
    """Without masters of their own they are what is stepped, with masters what these are rounded to."""
    model = build()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    config = EngineConfig(nvme=(NvmePath(path=tmp_path),) if with_a_drive else ())
    workload = with_adapter_state(find_workload(model, None, config), optimizer, piece_elements=1024)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert measured_rate(workload, optimizer) > 0
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] == []
