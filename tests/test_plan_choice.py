"""`plan="auto"` takes the faster of two plans at one machine's prices, says why, and gives the same bits."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import UnsupportedModule
from offload_rt.plans import plan_choice, planning, workload_sizes
from offload_rt.plans.plan_choice import (
    MAX_SECONDS,
    OPTIMISER,
    RULE,
    choose,
    profile_bytes,
    profile_seconds,
)
from offload_rt.plans.rule_price import rule_seconds, rule_simulation
from offload_rt.profiling import calibrate
from offload_rt.profiling.block_profile import MOST_PASSES
from offload_rt.running import rehearsal
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.optimiser.program import SolverMissing
from planners.plans.placement import Tier
from planners.problems.measured import KeptPass
from planners.rule.edges import lookups_of
from planners.rule.filling import Fill
from planners.rule.streaming import plan_streaming
from tests.conftest import build_lora, build_plain
from tests.parity import BATCH_SIZE, SEQ_LEN, build, run_plain, run_steps
from tests.test_layer_major import STEPS as LAYER_MAJOR_STEPS
from tests.test_layer_major import quiet, train
from tests.test_parity import differences
from tests.test_planning import BF16, MIB, SECONDS, UPDATES_PER_SECOND, machine, question

KEPT = replace(SECONDS, kept=KeptPass(forward=0.01, backward=0.01, saved_bytes=1 << 17, small_bytes=0,
                                      put_away=0.0, taken_back=0.0))  # fmt: skip
"""Of a layer for which computing again takes half of its backward."""


@pytest.fixture
def timed(monkeypatch):
    """Layers that take `KEPT`, which nobody measures; how often that was asked."""
    asked = []
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: asked.append(1) or KEPT)
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: UPDATES_PER_SECOND)
    return asked


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """This machine was measured; calling it says with what."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))

    def keep(hardware, *folders):
        known = calibrate.identity("cpu", folders)
        calibrate.keep(calibrate.cache_name(known), known, calibrate.Measurement(hardware, {}, 1.0))

    keep(machine(64 * MIB, 0), tmp_path.resolve())
    return keep


def engine_of(folder, **options):
    return Engine(
        build(BF16), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05, lr=1e-2, nvme=folder,
        **{"device_memory": 64 * MIB, "options": RuntimeOptions(fill=False), **options},
    )  # fmt: skip


def test_a_calibrated_machine_runs_the_optimisers_plan_where_it_is_faster(timed, calibrated, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "offload_rt"), engine_of(tmp_path) as engine:
        assert engine.plan.planner == "optimiser" and engine.plan.activations, "activations are kept"
        found = run_steps(BF16.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
        assert differences(run_plain(BF16), found) == []
    choice = report["plan_choice"]
    assert choice["chosen"] == OPTIMISER and timed == [1]
    assert choice["optimised_step_seconds"] == report["predicted"]["step_seconds"]
    assert choice["optimised_step_seconds"] < 0.9 * choice["rule_step_seconds"]
    assert report["memory"]["device"] <= 64 * MIB and choice["seconds"] > 0
    assert report["replanning"]["off"] is None, "it is held against what is measured"
    assert f"auto: {OPTIMISER}: " in caplog.text


def test_the_rules_plan_runs_where_the_optimisers_gains_nothing(timed, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: SECONDS)  # nothing can be kept
    with engine_of(tmp_path) as engine:
        assert engine.plan.planner == RULE and engine.plan.activations is None
        choice = engine.report()["plan_choice"]
    assert choice["chosen"] == RULE and "no faster" in choice["why"]
    assert choice["rule_step_seconds"] == pytest.approx(choice["optimised_step_seconds"], rel=0.03)


def test_the_rules_plan_that_fills_memory_is_as_fast_where_all_fits(timed, calibrated, tmp_path):
    with engine_of(tmp_path, options=None) as engine:
        choice = engine.report()["plan_choice"]
        assert engine.plan.rings == () and choice["chosen"] == RULE and "no faster" in choice["why"]


def test_without_a_calibration_the_rules_plan_runs_and_says_what_would_help(timed, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "offload_rt"), engine_of(tmp_path) as engine:
        assert engine.plan.planner == RULE
        why = engine.report()["plan_choice"]["why"]
        assert why in engine.summary() and json.dumps(engine.report()["plan_choice"])
    assert f"offload-rt calibrate --device cpu --nvme {tmp_path}" in why and why in caplog.text and not timed


@pytest.mark.parametrize("error", [PlanInfeasible, SolverMissing, UnsupportedModule, MemoryError, None])
def test_an_optimiser_that_fails_leaves_the_rules_plan(error, timed, calibrated, tmp_path, monkeypatch):
    """As one does whose plan the runtime refuses."""
    answer = planning.plan_optimal

    def fail(problem, *, freedoms=None):
        if error is None:
            plan = answer(problem)
            return replace(plan, resident=(*plan.resident, "of another model"))
        if error is not PlanInfeasible:
            raise error("no plan here")
        raise PlanInfeasible(tier="device", phase="forward", need_bytes=2, have_bytes=1, ways_out=[])

    monkeypatch.setattr(planning, "plan_optimal", fail)
    with engine_of(tmp_path) as engine:
        assert engine.plan.planner == RULE and timed
        assert "cannot plan this" in engine.report()["plan_choice"]["why"]


def test_models_that_cannot_be_profiled_run_by_the_rule(calibrated, tmp_path):
    with Engine(build_plain(), batch_size=2, seq_len=16, nvme=tmp_path, lr=1e-3, device_memory=64 * MIB) as engine:
        choice = engine.report()["plan_choice"]
    assert choice["chosen"] == RULE and "cannot be called with input_ids alone" in choice["why"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"plan": "optimise"}, None),
        ({"accumulation_steps": 2}, "several micro-batches"),
        ({"emulate": machine(64 * MIB, 0), "device_memory": None}, "under emulate="),
        ({"device_memory": None}, "no device_memory="),
    ],
)
def test_the_optimiser_is_asked_only_where_it_may_be(change, why, timed, calibrated, tmp_path):
    with engine_of(tmp_path, **change) as engine:
        choice = engine.report()["plan_choice"]
    assert choice is None if why is None else (why in choice["why"] and choice["chosen"] == RULE and not timed)


def test_micro_batches_that_the_rule_has_go_together_are_asked_about_one_after_the_other(
    timed, calibrated, tmp_path, monkeypatch
):
    """Each of them can keep what it saves; where nothing can be kept, the rule's plan, fetched once, is as fast."""
    priced, found = [], []
    monkeypatch.setattr(plan_choice, "rule_seconds", lambda *asked: priced.append(asked) or rule_seconds(*asked))
    for name, seconds in ((OPTIMISER, KEPT), (RULE, SECONDS)):
        monkeypatch.setattr(planning, "profile_layer", lambda *_, seconds=seconds, **__: seconds)
        folder = tmp_path / name
        folder.mkdir()
        hardware = machine(2 * MIB, 0)
        calibrated(hardware, folder.resolve())
        with Engine(
            quiet(build(BF16)), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05, lr=1e-2, nvme=folder,
            device_memory=2 * MIB, accumulation_steps=3, options=RuntimeOptions(fill=False),
        ) as engine:  # fmt: skip
            choice = engine.report()["plan_choice"]
            assert choice["chosen"] == name and engine.plan.layer_major is (name == RULE), choice["why"]
            losses = train(engine)
            before = engine.report()["bytes_read"]
            losses += train(engine)
            read = (engine.report()["bytes_read"] - before) / LAYER_MAJOR_STEPS
            found.append((losses, [p.detach().clone() for _, p in sorted(engine.trainable.items())]))
    assert read > 0, "of the rule's plan, in its steady state"
    assert rule_simulation(*priced[-1]).busy_seconds["ssd_read"] * hardware.read_bytes_per_second == pytest.approx(read)
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))


def test_free_memory_is_asked_for_once(timed, calibrated, tmp_path, monkeypatch):
    """There is some MiB less each time; the optimiser and the runtime see the same."""
    free = iter(range(64 * MIB, 0, -MIB))
    monkeypatch.setattr(workload_sizes, "free_memory_bytes", lambda: next(free))
    with engine_of(tmp_path, plan="optimise", device_memory=None) as engine:
        made_of = engine._runtime.made_of
        assert made_of.problem.device_capacity_bytes == made_of.asked.memory_bytes == 64 * MIB


def test_profiling_that_would_take_long_is_left_to_who_asks_for_it(timed, tmp_path):
    workload, streaming, _ = question(build(BF16), tmp_path, machine(64 * MIB, 0), None)
    slow = machine(64 * MIB, 0)
    flops = slow.device.matmul_flops_per_second * profile_seconds(workload, slow)
    rule = plan_streaming(streaming, fill=Fill.NOTHING)
    for seconds, name in ((MAX_SECONDS * 0.99, OPTIMISER), (MAX_SECONDS * 1.01, RULE)):
        asked = replace(slow, device=replace(slow.device, matmul_flops_per_second=flops / seconds))
        plan, choice, _ = choose(workload, streaming, rule, asked)
        assert choice.chosen == name == (RULE if plan is rule else OPTIMISER), choice.why
    assert len(timed) == 1 and "about 61 s" in choice.why
    assert profile_bytes(workload, streaming) > 4 * streaming.activation_bytes


def test_what_profiling_takes_grows_by_tokens_and_attention_by_pairs_of_them(tmp_path):
    hardware = machine(64 * MIB, 0)
    workload, _, _ = question(build(BF16), tmp_path, hardware, None)
    device = replace(hardware.device, attention_forward_efficiency=0.5, attention_backward_efficiency=0.25)
    free = replace(device, attention_forward_efficiency=math.inf, attention_backward_efficiency=math.inf)

    def parts(seq_len, chunk_tokens=None):
        asked = replace(workload, config=replace(workload.config, seq_len=seq_len))
        both, products = (
            profile_seconds(asked, replace(hardware, device=one), chunk_tokens) for one in (device, free)
        )  # fmt: skip
        return products, both - products

    (products, attention), longer = parts(SEQ_LEN), parts(2 * SEQ_LEN)
    width, rate = workload.model.config.hidden_size, device.matmul_flops_per_second
    causal = 2 * BATCH_SIZE * SEQ_LEN**2 * width / rate  # queries by keys and probabilities by values, half of each
    assert attention == pytest.approx(MOST_PASSES * (2 / 0.5 + 2.5 / 0.25) * causal)
    assert longer == (pytest.approx(2 * products), pytest.approx(4 * attention))
    by_chunks = parts(8 * SEQ_LEN, SEQ_LEN)  # two of eight chunks four times, and the whole
    assert by_chunks[1] / parts(8 * SEQ_LEN, 4 * SEQ_LEN)[1] == pytest.approx((1 + 4 / 16) / (1 + 4))


def test_the_rules_rows_are_priced_as_rows(tmp_path):
    """Read by rows from a slow drive, an embedding is waited for; one that stays is not."""
    model = build_lora("llama", torch.bfloat16, 2, 0.0, vocab_size=8192, hidden_size=64)
    _, streaming, problem = question(model, tmp_path, machine(64 * MIB, 0), None)
    stays = plan_streaming(streaming, fill=Fill.NOTHING)
    (block,) = [block for block in streaming.edges if block.rows is not None]
    resident = tuple(name for name in stays.resident if name != block.name)
    by_rows = replace(stays, lookups=lookups_of((block,), Tier.NVME), resident=resident)
    slow = [replace(drive, read_bytes_per_second=1e6) for drive in problem.hardware.drives]
    problem = replace(problem, hardware=replace(problem.hardware, drives=tuple(slow)))
    read = problem.workload.rows_of(next(e for e in problem.workload.classes if e.rows is not None)).read_bytes
    assert rule_seconds(problem, by_rows) == pytest.approx(rule_seconds(problem, stays) + read / 1e6)


def test_profiling_that_takes_more_memory_than_there_is_is_not_tried(timed, tmp_path):
    hardware = machine(64 * MIB, 0)
    workload, streaming, _ = question(build(BF16), tmp_path, hardware, None)
    need, rule = profile_bytes(workload, streaming), plan_streaming(streaming, fill=Fill.NOTHING)
    for have, name in ((need, OPTIMISER), (need - 1, RULE)):
        _, choice, _ = choose(workload, replace(streaming, device_capacity_bytes=have), rule, hardware)
        assert ("the budget is" in choice.why) is (name == RULE)
    assert len(timed) == 1


def test_the_rules_plan_is_priced_as_the_optimisers_are(tmp_path):
    """Layers that stream from a slow drive are waited for; ones that stay do not ask it."""
    _, streaming, problem = question(build(BF16), tmp_path, machine(64 * MIB, 0), None, KEPT)
    streams = plan_streaming(streaming, fill=Fill.NOTHING)
    stays = replace(streams, rings=(), resident=tuple(b.name for b in (*streaming.edges, *streaming.layers)))
    drive = replace(problem.hardware.drives[0], read_bytes_per_second=1e6)
    slow = replace(problem, hardware=replace(problem.hardware, drives=(drive,)))
    computed = 4 * (KEPT.forward + KEPT.backward + 3 * KEPT.decode) + SECONDS.forward + SECONDS.backward
    for asked, plan in ((problem, streams), (problem, stays), (slow, stays)):
        assert rule_seconds(asked, plan) == pytest.approx(computed, rel=0.1)
    assert rule_seconds(slow, streams) > 1.4 * computed
    filled = plan_streaming(streaming)
    assert filled.rings == () and len(filled.activations) == 4, "all stays, and nothing is computed again"
    kept = 4 * (KEPT.kept.forward + KEPT.kept.backward + 2 * KEPT.decode) + SECONDS.forward + SECONDS.backward
    assert rule_seconds(slow, filled) == pytest.approx(kept, rel=0.1)
    with pytest.raises(ValueError, match="cuts"):
        rule_seconds(problem, replace(streams, layer_major=True))


def test_a_rehearsal_that_does_not_fit_goes_on_with_the_rule(timed, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "ROOM", 1000)
    with engine_of(tmp_path, device_memory=3 * MIB) as engine:
        assert engine.plan.planner == "optimiser"
        device = engine._runtime.tiers.account(Tier.DEVICE)
        room, slack = device.capacity_bytes - device.used_bytes, device.holdings[rehearsal.SLACK]
        more = rehearsal.planned_bytes(engine._runtime) + room + slack
        monkeypatch.setattr(rehearsal, "measure", lambda *_: (more, None))
        found = run_steps(BF16.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
    assert report["rehearsal"]["result"] == "planned again" and report["plan"] == RULE
    assert report["plan_choice"]["chosen"] == RULE and "rehearsal" in report["plan_choice"]["why"]
    assert differences(run_plain(BF16), found) == []


def test_a_rehearsal_that_does_not_fit_goes_on_with_the_rule_without_a_drive_too(timed, calibrated, monkeypatch):
    """The optimiser would have all weights in DEVICE memory, the rule only slots: memory has the one copy of them."""
    calibrated(replace(machine(64 * MIB, 64 * MIB), drives=()))
    monkeypatch.setattr(rehearsal, "ROOM", 1000)
    monkeypatch.setattr(rehearsal, "measure", lambda *_: (980_000, None))  # what the rule has room for
    with engine_of(None, device_memory=MIB + MIB // 2, host_memory=64 * MIB) as engine:
        found = run_steps(BF16.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert engine.report()["rehearsal"]["result"] == "planned again" and engine.plan.planner == RULE
    assert differences(run_plain(BF16), found) == []
