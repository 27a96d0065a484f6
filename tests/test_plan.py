"""The fixed streaming rule and the form of a plan: budgets met to the byte, findings that help, files that read."""

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.plans.workload_sizes import allocator_slack_bytes
from planners.errors import PlanInfeasible, format_bytes
from planners.plans.plan import DecodeScope, Plan, Ring, Tier
from planners.rule.attempts import MIN_CHUNK_TOKENS, TIGHT_SLACK_BYTES
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import BlockSize, ChunkedSize, Cuts, LossHeadSize, StreamingProblem

KIB = 1024


def block(name, stored, decoded=0):
    return BlockSize(
        name=name, stored_bytes=stored, largest_module_bytes=decoded, decoded_bytes=2 * decoded, streams=True
    )


def problem(**changes):
    """Six layers of 100 KiB between an embedding and a head of 300 KiB."""
    fields = {
        "fingerprint": "f",
        "layers": tuple(block(f"layers.{i}", 100 * KIB, 50 * KIB) for i in range(6)),
        "edges": (block("embed", 300 * KIB), block("head", 300 * KIB)),
        "trainable_bytes": 40 * KIB,
        "layer_input_bytes": 8 * KIB,
        "activation_bytes": 64 * KIB,
        "device_capacity_bytes": None,
        "host_capacity_bytes": None,
        "nvme_capacity_bytes": 1 << 40,
        "unified": True,
    }
    return StreamingProblem(**{**fields, **changes})


sizes = st.integers(1, 64).map(lambda pages: 4096 * pages)


@st.composite
def problems(draw):
    unified = draw(st.booleans())
    return problem(
        layers=tuple(block(f"l{i}", draw(sizes), draw(sizes)) for i in range(draw(st.integers(1, 5)))),
        edges=tuple(block(f"e{i}", draw(sizes)) for i in range(draw(st.integers(0, 2)))),
        trainable_bytes=draw(st.integers(0, 100_000)),
        layer_input_bytes=draw(st.integers(1, 50_000)),
        activation_bytes=draw(st.integers(0, 200_000)),
        device_capacity_bytes=draw(st.none() | st.integers(1, 3_000_000)),
        host_capacity_bytes=None if unified else draw(st.none() | st.integers(1, 3_000_000)),
        nvme_capacity_bytes=draw(st.none() | st.integers(1, 3_000_000)),
        unified=unified,
    )


def capacities(p):
    return {
        Tier.DEVICE: p.device_capacity_bytes,
        Tier.HOST: p.host_capacity_bytes,
        Tier.NVME: p.nvme_capacity_bytes,
    }


@given(problems())
@settings(max_examples=100)
def test_a_plan_fits_every_budget_or_there_is_none(p):
    try:
        plan = plan_streaming(p)
    except PlanInfeasible as error:
        assert error.need_bytes > error.have_bytes == capacities(p)[Tier(error.tier)]
        return
    for tier, capacity in capacities(p).items():
        assert capacity is None or plan.predicted_bytes(tier) <= capacity
    placed = [*plan.resident, *(name for ring in plan.rings for name in ring.blocks)]
    assert sorted(placed) == sorted(b.name for b in p.layers + p.edges)


def test_without_limits_three_slots_stream_and_the_edges_stay():
    plan = plan_streaming(problem())
    assert [(r.name, r.num_slots, r.slot_bytes, r.rest) for r in plan.rings] == [("layers", 3, 100 * KIB, Tier.NVME)]
    assert plan.resident == ("embed", "head")
    assert plan.layer_inputs is Tier.DEVICE


def test_a_smaller_budget_gives_up_one_thing_after_the_other():
    """Whatever the budget, each step of leanness is met exactly: the plan of its own prediction, and one byte under."""
    seen = []
    capacity = plan_streaming(problem()).predicted_bytes(Tier.DEVICE)
    while True:
        try:
            plan = plan_streaming(problem(device_capacity_bytes=capacity))
        except PlanInfeasible as error:
            assert error.have_bytes == capacity
            break
        assert plan.predicted_bytes(Tier.DEVICE) <= capacity
        seen.append((plan.rings[0].num_slots, len(plan.resident), plan.layer_inputs, plan.decode_scope))
        capacity = plan.predicted_bytes(Tier.DEVICE) - 1
    assert seen[0] == (3, 2, Tier.DEVICE, DecodeScope.LAYER)
    assert seen[1] == (3, 2, Tier.DEVICE, DecodeScope.LINEAR)
    assert seen[-1] == (1, 0, Tier.NVME, DecodeScope.LINEAR)
    # The second slot, which hides every read, is given up last.
    assert sorted(seen, key=lambda plan: plan[0] == 1) == seen


def test_a_layers_decoded_weights_are_held_where_there_is_room_for_them_and_charged():
    held = plan_streaming(problem())
    assert held.decode_scope is DecodeScope.LAYER
    assert held.peak_bytes["device"]["decoded weights"] == 2 * 50 * KIB + 100 * KIB
    lean = plan_streaming(problem(device_capacity_bytes=held.predicted_bytes(Tier.DEVICE) - 1))
    assert lean.decode_scope is DecodeScope.LINEAR
    assert lean.peak_bytes["device"] == held.peak_bytes["device"] | {"decoded weights": 2 * 50 * KIB}


def test_where_nothing_is_quantized_nothing_decoded_is_held():
    plan = plan_streaming(problem(layers=tuple(block(f"layers.{i}", 100 * KIB) for i in range(6))))
    assert plan.decode_scope is DecodeScope.LINEAR


def leanest_device_bytes():
    try:
        plan_streaming(problem(device_capacity_bytes=1))
    except PlanInfeasible as error:
        return error.need_bytes
    raise ValueError("one byte was enough")


def test_the_budget_met_to_the_byte_is_enough_and_one_byte_under_is_not():
    need = leanest_device_bytes()
    assert plan_streaming(problem(device_capacity_bytes=need)).predicted_bytes(Tier.DEVICE) == need
    with pytest.raises(PlanInfeasible) as raised:
        plan_streaming(problem(device_capacity_bytes=need - 1))
    error = raised.value
    assert (error.tier, error.need_bytes, error.have_bytes) == ("device", need, need - 1)
    assert error.ways_out
    for evidence in ("device", "short by 1 B", "training step", "largest item"):
        assert evidence in str(error)


def read_bytes(text):
    """The size in "device_memory of 601.9 KiB", as a user would pass it on."""
    number, unit = text.rsplit(" ", 2)[-2:]
    return int(float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit])


@given(st.integers(0, 5000))
def test_the_memory_that_would_fit_does_fit_when_it_is_passed_on_as_it_was_printed(extra):
    p = problem(trainable_bytes=2_000_000 + extra, device_capacity_bytes=500_000)
    with pytest.raises(PlanInfeasible) as raised:
        plan_streaming(p)
    way = next(way for way in raised.value.ways_out if way.startswith("device_memory of "))
    plan_streaming(replace(p, device_capacity_bytes=read_bytes(way)))


@given(problems())
@settings(max_examples=100)
def test_what_the_finding_says_would_fit_does(p):
    """At least one way out, followed, ends in a plan: the tier that is short gets what it needs."""
    try:
        plan_streaming(p)
    except PlanInfeasible as error:
        assert error.ways_out
        field = {
            "device": "device_capacity_bytes",
            "host": "host_capacity_bytes",
            "nvme": "nvme_capacity_bytes",
        }
        plan_streaming(replace(p, **{field[tier]: need_bytes for tier, need_bytes in error.needs.items()}))


def test_a_smaller_batch_that_is_offered_as_a_way_out_fits():
    p = problem(activation_bytes=4_000_000, layer_input_bytes=100_000, device_capacity_bytes=2_000_000)
    with pytest.raises(PlanInfeasible) as raised:
        plan_streaming(p)
    way = next(way for way in raised.value.ways_out if "batch_size x seq_len" in way)
    share = int(way.split("cut to ")[1].split("%")[0]) / 100
    plan_streaming(
        replace(
            p,
            activation_bytes=int(p.activation_bytes * share),
            layer_input_bytes=int(p.layer_input_bytes * share),
        )
    )


def test_without_a_drive_nothing_rests_on_one():
    plan = plan_streaming(problem(nvme_capacity_bytes=None, unified=False))
    assert {ring.rest for ring in plan.rings} == {Tier.HOST}
    assert plan.predicted_bytes(Tier.NVME) == 0
    assert plan.peak_bytes["host"]["weights"] == 600 * KIB


def test_where_host_is_device_and_there_is_no_drive_nothing_streams():
    plan = plan_streaming(problem(nvme_capacity_bytes=None))
    assert plan.rings == ()
    assert sorted(plan.resident) == sorted(["embed", "head", *(f"layers.{i}" for i in range(6))])


def test_one_layer_gets_one_slot():
    plan = plan_streaming(problem(layers=(block("layers.0", 4096),)))
    assert [ring.num_slots for ring in plan.rings] == [1]


def test_a_plan_is_deterministic():
    assert plan_streaming(problem()) == plan_streaming(problem())


@given(problems())
def test_a_plan_reads_back_as_it_was_written(p):
    try:
        plan = plan_streaming(p)
    except PlanInfeasible:
        return
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_that_is_not_one_names_its_path(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="plan.json"):
        Plan.load(path)
    with pytest.raises(OSError):
        Plan.load(tmp_path / "nowhere.json")


def some_plan(**changes):
    ring = Ring(name="layers", blocks=("a", "b"), num_slots=1, slot_bytes=4096, rest=Tier.NVME)
    fields = {"fingerprint": "f", "planner": "p", "resident": (), "rings": (ring,)}
    return Plan(**{**fields, **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("rings"),
        lambda d: d.pop("fingerprint"),
        lambda d: d.update(rings=5),
        lambda d: d.update(rings=[5]),
        lambda d: d.update(resident=5),
        lambda d: d.update(unheard_of=1),
        lambda d: d.update(version=99),
        lambda d: d.update(layer_inputs="tape"),
        lambda d: d.update(decode_scope="word"),
        lambda d: d["rings"][0].update(num_slots=0),
        lambda d: d["rings"][0].update(num_slots="1"),
        lambda d: d["rings"][0].update(rest="device"),
        lambda d: d["rings"][0].pop("rest"),
        lambda d: d["rings"][0].update(colour="red"),
    ],
)
def test_a_malformed_plan_is_a_value_error(change):
    data = json.loads(some_plan(decode_scope=DecodeScope.LAYER).to_json())
    change(data)
    with pytest.raises(ValueError, match="plan|not a valid"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", "5", '"plan"', "\x00", "{}", "[" * 20, "{" + '"a":' * 3])
def test_what_is_no_plan_at_all_is_a_value_error(text):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(text)


@given(st.data())
@settings(max_examples=70)
def test_a_damaged_plan_is_read_or_refused_and_nothing_else(data):
    text = list(some_plan().to_json())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.characters(codec="ascii"))
    with contextlib.suppress(ValueError):
        Plan.from_json("".join(text))


@pytest.mark.parametrize(
    "num_bytes, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (22 * 2**30, "22 GiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_sizes_read_as_a_person_would_write_them(num_bytes, text):
    assert format_bytes(num_bytes) == text


def head(num_tokens=1024, tiles=True):
    return LossHeadSize(num_tokens=num_tokens, bytes_per_token=KIB, hidden_bytes_per_token=16, tiles=tiles)


def test_the_loss_is_taken_in_the_largest_tiles_that_need_no_more_than_a_layer():
    plan = plan_streaming(problem(loss_head=head(), activation_bytes=300 * KIB))
    assert plan.head_chunk_tokens == 256
    assert plan.peak_bytes["device"]["activations"] == 300 * KIB
    assert head().peak_bytes(512) > 300 * KIB >= head().peak_bytes(256)


def test_tiles_do_not_shrink_below_what_a_product_needs():
    plan = plan_streaming(problem(loss_head=head(), activation_bytes=1))
    assert plan.head_chunk_tokens == MIN_CHUNK_TOKENS
    assert plan.peak_bytes["device"]["activations"] == head().peak_bytes(MIN_CHUNK_TOKENS)


@pytest.mark.parametrize("whole", [None, head(num_tokens=32), head(tiles=False)])
def test_a_loss_that_cannot_or_need_not_be_tiled_is_taken_whole(whole):
    plan = plan_streaming(problem(loss_head=whole, activation_bytes=64 * KIB))
    assert plan.head_chunk_tokens is None
    assert plan.peak_bytes["device"]["activations"] == max(64 * KIB, whole.peak_bytes(None) if whole else 0)


@pytest.mark.parametrize(("chunk", "window_bytes"), [(None, 8 * KIB), (256, 3 * 8 * KIB)])
def test_what_waits_for_a_devices_copies_is_charged(chunk, window_bytes):
    """An input of whole layers, as part of the activations; of layers in chunks all that one of them puts away."""

    def least_bytes(passing_bytes):
        p = problem(
            unified=False, host_capacity_bytes=1 << 40, device_capacity_bytes=1, passing_bytes=passing_bytes,
            activation_bytes=64 * KIB + passing_bytes, chunked=ChunkedSize(num_tokens=512, sequence_bytes=24 * KIB),
            cuts=Cuts(head_chunk_tokens=None, chunk_tokens=chunk, layer_major=None),
        )  # fmt: skip
        with pytest.raises(PlanInfeasible) as short:
            plan_streaming(p)
        assert plan_streaming(replace(p, device_capacity_bytes=short.value.need_bytes)).layer_inputs is Tier.HOST
        return short.value.need_bytes

    assert least_bytes(8 * KIB) - least_bytes(0) == window_bytes


def test_tiles_of_no_tokens_are_no_plan():
    with pytest.raises(ValueError, match="head_chunk_tokens"):
        replace(plan_streaming(problem()), head_chunk_tokens=0)


def test_a_tight_budget_leaves_the_allocator_less_to_hold_back():
    wanted = 1000 * KIB
    roomy = plan_streaming(problem(allocator_slack_bytes=wanted))
    assert roomy.allocator_slack_bytes == roomy.peak_bytes["device"]["freed, held back by the allocator"] == wanted
    enough = roomy.predicted_bytes(Tier.DEVICE)
    assert plan_streaming(problem(allocator_slack_bytes=wanted, device_capacity_bytes=enough)) == roomy
    tight = plan_streaming(problem(allocator_slack_bytes=wanted, device_capacity_bytes=enough - 1))
    assert (tight.allocator_slack_bytes, tight.decode_scope) == (wanted, DecodeScope.LINEAR)
    granted = [wanted]
    while tight.rings == roomy.rings:
        granted.append(tight.allocator_slack_bytes)
        capacity = tight.predicted_bytes(Tier.DEVICE) - 1
        tight = plan_streaming(problem(allocator_slack_bytes=wanted, device_capacity_bytes=capacity))
    assert list(dict.fromkeys(granted)) == [wanted, wanted * 2 // 3, wanted // 4]


def test_what_a_tight_budget_leaves_the_allocator_has_a_bound_of_its_own():
    wanted = 100 * TIGHT_SLACK_BYTES
    roomy = plan_streaming(problem(allocator_slack_bytes=wanted))
    capacity = roomy.predicted_bytes(Tier.DEVICE) - wanted + TIGHT_SLACK_BYTES
    tight = plan_streaming(problem(allocator_slack_bytes=wanted, device_capacity_bytes=capacity))
    assert (tight.allocator_slack_bytes, tight.rings) == (TIGHT_SLACK_BYTES, roomy.rings)


def test_what_the_allocator_may_hold_back_grows_with_a_layers_activations_and_never_passes_twice_what_is_in_use():
    mib = KIB**2
    assert allocator_slack_bytes(1000 * mib, 10 * mib) == 384 * mib
    assert allocator_slack_bytes(1000 * mib, 280 * mib) == 816 * mib
    assert allocator_slack_bytes(1 * mib, 2 * mib) == 6 * mib


@given(problems(), st.sampled_from((None, 64, 100)), st.sampled_from((None, True, False)), st.integers(1, 3))
@settings(max_examples=70)
def test_a_run_that_goes_on_has_the_cuts_that_it_was_begun_with(p, tile, layer_major, micro_batches):
    head = LossHeadSize(num_tokens=512, bytes_per_token=1000, hidden_bytes_per_token=10, tiles=True)
    chunked = ChunkedSize(num_tokens=512, sequence_bytes=10_000)
    p = replace(p, loss_head=head, chunked=chunked, num_micro_batches=micro_batches)
    for chunk in (None, 256):
        cuts = Cuts(head_chunk_tokens=tile, chunk_tokens=chunk, layer_major=layer_major)
        try:
            plan = plan_streaming(replace(p, cuts=cuts))
        except PlanInfeasible as error:
            assert cuts.describe() in str(error)
            continue
        assert plan.head_chunk_tokens == tile and layer_major in (None, plan.layer_major)
        chunks = {c.num_tokens for policy in (plan.activations or {}).values() for c in policy.chunks}
        assert chunks == ({chunk} if chunk is not None else set())
