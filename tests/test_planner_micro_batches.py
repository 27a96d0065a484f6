"""Steps of several micro-batches, one after the other or together: what they fetch, hold and take, and who plans them.

forward 1  backward 1 | forward 2  backward 2 | ... | forward M  backward M  updates
fetches all           | starts with what lies in the slots, and so does every later one
"""

from dataclasses import replace

import pytest

from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.plans.placement import Tier, UpdateMode, UpdatePlace
from planners.problems.cost import fetch_counts
from planners.simulator import simulate as simulation
from planners.simulator import timeline
from planners.simulator.arenas import step_buffers
from planners.simulator.simulate import simulate
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
    """Gradients come for each, and all of them wait; classes say what all of them take."""
    one, together = several(1), several(3, layer_major=True)
    updates = {(Tier.NVME, UpdatePlace.CPU): 1.0}
    alone, all_of_them = (check(p, plan_of(p, updates=updates)).busy_seconds for p in (one, together))
    assert all_of_them["host_to_device"] == pytest.approx(alone["host_to_device"])
    gradients = one.workload.gradient_bytes_per_param * one.workload.trainable_params
    more = (
        all_of_them["device_to_host"] - alone["device_to_host"]
    ) * one.hardware.links.device_to_host_bytes_per_second
    assert more == pytest.approx(2 * gradients)


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
