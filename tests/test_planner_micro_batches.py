"""Steps of several micro-batches, one after the other or together: what they fetch, hold and take, and who plans them.

forward 1  backward 1 | forward 2  backward 2 | ... | forward M  backward M  updates
fetches all           | starts with what lies in the slots, and so does every later one
"""

from dataclasses import replace

import pytest

from planners.errors import PlanInfeasible
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.optimiser.orders import GAIN, in_best_order, layer_major
from planners.optimiser.policies import answer_by_policy
from planners.plans.placement import Tier, UpdateMode, UpdatePlace
from planners.problems.cost import fetch_counts, knobs_of
from planners.render import page, rest_shares
from planners.simulator import simulate as simulation
from planners.simulator import timeline
from planners.simulator.arenas import chunk_bytes, step_buffers, waiting_bytes
from planners.simulator.simulate import simulate
from planners.simulator.static_memory import fixed_device_bytes, fixed_host_bytes, static_bytes
from planners.simulator.step_work import floor_seconds
from planners.simulator.validate import InvalidPlan, check, check_modes
from tests.planner_cases import MIB, machine, plan_of, problem

ROOMY = {"device": 1 << 30, "host": 1 << 30}
TIGHT = {"device": 40 * MIB, "host": 96 * MIB}


def several(number, *, full=True, machine_=None, layer_major=False, **options):
    """Float32 sums, and a processor that takes gradients itself."""
    p = problem(full=full, machine_=machine_ or machine(**ROOMY), **options)
    workload = replace(
        p.workload, micro_batches=number, summed_gradient_bytes_per_param=4, summing_seconds_per_param=1e-12,
        layer_major=layer_major,
    )  # fmt: skip
    return replace(p, workload=workload)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("mode", UpdateMode)
def test_each_micro_batch_takes_its_passes_and_updates_come_once(full, mode):
    if full and mode is UpdateMode.DEFERRED:
        with pytest.raises(InvalidPlan, match="next forward, where gradients of several micro-batches"):
            check_modes(several(2), plan_of(several(1), mode=mode))
        return
    found = {n: several(n, full=full) for n in (1, 2, 3, 5)}
    replays = {n: check(p, plan_of(p, mode=mode)) for n, p in found.items()}  # whose work is that summed by hand
    busy = {n: replay.busy_seconds for n, replay in replays.items()}
    for n in (2, 3, 5):
        assert busy[n]["compute"] == pytest.approx(n * busy[1]["compute"])
        assert busy[n]["device_update"] == pytest.approx(busy[1]["device_update"])
        assert replays[n].step_seconds >= floor_seconds(found[n]) == pytest.approx(n * floor_seconds(found[1]))
    assert busy[5]["cpu"] - busy[3]["cpu"] == pytest.approx(busy[3]["cpu"] - busy[1]["cpu"])
    assert (busy[2]["cpu"] > busy[1]["cpu"]) is full, "gradients of adapters are summed where they are made"


@pytest.mark.parametrize("summing_seconds", [1e-12, 1e-8])
def test_one_micro_batch_is_simulated_for_all_between_the_first_and_the_last(monkeypatch, summing_seconds):
    """Also with a processor that takes longer to add gradients up than the device to make them."""
    p = several(7)
    p = replace(p, workload=replace(p.workload, summing_seconds_per_param=summing_seconds))
    plan = plan_of(p, mode=UpdateMode.SPECULATIVE)
    few = simulate(p, plan)
    for module in (timeline, simulation):
        monkeypatch.setattr(module, "MAX_SIMULATED_PASSES", 7)
    every = simulate(p, plan)
    assert every.num_events > 2 * few.num_events
    assert few.step_seconds >= max(few.busy_seconds.values())
    assert few.step_seconds == pytest.approx(every.step_seconds)
    assert few.busy_seconds == pytest.approx(every.busy_seconds)
    assert few.live_bytes == pytest.approx(every.live_bytes)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_later_micro_batches_find_in_the_slots_what_the_one_before_left(slots):
    p = several(2)
    layer = next(c for c, entry in enumerate(p.workload.classes) if entry.is_layer)
    first, later = (fetch_counts(p, slots, later=later)[layer] for later in (False, True))
    count = p.workload.classes[layer].count
    assert first == (count, count - slots) and later == (count - slots, count - slots)
    frozen = several(2, full=False)
    assert fetch_counts(frozen, slots) == fetch_counts(frozen, slots, later=True)


def test_summed_gradients_of_all_blocks_wait_in_host_in_every_mode():
    updates = {(Tier.NVME, UpdatePlace.CPU): 1.0}
    for number in (1, 2):
        p = several(number)
        plan = plan_of(p, updates=updates)
        params = p.workload.trainable_params
        held = [buffer for buffer in step_buffers(p, plan, Tier.HOST) if buffer.name.startswith("gradients of")]
        assert sum(buffer.num_bytes for buffer in held) == (0 if number == 1 else 4 * params)
        assert all((buffer.begin, buffer.end) == (0, 2 * p.workload.num_blocks + 1) for buffer in held)


def test_what_is_fetched_once_serves_all_that_go_together():
    """Computing, layer inputs that wait and gradients are of each, and all the sums wait."""
    one, three = several(1), several(3, layer_major=True)
    updates = {(Tier.NVME, UpdatePlace.CPU): 1.0}
    again = (1.0, 0.0, 0.0, 0.0)
    alone, together = (check(p, plan_of(p, updates=updates, tokens=again)).busy_seconds for p in (one, three))
    links, workload = one.hardware.links, one.workload
    inputs = workload.tokens * sum(e.count * s.bytes_per_token for e in workload.classes for s in e.saved[:1])
    gradients = workload.gradient_bytes_per_param * workload.trainable_params
    assert together["compute"] == pytest.approx(3 * alone["compute"])
    assert floor_seconds(three) == pytest.approx(3 * floor_seconds(one))
    down, up = (together[link] - alone[link] for link in ("host_to_device", "device_to_host"))
    assert down * links.host_to_device_bytes_per_second == pytest.approx(2 * inputs)
    assert up * links.device_to_host_bytes_per_second == pytest.approx(2 * (inputs + gradients))


@pytest.mark.parametrize(("chunk", "groups", "boundary"), [(1024, 1, Tier.DEVICE), (128, 2, Tier.HOST)])
def test_what_several_that_go_together_do_by_chunks_is_summed_by_hand_too(chunk, groups, boundary):
    """What is kept and swapped is, too, though nobody asks for it of several together."""
    one, three = several(1), several(3, layer_major=True)
    alone, together = (
        check(p, plan_of(p, chunk=chunk, groups=groups, boundary=boundary)).busy_seconds for p in (one, three)
    )
    assert together["compute"] == pytest.approx(3 * alone["compute"])
    assert together["ssd_read"] > alone["ssd_read"] and together["host_to_device"] > alone["host_to_device"]


def test_what_several_that_go_together_hold_is_their_inputs_and_hidden_states():
    """What one computes again is gone when the next one comes."""
    one, three = several(1), several(3, layer_major=True)
    knobs = knobs_of(plan_of(one))
    held, of_all = (fixed_device_bytes(p, knobs) for p in (one, three))
    between = held["activations between layers"]
    in_turn = {"activations between layers", "hidden states of other micro-batches"}
    assert [of_all[name] for name in in_turn] == 2 * [3 * between]
    through_host = replace(knobs, boundary=Tier.HOST)
    assert fixed_host_bytes(three, through_host) == {name: 3 * between for name in in_turn}
    assert not in_turn & fixed_device_bytes(three, through_host).keys() - {"activations between layers"}
    assert of_all["gradients"] == held["gradients"]
    for entry in one.workload.classes:
        assert chunk_bytes(three, knobs, entry) == chunk_bytes(one, knobs, entry)
        waiting = [waiting_bytes(p, plan_of(p).entry(entry.name), entry, Tier.HOST) for p in (one, three)]
        assert waiting[1] == 3 * waiting[0] and (waiting[0] or not entry.saved)
    on_drives = [static_bytes(p, plan_of(p))["nvme"]["activations"] for p in (one, three)]
    assert on_drives[1] == 3 * on_drives[0] > 0
    shown = [sum(sum(sizes) for name, sizes in rest_shares(p, plan_of(p)) if "activ" in name) for p in (one, three)]
    assert shown[1] == pytest.approx(3 * shown[0])


@pytest.mark.parametrize("layer_major", [False, True])
def test_planners_plan_several_micro_batches_within_their_bound(layer_major):
    p = several(5, machine_=machine(**TIGHT), layer_major=layer_major)
    plan, greedy = plan_optimal(p), plan_greedy(p)
    for found in (plan, greedy):
        check(p, found)
        assert found.update_mode is not UpdateMode.DEFERRED
    seconds = plan.predicted["step_seconds"]
    assert plan.predicted["lower_bound_seconds"] <= seconds <= greedy.predicted["step_seconds"]
    assert layer_major or plan.predicted["gap"] < 0.15
    assert plan.predicted["tokens_per_second"] == pytest.approx(5 * p.workload.tokens / seconds)


@pytest.mark.parametrize("room", [TIGHT, ROOMY])
@pytest.mark.parametrize("ask", [plan_optimal, plan_greedy])
def test_the_faster_order_is_taken_where_everything_trains(room, ask):
    p = several(5, machine_=machine(**room))
    apart, at_once = ask(p), ask(layer_major(p))
    seconds = [plan.predicted["step_seconds"] for plan in (apart, at_once)]
    question, plan = in_best_order(p, ask)
    check(question, plan)
    assert plan.layer_major is question.workload.layer_major is (seconds[1] <= (1 - GAIN) * seconds[0])
    if ask is plan_optimal:
        assert plan.layer_major is (room is TIGHT), "where weights stream, and not where activations can be kept"
    assert plan.predicted["step_seconds"] == seconds[plan.layer_major]
    assert ("micro-batches through each layer together" in page(question, plan)) is plan.layer_major
    again = [split for entry in at_once.classes for split in entry.tokens if split.name != "input"]
    assert again and all(split.recompute_tokens == p.workload.seq_len for split in again), "as the runtime has it"
    if ask is plan_greedy:
        assert plan.predicted["lower_bound_seconds"] is None
        return
    bounds = [one.predicted["lower_bound_seconds"] for one in (apart, at_once)]
    assert bounds[0] != bounds[1] and plan.predicted["lower_bound_seconds"] == min(bounds)
    assert plan.predicted["gap"] == pytest.approx(1 - min(bounds) / min(seconds))


def test_one_order_is_asked_about_where_the_other_is_no_question():
    asked = []

    def ask(question):
        asked.append(question.workload.layer_major)
        return plan_greedy(question)

    of_one, adapters = several(1), several(5, full=False)
    for p in (of_one, adapters, layer_major(several(5))):
        question, plan = in_best_order(p, ask)
        assert question == p and plan == plan_greedy(p)
    assert asked == [False, False, True]


def test_a_plan_stays_where_those_together_do_not_fit():
    p = several(5, machine_=machine(**TIGHT))

    def ask(question):
        if question.workload.layer_major:
            raise PlanInfeasible(tier="device", phase="forward", need_bytes=2, have_bytes=1, ways_out=[])
        return plan_greedy(question)

    assert in_best_order(p, ask) == (p, plan_greedy(p))


def test_what_others_do_goes_one_after_the_other():
    p = several(5, machine_=machine(**TIGHT))
    assert answer_by_policy(p, "greedy")[1].layer_major
    question, plan = answer_by_policy(p, "fuyou")
    assert question == p and not plan.layer_major
