"""The longest step before the first one: what it counts, that it changes nothing, and what follows from it.

budget   |- arenas -|- adapters -|- activations -|- freed memory -|- room -|
measured                         |=====================>                     fits | room | freed memory | planned again
"""

import copy
import gc
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from offload_rt.memory.allocations import AllocationMeter, counted, together
from offload_rt.plans import workload_sizes
from offload_rt.profiling.measured_sizes import remembered_factor, scaled, sizes_key
from offload_rt.running import rehearsal
from offload_rt.running.longest_step import longest
from offload_rt.running.rehearsal import MEASURED_BEFORE, SLACK, Rehearsal, planned_bytes
from planners.errors import PlanInfeasible
from planners.plans.plan import Tier
from tests.conftest import VOCABULARY, build_lora

KIB, MIB = 1 << 10, 1 << 20
ROWS, TOKENS = 2, 64


def batch(seed, rows=1, tokens=24):
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nvme").mkdir()


@pytest.fixture
def make(make_engine, tmp_path):
    def made(budget=None, model=None, **arguments):
        arguments = {"nvme": tmp_path / "nvme", "bits": 4, **arguments}
        if budget is not None:
            arguments["device_memory"] = budget
        return make_engine(
            build_lora("llama") if model is None else model, batch_size=ROWS, seq_len=TOKENS, device="cpu", **arguments
        )

    return made


def used_bytes(engine):
    return engine._runtime.tiers.account(Tier.DEVICE).used_bytes


@pytest.fixture
def tight(make):
    """The least budget in which the rule's first choice fits: nothing of it is left."""
    with make() as roomy:
        return used_bytes(roomy)


def outcome(engine):
    return engine.report()["rehearsal"]


def train(engine, numbers=range(3), by_model=False):
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        loss = (engine.model if by_model else engine)(**batch(number)).loss
        engine.backward(loss)
        losses.append(float(loss.detach()))
        engine.step()
    return losses, {name: p.detach().clone() for name, p in engine.trainable.items()}


def test_adapters_that_compute_with_weights_are_counted_however_much_room_there_is(make):
    """Formulas are for adapters beside a product: these take many times as much."""
    peft = pytest.importorskip("peft")
    base = build_lora("llama", num_layers=2).unload()
    config = peft.HRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for model, result in ((build_lora("llama", num_layers=2), "left out"), (peft.get_peft_model(base, config), None)):
        with make("64MiB", model) as engine:
            train(engine, range(1))
            assert (outcome(engine)["result"] == "left out") is (result == "left out")
            if result is None:
                assert outcome(engine)["measured_bytes"] > 2 * outcome(engine)["planned_bytes"]


def test_blocks_are_counted_to_the_byte():
    with AllocationMeter() as meter:
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del second
        third = torch.empty(100, dtype=torch.uint8)
        del first
        fourth = torch.empty(7, dtype=torch.uint8)
    assert (meter.peak_bytes, meter.live_bytes) == (3 * MIB, 107)
    assert third.numel() + fourth.numel() == 107


def test_what_the_garbage_collector_frees_of_an_earlier_count_does_not_lower_the_peak():
    with AllocationMeter():
        loop = [torch.empty(MIB, dtype=torch.uint8)]
        loop.append(loop)
    gone = weakref.ref(loop[0])
    del loop
    with AllocationMeter() as meter:
        gc.collect()
        with torch.profiler.record_function("a part that has a name"):
            kept = torch.empty(2 * MIB, dtype=torch.uint8)
    assert gone() is None and kept.numel() == meter.peak_bytes == meter.live_bytes == 2 * MIB


def test_a_block_whose_end_was_not_reported_ends_where_its_address_begins_again():
    """Another thread gave it back."""
    first, second = 4096, 8192
    blocks = [(1, first, 100), (4, second, -7), (2, second, 7), (3, first, 50), (5, 0, -1000)]
    assert together(counted(blocks)) == (50, 107)


@pytest.mark.parametrize("counter", [AllocationMeter, lambda: torch.autograd.profiler.profile(profile_memory=True)])
def test_blocks_from_before_a_session_are_reported_to_other_sessions_alone(counter, capfd):
    # Torch says it of the first of a thousand blocks: one of these. The profiler, asked after the meter, still says it.
    early = [torch.zeros(4) for _ in range(1001)]
    with AllocationMeter():
        pass
    with counter():
        early.clear()
    said = "allocated before the profiling started" in capfd.readouterr().err
    assert said == (counter is not AllocationMeter)


def test_a_profiler_of_the_callers_is_left_alone():
    assert AllocationMeter.refusal() is None
    with torch.profiler.profile(profile_memory=True):
        assert "caller's" in AllocationMeter.refusal()


def test_the_call_is_stretched_to_the_largest_batch(make):
    with make() as engine:
        config = engine.config
    ids = torch.arange(24).view(1, 24)
    embeds = torch.zeros(1, 24, 5)
    (), found = longest(
        (), {"input_ids": ids, "inputs_embeds": embeds, "use_cache": False, "scale": torch.ones(())}, config
    )
    assert found["input_ids"].shape == (ROWS, TOKENS) and found["inputs_embeds"].shape == (ROWS, TOKENS, 5)
    assert found["input_ids"][1].tolist() == [position % 24 for position in range(TOKENS)]
    assert found["use_cache"] is False and found["scale"].ndim == 0
    args, _ = longest((torch.zeros(2, 16, 8),), {}, config)
    assert args[0].shape == (ROWS, TOKENS, 8)
    assert longest((), {"input_ids": ids, "pixels": torch.zeros(1, 3, 8, 8)}, config) is None
    assert longest((), {"input_ids": torch.zeros(0, 24)}, config) is None
    assert longest((), {}, config) is None


def test_it_counts_the_longest_step_once_through_the_real_code(make, tight, monkeypatch):
    rows = []
    with make(tight) as engine:
        engine.model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        planned = planned_bytes(engine._runtime)
        train(engine)
        found = outcome(engine)
    assert rows == [(ROWS, TOKENS), (1, 24), (1, 24), (1, 24)]
    assert found["planned_bytes"] == planned and found["measured_bytes"] > 0 and found["seconds"] > 0
    rows.clear()
    with make(tight) as again:
        train(again)
        known = outcome(again)
    assert rows == [], "the hook was the first engine's model's"
    assert known["why"] == MEASURED_BEFORE and known["seconds"] == 0.0
    assert [known[name] for name in ("result", "measured_bytes")] == [found["result"], found["measured_bytes"]]


def test_what_is_counted_is_what_the_step_really_takes(make, tight):
    """Counted by hand in an engine that rehearses nothing."""
    with make(tight) as engine:
        train(engine)
        rehearsed = outcome(engine)["measured_bytes"]
    with make() as engine:
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
        parameters = list(engine.trainable.values())
        for _ in range(2):
            with AllocationMeter() as meter:
                loss = engine(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
                gradients = torch.autograd.grad(loss, parameters)
                del gradients, loss
    assert rehearsed == pytest.approx(meter.peak_bytes, rel=0.02)


class Counting(nn.Module):
    """A layer that draws from every generator, counts its calls and keeps the longest length in a buffer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.num_calls = 0
        self.register_buffer("longest", torch.zeros(1))

    def forward(self, *args, **kwargs):
        self.num_calls += 1
        self.longest.fill_(max(float(self.longest), float(args[0].shape[1])))
        random.random()
        np.random.rand()
        return self.inner(*args, **kwargs)


def test_it_changes_nothing(make, tight, monkeypatch):
    """Losses, parameters, optimizer state, generators, buffers, counters: as without it."""
    found = {}
    for how in ("rehearsed", "not"):
        if how == "not":
            monkeypatch.setattr(rehearsal, "ROOM", 0)
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        model = build_lora("llama")
        model.base_model.model.model.norm = Counting(model.base_model.model.model.norm)
        with make(tight + 64 * KIB, model) as engine:
            before = copy.deepcopy(engine.report())
            losses, parameters = train(engine)
            after = engine.report()
            norm = model.base_model.model.model.norm
            found[how] = {
                "losses": losses, "parameters": parameters, "calls": norm.num_calls, "longest": float(norm.longest),
                "random": random.getstate(), "numpy": np.random.get_state()[1].tolist(), "torch": torch.get_rng_state(),
                "state": engine.optimizer.state_dict()["state"],
                **{name: after[name] - before[name] for name in (
                    "bytes_read", "bytes_copied", "fetches", "scheduled_fetches", "prefetch_hits", "prefetch_misses",
                    "recomputes", "decodes", "step", "replans",
                )},
            }  # fmt: skip
            assert (outcome(engine)["measured_bytes"] is not None) is (how == "rehearsed")
    one, other = found.values()
    for name, value in one.items():
        if name == "parameters":
            assert all(torch.equal(value[key], other[name][key]) for key in value)
        elif name == "state":
            for number, entry in value.items():
                assert all(torch.equal(entry[key], other[name][number][key]) for key in entry)
        elif name == "torch":
            assert torch.equal(value, other[name])
        else:
            assert value == other[name], name


def test_a_loop_that_calls_the_model_itself_is_rehearsed_too(make, tight, monkeypatch):
    found = []
    for by_model in (False, True):
        with monkeypatch.context() as fresh, make(tight + 64 * KIB) as engine:
            fresh.setattr(rehearsal, "remembered_bytes", lambda *_: None)
            losses, _ = train(engine, by_model=by_model)
            found.append((losses, outcome(engine)["measured_bytes"], engine.report()["recomputes"]))
            assert engine.step_meter.num_steps == 3
    assert found[0] == found[1] and found[0][1] is not None


def short_formula(monkeypatch, factor):
    """The formulas for a layer give so much of what they gave."""
    for name in ("estimate_activation_bytes", "attention_bytes"):
        whole = getattr(workload_sizes, name)
        monkeypatch.setattr(workload_sizes, name, lambda *a, whole=whole, **k: int(whole(*a, **k) * factor))


def test_more_than_planned_is_booked_where_the_budget_has_room(make, tight, monkeypatch):
    with make(2 * tight) as engine:
        monkeypatch.setattr(rehearsal, "ROOM", 1000)
        used, slack = used_bytes(engine), engine._runtime.tiers.account(Tier.DEVICE).holdings[SLACK]
        train(engine)
        found = outcome(engine)
        assert found["result"] == "within the budget"
        assert used_bytes(engine) == used + found["measured_bytes"] - found["planned_bytes"]
        assert engine._runtime.tiers.account(Tier.DEVICE).holdings[SLACK] == slack


def test_more_than_planned_is_taken_from_freed_memory_where_there_is_no_room(make, tight):
    with make(tight) as engine:
        account = engine._runtime.tiers.account(Tier.DEVICE)
        slack = account.holdings[SLACK]
        train(engine)
        found = outcome(engine)
        assert found["result"] == "less freed memory is granted"
        more = found["measured_bytes"] - found["planned_bytes"]
        assert 0 < slack - account.holdings[SLACK] <= more and account.used_bytes <= account.capacity_bytes
        assert engine._runtime.heap._holes_allowed == account.holdings[SLACK]


def test_a_plan_is_made_again_where_neither_helps_and_gives_the_same_numbers(make, tmp_path, monkeypatch):
    with make() as roomy:
        expected = train(roomy)
    short_formula(monkeypatch, 0.25)
    with make() as short:
        least = used_bytes(short)
    seen = set()
    for more in range(64, 1024, 64):
        monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / f"cache {more}"))
        with make(least + more * KIB) as engine:
            before, bytes_read = engine.plan, engine.report()["bytes_read"]
            try:
                losses, parameters = train(engine, by_model=True)  # where the call has begun
            except PlanInfeasible:
                seen.add("refused")
                continue
            seen.add(outcome(engine)["result"])
            assert losses == expected[0] and all(torch.equal(parameters[name], p) for name, p in expected[1].items())
            assert used_bytes(engine) <= least + more * KIB
            assert engine.plan != before and engine.report()["bytes_read"] > bytes_read, "counts go on"
            made_again = engine.plan
        with make(least + more * KIB) as next_time:
            assert next_time.plan == made_again, "what was measured is planned with"
            assert train(next_time)[0] == losses and outcome(next_time)["result"] == "fits"
        break
    assert seen == {"refused", "planned again"}, "with less memory nothing fits, with a little more another plan does"


def test_what_fits_no_plan_is_refused_before_training_starts(make, monkeypatch):
    short_formula(monkeypatch, 0.02)
    with make() as short:
        least = used_bytes(short)
    with pytest.raises(PlanInfeasible) as least_of_all:
        make(KIB)
    with make(max(least, least_of_all.value.need_bytes)) as engine:
        before = {name: p.detach().clone() for name, p in engine.trainable.items()}
        for by_model in (False, True):  # it stays refused
            with pytest.raises(PlanInfeasible) as refused:
                train(engine, by_model=by_model)
        assert refused.value.need_bytes > refused.value.have_bytes and refused.value.ways_out
        assert engine.step_number == 0 and all(torch.equal(before[n], p) for n, p in engine.trainable.items())
        assert all(p.grad is None for p in engine.trainable.values())


def test_a_given_plan_is_refused_with_what_would_fit(make, tight, monkeypatch):
    short_formula(monkeypatch, 0.25)
    with make() as short:
        plan, budget = short.plan, used_bytes(short) + 64 * KIB
    with make(budget, plan=plan) as engine, pytest.raises(PlanInfeasible, match="rehearsal of the longest step"):
        train(engine)


def test_it_is_left_out_in_evaluation_and_where_it_cannot_matter(make, tight):
    with make(tight) as engine:
        engine.model.eval()
        with torch.no_grad():
            engine(**batch(0))
        assert outcome(engine) is None
    with make() as roomy:
        train(roomy)
        assert outcome(roomy)["result"] == "left out" and "room for much more" in outcome(roomy)["why"]


def test_a_model_that_fails_at_the_largest_size_trains_on(make, tight, caplog):
    class Picky(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            if hidden.shape[1] == TOKENS:
                raise IndexError("position 63 of 32")
            return self.inner(hidden)

    model = build_lora("llama")
    model.base_model.model.model.norm = Picky(model.base_model.model.model.norm)
    with make(tight + 64 * KIB, model) as engine:
        train(engine)
        assert "position 63 of 32" in outcome(engine)["why"] and "not rehearsed" in caplog.text
        assert engine.step_number == 3


def test_sizes_scale_together_and_the_larger_measurement_is_kept(make):
    from offload_rt.profiling.measured_sizes import remember_factor

    with make() as engine:
        problem = engine._runtime.made_of.problem
        key = sizes_key(engine.model, problem.fingerprint)
    twice = scaled(problem, 2.0)
    for chunk in (None, 16):
        assert twice.transient_bytes(chunk) == pytest.approx(2 * problem.transient_bytes(chunk), rel=1e-3)
    assert replace(twice, activation_bytes=0).layers == problem.layers
    assert remembered_factor(key) is None
    for factor, kept in ((0.5, 1.0), (1.75, 1.75), (1.2, 1.75)):
        remember_factor(key, factor)
        assert remembered_factor(key) == kept
    assert sizes_key(nn.Linear(2, 2), problem.fingerprint) != key
    assert Rehearsal().is_due
