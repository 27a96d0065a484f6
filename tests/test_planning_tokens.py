"""What the optimiser decides of activations, measured, planned and run: bits, bytes, recomputes, memory, links."""

import functools
import itertools
import logging
from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError
from offload_rt.layers.discover import find_blocks
from offload_rt.plans import planning
from offload_rt.plans.planning import SLACK_DIVISOR, lowered
from offload_rt.plans.planning_tokens import ACTIVATIONS, policies_of
from offload_rt.profiling import block_profile
from offload_rt.profiling.block_profile import profile_layer
from offload_rt.tokenwise.saved import MIN_SWAPPED_BYTES
from offload_rt.tokenwise.slicing import NotTokenLocal
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.optimiser.choices import combinations
from planners.optimiser.expand import Fractions, expand, with_prediction
from planners.optimiser.mip import plan_optimal
from planners.optimiser.steady import solve_steady
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import Cuts, DecodeScope, Tier, TokenSplit, UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.problems.cost import Knobs
from planners.rule.filling import KEPT_TENSORS
from planners.simulator.division import divided, home_of_each
from planners.simulator.simulate import simulate
from planners.simulator.step_work import floor_seconds
from planners.simulator.validate import InvalidPlan, check
from tests.conftest import language_batch
from tests.parity import BATCH_SIZE, SEQ_LEN, build, run_plain, run_steps
from tests.test_parity import differences
from tests.test_planning import BF16, KIB, MIB, NF4, PAGE, SECONDS, machine, question

KEPT, HOST, NVME, AGAIN = (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)
EACH = (0.25, 0.25, 0.25, 0.25)
STEPS = 2

CASES = {
    "kept": (BF16, 64 * MIB, KEPT, {}),
    "to HOST": (BF16, 64 * MIB, HOST, {}),
    "to NVMe": (BF16, 64 * MIB, NVME, {}),
    "each way, all from HOST": (BF16, 64 * MIB, EACH, {"weights": (0, 1, 0), "inputs": Tier.HOST}),
    "one tier, half on NVMe": (NF4, 0, (0.5, 0.5, 0, 0), {"weights": (0, 0, 1), "inputs": Tier.NVME}),
    "decoded whole, half in HOST": (NF4, 64 * MIB, (0, 0, 0.5, 0.5), {"scope": DecodeScope.LAYER}),
}
"""A model, bytes of HOST, shares (computed again, NVMe, HOST, kept), and what else the plan says."""
QUICK = ("each way, all from HOST", "one tier, half on NVMe", "decoded whole, half in HOST")


def model_of(case):
    """A tiny model whose first layer saves what the others do: its input wants a gradient as theirs does."""
    model = build(case)
    model.enable_input_require_grads()
    return model


@functools.cache
def seconds_of(case):
    """The bytes that a layer really saves, with seconds that nobody measured."""
    model = model_of(case)
    draft = next(draft for draft in find_blocks(model, bits=4 if case is NF4 else None) if draft.is_layer)
    kept = profile_layer(model, draft, batch_size=BATCH_SIZE, seq_len=SEQ_LEN).kept
    return replace(SECONDS, kept=replace(kept, forward=0.01, backward=0.008, put_away=1e-4, taken_back=2e-4))


def measured(case, folder, hardware):
    """Workload, sizes and the problem of a model on a machine."""
    return question(model_of(case), folder, hardware, 4 if case is NF4 else None, seconds_of(case))


def plan_by_hand(problem, shares, *, weights=(1, 0, 0), inputs=Tier.DEVICE, scope=DecodeScope.LINEAR, chunk=None):
    """A plan of these shares of what layers save."""
    knobs = Knobs(
        update_mode=UpdateMode.AFTER, slots=2, cuts=Cuts(chunk_tokens=chunk or problem.workload.tokens),
        decode_scope=scope, inputs=inputs,
    )  # fmt: skip
    kept = tuple(float(inputs is tier) for tier in (Tier.NVME, Tier.HOST, Tier.DEVICE))
    fractions = [
        Fractions(
            weights=weights if entry.is_layer else (1, 0, 0),
            tokens=tuple(shares if saved.recomputable else (0.0, *kept) for saved in entry.saved),
            updates={(Tier.DEVICE, UpdatePlace.DEVICE, False): 1.0},
        )
        for entry in problem.workload.classes
    ]
    plan = expand(problem, knobs, fractions, planner="by hand")
    return with_prediction(problem, plan, simulate(divided(problem, plan), plan))


def tokens_of(plan, block):
    entry = next(entry for entry in plan.classes if block in entry.blocks)
    return next((split for split in entry.tokens if split.name == ACTIVATIONS), None)


def planned_bytes(plan, where):
    """What a step's activations, without layer inputs, take in a tier."""
    splits = [tokens_of(plan, block) for entry in plan.classes for block in entry.blocks]
    return sum(s.bytes_per_token * BATCH_SIZE * getattr(s, f"{where}_tokens") for s in splits if s is not None)


def train(engine, num_steps=STEPS):
    """Steps without padding, whose masks no measurement foresees."""
    for number in range(num_steps):
        engine.backward(engine(**language_batch(number, BATCH_SIZE, SEQ_LEN)).loss)
        engine.step()


# what is measured


@pytest.mark.parametrize(("bits", "trains"), [(None, False), (4, False), (None, True)])
def test_a_profile_counts_what_plain_autograd_saves(bits, trains):
    model = model_of(NF4 if bits else BF16)
    if trains:
        model = model.get_base_model().requires_grad_(True)
    draft = next(draft for draft in find_blocks(model, bits=bits) if draft.is_layer)
    assert draft.trains is trains
    kept = profile_layer(model, draft, batch_size=BATCH_SIZE, seq_len=SEQ_LEN).kept
    layer = draft.modules[0]
    layer.gradient_checkpointing = False
    call = block_profile.call_of(model, layer, BATCH_SIZE, SEQ_LEN)
    arguments = [call.hidden, *(t for t in call.kwargs["position_embeddings"]), *layer.parameters()]
    stays = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stays:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(call.hidden.requires_grad_(), *call.rest, **call.kwargs)
    sizes = [storage.nbytes() for storage in held.values()]
    assert kept.saved_bytes == sum(size for size in sizes if size >= MIN_SWAPPED_BYTES) > 0
    assert kept.small_bytes == sum(size for size in sizes if size < MIN_SWAPPED_BYTES) > 0
    del output


def test_a_layer_whose_saving_cannot_be_measured_is_recomputed_whole_and_that_is_said(tmp_path, monkeypatch, caplog):
    def apply(self, call):
        raise NotTokenLocal("no")

    monkeypatch.setattr(block_profile.TokenwiseLayer, "apply", apply)
    model = model_of(BF16)
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    with caplog.at_level(logging.WARNING, "offload_rt"):
        seconds = profile_layer(model, draft, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)
    assert seconds.kept is None and seconds.backward > 0
    assert "so that they are recomputed whole" in caplog.text
    _, streaming, problem = question(model, tmp_path, machine(64 * MIB, 64 * MIB), None, seconds)
    plan = lowered(plan_optimal(problem), streaming, problem)
    assert plan.activations is None and [split.name for split in plan.entry("layer").tokens] == ["input"]


# what is planned


@pytest.mark.parametrize("counts", [(0, 0, 0, 4), (3, 1, 0, 0), (0, 2, 3, 1), (1, 2, 2, 3), (5, 1, 1, 1), (0, 0, 7, 0)])
def test_every_block_gets_one_home_and_what_is_kept_is_kept_of_the_last(counts):
    homes = home_of_each(counts)
    assert [homes.count(home) for home in range(4)] == list(counts)
    assert set(homes[len(homes) - counts[3] :]) <= {3}
    assert not counts[0] or homes[0] == 0


def test_swapped_blocks_lie_apart():
    assert home_of_each((4, 0, 2, 2)) == [0, 0, 2, 0, 2, 0, 3, 3]
    assert home_of_each((0, 2, 4, 0)) == [2, 2, 1, 2, 2, 1]


def plans_for_less_and_less(folder, host, link, *, measured=measured, begin=1400 * KIB, less=80 * KIB, least=None):
    """(hardware, problem, streaming, plan) for ever less DEVICE memory, from `begin` on, until nothing fits.

    With `least`, from there on by ever smaller steps, down to that many bytes: the last plan is then of the least
    memory that any plan takes, but for so much, wherever the steps fall.
    """
    hardware = machine(begin, host)
    links = replace(hardware.links, host_to_device_bytes_per_second=link, device_to_host_bytes_per_second=link)
    hardware = replace(hardware, links=links)
    taken = begin
    while True:
        _, streaming, problem = measured(BF16, folder, hardware)
        try:
            plan = plan_optimal(problem)
        except PlanInfeasible:
            less //= 2
            if least is None or less < least:
                return
        else:
            yield hardware, problem, streaming, plan
            taken = min(
                hardware.device.memory_bytes,
                plan.predicted_bytes(Tier.DEVICE) + problem.hardware.device.reserve_bytes,
            )
        hardware = replace(hardware, device=replace(hardware.device, memory_bytes=taken - less))


@pytest.fixture(scope="module")
def plans_in_one_tier(tmp_path_factory):
    """Of those that several tests look at, each is made once."""
    return list(plans_for_less_and_less(tmp_path_factory.mktemp("plans"), 0, 2e9))


def test_less_memory_means_less_kept_and_slower_plans_in_whole_layers(plans_in_one_tier):
    kept, seconds = [], []
    for _, problem, streaming, plan in plans_in_one_tier:
        check(problem, plan)
        kept.append(sum(len(e.blocks) for e in plan.classes for s in e.tokens if s.name == ACTIVATIONS and
                        s.device_tokens == SEQ_LEN))  # fmt: skip
        seconds.append(plan.predicted["step_seconds"])
        assert plan.predicted["lower_bound_seconds"] <= seconds[-1]
        assert Plan.from_json(plan.to_json()) == plan
        policies = lowered(plan, streaming, problem).activations or {}
        assert sum(policy.chunks[0].action is Action.KEEP for policy in policies.values()) == kept[-1]
    assert kept == sorted(kept, reverse=True) and {0, 4} < set(kept)
    assert all(later >= 0.99 * before for before, later in zip(seconds, seconds[1:], strict=False))


def test_a_fast_link_is_used_for_what_does_not_fit(tmp_path):
    plans = [plan for *_, plan in plans_for_less_and_less(tmp_path, 64 * MIB, 2e9)]
    assert any(planned_bytes(plan, "host") for plan in plans)
    tiers = plans_for_less_and_less(tmp_path, 64 * MIB, 1e6)  # swapping a layer takes longer than computing it again
    assert not any(planned_bytes(plan, "host") for *_, plan in tiers)


def test_blocks_are_counted_in_whole_numbers_and_the_bound_is_the_relaxations(tmp_path):
    _, _, problem = measured(BF16, tmp_path, machine(1100 * KIB, 0))
    unit = floor_seconds(problem)
    mixed = 0
    for knobs in itertools.chain.from_iterable(combinations(problem)):
        relaxed = solve_steady(problem, knobs, unit_seconds=unit)
        whole = solve_steady(problem, knobs, unit_seconds=unit, in_whole_numbers=True)
        if relaxed is None or whole is None:
            continue
        counts = [4 * share for share in whole.fractions[0].tokens[1]]
        assert counts == pytest.approx([round(count) for count in counts], abs=1e-6)
        mixed += any(abs(4 * share - round(4 * share)) > 1e-3 for share in relaxed.fractions[0].tokens[1])
        assert whole.step_seconds >= relaxed.step_seconds * (1 - 1e-6)
        assert whole.bound_seconds == relaxed.bound_seconds <= relaxed.step_seconds * (1 + 1e-6)
    assert mixed


def test_what_the_runtime_cannot_do_with_tokens_is_no_plan(tmp_path):
    _, _, problem = measured(BF16, tmp_path, machine(64 * MIB, 64 * MIB))
    plan = plan_by_hand(problem, (0.5, 0, 0.25, 0.25))
    check(problem, plan)

    def refused(match, index, **changes):
        entry = plan.classes[index]
        tokens = (entry.tokens[0], replace(entry.tokens[1], **changes))
        classes = (*plan.classes[:index], replace(entry, tokens=tokens), *plan.classes[index + 1 :])
        with pytest.raises(InvalidPlan, match=match):
            check(problem, replace(plan, classes=classes))

    assert [entry.name for entry in plan.classes[:3]] == ["layer, computed again", "layer, in HOST", "layer, kept"]
    refused("go different ways", 2, device_tokens=SEQ_LEN - 1, host_tokens=1)
    refused("bytes a token", 2, bytes_per_token=1.0)
    refused("of 12 tokens", 2, device_tokens=SEQ_LEN - 1)
    odd = replace(plan.classes[0], blocks=("nobody",))
    with pytest.raises(InvalidPlan, match="is no part of a class"):
        check(problem, replace(plan, classes=(odd, *plan.classes[1:])))
    with pytest.raises(InvalidPlan, match="has classes of"):
        check(problem, replace(plan, classes=plan.classes[1:]))


# what is run


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_a_plan_of_whole_layers_gives_plain_bits_and_moves_what_it_says(name, tmp_path):
    case, host, shares, more = CASES[name]
    hardware = machine(64 * MIB, host)
    _, streaming, problem = measured(case, tmp_path, hardware)
    plan = plan_by_hand(problem, shares, **more)
    check(problem, plan)
    with Engine(
        model_of(case), bits=4 if case is NF4 else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05,
        lr=1e-2, nvme=tmp_path, plan=lowered(plan, streaming, problem), emulate=hardware,
    ) as engine:  # fmt: skip
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(run_plain(case), found) == []
        before = engine.report()
        train(engine)
        after = engine.report()
        assert engine._runtime.decoder.counters.overflow_bytes == 0
    window = after["holdings"]["device"].get("swapped activations on their way", 0)
    assert (window > 0) is (after["tokenwise"]["swapped_bytes"] > 0 and any(shares[1:3]))
    assert engine._runtime.heap._kept_bytes >= window + after["holdings"]["device"].get("kept activations", 0)
    did = {key: after["tokenwise"][key] - before["tokenwise"][key] for key in ("kept_bytes", "swapped_bytes")}
    layers = problem.workload.classes[0].blocks
    actions = [tokens_of(plan, block) for block in layers]
    again = sum(split.recompute_tokens == SEQ_LEN for split in actions)
    inputs = streaming.layer_input_bytes * (len(layers) - again)  # of those computed again others count
    put_away = plan.layer_inputs is not Tier.DEVICE
    assert did["swapped_bytes"] == STEPS * (
        planned_bytes(plan, "host") + planned_bytes(plan, "nvme") + inputs * put_away
    )
    small = problem.workload.classes[0].measured.kept.small_bytes * (len(layers) - again)
    assert did["kept_bytes"] == STEPS * (planned_bytes(plan, "device") + small + inputs * (not put_away))
    assert after["tokenwise"]["no_room_bytes"] == after["tokenwise"]["num_whole"] == 0
    assert after["recomputes"] - before["recomputes"] == STEPS * again
    expected = plan.predicted["busy_seconds"]
    rates = {"ssd_read": 1e9, "ssd_write": 1e9, "host_to_device": 2e9, "device_to_host": 2e9}
    for link, taken in before["link_busy_seconds"].items():
        num_bytes = (after["link_busy_seconds"][link] - taken) / STEPS * rates[link]
        pages = PAGE * KEPT_TENSORS * len(layers) if link.startswith("ssd") and planned_bytes(plan, "nvme") else 0
        assert 0.999 * expected[link] * rates[link] - 1 <= num_bytes <= 1.001 * expected[link] * rates[link] + pages + 1
    granted = engine.plan.allocator_slack_bytes - streaming.allocator_slack_bytes // SLACK_DIVISOR
    device_bytes = plan.predicted_bytes(Tier.DEVICE) + problem.hardware.device.reserve_bytes + granted
    assert after["memory"]["device"] <= min(device_bytes, 64 * MIB)
    assert after["memory"]["host"] <= plan.predicted_bytes(Tier.HOST) + 12 * PAGE


@pytest.mark.parametrize(("host", "link"), [(0, 2e9), (400 * KIB, 2e7)])
def test_an_optimised_mix_runs_within_the_budgets_that_it_was_made_for(
    host, link, plans_in_one_tier, tmp_path, monkeypatch
):
    plans = plans_for_less_and_less(tmp_path, host, link) if host else plans_in_one_tier
    for hardware, problem, _, plan in plans:  # noqa: B007
        homes = [entry.name for entry in plan.classes if entry.name.startswith("layer, ")]
        if len(homes) > 1:
            break
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: seconds_of(BF16))
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: 1e9)
    with Engine(
        model_of(BF16), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, lr=1e-2, nvme=tmp_path, plan="optimise",
        emulate=hardware,
    ) as engine:  # fmt: skip
        assert [engine.plan.entry(home).blocks for home in homes] == [plan.entry(home).blocks for home in homes]
        train(engine)
        report = engine.report()
    assert report["tokenwise"]["no_room_bytes"] == 0 < report["tokenwise"]["kept_bytes"]
    assert report["memory"]["device"] <= hardware.device.memory_bytes and report["memory"]["host"] <= host


def test_a_plan_whose_classes_and_activations_differ_is_refused(tmp_path):
    hardware = machine(64 * MIB, 64 * MIB)
    _, streaming, problem = measured(BF16, tmp_path, hardware)
    plan = lowered(plan_by_hand(problem, (0.5, 0, 0, 0.5)), streaming, problem)

    def refused(match, broken):
        with pytest.raises(ConfigError, match=match):
            Engine(model_of(BF16), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=tmp_path, plan=broken, emulate=hardware)

    refused("are not what its class says", replace(plan, activations=None))
    refused("2 differ", replace(plan, activations={}))
    entry = plan.classes[1]
    short = replace(entry, tokens=(entry.tokens[0], replace(entry.tokens[1], device_tokens=SEQ_LEN - 1)))
    refused("places 11 tokens of 'activations'", replace(plan, classes=(plan.classes[0], short, *plan.classes[2:])))


# shares of tokens


def split(**tokens):
    every = {f"{where}_tokens": tokens.get(where, 0) for where in ("recompute", "nvme", "host", "device")}
    return TokenSplit(name=ACTIVATIONS, **every)


def test_shares_of_tokens_become_chunks_that_end_where_the_shares_do(tmp_path):
    _, streaming, problem = measured(BF16, tmp_path, machine(64 * MIB, 64 * MIB))
    plan = plan_by_hand(problem, AGAIN)
    entry = plan.entry("layer")

    def chunks(cuts, *splits):
        tokens = (entry.tokens[0], *splits)
        policies = policies_of(replace(plan, cuts=cuts, classes=(replace(entry, tokens=tokens), *plan.classes[1:])))
        assert set(policies) == set(entry.blocks) and len({id(policy) for policy in policies.values()}) == 1
        return [(c.num_tokens, c.action.value, c.tier and c.tier.value) for c in policies[entry.blocks[0]].chunks]

    mixed = split(recompute=5, nvme=1, host=2, device=4)
    whole = Cuts(chunk_tokens=BATCH_SIZE * SEQ_LEN)
    assert chunks(whole, mixed) == [
        (5, "recompute", None), (1, "swap", "nvme"), (2, "swap", "host"), (4, "keep", None),
    ]  # fmt: skip
    assert chunks(Cuts(chunk_tokens=4), split(recompute=6, device=6)) == [
        (4, "recompute", None), (2, "recompute", None), (4, "keep", None), (2, "keep", None),
    ]  # fmt: skip
    assert chunks(Cuts(chunk_tokens=12, attention_groups=2), split(recompute=12)) == [(12, "recompute", None)]
    with pytest.raises(ValueError, match="go different ways"):
        chunks(whole, mixed, replace(split(device=12), name="more"))


def test_shares_of_tokens_run_to_the_bits_of_recomputing_the_same_chunks(tmp_path):
    hardware = machine(64 * MIB, 64 * MIB)
    _, streaming, problem = measured(BF16, tmp_path, hardware)
    free = replace(problem, capabilities=replace(problem.capabilities, token_shares=True))
    plan = plan_by_hand(free, EACH)
    check(free, plan)
    with pytest.raises(InvalidPlan, match="go different ways"):
        check(problem, plan)
    traces = []
    recomputed = ActivationPolicy(chunks=(Chunk(num_tokens=SEQ_LEN // 4, action=Action.RECOMPUTE),))
    for given in (
        {"plan": lowered(plan, streaming, problem), "emulate": hardware},
        {"options": RuntimeOptions(activations=recomputed)},
    ):
        with Engine(
            model_of(BF16), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05, lr=1e-2, nvme=tmp_path, **given
        ) as engine:
            traces.append(run_steps(BF16.accumulation, engine, engine.backward, engine.trainable, engine.step))
            report = engine.report()["tokenwise"]
            if "plan" in given:
                num_chunks = report["num_chunks"]
                assert report["swapped_bytes"] > 0 and report["num_first_replays"] > 0 == report["no_room_bytes"]
            assert report["num_whole"] == 0 and report["num_chunks"] == num_chunks
    assert differences(*traces) == []
