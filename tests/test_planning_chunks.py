"""What the optimiser decides of layers that run by chunks: measured, planned, simulated and run, to the rule's bits."""

import functools
import itertools
import weakref
from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, OutOfDeviceMemory
from offload_rt.layers.discover import find_blocks
from offload_rt.plans import planning
from offload_rt.plans.cuts import check_cuts, cuts_of
from offload_rt.plans.plan_choice import OPTIMISER, choose, profile_bytes
from offload_rt.plans.planning import lowered, optimised_adapters
from offload_rt.plans.planning_tokens import GROUPS, INPUT, policies_of
from offload_rt.plans.rule_price import rule_seconds
from offload_rt.profiling import block_profile, chunk_profile
from offload_rt.profiling.chunk_profile import passes, profile_chunked_layer
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.optimiser.mip import plan_optimal
from planners.optimiser.steady import solve_steady
from planners.plans.activations import Action, ActivationPolicy, Chunk, Group, Treatment
from planners.plans.placement import Cuts, DecodeScope, Tier
from planners.problems.cost import class_costs, knobs_of
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import Cuts as RunsCuts
from planners.simulator.division import deal
from planners.simulator.validate import InvalidPlan, check
from tests.parity import BATCH_SIZE, SEQ_LEN, run_steps
from tests.test_parity import differences
from tests.test_plan_choice import calibrated
from tests.test_planning import BF16, KIB, MIB, NF4, PAGE, SECONDS, machine, question
from tests.test_planning_tokens import model_of, plan_by_hand, train
from tests.test_planning_tokens import plans_for_less_and_less as less_and_less

__all__ = ["calibrated"]  # a fixture
FULL = pytest.mark.full
CHUNK = 4
NUM_CHUNKS = 3
BEFORE, QKV, AFTER = (group.value for group in (Group.BEFORE, Group.QKV, Group.AFTER))
AGAIN = (1, 0, 0, 0)


@functools.cache
def seconds_of(case):
    """The bytes that a layer really holds by chunks, with seconds that nobody measured: 0.03 whole, 0.018 all kept."""
    model = model_of(case)
    draft = next(draft for draft in find_blocks(model, bits=4 if case is NF4 else None) if draft.is_layer)
    size = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "chunk_tokens": CHUNK}
    found = profile_chunked_layer(model, draft, **size)
    groups = tuple(replace(g, again=0.006 if g.name == AFTER else 0.003) for g in found.kept.groups)
    kept = replace(found.kept, forward=0.01, backward=0.008, put_away=1e-4, taken_back=2e-4, groups=groups)
    return replace(SECONDS, kept=kept, chunks=found.chunks)


def measured(case, folder, hardware):
    return question(model_of(case), folder, hardware, 4 if case is NF4 else None, seconds_of(case))


def by_hand(problem, shares, **more):
    """A plan of the same shares of every group, or of each one's own."""
    return plan_by_hand(problem, shares, chunk=CHUNK, **more)


def engine_of(case, folder, **given):
    return Engine(
        model_of(case), bits=4 if case is NF4 else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05,
        lr=1e-2, nvme=folder, **given,
    )  # fmt: skip


# what is measured


def test_a_profile_counts_what_a_pass_by_chunks_stores_and_knows_how_often_it_runs(monkeypatch):
    model = model_of(BF16)
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    tokens, take = [], chunk_profile.one_pass
    monkeypatch.setattr(
        chunk_profile, "one_pass", lambda layer, call, on: tokens.append(call.hidden.shape[1]) or take(layer, call, on)
    )
    found = profile_chunked_layer(model, draft, batch_size=2, seq_len=48, chunk_tokens=8)
    assert sum(tokens) == 48 * passes(48, 8) + 48, "and one to count bytes"
    assert {group.name for group in found.kept.groups} == GROUPS
    assert found.kept.saved_bytes == sum(group.num_bytes for group in found.kept.groups)
    twice = profile_chunked_layer(model, draft, batch_size=2, seq_len=96, chunk_tokens=8)
    for one, other in zip(found.kept.groups, twice.kept.groups, strict=True):
        assert other.num_bytes == pytest.approx(2 * one.num_bytes, rel=0.02)
    assert twice.chunks.with_input_bytes == 2 * found.chunks.with_input_bytes > 0
    assert found.chunks.peak_bytes < twice.chunks.peak_bytes < 2 * found.chunks.peak_bytes


def test_layers_that_cannot_be_cut_are_not_asked_about(monkeypatch):
    model = model_of(BF16)
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    with pytest.raises(ConfigError, match="are one chunk"):
        profile_chunked_layer(model, draft, batch_size=2, seq_len=8, chunk_tokens=8)
    draft.modules[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigError, match="could not be measured by chunks"):
        profile_chunked_layer(model, draft, batch_size=2, seq_len=16, chunk_tokens=8)


# what is planned


@pytest.mark.parametrize(("num_blocks", "num_chunks"), [(1, 3), (3, 4), (4, 3), (7, 5)])
def test_dealt_chunks_are_all_there_and_no_block_has_two_more_of_a_kind_than_another(num_blocks, num_chunks, tmp_path):
    _, _, problem = measured(BF16, tmp_path, machine(64 * MIB, 64 * MIB))
    blocks = tuple(map(str, range(num_blocks)))
    entry = replace(problem.workload.classes[0], blocks=blocks, positions=tuple(range(num_blocks)))
    total = num_blocks * num_chunks
    for cut in itertools.combinations_with_replacement(range(0, total + 1, 1 if total < 13 else 3), 3):
        counts = [b - a for a, b in itertools.pairwise((0, *cut, total))]
        parts = deal(entry, [counts, [total, 0, 0, 0]])
        assert sorted(block for _, part in parts for block in part.blocks) == sorted(blocks)
        homes = [homes for homes, part in parts for _ in part.blocks]
        assert all(sum(own) == num_chunks for one in homes for own in one)
        for home, count in enumerate(counts):
            own = [one[0][home] for one in homes]
            assert sum(own) == count and max(own) - min(own) <= 1
        again = [one[0][0] for one, part in parts for _ in part.blocks]
        assert again == sorted(again, reverse=True) and len(parts) <= 4, "the first block computes most again"


def test_prices_are_those_that_were_measured_whatever_the_mix(tmp_path):
    _, _, problem = measured(NF4, tmp_path, machine(64 * MIB, 64 * MIB))
    cuts, seconds = Cuts(chunk_tokens=CHUNK), seconds_of(NF4)
    layer = problem.workload.classes[0]
    assert [saved.name for saved in layer.saved] == [INPUT, BEFORE, QKV, AFTER]
    for scope, decodes in ((DecodeScope.LINEAR, NUM_CHUNKS), (DecodeScope.LAYER, 1)):
        cost = class_costs(problem, cuts, scope)[0]
        assert cost.forward_seconds == pytest.approx(0.01 + decodes * 0.001)
        assert cost.backward_seconds == pytest.approx(0.008 + decodes * 0.001)
        again = sum(cost.recompute_seconds)
        more = decodes * 0.001 if scope is DecodeScope.LINEAR else 0.0
        assert again == pytest.approx(seconds.forward + seconds.backward - 0.018 + more)
        assert [one / again for one in cost.recompute_seconds] == pytest.approx([0, 0.25, 0.25, 0.5])
        swap = [sum(one[phase] for one in cost.swap_seconds) for phase in (0, 1)]
        assert swap == pytest.approx([1e-4, 2e-4])
    for wrong in (
        Cuts(chunk_tokens=CHUNK // 2),
        Cuts(chunk_tokens=SEQ_LEN * BATCH_SIZE),
        replace(cuts, attention_groups=2),
    ):
        with pytest.raises(ValueError, match="measured in 3 chunks"):
            class_costs(problem, wrong, DecodeScope.LINEAR)


plans_for_less_and_less = functools.partial(less_and_less, measured=measured, begin=3 * MIB, less=64 * KIB)


@pytest.fixture(scope="module")
def plans_in_one_tier(tmp_path_factory):
    """Of those that several tests look at, each is made once."""
    return list(plans_for_less_and_less(tmp_path_factory.mktemp("plans"), 0, 2e9))


def planned(plan, name, where):
    """Tokens of all blocks, of each sequence, of one group."""
    splits = [(len(entry.blocks), split) for entry in plan.classes for split in entry.tokens if split.name == name]
    return sum(count * getattr(split, f"{where}_tokens") for count, split in splits)


@pytest.mark.parametrize("host", [0, pytest.param(64 * MIB, marks=FULL)])
def test_less_memory_means_less_kept_of_chunks_and_slower_plans_that_the_validator_takes(
    host, plans_in_one_tier, tmp_path
):
    kept, seconds, mixed, put_away = [], [], 0, 0
    plans = plans_for_less_and_less(tmp_path, host, 2e9, least=PAGE) if host else plans_in_one_tier
    for _, problem, streaming, plan in plans:
        check(problem, plan)
        seconds.append(plan.predicted["step_seconds"])
        assert plan.predicted["lower_bound_seconds"] <= seconds[-1]
        kept.append(sum(planned(plan, name, "device") for name in GROUPS))
        put_away += sum(planned(plan, name, "host") + planned(plan, name, "nvme") for name in GROUPS)
        policies = lowered(plan, streaming, problem).activations
        assert len(policies) == 4
        assert all([span.end for span in policy.spans(SEQ_LEN)] == [4, 8, 12] for policy in policies.values())
        mixed += any(len({chunk.action for chunk in policy.chunks}) > 1 for policy in policies.values())
    assert kept[0] == 4 * 3 * SEQ_LEN > kept[-1] and put_away and mixed
    assert min(seconds) >= 0.999 * seconds[0] and seconds[-1] > 1.2 * seconds[0]


def test_chunks_are_counted_in_whole_numbers(plans_in_one_tier):
    mixed = 0
    for _, problem, _, plan in plans_in_one_tier:
        knobs = replace(knobs_of(plan), inputs=plan.layer_inputs)
        whole = solve_steady(problem, knobs, unit_seconds=0.1, in_whole_numbers=True)
        relaxed = solve_steady(problem, knobs, unit_seconds=0.1)
        for found in (whole, relaxed):
            before, qkv, after = found.fractions[0].tokens[1:]
            assert before[0] <= after[0] + 1e-6, "what precedes attention has a graph where what follows it has one"
        counts = [4 * NUM_CHUNKS * share for split in whole.fractions[0].tokens[1:] for share in split]
        assert counts == pytest.approx([round(count) for count in counts], abs=1e-5)
        mixed += any(abs(12 * s - round(12 * s)) > 1e-3 for split in relaxed.fractions[0].tokens[1:] for s in split)
    assert mixed


def test_what_the_runtime_cannot_do_with_chunks_is_no_plan(tmp_path):
    _, _, problem = measured(BF16, tmp_path, machine(64 * MIB, 64 * MIB))
    plan = by_hand(problem, (1 / 3, 0, 1 / 3, 1 / 3))
    check(problem, plan)

    def refused(match, name, **changes):
        entry = plan.classes[0]
        tokens = tuple(replace(split, **changes) if split.name == name else split for split in entry.tokens)
        with pytest.raises(InvalidPlan, match=match):
            check(problem, replace(plan, classes=(replace(entry, tokens=tokens), *plan.classes[1:])))

    refused("go different ways", AFTER, recompute_tokens=3, host_tokens=5)
    refused("is computed again where what follows", BEFORE, recompute_tokens=8, host_tokens=0)


def test_each_group_of_each_chunk_has_the_treatment_that_its_range_says(tmp_path):
    _, _, problem = measured(BF16, tmp_path, machine(64 * MIB, 64 * MIB))
    plan = by_hand(problem, AGAIN)
    entry = plan.classes[0]

    def policy(**tokens):
        splits = [replace(split, **{"recompute_tokens": 0, **tokens[split.name]}) for split in entry.tokens[1:]]
        parts = (replace(entry, tokens=(entry.tokens[0], *splits)), *plan.classes[1:])
        return policies_of(replace(plan, classes=parts))[entry.blocks[0]]

    again, keep = Treatment(action=Action.RECOMPUTE), Treatment(action=Action.KEEP)
    nvme = Treatment(action=Action.SWAP, tier=Tier.NVME)
    assert policies_of(plan)[entry.blocks[0]] == ActivationPolicy(
        chunks=(Chunk(num_tokens=4, action=Action.RECOMPUTE),)
    )
    mixed = policy(
        before={"recompute_tokens": 4, "device_tokens": 8}, qkv={"nvme_tokens": 8, "host_tokens": 4},
        after={"recompute_tokens": 8, "device_tokens": 4},
    )  # fmt: skip
    assert mixed.chunks == (
        Chunk(num_tokens=4, action=Action.RECOMPUTE, qkv=nvme),
        Chunk(num_tokens=4, action=Action.RECOMPUTE, before=keep, qkv=nvme),
        Chunk(num_tokens=4, action=Action.KEEP, qkv=Treatment(action=Action.SWAP, tier=Tier.HOST)),
    )
    assert mixed.spans(12)[0].of(Group.BEFORE) == again


# what is run

RUNS = {
    "all again": (BF16, 64 * MIB, AGAIN, {}),
    "kept": (BF16, 64 * MIB, (0, 0, 0, 1), {}),
    "a third again, the rest in HOST": (
        BF16,
        64 * MIB,
        (1 / 3, 0, 2 / 3, 0),
        {"weights": (0, 1, 0), "inputs": Tier.HOST},
    ),
    "each way": (BF16, 64 * MIB, (0.25, 0.25, 0.25, 0.25), {"weights": (0.3, 0.3, 0.4), "inputs": Tier.NVME}),
    "one tier, half on NVMe": (NF4, 0, (0.5, 0.5, 0, 0), {"weights": (0, 0, 1), "inputs": Tier.NVME}),
    "decoded whole": (NF4, 64 * MIB, (0.5, 0, 0.25, 0.25), {"scope": DecodeScope.LAYER}),
}


QUICK = ("all again", "each way", "one tier, half on NVMe")


@functools.cache
def ruled(case):
    """Steps with layers by the same chunks, computed again: what the fixed rule does."""
    policy = ActivationPolicy(chunks=(Chunk(num_tokens=CHUNK, action=Action.RECOMPUTE),))
    with Engine(
        model_of(case), bits=4 if case is NF4 else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05,
        lr=1e-2, options=RuntimeOptions(activations=policy),
    ) as engine:  # fmt: skip
        return run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=FULL) for name in RUNS])
def test_a_plan_of_chunks_gives_the_rules_bits_and_moves_what_it_says(name, tmp_path):
    case, host, shares, more = RUNS[name]
    hardware = machine(64 * MIB, host)
    _, streaming, problem = measured(case, tmp_path, hardware)
    plan = by_hand(problem, shares, **more)
    check(problem, plan)
    with engine_of(case, tmp_path, plan=lowered(plan, streaming, problem), emulate=hardware) as engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(ruled(case), found) == []
        before = engine.report()
        train(engine, 2)
        after = engine.report()
    did = {key: after["tokenwise"][key] - before["tokenwise"][key] for key in before["tokenwise"] if key != "refused"
           and key != "bytes_by_group"}  # fmt: skip
    layers = problem.workload.classes[0]
    each = {saved.name: saved.bytes_per_token * BATCH_SIZE for saved in layers.saved}
    swapped = sum(each[name] * (planned(plan, name, "host") + planned(plan, name, "nvme")) for name in GROUPS | {INPUT})
    assert did["swapped_bytes"] == pytest.approx(2 * swapped, rel=0.02)
    kept = sum(each[name] * planned(plan, name, "device") for name in GROUPS | {INPUT})
    small = 2 * 4 * layers.measured.kept.small_bytes
    assert 2 * kept <= did["kept_bytes"] + PAGE and did["kept_bytes"] <= 2 * kept + small + PAGE
    again = {name: planned(plan, name, "recompute") // CHUNK for name in GROUPS}
    assert did["num_first_replays"] == 2 * (again[BEFORE] + again[QKV])
    assert did["num_second_replays"] == 2 * again[AFTER]
    assert did["num_attentions"] == did["num_passes"] == 2 * 4
    assert did["no_room_bytes"] == did["num_whole"] == 0
    expected = plan.predicted["busy_seconds"]
    rates = {"ssd_read": 1e9, "ssd_write": 1e9, "host_to_device": 2e9, "device_to_host": 2e9}
    for link, taken in before["link_busy_seconds"].items():
        moved = (after["link_busy_seconds"][link] - taken) / 2 * rates[link]
        pages = PAGE * 64 * 12 if link.startswith("ssd") and plan.predicted["ssd_bytes_written_per_step"] else 0
        assert 0.98 * expected[link] * rates[link] - PAGE <= moved <= 1.02 * expected[link] * rates[link] + pages + PAGE
    assert after["memory"]["device"] <= plan.predicted_bytes(Tier.DEVICE) + problem.hardware.device.reserve_bytes + (
        engine.plan.allocator_slack_bytes
    )
    assert after["memory"]["host"] <= plan.predicted_bytes(Tier.HOST) + problem.hardware.host.memory_bytes // 50


@pytest.mark.parametrize(("host", "link"), [(0, 2e9), pytest.param(400 * KIB, 2e7, marks=FULL)])
def test_optimised_chunks_run_within_the_budgets_that_they_were_planned_for(host, link, plans_in_one_tier, tmp_path):
    plans = plans_for_less_and_less(tmp_path, host, link) if host else plans_in_one_tier
    for hardware, problem, streaming, plan in plans:  # noqa: B007
        if sum(planned(plan, name, "recompute") for name in GROUPS) > SEQ_LEN:
            break
    with engine_of(BF16, tmp_path, plan=lowered(plan, streaming, problem), emulate=hardware) as engine:
        train(engine)
        report = engine.report()
    assert report["tokenwise"]["no_room_bytes"] == 0 < report["tokenwise"]["kept_bytes"]
    assert report["memory"]["device"] <= hardware.device.memory_bytes and report["memory"]["host"] <= host


# what is chosen


@pytest.fixture
def timed(monkeypatch):
    """Layers that take what nobody measures; by which chunks that was asked."""
    asked = []
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: asked.append(None) or SECONDS)
    monkeypatch.setattr(
        planning, "profile_chunked_layer", lambda *_, **size: asked.append(size["chunk_tokens"]) or seconds_of(BF16)
    )
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: 1e9)
    return asked


def by_chunks(streaming, device):
    """The rule's question and plan where only chunks of CHUNK tokens are left to it."""
    cuts = RunsCuts(head_chunk_tokens=None, chunk_tokens=CHUNK, layer_major=None)
    streaming = replace(streaming, cuts=cuts, device_capacity_bytes=device)
    return streaming, plan_streaming(streaming)


def test_auto_takes_the_optimisers_plan_of_the_rules_own_chunks(timed, tmp_path):
    hardware = machine(64 * MIB, 0)
    workload, streaming, _ = question(model_of(BF16), tmp_path, hardware, None)
    streaming, rule = by_chunks(streaming, 64 * MIB)
    assert cuts_of(rule, workload).chunk_tokens == CHUNK
    plan, choice, asked = choose(workload, streaming, rule, hardware)
    assert choice.chosen == OPTIMISER and timed == [CHUNK], choice.why
    check_cuts(plan, workload, cuts_of(rule, workload))
    assert choice.optimised_step_seconds < 0.9 * choice.rule_step_seconds
    again = 4 * (seconds_of(BF16).forward + seconds_of(BF16).backward)
    assert rule_seconds(asked.question, rule) == choice.rule_step_seconds >= again
    with pytest.raises(ValueError, match="other cuts"):
        rule_seconds(asked.question, replace(rule, activations=None))
    need = profile_bytes(workload, streaming, CHUNK)
    tight = replace(streaming, device_capacity_bytes=need - 1)
    assert "profiling a layer takes" in choose(workload, tight, rule, hardware)[1].why and timed == [CHUNK]


def test_a_session_runs_the_optimisers_chunks_to_the_rules_bits(timed, calibrated, tmp_path):
    cuts = RunsCuts(head_chunk_tokens=None, chunk_tokens=CHUNK, layer_major=None)
    given = {"device_memory": 64 * MIB, "options": RuntimeOptions(cuts=cuts)}
    with engine_of(BF16, tmp_path, **given) as engine:
        assert engine.plan.planner == "optimiser" and timed == [CHUNK]
        found = run_steps(BF16.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
    assert differences(ruled(BF16), found) == []
    assert report["plan_choice"]["chosen"] == OPTIMISER and report["memory"]["device"] <= 64 * MIB
    done = report["tokenwise"]
    assert (
        done["kept_bytes"] > 0 == done["num_second_replays"] and done["num_chunks"] == NUM_CHUNKS * done["num_passes"]
    )


def test_a_run_that_goes_on_keeps_its_chunks_and_a_new_one_takes_them_only_where_it_must(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "CHUNK_TOKENS", (CHUNK,))
    hardware = machine(64 * MIB, 0)
    workload, streaming, _ = question(model_of(BF16), tmp_path, hardware, None)
    whole, _ = optimised_adapters(workload, streaming, hardware)
    assert timed == [None] and whole.activations is None
    plan, _ = optimised_adapters(workload, by_chunks(streaming, 64 * MIB)[0], hardware)
    assert timed == [None, CHUNK] and cuts_of(plan, workload).chunk_tokens == CHUNK

    def whole_does_not_fit(asked, *, freedoms=None):
        return plan_optimal(with_little(asked) if timed[-1] is None else asked)

    monkeypatch.setattr(planning, "plan_optimal", whole_does_not_fit)
    plan, _ = optimised_adapters(workload, streaming, hardware)
    assert timed[2:] == [None, CHUNK] and cuts_of(plan, workload).chunk_tokens == CHUNK


@pytest.mark.parametrize("at", ["_warm", "_saving"])
def test_where_a_gpu_refuses_a_layer_memory_shorter_chunks_are_profiled_with_all_of_it(
    at, tmp_path, monkeypatch, caplog
):
    """The estimate said that the profile would fit; what it held is free before the next one begins. `at`: computed
    again, or kept.
    """
    monkeypatch.setattr(planning, "CHUNK_TOKENS", (CHUNK,))
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: 1e9)
    held, asked = [], []

    def refused(*_):
        large = torch.ones(16)
        held.append(weakref.ref(large))
        if at == "_saving":  # as an arena says it
            raise OutOfDeviceMemory("CUDA out of memory. Tried to allocate 2 GiB", wanted=2 << 30, free=0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def by_chunks(*_, chunk_tokens, **__):
        asked.append((chunk_tokens, [one() for one in held]))
        return seconds_of(BF16)

    monkeypatch.setattr(block_profile, at, refused)
    monkeypatch.setattr(planning, "profile_chunked_layer", by_chunks)
    hardware = machine(64 * MIB, 0)
    workload, streaming, _ = question(model_of(BF16), tmp_path, hardware, None)
    with caplog.at_level("INFO", "offload_rt"):
        plan, _ = optimised_adapters(workload, streaming, hardware)
    assert cuts_of(plan, workload).chunk_tokens == CHUNK and asked == [(CHUNK, [None])]
    lines = [record.getMessage() for record in caplog.records]
    about = f"s at the rates of {hardware.name}"
    assert [line for line in lines if line.startswith("plan: timing a layer of each kind, about") and about in line]
    assert [line for line in lines if f"each kind by chunks of {CHUNK} tokens, about" in line]
    assert [line for line in lines if "no room for timing a layer: CUDA out of memory. Tried" in line]
    monkeypatch.setattr(planning, "CHUNK_TOKENS", ())
    with pytest.raises(PlanInfeasible, match="refused by the GPU"):
        optimised_adapters(workload, streaming, hardware)


def with_little(problem):
    """The problem on a machine where nothing fits."""
    device = replace(problem.hardware.device, memory_bytes=problem.hardware.device.reserve_bytes + 1)
    return replace(problem, hardware=replace(problem.hardware, device=device))
