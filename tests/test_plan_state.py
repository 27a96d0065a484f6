"""Where the fixed rule and plans place masters and moments: what HOST leaves is filled, piece by piece."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from offload_rt.errors import ConfigError
from planners.errors import PlanInfeasible
from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan, StatePlacement, Tier
from planners.plans.training_state import TrainedSize, TrainingSizes
from planners.rule import attempts
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from tests.test_plan import KIB, problem
from tests.tiny_training import ON_NVME, Plain, differences, engine, model, train

PIECES = (40 * KIB, 24 * KIB, 8 * KIB)


def training_problem(**changes: object) -> StreamingProblem:
    """Three layers of 72 KiB of state each, in pieces of 40, 24 and 8 KiB, and an embedding of one piece."""
    blocks = tuple(
        TrainedSize(name=f"layers.{i}", pieces=PIECES, gradient_bytes=12 * KIB, weight_bytes=12 * KIB) for i in range(3)
    )
    embedding = TrainedSize(name="embed", pieces=(16 * KIB,), gradient_bytes=4 * KIB, weight_bytes=0)
    sizes = TrainingSizes(blocks=(embedding, *blocks), clips=True, commits_each_step=True)
    return problem(training=sizes, **changes)


@pytest.mark.parametrize("asked", [problem(), training_problem()], ids=["frozen", "trains"])
def test_no_plan_is_made_behind_the_first_that_fits(asked: StreamingProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Plan] = []
    plan = attempts._plan
    monkeypatch.setattr(attempts, "_plan", lambda *given, **named: made.append(plan(*given, **named)) or made[-1])
    found = plan_streaming(asked)
    assert len(made) == 1
    assert (found.rings, found.layer_inputs, found.head_chunk_tokens) == (made[0].rings, made[0].layer_inputs, None)


@functools.cache
def leanest_bytes() -> int:
    """The least HOST memory that a plan fits into."""
    low, high = 0, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_streaming(training_problem(unified=False, host_capacity_bytes=middle))
            high = middle
        except PlanInfeasible:
            low = middle
    return high


def test_each_piece_that_fits_into_what_is_left_rests_in_memory() -> None:
    """Of the first blocks first; at the least budget none, a byte below a piece none more, at the byte one more."""
    lean = leanest_bytes()
    expected: list[tuple[int, dict[str, int]]] = [
        (0, {}), (8 * KIB - 1, {}), (8 * KIB, {}), (16 * KIB - 1, {}), (16 * KIB, {"embed": 1}),
        (56 * KIB - 1, {"embed": 1}),
    ]  # fmt: skip
    for more, in_memory in expected:
        plan = plan_streaming(training_problem(unified=False, host_capacity_bytes=lean + more))
        assert plan.state is not None
        assert (plan.state.state_slots, plan.state.in_memory) == (2, in_memory), more
        assert plan.predicted_bytes(Tier.HOST) <= lean + more


def test_memory_is_filled_until_the_next_piece_would_not_fit_and_never_beyond() -> None:
    sizes = training_problem().training
    assert sizes is not None
    lean, split = leanest_bytes(), 0
    for more in range(0, 400 * KIB, 29 * KIB):
        asked = training_problem(unified=False, host_capacity_bytes=lean + more)
        plan = plan_streaming(asked)
        state = plan.state
        assert state is not None
        assert plan.predicted_bytes(Tier.HOST) <= lean + more
        assert plan.peak_bytes["host"]["optimizer state"] == state.in_memory_bytes(sizes)
        if state.is_all_in_memory(sizes):
            continue
        assert plan.update_mode is UpdateMode.SPECULATIVE
        left = lean + more - plan.predicted_bytes(Tier.HOST)
        waiting = [block.pieces[state.in_memory.get(block.name, 0) :] for block in sizes.blocks]
        waiting[-1] = waiting[-1][:-1]  # one piece always rests on NVME
        assert all(pieces[0] > left for pieces in waiting if pieces)
        split += any(0 < state.in_memory.get(block.name, 0) < len(block.pieces) for block in sizes.blocks)
        assert Plan.from_json(plan.to_json()) == plan
    assert split > 2


@pytest.mark.parametrize("in_memory", [["layers.0"], {"layers.0": 0}, {"layers.0": True}, {"layers.0": "1"}, 5, None])
def test_what_is_no_number_of_pieces_is_refused(in_memory: object) -> None:
    state = StatePlacement(in_memory={"layers.0": 1}, gradients=Tier.HOST, state_slots=2, weight_slots=1)
    plan = replace(plan_streaming(training_problem()), state=state)
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    data["state"]["in_memory"] = in_memory
    with pytest.raises(ValueError, match="plan: state: .*pieces|plan: state: in_memory"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("in_memory", "message"),
    [({"layers.1": 5}, "5 pieces of state of 'layers.1' in memory, which has 4"), ({"head": 1}, "'head' in memory")],
)
def test_pieces_that_there_are_not_are_refused(in_memory: dict[str, int], message: str, tmp_path: Path) -> None:
    with engine(model(), "SPECULATIVE", tmp_path) as run:
        plan = replace(run.plan, state=replace(ON_NVME, in_memory=in_memory))
    with pytest.raises(ConfigError, match=message):
        engine(model(), "SPECULATIVE", tmp_path, plan=plan, options={"state": None})


def test_an_engine_runs_the_plan_that_fills_its_memory(tmp_path: Path) -> None:
    twin = Plain(model())
    train(twin, range(2))
    for budget in range(360, 100, -20):  # KiB: from where all fits to where nothing is left
        folder = tmp_path / str(budget)
        folder.mkdir()
        try:
            run = engine(model(), "in place", folder, nvme=folder, device_memory=budget << 10)
        except PlanInfeasible:
            continue
        with run:
            training = run.report()["training"]
            if 0 < training["state_in_memory_bytes"] < training["state_bytes"]:
                train(run, range(2))
                assert differences(twin.state(), run.state()) == []
                return
    raise AssertionError("no budget left room for a part of the state")
