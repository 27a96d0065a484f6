"""A head by tiles in the runtime's questions: where nothing else fits, with the bits of the rule's tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError
from offload_rt.plans import planning
from offload_rt.plans.cuts import check_cuts, cuts_of
from offload_rt.plans.plan_check import check_plan
from offload_rt.plans.plan_choice import OPTIMISER, choose
from offload_rt.plans.planning import by_tiles, lowered
from offload_rt.plans.rule_price import rule_seconds
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.plans.placement import Tier
from planners.plans.plan import Plan
from planners.problems.cost import tiles_again_seconds
from planners.problems.measured import KeptPass, MeasuredSeconds
from planners.rule.filling import Fill
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import Cuts
from planners.simulator.validate import InvalidPlan, check, check_placement
from tests.conftest import build_lora
from tests.parity import SEQ_LEN
from tests.test_planning import MIB, SECONDS, UPDATES_PER_SECOND, machine, question

VOCABULARY, WIDTH = 8192, 64
TABLE_BYTES = VOCABULARY * WIDTH * 2
NUM_TILES = 8
TILE_ROWS = VOCABULARY // NUM_TILES
PAGE = 4096
KEPT = replace(SECONDS, kept=KeptPass(forward=0.01, backward=0.01, saved_bytes=1 << 17, small_bytes=0,
                                      put_away=0.0, taken_back=0.0))  # fmt: skip
HEAD = MeasuredSeconds(forward=0.004, backward=0.0, product=0.001)
HOSTS = pytest.mark.parametrize(
    "host", [0, pytest.param(64 * MIB, marks=pytest.mark.full)], ids=["from NVMe", "from HOST"]
)


def model(family="llama"):
    return build_lora(family, torch.bfloat16, 2, 0.0, vocab_size=VOCABULARY, hidden_size=WIDTH)


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Seconds that nobody measures."""
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: KEPT)
    monkeypatch.setattr(planning, "profile_head", lambda **_: HEAD)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: UPDATES_PER_SECOND)


def asked(folder, device, host=0, family="llama"):
    workload, streaming, problem = question(model(family), folder, machine(device, host), None, KEPT)
    *others, head = problem.workload.classes
    classes = (*others, replace(head, measured=HEAD))
    problem = replace(problem, workload=replace(problem.workload, classes=classes))
    return workload, streaming, problem, by_tiles(problem, streaming)


def tight(folder, host, family="llama"):
    """DEVICE memory in which the head's rows by tiles fit, and not all of them."""
    _, _, whole, tiled = asked(folder, 64 * MIB, host, family)
    reserve, hardware = whole.hardware.device.reserve_bytes, whole.hardware

    def answer(problem, num_bytes):
        device = replace(hardware.device, memory_bytes=num_bytes)
        return plan_optimal(replace(problem, hardware=replace(hardware, device=device)))

    with pytest.raises(PlanInfeasible) as least:
        answer(tiled, reserve + 1)
    budget = least.value.need_bytes + reserve + TABLE_BYTES // 32
    with pytest.raises(PlanInfeasible):
        answer(whole, budget)
    return budget


def batch():
    ids = torch.randint(3, VOCABULARY, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def train(engine, steps=3):
    found = []
    for _ in range(steps):
        loss = engine(**batch()).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found, {name: p.detach().clone() for name, p in engine.trainable.items()}


def same(one, other):
    return one[0] == other[0] and all(torch.equal(p, other[1][name]) for name, p in one[1].items())


def engine_of(folder, family="llama", **options):
    return Engine(model(family), batch_size=2, seq_len=SEQ_LEN, lr=1e-2, nvme=folder, **options)


@pytest.fixture(scope="module")
def of_the_rule(tmp_path_factory):
    """The plan of a run by the rule's tiles, with all memory, and what it gives."""
    folder = tmp_path_factory.mktemp("rule")
    options = RuntimeOptions(stream_edges=True, head_tile_rows=TILE_ROWS)
    with Engine(
        model(), batch_size=2, seq_len=SEQ_LEN, lr=1e-2, nvme=folder, device_memory=64 * MIB, options=options
    ) as engine:
        return engine.plan, train(engine)


@HOSTS
def test_a_head_that_nothing_else_fits_beside_goes_by_tiles_with_the_bits_of_the_rules(host, tmp_path, of_the_rule):
    budget = tight(tmp_path, host)
    ruled, expected = of_the_rule
    with engine_of(tmp_path, plan="optimise", emulate=machine(budget, host)) as engine:
        plan = engine.plan
        assert plan.planner == "optimiser" and plan.head_tiles is not None
        assert plan.head_tiles.rest is (Tier.HOST if host else Tier.NVME)
        assert plan.head_tiles.tile_rows == ruled.head_tiles.tile_rows == TILE_ROWS
        assert cuts_of(plan, engine._runtime.made_of.workload) == cuts_of(ruled, engine._runtime.made_of.workload)
        executor = next(e for e in engine._runtime.executors if e.ring.name == "tiles")
        found = train(engine, 1)
        before = executor.counters.num_fetches
        more = train(engine, 2)
        assert executor.counters.num_fetches - before == 2 * 2 * (NUM_TILES - 2)
        report = engine.report()
    assert same(([*found[0], *more[0]], more[1]), expected)
    assert report["memory"]["device"] <= budget and report["prefetch_misses"] == 0
    assert Plan.from_json(plan.to_json()) == plan
    with engine_of(tmp_path, plan=Plan.from_json(plan.to_json()), emulate=machine(budget, host)) as engine:
        assert train(engine, 1)[0] == expected[0][:1]
    entry = plan.entry(plan.head_tiles.block)
    parted = replace(entry.weights, device_bytes=PAGE, host_bytes=0, nvme_bytes=TABLE_BYTES - PAGE)
    odd = replace(plan, classes=tuple(replace(c, weights=parted) if c is entry else c for c in plan.classes))
    with pytest.raises(ConfigError, match="tiles of .* but its class says"):
        engine_of(tmp_path, plan=odd, emulate=machine(budget, host))


def test_a_run_that_goes_on_keeps_its_cuts(tmp_path, of_the_rule):
    """With all memory by tiles, if it was begun so; where only tiles fit as a whole, or not at all."""
    roomy, budget = machine(64 * MIB, 0), tight(tmp_path, 0)
    whole = Cuts(head_chunk_tokens=None, chunk_tokens=None, layer_major=None)
    tiled = replace(whole, head_tile_rows=TILE_ROWS)
    with engine_of(tmp_path, plan="optimise", emulate=roomy, options=RuntimeOptions(cuts=tiled)) as engine:
        assert engine.plan.planner == "optimiser" and engine.plan.head_tiles is not None
        assert engine._runtime.cuts == tiled and train(engine, 2)[0] == of_the_rule[1][0][:2]
        made_of = engine._runtime.made_of
        again, _ = made_of.asked.with_memory(budget).best(made_of.workload, made_of.problem)
        assert again.head_tiles == engine.plan.head_tiles, "asked again, it is asked about the same cuts"
    with engine_of(tmp_path, plan="optimise", emulate=roomy) as engine:
        assert engine.plan.head_tiles is None, "a cut only where nothing else fits"
    with pytest.raises(PlanInfeasible, match="device"):
        engine_of(tmp_path, plan="optimise", emulate=machine(budget, 0), options=RuntimeOptions(cuts=whole))


def test_a_run_that_was_begun_with_other_rows_is_asked_about_with_them(tmp_path):
    rows = TILE_ROWS // 2
    workload, streaming, problem, ruled = asked(tmp_path, 64 * MIB)
    cuts = Cuts(head_chunk_tokens=None, chunk_tokens=None, layer_major=None, head_tile_rows=rows)
    tiled = by_tiles(problem, replace(streaming, cuts=cuts))
    plans = [lowered(plan_optimal(one), streaming, one) for one in (ruled, tiled)]
    assert [plan.head_tiles.tile_rows for plan in plans] == [TILE_ROWS, rows]
    assert plans[1].head_tiles.tile_bytes < plans[0].head_tiles.tile_bytes
    check_plan(plans[1], streaming, workload)
    check_cuts(plans[1], workload, cuts)
    check_placement(tiled, plan_optimal(tiled))
    with pytest.raises(InvalidPlan, match=f"tiles of {TILE_ROWS} rows, but {rows}"):
        check_placement(tiled, plan_optimal(ruled))


def by_the_rule(streaming, tile_rows=TILE_ROWS):
    tiled = Cuts(head_chunk_tokens=None, chunk_tokens=None, layer_major=None, head_tile_rows=tile_rows)
    return plan_streaming(replace(streaming, cuts=tiled), fill=Fill.NOTHING)


def test_auto_asks_about_the_cuts_of_the_rules_plan(tmp_path):
    workload, streaming, problem, tiled = asked(tmp_path, 64 * MIB)
    for rule in (plan_streaming(streaming, fill=Fill.NOTHING), by_the_rule(streaming)):
        plan, choice, question = choose(workload, streaming, rule, machine(64 * MIB, 0))
        assert choice.chosen == OPTIMISER and plan.planner == "optimiser", choice.why
        assert cuts_of(plan, workload) == cuts_of(rule, workload)
        assert question.question == (problem if rule.head_tiles is None else tiled)
        assert choice.rule_step_seconds == rule_seconds(question.question, rule)
    with pytest.raises(ValueError, match="other cuts"):
        rule_seconds(problem, rule)
    rule = by_the_rule(streaming, TILE_ROWS // 2)  # as a run was begun with that goes on
    plan, choice, _ = choose(workload, streaming, rule, machine(64 * MIB, 0))
    assert plan is rule and "cuts otherwise" in choice.why and f"by {TILE_ROWS} rows" in choice.why


def test_tiles_are_priced_by_what_a_head_was_measured_to_take(tmp_path):
    """Its logits once more; and where a drive is slow, its bytes twice."""
    _, streaming, problem, tiled = asked(tmp_path, 64 * MIB)
    assert tiles_again_seconds(tiled, tiled.workload.classes[-1]) == HEAD.product

    def priced(product, rate=1e9):
        *others, head = tiled.workload.classes
        head = replace(head, measured=replace(HEAD, product=product))
        drives = (replace(tiled.hardware.drives[0], read_bytes_per_second=rate),)
        workload = replace(tiled.workload, classes=(*others, head))
        hardware = replace(tiled.hardware, drives=drives)
        return rule_seconds(replace(tiled, workload=workload, hardware=hardware), by_the_rule(streaming))

    assert priced(0.5) - priced(0.25) == pytest.approx(0.25)
    assert priced(HEAD.product, 1e6) > 2 * TABLE_BYTES / 1e6
    resident, plan = plan_optimal(problem), plan_optimal(tiled)
    check(tiled, plan)
    with pytest.raises(InvalidPlan, match="by tiles"):
        check_placement(tiled, resident)
    with pytest.raises(InvalidPlan, match="by tiles"):
        check_placement(problem, plan)
    found = plan_greedy(tiled)
    check(tiled, found)
    assert found.head_tiles == plan.head_tiles


def test_what_cannot_go_by_tiles_is_not_asked_about(tmp_path):
    _, streaming, problem, _ = asked(tmp_path, 64 * MIB)
    nowhere = replace(problem, hardware=replace(problem.hardware, drives=()))
    edges = tuple(replace(block, product=None) for block in streaming.edges)
    for one, sizes in ((nowhere, streaming), (problem, replace(streaming, edges=edges))):
        with pytest.raises(ConfigError, match="head goes by tiles"):
            by_tiles(one, sizes)


@HOSTS
def test_a_tied_matrix_is_read_by_rows_and_tiles_where_nothing_else_fits(host, tmp_path):
    _, streaming, whole, _ = asked(tmp_path, 64 * MIB, host, "qwen")
    assert streaming.edges[-1].rows is not None and whole.workload.classes[-1].rows is None, "it is multiplied with"
    budget = tight(tmp_path, host, "qwen")
    with engine_of(tmp_path, "qwen", plan="optimise", emulate=machine(budget, host)) as engine:
        plan, cuts = engine.plan, engine._runtime.cuts
        assert plan.planner == "optimiser" and plan.head_tiles is not None and plan.lookups is not None
        assert plan.lookups.blocks == (plan.head_tiles.block,)
        assert plan.lookups.rest is plan.head_tiles.rest is (Tier.HOST if host else Tier.NVME)
        found, report = train(engine), engine.report()
    assert report["memory"]["device"] <= budget and report["prefetch_misses"] == 0
    assert report["lookups"]["num_rows"] == 3 * batch()["input_ids"].unique().numel()
    with engine_of(tmp_path, "qwen", device_memory=64 * MIB, options=RuntimeOptions(cuts=cuts)) as engine:
        assert engine.plan.planner != "optimiser" and engine.plan.head_tiles is not None
        assert same(train(engine), found)
