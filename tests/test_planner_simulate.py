"""The simulator: small timelines by hand, and what holds for every plan: work as planned, no time gained."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest

from planners.plans.placement import Buffers, Cuts, DecodeScope, Tier, UpdateMode, UpdatePlace
from planners.plans.schedule import StepKind, num_fetches
from planners.problems.cost import class_costs, steady_ring
from planners.problems.hardware import named_hardware
from planners.problems.problem import Capabilities
from planners.simulator.passes import build_timeline
from planners.simulator.simulate import Deadlock, _Run, simulate
from planners.simulator.static_memory import static_bytes
from planners.simulator.step_work import busy_seconds
from planners.simulator.timeline import DEVICE, Resource, Timeline
from planners.simulator.validate import InvalidPlan, check_busy, check_replay
from tests.planner_cases import machine, matrix, plan_of, problem


def timeline(*ops, pools=(), span=100.0):
    """Operations as (resource, seconds, key, deps, more)."""
    t = Timeline(span=span, pools=list(pools))
    for resource, seconds, key, deps, more in ops:
        t.resource.append(resource)
        t.seconds.append(seconds)
        t.key.append(key)
        t.deps.append(list(deps))
        t.at_start.append(more.get("at_start"))
        t.at_finish.append(list(more.get("at_finish", ())))
        t.acquire.append(more.get("acquire"))
        t.release.append(more.get("release"))
        t.phase.append(0)
        t.label.append(("op", len(t.label), 0))
    t.end = len(t) - 1
    return t


def run(t, *, num_steps=2, link=1.0, drive=1.0):
    result = _Run(t, num_steps=num_steps, link_rate=link, drive_rate=drive, keep_events=True)
    result.run()
    return result


def test_a_fetch_hides_behind_computation():
    """fetch A  |  fetch B
    |  compute A  |  compute B        1 + max(2, 3) + 3
    """
    t = timeline(
        (Resource.HOST_TO_DEVICE, 1.0, 0, [], {}),
        (Resource.HOST_TO_DEVICE, 2.0, 1, [(0, 0)], {}),
        (Resource.COMPUTE, 3.0, 0, [(0, 0)], {}),
        (Resource.COMPUTE, 3.0, 1, [(1, 0), (2, 0)], {}),
    )
    assert run(t, num_steps=1).ends == [7.0]


def test_the_least_key_runs_first_and_nothing_is_interrupted():
    t = timeline(
        (Resource.COMPUTE, 1.0, 5, [], {}), (Resource.COMPUTE, 1.0, 1, [], {}), (Resource.COMPUTE, 1.0, 3, [(1, 0)], {})
    )
    order = [op for op, _, _ in sorted(run(t, num_steps=1).events, key=lambda e: e[1])]
    assert order == [1, 2, 0]


def test_both_directions_of_a_link_share_it():
    """2 s and 1 s of work at half rate each: 2 s together, then 1 s alone."""
    t = timeline(
        (Resource.HOST_TO_DEVICE, 2.0, 0, [], {}),
        (Resource.DEVICE_TO_HOST, 1.0, 0, [], {}),
        (Resource.NONE, 0.0, 0, [(0, 0), (1, 0)], {}),
    )
    assert run(t, num_steps=1, link=0.5).ends == [3.0]
    assert run(t, num_steps=1, link=1.0).ends == [2.0]


def test_a_drive_that_reads_and_writes_is_slower():
    t = timeline(
        (Resource.SSD_READ, 1.0, 0, [], {}),
        (Resource.SSD_WRITE, 1.0, 0, [], {}),
        (Resource.NONE, 0.0, 0, [(0, 0), (1, 0)], {}),
    )
    assert run(t, num_steps=1, drive=0.8).ends == [pytest.approx(1.25)]


def test_a_credit_holds_back_what_has_none():
    """One bucket: the second read waits until the first one's write gives the bucket back, at 3."""
    one = {"acquire": (0, 1.0)}
    back = {"release": (0, 1.0)}
    t = timeline(
        (Resource.SSD_READ, 1.0, 0, [], one),
        (Resource.SSD_WRITE, 2.0, 0, [(0, 0)], back),
        (Resource.SSD_READ, 1.0, 1, [], one),
        (Resource.SSD_WRITE, 2.0, 1, [(2, 0)], back),
        pools=(1.0,),
    )
    assert run(t, num_steps=1).ends == [6.0]
    assert run(replace(t, pools=[2.0]), num_steps=1).ends == [5.0]


def test_a_lag_waits_for_the_step_before():
    t = timeline((Resource.COMPUTE, 1.0, 0, [(1, 1)], {}), (Resource.SSD_WRITE, 2.0, 0, [(0, 0)], {}))
    assert run(t, num_steps=3).ends == [3.0, 6.0, 9.0]


def test_memory_peaks_while_two_things_are_there():
    held = {"at_start": (DEVICE, 5.0), "at_finish": [(DEVICE, -5.0)]}
    t = timeline((Resource.COMPUTE, 2.0, 0, [], held), (Resource.SSD_READ, 1.0, 0, [], held))
    assert max(run(t, num_steps=1).peaks[DEVICE]) == 10.0
    t = timeline((Resource.COMPUTE, 2.0, 0, [], held), (Resource.SSD_READ, 1.0, 0, [(0, 0)], held))
    assert max(run(t, num_steps=1).peaks[DEVICE]) == 5.0


def test_a_circle_of_credits_is_a_deadlock_with_names():
    """Each holds what the other wants."""
    t = timeline(
        (Resource.SSD_READ, 1.0, 0, [], {"acquire": (0, 1.0)}),
        (Resource.CPU, 1.0, 0, [], {"acquire": (1, 1.0)}),
        (Resource.CPU, 1.0, 1, [(0, 0)], {"acquire": (1, 1.0), "release": (0, 1.0)}),
        (Resource.SSD_READ, 1.0, 1, [(1, 0)], {"acquire": (0, 1.0), "release": (1, 1.0)}),
        pools=(1.0, 1.0),
    )
    with pytest.raises(Deadlock, match="2 of 4 operations never run"):
        run(t, num_steps=1)


CASES = list(matrix())


@pytest.mark.parametrize("full, mode, boundary, weights, commit", CASES)
def test_work_is_what_the_plan_says_and_no_resource_does_two_things(full, mode, boundary, weights, commit):
    p = problem(full=full, commit_every=commit)
    plan = plan_of(p, mode=mode, boundary=boundary, weights=weights, groups=2)
    replay = simulate(p, plan, keep_events=True)
    check_busy(p, plan, replay)
    check_replay(replay)
    links = p.hardware.links
    busy = replay.busy_seconds
    least = max(
        busy["compute"] + busy["device_update"],
        busy["cpu"],
        (busy["host_to_device"] + busy["device_to_host"]) / (1 + links.duplex),
        (busy["ssd_read"] + busy["ssd_write"]) / (1 + p.hardware.drive_mix),
    )  # fmt: skip
    if mode is not UpdateMode.DEFERRED:  # whose last step may leave work to the next
        assert replay.step_seconds >= least * (1 - 1e-9)


@pytest.mark.parametrize("name, limit", [("compute", 0.05), ("host_to_device", 0.05), ("ssd_read", 0.1)])
def test_a_step_takes_little_more_than_what_binds(name, limit):
    """One resource slowed down a thousandfold: the rest hides behind it."""
    slow = machine()
    if name == "compute":
        slow = replace(slow, device=replace(slow.device, matmul_flops_per_second=1e10))
    elif name == "host_to_device":
        slow = replace(slow, links=replace(slow.links, host_to_device_bytes_per_second=2e7))
    else:
        slow = replace(slow, drives=tuple(replace(d, read_bytes_per_second=1e6) for d in slow.drives))
    p = problem(machine_=slow)
    replay = simulate(p, plan_of(p, weights=(0, 0, 1), slots=3))
    assert max(replay.busy_seconds, key=replay.busy_seconds.get) == name
    assert replay.step_seconds <= replay.busy_seconds[name] * (1 + limit)


def test_fetches_are_the_schedules():
    """As many, in the same order, as the steps that the executor takes in a steady state."""
    p = problem()
    plan = plan_of(p, weights=(0, 0, 1))
    t = build_timeline(p, plan)
    steps = steady_ring(6, 2, frozenset(range(6)), False)
    fetched = [position - 1 for kind, position, _ in t.label if kind == "fetch" and 1 <= position <= 6]
    assert fetched == [step.block for step in steps if step.kind is StepKind.FETCH]
    assert num_fetches(steps) == 2 * (6 - 2)


def test_updated_blocks_are_fetched_anew_and_frozen_ones_stay():
    frozen = steady_ring(6, 2, frozenset(range(6)), False)
    assert num_fetches(steady_ring(6, 2, frozenset(range(6)), True)) == num_fetches(frozen) + 2
    assert num_fetches(steady_ring(3, 4, frozenset(range(3)), False)) == 0
    assert num_fetches(steady_ring(3, 4, frozenset(range(3)), True)) == 3


def test_later_chunks_of_a_sequence_attend_to_more():
    p = problem(batch_size=1, seq_len=1024)
    t = build_timeline(p, plan_of(p, chunk=256))
    forward = [
        s for s, (kind, position, _) in zip(t.seconds, t.label, strict=True) if (kind, position) == ("forward", 1)
    ]
    cost = class_costs(p, Cuts(chunk_tokens=256), DecodeScope.LINEAR)[1]
    assert sum(forward) == pytest.approx(cost.forward_seconds)
    assert forward[1] - forward[0] == pytest.approx(cost.forward_attention_seconds * 2 / 16)
    rows = problem(batch_size=4, seq_len=256)
    t = build_timeline(rows, plan_of(rows, chunk=256))
    forward = {
        s for s, (kind, position, _) in zip(t.seconds, t.label, strict=True) if (kind, position) == ("forward", 1)
    }
    assert len(forward) == 1


def test_updates_hide_behind_backward_and_not_after_it():
    """Enough memory that only the order differs."""
    p = problem(full=True, batch_size=64)
    modes = {
        mode: simulate(p, plan_of(p, mode=mode, updates={(Tier.NVME, UpdatePlace.CPU): 1.0})).step_seconds
        for mode in (UpdateMode.BACKWARD, UpdateMode.AFTER)
    }
    assert modes[UpdateMode.BACKWARD] < modes[UpdateMode.AFTER]


def test_gradients_stay_until_the_commit_where_the_norm_is_not_known():
    p = problem(full=True)
    grads = 2 * p.workload.trainable_params
    held = {}
    for mode in (UpdateMode.SPECULATIVE, UpdateMode.AFTER, UpdateMode.BACKWARD):
        plan = plan_of(p, mode=mode, tokens=(1.0, 0, 0, 0), updates={(Tier.NVME, UpdatePlace.CPU): 1.0})
        held[mode] = simulate(p, plan).peak_bytes["host"] - sum(static_bytes(p, plan)["host"].values())
    assert held[UpdateMode.SPECULATIVE] >= grads
    assert held[UpdateMode.AFTER] >= grads
    staged = 4 * 12 * max(entry.trainable_params for entry in p.workload.classes)
    assert held[UpdateMode.BACKWARD] < held[UpdateMode.SPECULATIVE] <= grads + staged + 4 * p.workload.boundary_bytes


def test_decoding_a_layer_at_once_costs_memory_and_saves_time():
    p = problem(bits=4)
    linear, layer = (
        simulate(p, plan_of(p, scope=scope, weights=(0, 1, 0), updates={(Tier.HOST, UpdatePlace.CPU): 1.0}))
        for scope in (DecodeScope.LINEAR, DecodeScope.LAYER)
    )
    assert layer.peak_bytes["device"] > linear.peak_bytes["device"]
    assert layer.busy_seconds["compute"] < linear.busy_seconds["compute"]


def test_without_a_gpu_nothing_crosses_a_link():
    p = replace(problem(machine_=machine(name="cpu")), capabilities=Capabilities())
    plan = plan_of(
        p, weights=(0.5, 0, 0.5), tokens=(0.5, 0.25, 0.0, 0.25), updates={(Tier.DEVICE, UpdatePlace.DEVICE): 1.0}
    )
    replay = simulate(p, plan)
    check_busy(p, plan, replay)
    assert replay.busy_seconds["host_to_device"] == replay.busy_seconds["device_to_host"] == 0.0
    assert replay.busy_seconds["ssd_read"] > 0 and replay.peak_bytes["host"] == 0


def test_a_replay_that_did_less_work_is_found():
    """The check itself fires: a replay of other fractions is not this plan's."""
    p = problem()
    plan, other = plan_of(p), plan_of(p, weights=(0.25, 0.0, 0.75))
    with pytest.raises(InvalidPlan, match="ssd_read works"):
        check_busy(p, plan, simulate(p, other))
    assert busy_seconds(p, plan) != busy_seconds(p, other)


def test_it_is_deterministic():
    p = problem(full=True)
    plan = plan_of(p, mode=UpdateMode.DEFERRED)
    assert simulate(p, plan) == simulate(p, plan)
    assert named_hardware("h100") == named_hardware("h100")


@pytest.mark.parametrize("mode", UpdateMode)
def test_a_step_is_steady_when_it_is_measured(mode, monkeypatch):
    """Four steps more change nothing."""
    p = problem(full=True)
    plan = plan_of(p, mode=mode, weights=(0, 0, 1))
    measured = simulate(p, plan).step_seconds
    monkeypatch.setattr("planners.simulator.simulate.NUM_STEPS", {False: 7, True: 6})
    assert simulate(p, plan).step_seconds == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_runtime_that_does_not_read_ahead_reads_when_a_slot_is_free(slots):
    """slots 1:   read 1 into HOST | read 2 ...   against   compute 0 | read 1 | move 1 | compute 1"""
    ahead = problem()
    plan = plan_of(ahead, weights=(0, 0, 1), slots=slots)
    waits = replace(ahead, capabilities=replace(ahead.capabilities, reads_ahead=False))
    first, second = (simulate(p, plan, keep_events=True) for p in (ahead, waits))
    assert second.step_seconds > first.step_seconds
    check_busy(waits, plan, second)
    for run_, is_waiting in ((first, False), (second, True)):
        begins = {e.label[1]: e.start_seconds for e in run_.events if e.label[0] == "read"}
        ends = {}
        for event in run_.events:
            if event.label[0] == "backward":
                ends[event.label[1]] = max(event.finish_seconds, ends.get(event.label[1], 0.0))
        layers = range(1, 1 + 6 - slots)  # positions that backward fetches again, from high to low
        late = [begins[k] >= ends[k + slots] - 1e-9 for k in layers]
        assert all(late) is is_waiting


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.NVME])
def test_what_was_swapped_comes_back_in_the_order_of_backward(tier):
    """What was put away first has left first, and could come back first; a link or a drive would be busy with it."""
    slow = machine()
    links = replace(slow.links, device_to_host_bytes_per_second=slow.links.device_to_host_bytes_per_second / 20)
    drives = tuple(replace(drive, write_bytes_per_second=drive.write_bytes_per_second / 20) for drive in slow.drives)
    slow = replace(slow, links=links, drives=drives)
    p = problem(machine_=slow)
    plan = plan_of(p, tokens=(0, float(tier is Tier.NVME), float(tier is Tier.HOST), 0), buffers=Buffers(swap_slots=6))
    way = Resource.HOST_TO_DEVICE if tier is Tier.HOST else Resource.SSD_READ
    events = sorted(simulate(p, plan, keep_events=True).events, key=lambda event: event.start_seconds)
    back = dict.fromkeys(e.label for e in events if e.label[0] == "load" and e.resource is way)  # gradients come later
    positions = [position for _, position, _ in back]
    assert len(set(positions)) > 3 and positions == sorted(positions, reverse=True)


def in_pieces(p, *, sizes, **buffers):
    """The full fine-tuning of `p` with all weights and state on NVMe, each block's state in pieces of `sizes`, in
    shares of the largest; and its plan.
    """
    piece = 1 << 20
    classes = []
    for entry in p.workload.classes:
        ends = [entry.trainable_params * end // len(sizes) for end in range(len(sizes) + 1)]
        cuts = tuple(zip(ends, (int(piece * end) for end in accumulate(sizes, initial=0)), strict=True))
        classes.append(replace(entry, state_cuts=cuts))
    p = replace(p, workload=replace(p.workload, classes=tuple(classes), state_piece_bytes=piece))
    updates = {(Tier.NVME, UpdatePlace.CPU): 1.0}
    return p, plan_of(p, weights=(0, 0, 1), updates=updates, buffers=Buffers(**buffers))


def test_state_of_no_bytes_is_stepped_as_well():
    """A rule without moments, whose masters are the weights themselves."""
    p = problem(full=True)
    p = replace(p, workload=replace(p.workload, state_bytes_per_param=0, state_piece_bytes=1 << 20))
    plan = plan_of(p, weights=(0, 0, 1), updates={(Tier.NVME, UpdatePlace.CPU): 1.0})
    events = simulate(p, plan, keep_events=True).events
    stepped = {event.label[1] for event in events if event.label[0] == "update"}
    assert stepped == {n for entry in p.workload.classes if entry.trainable_params for n in entry.positions}


def test_a_block_is_stepped_when_there_is_a_slot_for_its_new_weights():
    """one slot    step 5 |               | step 4
                          | write weights |
    two slots   step 5 | step 4
                       | write weights |
    """
    taken = {}
    for slots in (1, 2):
        p, plan = in_pieces(problem(full=True), sizes=(1, 1, 1), weight_slots=slots, state_slots=2)
        found = simulate(p, plan, keep_events=True)
        events = {event.label: event for event in found.events}
        blocks = sorted({position for kind, position, _ in events if kind == "write back"}, reverse=True)
        assert len(blocks) == p.workload.num_blocks
        late = [
            events["update", block, 0].start_seconds >= events["write back", before, 0].finish_seconds
            for before, block in pairwise(blocks)
        ]
        assert all(late) is (slots == 1)
        taken[slots] = found.step_seconds
    assert taken[2] < taken[1]


@pytest.mark.parametrize("mode", [mode for mode in UpdateMode if mode is not UpdateMode.DEFERRED])
@pytest.mark.parametrize("slots", [1, 2])
def test_one_slot_for_new_weights_serves_blocks_that_are_stepped_in_two_parts(mode, slots):
    p = replace(problem(full=True), capabilities=Capabilities(memory_steps_after=True))
    for weights in ((0, 0, 1), (0.25, 0.25, 0.5)):
        plan = plan_of(p, mode=mode, weights=weights, buffers=Buffers(weight_slots=slots, state_slots=1))
        found = simulate(p, plan, keep_events=True)
        labels = [event.label for event in found.events if event.label[0] == "room"]
        in_parts = mode is not UpdateMode.AFTER
        assert len(labels) == p.workload.num_blocks * (1 + in_parts)
        check_busy(p, plan, found)


def test_state_is_read_in_the_order_in_which_blocks_are_stepped():
    """So no slot holds state of a block that waits for one whose own state has no slot."""
    p = problem(full=True)
    t = build_timeline(p, plan_of(p, mode=UpdateMode.AFTER, weights=(0, 0, 1)))
    reads = [op for op, label in enumerate(t.label) if label[0] == "read state"]
    assert len(reads) > p.workload.num_blocks
    assert all((before, 0) in t.deps[op] for before, op in pairwise(reads))


@pytest.mark.parametrize(("slots", "moved"), [(2, [1, 1, 1, 1, 0.5]), (8, [1, 1, 1, 1, 0.5]), (1, [1, 1, 1, 1, 0.5])])
def test_state_moves_in_the_pieces_that_there_are_and_each_takes_a_slot(slots, moved):
    p, plan = in_pieces(problem(full=True), sizes=(1, 1, 1, 1, 0.5), state_slots=slots)
    t = build_timeline(p, plan)
    reads = [op for op, label in enumerate(t.label) if label[:2] == ("read state", 1)]
    rate = p.hardware.read_bytes_per_second
    assert [t.seconds[op] * rate / 2**20 for op in reads] == pytest.approx(moved)
    assert [t.acquire[op][1] for op in reads] == [float(2**20)] * 5


@pytest.mark.parametrize(("slots", "groups"), [(2, 40), (4, 40), (8, 20), (32, 8), (128, 8)])
def test_many_pieces_are_simulated_in_groups_of_which_four_have_slots(slots, groups):
    p, plan = in_pieces(problem(full=True), sizes=(1,) * 40, state_slots=slots)
    t = build_timeline(p, plan)
    taken = [t.acquire[op][1] / 2**20 for op, label in enumerate(t.label) if label[:2] == ("read state", 1)]
    assert len(taken) == groups and sum(taken) == 40
