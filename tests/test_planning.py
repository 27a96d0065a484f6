"""The optimiser's plan of the model at hand, run under emulated links: its numbers, its bytes, its memory."""

import gc
import json
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.emulation import emulated_config, emulated_hardware
from offload_rt.errors import ConfigError
from offload_rt.layers.autograd import CHECKED_CALLS, RecomputedLayer
from offload_rt.layers.discover import find_blocks
from offload_rt.memory.arena import Arena
from offload_rt.plans import planning
from offload_rt.plans.asked import asked
from offload_rt.plans.planning import CAPABILITIES, SLACK_DIVISOR, lowered, problem_of
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.profiling import block_profile, calibrate, workbench
from offload_rt.profiling.block_profile import profile_layer
from offload_rt.profiling.chunk_profile import profile_chunked_layer
from offload_rt.profiling.edge_profile import profile_head, updates_per_second
from offload_rt.wiring.workload import find_workload
from planners.errors import PlanInfeasible
from planners.optimiser.mip import plan_optimal
from planners.plans.placement import Cuts, Tier, UpdatePlace
from planners.problems.cost import knobs_of
from planners.problems.hardware import Drive, Links, named_hardware
from planners.problems.measured import MeasuredSeconds
from planners.simulator.static_memory import capacities
from planners.simulator.validate import InvalidPlan, check, check_modes
from tests.conftest import build_lora, build_plain
from tests.parity import BATCH_SIZE, SEQ_LEN, STEPS, Case, build, run_plain, run_steps
from tests.test_parity import differences

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096
BF16 = Case("llama", "bf16", 1, True, False, "from NVME")
NF4 = Case("llama", "nf4", 1, True, False, "from NVME")
DRIVES = (Drive(capacity_bytes=1 << 30, read_bytes_per_second=1e9, write_bytes_per_second=1e9),)
UPDATES_PER_SECOND = 1e9
SECONDS = MeasuredSeconds(forward=0.01, backward=0.02, decode=0.001)


def machine(device, host):
    """A card with little memory, so that a tiny model overflows it. Bytes; a host of 0 makes one tier of memory."""
    card = named_hardware("rtx4090")
    return replace(
        card,
        device=replace(card.device, memory_bytes=device, reserve_bytes=0, adamw_params_per_second=UPDATES_PER_SECOND),
        host=replace(card.host, memory_bytes=host),
        links=Links(host_to_device_bytes_per_second=2e9, device_to_host_bytes_per_second=2e9, duplex=0.5),
        drives=DRIVES,
        unified=not host,
    )


def question(model, folder, hardware, bits=4, seconds=SECONDS):
    """The problem of a model on a machine, with seconds of a layer that nobody measured."""
    config = EngineConfig(bits=bits, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=(NvmePath(path=folder),))
    workload = find_workload(model, None, emulated_config(config, hardware))
    streaming = streaming_problem(workload)
    layers = {draft.name: seconds for draft in workload.layers}
    return workload, streaming, problem_of(workload, streaming, hardware, layers, SECONDS)


def plans_for_less_and_less(case, folder, host, bits):
    """(problem, streaming, plan) of one model on machines with ever less DEVICE memory, until nothing fits."""
    device = 4 * MIB
    while True:
        _, streaming, problem = question(build(case), folder, machine(device, host), bits)
        try:
            plan = plan_optimal(problem)
        except PlanInfeasible:
            return
        yield problem, streaming, plan
        taken = plan.predicted_bytes(Tier.DEVICE) + problem.hardware.device.reserve_bytes
        device = min(device, taken) - plan.entry("layer").weights.total_bytes // 2


def test_the_question_has_the_bytes_that_are_stored(tmp_path):
    workload, streaming, problem = question(build_lora("qwen"), tmp_path, machine(64 * MIB, 64 * MIB))
    classes = {entry.name: entry for entry in problem.workload.classes}
    layer = classes["layer"]
    assert layer.blocks == tuple(draft.name for draft in workload.layers)
    assert {draft.spec.stored_bytes for draft in workload.layers} == {layer.stored_bytes}
    assert layer.weight_cuts == workload.layers[0].spec.cuts_bytes
    assert layer.decoded_bytes == sum(t.compute_bytes for t in workload.layers[0].spec.tensors if t.is_quantized)
    assert sum(e.count * e.trainable_params for e in classes.values()) == sum(
        p.numel() for p in workload.model.parameters() if p.requires_grad
    )
    positions = sorted(position for entry in classes.values() for position in entry.positions)
    assert positions == list(range(len(workload.drafts)))
    assert problem.hardware.device.reserve_bytes >= streaming.allocator_slack_bytes // 4


def test_a_question_with_less_memory_than_the_budget_is_short_of_what_the_budget_has(tmp_path):
    """As after a rehearsal whose tensors took more: so much of the budget is no plan's any more."""
    workload, streaming, problem = question(build_lora("qwen"), tmp_path, machine(64 * MIB, 64 * MIB))
    too_little = problem.hardware.device.reserve_bytes + PAGE
    shorts = []
    for taken in (0, MIB):
        budget = replace(streaming, device_capacity_bytes=too_little + taken)
        with pytest.raises(PlanInfeasible) as found:
            asked(problem).with_memory(too_little).best(workload, budget)
        assert found.value.have_bytes == too_little + taken
        shorts.append(found.value.need_bytes - found.value.have_bytes)
    assert shorts[0] == shorts[1] > 0


@pytest.mark.parametrize("host", [0, 120 * KIB, 64 * MIB])
def test_plans_of_real_blocks_pass_the_validator_and_say_only_what_can_be_run(host, tmp_path):
    splits, grants = [], []
    for problem, streaming, plan in plans_for_less_and_less(NF4, tmp_path, host, 4):
        check(problem, plan)
        split = plan.entry("layer").weights
        assert split.device_bytes in problem.workload.classes[0].weight_cuts
        assert split.device_bytes == split.total_bytes or split.host_bytes % PAGE == 0
        assert lowered(plan, streaming, problem).fingerprint == streaming.fingerprint != plan.fingerprint
        granted = lowered(plan, streaming, problem).allocator_slack_bytes
        quarter, full = streaming.allocator_slack_bytes // SLACK_DIVISOR, streaming.allocator_slack_bytes
        room = capacities(problem)["device"] - plan.predicted["peak_bytes"]["device"]
        assert granted == min(full, quarter + room)
        grants.append(granted == full)
        splits.append((split.device_bytes > 0, split.host_bytes > 0, split.nvme_bytes > 0))
    assert splits[0] == (True, False, False)
    parted = {0: (True, False, True), 120 * KIB: (True, True, True), 64 * MIB: (True, True, False)}[host]
    assert parted in splits
    assert grants[0] and not grants[-1]


@pytest.mark.parametrize(("case", "host"), [(BF16, 0), (NF4, 32 * KIB)], ids=str)
def test_what_a_refusal_says_would_fit_does(case, host, tmp_path):
    """In the user's budgets, of which the question has only what a plan may decide about; and a page beside."""

    def refusal(device, host):
        bits = 4 if case.weights == "nf4" else None
        workload, streaming, problem = question(build(case), tmp_path, machine(device, host), bits)
        try:
            asked(problem).best(workload, streaming)
        except PlanInfeasible as error:
            return error
        return None

    short = refusal(400 * KIB, host)
    assert short.tier == ("host" if host else "device") and short.have_bytes == (host or 400 * KIB)
    device, host = short.needs["device"], short.needs.get("host", 0)
    assert refusal(device, host) is None
    for missing in range(PAGE, PAGE + 3):  # by bytes, which a solver can hardly tell from none
        assert (again := refusal(device - missing, host)) is None or again.needs["device"] <= device + PAGE


@pytest.mark.parametrize(
    ("case", "host"),
    [(BF16, 0), pytest.param(NF4, 0, marks=pytest.mark.full), (replace(NF4, accumulation=2), 120 * KIB)],
    ids=str,
)
def test_an_optimised_plan_runs_with_the_bits_of_plain_pytorch_and_the_bytes_it_predicts(
    case, host, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: SECONDS)
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: UPDATES_PER_SECOND)
    bits = 4 if case.weights == "nf4" else None
    plans = list(plans_for_less_and_less(case, tmp_path, host, bits))
    splits = [plan.entry("layer").weights for _, _, plan in plans]
    tiers = [split.nvme_bytes and bool(split.device_bytes) + bool(split.host_bytes) for split in splits]
    problem = plans[tiers.index(max(tiers))][0]  # the one that takes a layer from most places
    hardware = machine(problem.hardware.device.memory_bytes, host)
    with Engine(
        build(case), bits=bits, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=0.05, lr=1e-2, nvme=tmp_path,
        plan="optimise", emulate=hardware, accumulation_steps=case.accumulation,
    ) as engine:  # fmt: skip
        plan = engine.plan
        assert plan.planner == "optimiser" and plan.entry("layer").weights.nvme_bytes
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(run_plain(case), found) == []
        before = engine.report()
        run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
        assert engine._runtime.executors[0].counters.num_replans == 0
    assert max(tiers) > 0 and report["prefetch_misses"] == 0
    in_use = plan.peak_bytes["device"].get("layer input in use", 0)
    assert report["holdings"]["device"].get("layer input in use", 0) == in_use
    assert (in_use > 0) is (plan.layer_inputs is not Tier.DEVICE)
    assert report["bytes_read"] > before["bytes_read"]
    for name, taken in before["link_busy_seconds"].items():
        each = (report["link_busy_seconds"][name] - taken) / STEPS
        assert each == pytest.approx(plan.predicted["busy_seconds"][name], rel=1e-3, abs=1e-9), name
    besides = {"device": problem.hardware.device.reserve_bytes, "host": 6 * PAGE}  # a page for each block
    if (rehearsed := report["rehearsal"])["measured_bytes"] is not None:  # what tensors really take is booked
        besides["device"] += max(0, rehearsed["measured_bytes"] - rehearsed["planned_bytes"])
    for tier, more in besides.items():
        assert report["memory"][tier] <= plan.predicted_bytes(Tier(tier)) + more


def test_what_the_runtime_cannot_do_is_no_plan_of_its(tmp_path):
    _, _, problem = question(build_lora("llama"), tmp_path, machine(64 * MIB, 64 * MIB))
    plan = plan_optimal(problem)

    def refused(match, broken):
        with pytest.raises(InvalidPlan, match=match):
            check_modes(problem, broken)

    def with_entry(**changes):
        return replace(plan, classes=(replace(plan.classes[0], **changes), *plan.classes[1:]))

    refused("cuts the batch", replace(plan, cuts=Cuts(chunk_tokens=SEQ_LEN)))
    (inputs,) = plan.classes[0].tokens
    parted = replace(inputs, device_tokens=inputs.total_tokens - 4, host_tokens=4)
    refused("several tiers", with_entry(tokens=(parted,)))
    refused("cannot be cut at 17 bytes", with_entry(weights=replace(plan.classes[0].weights, device_bytes=17)))
    updates = tuple(replace(u, tier=Tier.HOST, place=UpdatePlace.CPU) for u in plan.classes[0].updates)
    refused("rests where the runtime cannot", with_entry(updates=updates))
    everything = replace(problem, capabilities=replace(CAPABILITIES, batch_cuts=True))
    halves = replace(knobs_of(plan), cuts=Cuts(chunk_tokens=SEQ_LEN))
    with pytest.raises(ValueError, match="were measured whole"):
        check(everything, replace(plan, cuts=halves.cuts))


def test_a_profile_measures_and_leaves_the_model_and_the_random_numbers_alone():
    model = build_lora("llama")
    (first, *_) = [draft for draft in find_blocks(model, bits=4) if draft.is_layer]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    seconds = profile_layer(model, first, batch_size=2, seq_len=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert min(seconds.forward, seconds.backward, seconds.decode) > 0
    head = profile_head(hidden_size=8, vocabulary=40000, num_tokens=64, tile_tokens=16, dtype=torch.float32)
    assert head.forward > 0 == head.backward and head.product > 0
    assert updates_per_second([p for p in model.parameters() if p.requires_grad]) > 0


def test_a_profile_runs_a_layer_as_the_runtime_does(monkeypatch):
    made = []

    class Spy(RecomputedLayer):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            made.append(self)

    monkeypatch.setattr(block_profile, "RecomputedLayer", Spy)
    model = build_lora("llama")
    (first, *_) = [draft for draft in find_blocks(model, bits=4) if draft.is_layer]
    profile_layer(model, first, batch_size=2, seq_len=16)
    (layer,) = made
    assert layer.around.counters.num_recomputes == CHECKED_CALLS + 1 + block_profile.RUNS
    assert layer.around.counters.num_products_left_out >= block_profile.RUNS
    quantized = [spec for spec in first.spec.tensors if spec.is_quantized]
    # Three times where it is computed again; twice where it is kept, and where it is put away.
    each_way = layer.around.counters.num_recomputes
    assert layer.block.decoder.counters.num_decodes == (3 + 2 + 2) * len(quantized) * each_way
    assert layer.block.decoder.counters.overflow_bytes == 0


def test_a_profile_takes_as_many_passes_as_are_told_beforehand(monkeypatch):
    passes, take = [], block_profile.one_pass
    monkeypatch.setattr(block_profile, "one_pass", lambda *arguments: passes.append(0) or take(*arguments))
    model = build_lora("llama")
    (first, *_) = [draft for draft in find_blocks(model, bits=4) if draft.is_layer]
    profile_layer(model, first, batch_size=2, seq_len=16)
    assert len(passes) == block_profile.MOST_PASSES


@pytest.mark.parametrize(
    "take",
    [profile_layer, pytest.param(partial(profile_chunked_layer, chunk_tokens=8), marks=pytest.mark.full)],
    ids=["whole", "by chunks"],
)
def test_the_memory_of_a_profile_is_given_back_without_the_collector(take, monkeypatch):
    """Which may come steps later: until then a layer's bytes would be held beside all that is planned."""
    made = []

    def arena(*arguments, **more):
        found = Arena(*arguments, **more)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(workbench, "Arena", arena)
    model = build_lora("llama")
    (first, *_) = [draft for draft in find_blocks(model, bits=4) if draft.is_layer]
    gc.disable()
    try:
        take(model, first, batch_size=2, seq_len=16)
        assert len(made) >= 2 and [one for one in made if one() is not None] == []
    finally:
        gc.enable()


def test_a_model_on_meta_is_profiled_as_one_in_memory():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    (first, *_) = [draft for draft in find_blocks(model, bits=4) if draft.is_layer]
    assert profile_layer(model, first, batch_size=2, seq_len=16).backward > 0
    assert all(p.is_meta for p in model.parameters())


def test_models_that_cannot_be_planned_say_why_and_are_as_they_were(tmp_path):
    model = build_plain()
    with pytest.raises(ConfigError, match="cannot be called with input_ids alone"):
        Engine(model, batch_size=2, seq_len=16, nvme=tmp_path, plan="optimise", emulate=machine(64 * MIB, 64 * MIB))
    assert not any(p.is_meta for p in model.parameters()) and model.layers[0].forward


def test_this_machines_calibrated_rates_are_planned_for(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    known = calibrate.identity("cpu", (tmp_path.resolve(),))
    assert calibrate.calibrated("cpu", (tmp_path.resolve(),)) is None
    hardware = replace(machine(64 * MIB, 0), name="calibrated here")
    calibrate.keep(calibrate.cache_name(known), known, calibrate.Measurement(hardware, {}, 1.0))
    with Engine(
        build_lora("llama"), bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, nvme=tmp_path, plan="optimise"
    ) as engine:
        assert engine.plan.planner == "optimiser" and engine.report()["link_busy_seconds"] is None
        assert engine.report()["predicted"]["step_seconds"] > 0


def test_emulated_machines_are_profiles_names_or_files(tmp_path):
    hardware = machine(64 * MIB, 8 * MIB)
    file = tmp_path / "machine.json"
    file.write_text(hardware.to_json())
    assert emulated_hardware(hardware) is hardware
    assert emulated_hardware(file) == emulated_hardware(str(file)) == hardware
    assert emulated_hardware("rtx4090") == named_hardware("rtx4090")
    file.write_text(json.dumps({**json.loads(hardware.to_json()), "lnks": {}}))
    with pytest.raises(ConfigError, match="emulate: .*did you mean 'links'"):
        emulated_hardware(file)


def test_an_emulated_machine_gives_the_budgets(tmp_path):
    config = EngineConfig(nvme=(NvmePath(path=tmp_path), NvmePath(path=tmp_path, capacity_bytes=7)))
    found = emulated_config(config, machine(64 * MIB, 8 * MIB))
    assert (found.device_memory_bytes, found.host_memory_bytes) == (64 * MIB, 8 * MIB)
    assert [drive.capacity_bytes for drive in found.nvme] == [1 << 29, 7]
    assert emulated_config(config, machine(64 * MIB, 0)).host_memory_bytes is None
    less = replace(config, device_memory_bytes=MIB, host_memory_bytes=MIB)
    assert emulated_config(less, machine(64 * MIB, 8 * MIB)).device_memory_bytes == MIB
    for broken, hardware, match in (
        (replace(config, device="cuda:0"), machine(MIB, MIB), "on the CPU device"),
        (less, machine(MIB - 1, MIB), "device_memory: 1048576 bytes, but rtx4090 has 1048575"),
        (less, machine(MIB, MIB - 1), "host_memory: 1048576 bytes, but rtx4090 has 1048575"),
        (less, machine(MIB, 0), "has one tier of memory"),
        (config, replace(machine(MIB, MIB), drives=()), "has no drive"),
    ):
        with pytest.raises(ConfigError, match=match):
            emulated_config(broken, hardware)


@pytest.mark.parametrize("host", [0, 64 * MIB], ids=["from NVMe", "from HOST"])
def test_an_embedding_that_does_not_stay_is_read_by_rows_with_the_same_bits(host, tmp_path, monkeypatch):
    """Its table alone is larger than the memory that there is besides the head's."""
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: SECONDS)
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: UPDATES_PER_SECOND)

    def model():
        return build_lora("llama", torch.bfloat16, 2, 0.0, vocab_size=8192, hidden_size=64)

    table = 8192 * 64 * 2
    ids = torch.randint(3, 8192, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))

    def losses(**options):
        with Engine(model(), batch_size=2, seq_len=SEQ_LEN, lr=1e-2, nvme=tmp_path, **options) as engine:
            found = []
            for _ in range(2):
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                found.append(loss.item())
            return engine.plan, engine.report(), found

    workload, _, problem = question(model(), tmp_path, machine(64 * MIB, host), None)
    rows = {entry.name: problem.workload.rows_of(entry) for entry in problem.workload.classes}
    (name,) = [name for name, size in rows.items() if size is not None]
    everything = plan_optimal(problem)
    assert everything.lookups is None and name in everything.resident
    less = everything.predicted_bytes(Tier.DEVICE) + problem.hardware.device.reserve_bytes - table // 2
    plan, report, found = losses(plan="optimise", emulate=machine(less, host))
    assert plan.planner == "optimiser" and plan.lookups is not None and plan.lookups.blocks == (name,)
    assert plan.lookups.rest is (Tier.HOST if host else Tier.NVME)
    assert report["lookups"]["num_rows"] == 2 * ids.unique().numel()
    assert report["memory"]["device"] <= less
    entry = plan.entry(name)
    parted = replace(entry.weights, device_bytes=PAGE, host_bytes=0, nvme_bytes=table - PAGE)
    odd = replace(plan, classes=tuple(replace(c, weights=parted) if c is entry else c for c in plan.classes))
    with pytest.raises(ConfigError, match="lookups of .* but its class says"):
        losses(plan=odd, emulate=machine(less, host))
    other, _, expected = losses(device_memory=64 * MIB)
    assert other.lookups is None and found == expected
