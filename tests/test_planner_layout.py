"""Offsets: drawings by hand, an exact model as the oracle, what chunks and steps need, what a broken layout says."""

import random
import weakref
from dataclasses import replace

import pytest

from planners.plans import layout
from planners.plans.layout import ALIGNMENT_BYTES, Buffer, lay_out, live_bytes
from planners.plans.placement import Buffers, Tier, UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.plans.schedule import Phase
from planners.problems.cost import knobs_of, num_chunks
from planners.problems.model_workload import make_workload
from planners.problems.problem import Capabilities, Problem
from planners.shapes.architectures import shape_from_config
from planners.shapes.models import find_model
from planners.shapes.trace import NUM_OPERATIONS, backward_tick, saved_tensors, transients
from planners.simulator.arenas import chunk_arena_name, demands, retained_gradients
from planners.simulator.simulate import simulate
from planners.simulator.validate import InvalidPlan, check_arena, check_layout
from tests.planner_cases import EVERYWHERE, machine, plan_of, problem

K = ALIGNMENT_BYTES


def buffer(name, size, begin, end, offset=0):
    return Buffer(name=name, num_bytes=size * K, begin=begin, end=end, offset_bytes=offset * K)


def laid(*buffers, period=8, **options):
    arena = lay_out("x", Tier.DEVICE, buffers, period, **options)
    return {b.name: b.offset_bytes // K for b in arena.buffers}, arena.num_bytes // K


def test_what_is_not_live_together_shares_bytes():
    """
    2 ▲ ┌─b─┐   ┌─c─┐
    1 │ └───┘   └───┘
      │ ┌─────a─────┐
    0 └─0───2───4───6─►
    """
    offsets, top = laid(buffer("a", 1, 0, 6), buffer("b", 1, 0, 2), buffer("c", 1, 4, 6))
    assert offsets["b"] == offsets["c"] and top == 2


def test_intervals_are_half_open():
    assert laid(buffer("a", 3, 0, 4), buffer("b", 3, 4, 8))[1] == 3
    assert laid(buffer("a", 3, 0, 5), buffer("b", 3, 4, 8))[1] == 6


def test_what_crosses_the_end_of_a_round_meets_its_beginning():
    """
    2 ▲ ──┐   ┌─b─┐ ┌──        a lives in [6, 8) and, in the next round, in [0, 2)
    1 │ a │   └───┘ │ a
    0 └─0─2───3───5─6──8►
    """
    offsets, top = laid(buffer("a", 2, 6, 10), buffer("b", 2, 2, 6))
    assert offsets == {"a": 0, "b": 0} and top == 2
    assert laid(buffer("a", 2, 6, 10), buffer("b", 2, 1, 6))[1] == 4


def test_a_slot_is_stacked_and_its_free_part_is_used():
    """
    4 ▲ . . .┌──────        slot of 4: `first` from tick 0, `second` from tick 4
    2 │──────┘ second
    0 └─0────4────8►        `early` fits in the gap, `late` does not, `wide` would lie across the slot's end
    """
    slot = [buffer("first", 2, 0, 8), buffer("second", 2, 4, 8)]
    early, late, wide = buffer("early", 2, 0, 4), buffer("late", 2, 4, 8), buffer("wide", 3, 0, 4)
    offsets, top = laid(early, late, in_slot=slot, slot_bytes=4 * K)
    assert offsets == {"first": 0, "second": 2, "early": 2, "late": 4} and top == 6
    assert laid(wide, in_slot=slot, slot_bytes=4 * K)[0]["wide"] == 4
    with pytest.raises(ValueError, match="needs a slot of"):
        laid(in_slot=slot, slot_bytes=3 * K)


def test_sizes_are_rounded_up_and_empty_ones_left_out():
    arena = lay_out("x", Tier.DEVICE, [Buffer(name="a", num_bytes=1, begin=0, end=1),
                                       Buffer(name="b", num_bytes=0, begin=0, end=1)], 1)  # fmt: skip
    assert [b.num_bytes for b in arena.buffers] == [K] and arena.num_bytes == K
    assert lay_out("x", Tier.DEVICE, [], 1).num_bytes == 0


@pytest.mark.parametrize("begin, end", [(-1, 2), (2, 2), (3, 2), (8, 9), (1, 10)])
def test_a_lifetime_that_no_round_has_is_refused(begin, end):
    with pytest.raises(ValueError, match="is no lifetime in a round of 8 ticks"):
        laid(buffer("a", 1, begin, end))


def optimum(buffers, period):
    """The exact model, in units of K: offsets, and of each pair that is live together which one lies below."""
    highspy = pytest.importorskip("highspy")
    high = sum(b.num_bytes for b in buffers) // K
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("threads", 1)
    top = model.addVariable(lb=0, ub=high, obj=1.0)
    offsets = [model.addVariable(lb=0, ub=high) for _ in buffers]
    ticks = [{t % period for t in range(b.begin, b.end)} for b in buffers]
    for i, b in enumerate(buffers):
        model.addConstr(top - offsets[i] >= b.num_bytes // K)
        for j in range(i):
            if ticks[i] & ticks[j]:
                below = model.addBinary()
                model.addConstr(offsets[j] - offsets[i] + high * (1 - below) >= b.num_bytes // K)
                model.addConstr(offsets[i] - offsets[j] + high * below >= buffers[j].num_bytes // K)
    model.minimize()
    assert model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return round(model.getObjectiveValue())


def instance(seed, count=7, period=8):
    chance = random.Random(seed)
    made = []
    for i in range(count):
        begin = chance.randrange(period)
        made.append(buffer(str(i), chance.randrange(1, 9), begin, begin + chance.randrange(1, period)))
    return made


@pytest.mark.parametrize("seed", range(14))
def test_layouts_are_as_small_as_the_exact_model_says(seed):
    buffers = instance(seed)
    arena = lay_out("x", Tier.DEVICE, buffers, 8)
    check_arena(arena, buffers)
    assert arena.num_bytes // K == optimum(buffers, 8) >= max(live_bytes(buffers, 8)) // K


def greedy_misses(seed):
    buffers = instance(seed, count=20, period=12)
    plain = lay_out("x", Tier.DEVICE, buffers, 12, attempts=0).num_bytes
    return buffers, plain, max(live_bytes(buffers, 12))


def test_local_search_gains_where_the_fixed_orders_miss_the_bound():
    gained = 0
    for seed in range(40):
        buffers, plain, bound = greedy_misses(seed)
        found = lay_out("x", Tier.DEVICE, buffers, 12).num_bytes
        assert bound <= found <= plain
        gained += found < plain
    assert gained >= 5


def test_the_search_stops_at_the_bound_and_at_what_is_enough(monkeypatch):
    calls = []
    place = layout.place
    monkeypatch.setattr(layout, "place", lambda *arguments: calls.append(1) or place(*arguments))
    layout._offsets.cache_clear()
    laid(buffer("a", 1, 0, 4), buffer("b", 1, 4, 8))
    assert len(calls) == 1
    seed = next(s for s in range(99) if greedy_misses(s)[1] > greedy_misses(s)[2])
    buffers, plain, _ = greedy_misses(seed)
    layout._offsets.cache_clear()
    calls.clear()
    assert lay_out("x", Tier.DEVICE, buffers, 12, enough_bytes=plain).num_bytes == plain
    assert len(calls) <= len(layout._ORDERS)


def test_a_layout_is_deterministic():
    first = lay_out("x", Tier.DEVICE, instance(3, count=30), 8)
    layout._offsets.cache_clear()
    assert lay_out("x", Tier.DEVICE, instance(3, count=30), 8) == first


# What chunks and steps need.


ROOMY = {"device": 1 << 30, "host": 1 << 30}


@pytest.mark.parametrize("swap_slots", [1, 2, 3])
@pytest.mark.parametrize("tokens", [(1.0, 0, 0, 0), (0, 0, 1.0, 0), (0.25, 0.25, 0.25, 0.25), (0, 0, 0, 1.0)])
def test_what_the_program_charges_is_what_is_live(swap_slots, tokens):
    """The most over `demands` is the max-live bound of the chunks' arenas, and the layout is that or little more."""
    p = problem(machine_=machine(**ROOMY))
    plan = plan_of(p, tokens=tokens, buffers=Buffers(swap_slots=swap_slots), chunk=256)
    knobs = knobs_of(plan)
    each = p.workload.batch_size / num_chunks(p, knobs.cuts)
    for entry in p.workload.classes:
        if not entry.is_layer:
            continue
        charged = 0.0
        for demand in demands(p, knobs, entry):
            live = demand.fixed_bytes
            for j, (saved, split) in enumerate(zip(entry.saved, plan.entry(entry.name).tokens, strict=True)):
                live += each * saved.bytes_per_token * split.recompute_tokens * demand.again[j]
                live += each * saved.bytes_per_token * (split.host_tokens + split.nvme_tokens) * demand.swapped[j]
            charged = max(charged, live)
        arenas = [plan.arena(chunk_arena_name(entry, phase)) for phase in Phase]
        bound = max(max(live_bytes(arena.buffers, arena.period)) for arena in arenas)
        assert charged <= bound <= charged + 30 * K
        largest = max(arena.num_bytes for arena in arenas)
        assert largest <= max(1.1 * bound, max(a.num_bytes for a in plan.arenas[1:]))


def test_a_chunks_slot_is_taken_until_it_is_out_and_from_the_beginning_when_it_comes_back():
    plan = plan_of(problem(machine_=machine(**ROOMY)), tokens=(0, 0.5, 0.5, 0))
    leaving, coming = (
        {b.name: (b.begin, b.end) for b in plan.arena(f"layer, {phase.value}").buffers if "swapped" in b.name}
        for phase in Phase
    )
    assert leaving["input, swapped"] == (0, 8) and leaving["up, swapped"] == (5, 8)
    assert coming["input, swapped"] == (0, 15) and coming["product, swapped"] == (0, 8)


def test_transformer_layers_reach_the_bound():
    """Backward with everything recomputed and nothing swapped."""
    for kind in ("llama3-8b", "gpt3-13b", "gemma2-9b", "mixtral-8x7b", "deepseek-v3", "qwen2.5-72b"):
        workload = make_workload(find_model(kind), batch_size=1, seq_len=4096)
        p = Problem(hardware=machine(device=1 << 40, host=1 << 40, nvme=1 << 44), workload=workload)
        plan = plan_of(p, tokens=(1.0, 0, 0, 0), weights=(0, 1, 0), chunk=4096)
        entry = next(e for e in workload.classes if e.is_layer)
        buffers = [replace(b, offset_bytes=0) for b in plan.arena(chunk_arena_name(entry, Phase.BACKWARD)).buffers]
        free = [b for b in buffers if "swapped" not in b.name]
        arena = lay_out("x", Tier.DEVICE, free, 2 * NUM_OPERATIONS - 1)
        assert arena.num_bytes == max(live_bytes(free, arena.period)), kind


@pytest.mark.parametrize("mode", UpdateMode)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["rtx4090", "cpu"])
def test_a_replay_has_no_more_live_than_is_laid_out(mode, full, name):
    p = problem(full=full, machine_=machine(name=name, **ROOMY))
    updates = {(Tier.DEVICE, UpdatePlace.DEVICE): 0.5, (Tier.NVME, UpdatePlace.DEVICE): 0.5}
    options = {"updates": updates, "weights": (0.5, 0, 0.5), "tokens": (0.4, 0.3, 0, 0.3)} if name == "cpu" else {}
    plan = plan_of(p, mode=mode, **options)
    check_layout(p, plan)
    replay = simulate(p, plan)
    assert all(replay.live_bytes[tier] <= replay.peak_bytes[tier] for tier in ("device", "host", "nvme"))
    # And not much less: nothing is laid out that a step does not use.
    assert replay.peak_bytes["device"] <= 1.1 * replay.live_bytes["device"] + 100 * K


def test_gradients_that_wait_into_the_next_forward_cross_the_end_of_the_step():
    p = problem(full=True, machine_=machine(**ROOMY))
    plan = plan_of(p, mode=UpdateMode.DEFERRED, updates=EVERYWHERE)
    arena = plan.arena("host")
    waiting = [b for b in arena.buffers if b.name.startswith("gradients of")]
    assert waiting and all(b.end > arena.period for b in waiting)
    assert retained_gradients(p, plan, plan.entry("layer"), Tier.HOST)


def test_gradients_that_wait_into_the_next_forward_may_have_memory_of_their_own():
    p = problem(full=True, machine_=machine(**ROOMY))
    p = replace(p, capabilities=Capabilities(gradients_apart=True))
    plan = plan_of(p, mode=UpdateMode.DEFERRED, updates=EVERYWHERE)
    check_layout(p, plan)
    arena = plan.arena("host")
    waiting = [b for b in arena.buffers if b.name.startswith("gradients of")]
    assert waiting and all((b.begin, b.end) == (0, arena.period) for b in waiting)


def test_a_plan_keeps_its_offsets_in_its_file():
    plan = plan_of(problem(machine_=machine(**ROOMY)))
    again = Plan.from_json(plan.to_json())
    assert again.arenas == plan.arenas and again == plan
    with pytest.raises(ValueError, match="is no lifetime"):
        Plan.from_json(plan.to_json().replace('"period": 8', '"period": 1'))


def with_arena(plan, name, change):
    return replace(plan, arenas=tuple(change(a) if a.name == name else a for a in plan.arenas))


def moved(index, **changes):
    return lambda a: replace(
        a, buffers=tuple(replace(b, **changes) if i == index else b for i, b in enumerate(a.buffers))
    )


BACKWARD = "layer, backward"
BROKEN = {
    "two things overlap": (BACKWARD, lambda a: moved(len(a.buffers) - 1, offset_bytes=a.slot_bytes)(a), "overlap"),
    "ends beyond the arena": (BACKWARD, lambda a: moved(3, offset_bytes=a.num_bytes)(a), "ends at"),
    "lies across the slot": (
        BACKWARD, lambda a: moved(len(a.buffers) - 1, offset_bytes=a.slot_bytes - K)(a), "across the end of the slot"
    ),
    "something is missing": (BACKWARD, lambda a: replace(a, buffers=a.buffers[:-1]), "holds other things"),
    "something is too small": (BACKWARD, lambda a: moved(4, num_bytes=K)(a), "and needs"),
    "slots differ": (BACKWARD, lambda a: replace(a, slot_bytes=a.slot_bytes + K), "different sizes"),
    "the step's arena is too small": ("device", lambda a: replace(a, num_bytes=a.num_bytes - 1), "ends at"),
    "activations of a step overlap": ("host", lambda a: moved(-1 % len(a.buffers), offset_bytes=0)(a), "overlap"),
    "another name": ("host", lambda a: replace(a, name="lost"), "a step has"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layout_is_rejected(name):
    p = problem(full=True, machine_=machine(**ROOMY))
    plan = plan_of(p)
    check_layout(p, plan)
    arena, change, message = BROKEN[name]
    with pytest.raises(InvalidPlan, match=message):
        check_layout(p, with_arena(plan, arena, change))


def test_promised_peaks_are_those_of_the_layout():
    p = problem(full=True, machine_=machine(**ROOMY))
    plan = plan_of(p)
    with pytest.raises(InvalidPlan, match="promises peaks"):
        check_layout(p, replace(plan, predicted={"peak_bytes": {"device": 1, "host": 1, "nvme": 1}}))


@pytest.mark.parametrize("hidden, inner, heads, kv_heads", [(128, 512, 4, 4), (128, 448, 8, 2), (256, 256, 8, 8)])
def test_the_trace_is_that_of_a_real_layer(hidden, inner, heads, kv_heads):
    """A Llama layer's forward with a graph and backward, every storage counted while it is there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        now = peak = 0

        def __init__(self):
            super().__init__()
            self.sizes = {}

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                    storage = tensor.untyped_storage()
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata)
            return result

        def gone(self, key):
            self.now -= self.sizes.pop(key, 0)

    tokens = 512
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
             "num_key_value_heads": kv_heads, "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
    config = transformers.LlamaConfig(**sizes, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    hidden_BTD = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    rotary = model.model.rotary_emb(hidden_BTD, torch.arange(tokens)[None])
    gradient_BTD = torch.randn_like(hidden_BTD)
    with Live() as live:
        result = model.model.layers[0](hidden_BTD, position_embeddings=rotary)
        (result[0] if isinstance(result, tuple) else result).backward(gradient_BTD)
    layer = shape_from_config({"model_type": "llama", **sizes}, "one").layers[0]
    traced = [
        Buffer(name=s.name, num_bytes=round(tokens * s.bytes_per_token), begin=s.made,
               end=backward_tick(NUM_OPERATIONS, s.needed) + 1)
        for s in saved_tensors(layer, lambda linear: 0)
        if s.recomputable
    ]  # fmt: skip
    traced += [
        Buffer(name=t.name, num_bytes=round(tokens * t.bytes_per_token), begin=t.begin, end=t.end)
        for t in transients(layer)
        if t.phase is Phase.BACKWARD
    ]
    assert max(live_bytes(traced, 2 * NUM_OPERATIONS - 1)) == pytest.approx(live.peak, rel=0.1)
