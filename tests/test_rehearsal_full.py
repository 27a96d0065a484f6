"""The longest step before the first one where state rests in tiers: counts, that nothing changes, what follows.

budget   |- arenas, state -|- activations, gradients under way -|- freed memory -|- room -|
measured                   |=========================>           fits | room | freed memory | planned again
"""

import hashlib
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import BudgetExceeded, ConfigError, OffloadError
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.optimizer import rehearsed
from offload_rt.optimizer.rehearsed import update_peak_bytes
from offload_rt.running import rehearsal
from offload_rt.running.rehearsal import SLACK
from offload_rt.wiring import runtime_assembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.plans.activations import Action, whole_batch
from planners.plans.placement import UpdateMode
from planners.plans.plan import StatePlacement, Tier
from tests.conftest import VOCABULARY, build_base, build_lora
from tests.fake_device import FakeDevice
from tests.full_parity import OPTIMIZERS, state_of
from tests.test_rehearsal import short_formula

KIB, MIB = 1 << 10, 1 << 20
ROWS, TOKENS = 2, 64
ON_NVME = {"rest": Tier.NVME, "piece_elements": 8192}

KINDS = {
    "in memory": {"nvme": None},
    "in memory, committed": {"commit_every": 2},
    "behind backward": {"options": RuntimeOptions(**ON_NVME)},
    "behind backward, clipped": {"max_grad_norm": 1e6, "options": RuntimeOptions(**ON_NVME)},
    "after backward": {"commit_every": 2, "options": RuntimeOptions(**ON_NVME)},
    "gradients on NVMe": {
        "accumulation_steps": 2,
        "options": RuntimeOptions(
            **ON_NVME,
            state=StatePlacement(in_memory={}, gradients=Tier.NVME, state_slots=2, weight_slots=1, gradient_slots=1),
        ),
    },
    "adapters in tiers": {
        "adapters": True,
        "options": RuntimeOptions(
            state=StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2), piece_elements=4096
        ),
    },
}  # fmt: skip
SELDOM = ("in memory, committed", "behind backward")
"""What others have, too: commits of state in memory, and updates behind a backward pass."""


def batch(seed, rows=1, tokens=24):
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path, request):
    numbers = iter(range(1000))

    def made(
        budget=None, dtype=torch.bfloat16, dropout=0.0, adapters=False, optimizer="adamw", folder=None, **arguments
    ):
        torch.manual_seed(0)
        model = (
            build_lora("llama")
            if adapters
            else build_base("llama", dtype, attention_dropout=dropout).requires_grad_(True).train()
        )
        if arguments.get("nvme", True) is True:
            arguments["nvme"] = folder or tmp_path / f"nvme {next(numbers)}"
            arguments["nvme"].mkdir(exist_ok=True)
        if budget is not None:
            arguments["device_memory"] = budget
        arguments.setdefault("options", RuntimeOptions(fill=False))
        made_by = OPTIMIZERS[optimizer]
        if adapters:
            made_by = lambda groups: torch.optim.AdamW(groups, lr=1e-2)  # noqa: E731
        engine = Engine(model, batch_size=ROWS, seq_len=TOKENS, device="cpu", optimizer=made_by, **arguments)
        request.addfinalizer(engine.close)
        return engine

    return made


def used_bytes(engine):
    return engine._runtime.tiers.account(Tier.DEVICE).used_bytes


def outcome(engine):
    return engine.report()["rehearsal"]


def values(engine):
    """Masters, where there are any, and weights, by name."""
    training = engine._runtime.made_of.workload.training
    if training is None or training.adapters:
        return {name: (p.detach().clone(),) for name, p in engine.trainable.items()}
    return state_of(engine._training)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


def train(engine, numbers=range(3)):
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        for part in range(engine.config.accumulation_steps):
            loss = engine(**batch(10 * number + part)).loss
            engine.backward(loss)
            losses.append(float(loss.detach()))
        engine.step()
    return losses, values(engine)


def files(engine):
    """Everything on the drive, to the bit."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for drive in engine.config.nvme
        for path in sorted(drive.path.rglob("*"))
        if path.is_file()
    }


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


COUNTS = ("bytes_written", "fetches", "prefetch_misses", "recomputes", "decodes", "step", "replans")
STEPS = ("num_steps", "num_ahead_of_norm", "num_pieces", "num_elements", "num_commits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=pytest.mark.full) if name in SELDOM else name for name in KINDS]
)
def test_it_changes_nothing(make, kind, dtype, monkeypatch):
    """At once: weights, state, files, generators. In the steps that follow: losses, state, counts."""
    found = {}
    for how, room in (("rehearsed", 1 << 40), ("not", 0)):
        monkeypatch.setattr(rehearsal, "ROOM", room)
        engine = make(dtype=dtype, dropout=0.1, **KINDS[kind])
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        before, counted = (values(engine), files(engine), generators()), engine.report()
        engine._changes.rehearse((), batch(0))
        assert same(before[0], values(engine)) and before[1:] == (files(engine), generators())
        assert all(p.grad is None for p in engine.trainable.values())
        assert (outcome(engine)["measured_bytes"] is not None) is (how == "rehearsed")
        losses, state = train(engine)
        after = engine.report()
        counts = [after[name] - counted[name] for name in COUNTS]
        counts += [after["training"].get(name, 0) - counted["training"].get(name, 0) for name in STEPS]
        found[how] = losses, state, counts
        engine.close()
    (losses, state, counts), twin = found.values()
    assert same(state, twin[1])
    assert losses == twin[0] and counts == twin[2]


ON_DEVICE = {
    "adapters": {"adapters": True, "bits": 4},
    "state in HOST": {"nvme": None, "options": RuntimeOptions(layer_inputs=Tier.HOST)},
    "behind backward": {"options": RuntimeOptions(**ON_NVME)},
    "gradients on NVMe, summed": KINDS["gradients on NVMe"],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [name if name == "gradients on NVMe, summed" else pytest.param(name, marks=pytest.mark.full) for name in ON_DEVICE],
)
def test_a_device_counts_for_itself_and_nothing_changes(make, kind, monkeypatch):
    """A late one, whose kernels torch runs in the calling thread."""
    found = {}
    for how, room in (("rehearsed", 1 << 40), ("not", 0)):
        monkeypatch.setattr(rehearsal, "ROOM", room)
        device = FakeDevice(late_seconds=0.001, kernels_are_late=False)
        arguments = {"host_memory": "64MiB", **ON_DEVICE[kind]}
        options = replace(arguments.pop("options", RuntimeOptions()), device=device, poison=True, record=True)
        engine = make(**arguments, options=options)
        torch.manual_seed(5)
        before = generators()
        engine._changes.rehearse(*engine._runtime.on_device((), batch(0)))
        assert generators() == before and all(p.grad is None for p in engine.trainable.values())
        assert device.num_meters == (outcome(engine)["measured_bytes"] is not None) == (how == "rehearsed")
        found[how] = train(engine)
        assert [str(race) for race in engine._runtime.recorder.check()] == []
        engine.close()
        device.close()
    assert found["rehearsed"][0] == found["not"][0] and same(found["rehearsed"][1], found["not"][1])


def test_a_device_whose_memory_is_too_small_is_refused_before_training_starts(make, monkeypatch):
    short_formula(monkeypatch, 0.02)
    device = FakeDevice(kernels_are_late=False)
    arguments = {
        "adapters": True,
        "bits": 4,
        "host_memory": "64MiB",
        "options": RuntimeOptions(device=device, fill=False),
    }
    with pytest.raises(PlanInfeasible) as least:
        make(KIB, **arguments)
    engine = make(least.value.need_bytes + 4 * KIB, **arguments)
    with pytest.raises(PlanInfeasible, match="largest item: activations") as refused:
        train(engine)
    assert refused.value.tier == "device" and refused.value.need_bytes > refused.value.have_bytes
    assert refused.value.need_bytes > least.value.need_bytes, "by what was measured"
    engine.close()
    device.close()


def test_nothing_is_stepped_behind_its_backward_pass(make, tmp_path, monkeypatch):
    """In a run that goes on, whose first step would step blocks as their gradients come."""
    arguments = {**KINDS["behind backward"], "folder": tmp_path / "nvme"}
    engine = make(**arguments)
    train(engine, range(2))
    engine.close()
    monkeypatch.setattr(rehearsal, "ROOM", 1 << 40)
    engine = make(**arguments)
    engine.load_checkpoint(engine.commit_folder)
    before = values(engine), files(engine)
    engine._changes.rehearse((), batch(0))
    assert same(before[0], values(engine)) and before[1] == files(engine) and outcome(engine)["measured_bytes"]
    assert engine.report()["training"]["num_ahead_of_norm"] == 0
    train(engine, range(2, 3))
    assert engine.report()["training"]["num_ahead_of_norm"] > 0


AWAY = {"model.layers.0": whole_batch(Action.SWAP, Tier.NVME), "model.layers.1": whole_batch(Action.KEEP)}


@pytest.mark.parametrize(
    ("accumulation", "activations"), [(1, {}), (2, None), (1, whole_batch(Action.KEEP)), (1, AWAY)]
)
def test_what_is_counted_is_what_the_step_really_takes(make, monkeypatch, accumulation, activations):
    """Counted by hand in an engine that rehearses nothing, over the backward pass of the last micro-batch."""
    monkeypatch.setattr(rehearsal, "ROOM", 1 << 40)
    options = RuntimeOptions(**ON_NVME, update_mode=UpdateMode.AFTER, activations=activations)
    engine = make(options=options, accumulation_steps=accumulation)
    engine._changes.rehearse((), batch(0))
    counted = outcome(engine)["measured_bytes"]
    engine.close()
    monkeypatch.setattr(rehearsal, "ROOM", 0)
    engine = make(options=options, accumulation_steps=accumulation)
    for _ in range(2):
        for _ in range(accumulation):
            with AllocationMeter() as meter:
                engine.backward(engine(**batch(0, ROWS, TOKENS)).loss)
        engine.step()
    assert counted == pytest.approx(meter.peak_bytes, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw 8bit", "sgd", "adafactor"])
def test_an_update_is_counted_as_it_allocates(make, optimizer, monkeypatch):
    """By hand, around what real steps do with each block, on the calling thread."""
    monkeypatch.setattr(rehearsal, "ROOM", 0)
    options = RuntimeOptions(**ON_NVME, update_mode=UpdateMode.AFTER, serial_updates=True)
    engine = make(options=options, optimizer=optimizer)
    counted = update_peak_bytes(engine._training)
    peaks = []
    submit = engine._training.stepper.submit

    def metered(*arguments, **options):
        with AllocationMeter() as meter:
            submit(*arguments, **options)
        peaks.append(meter.peak_bytes)

    monkeypatch.setattr(engine._training.stepper, "submit", metered)
    train(engine, range(2))
    assert counted == pytest.approx(max(peaks), rel=0.02, abs=4 * KIB)
    assert (counted > 32 * KIB) is (optimizer in ("sgd", "adafactor")), "the kernel takes nothing besides"


def test_an_update_of_a_large_parameter_is_counted_on_few_of_its_rows(make, monkeypatch):
    engine = make(optimizer="adafactor")
    whole = update_peak_bytes(engine._training)
    monkeypatch.setattr(rehearsed, "PIECE_ELEMENTS", 2048)
    assert update_peak_bytes(engine._training) == pytest.approx(whole, rel=0.1)


def test_an_update_behind_the_backward_pass_is_added_to_it(make, monkeypatch):
    monkeypatch.setattr(rehearsal, "ROOM", 1 << 40)
    found = {}
    for mode in (UpdateMode.AFTER, UpdateMode.BACKWARD):
        engine = make(options=RuntimeOptions(**ON_NVME, update_mode=mode), optimizer="sgd")
        engine._changes.rehearse((), batch(0))
        found[mode] = outcome(engine)["measured_bytes"]
        of_update = update_peak_bytes(engine._training)
        engine.close()
    assert found[UpdateMode.BACKWARD] - found[UpdateMode.AFTER] == pytest.approx(of_update, rel=0.01) and of_update


@pytest.mark.parametrize(
    "result, budget, short",
    [
        ("within the budget", 2600, 0),
        ("less freed memory is granted", 2600, 1),
        ("less freed memory is granted", 3140, None),
    ],
)
def test_more_than_planned_is_booked_or_taken_from_freed_memory(make, monkeypatch, result, budget, short):
    """In a budget (KiB) that holds the step to the byte, where `short` is 0, or is so many bytes short of it.

    What a step takes is the machine's: its products of bfloat16 take memory, or none, by what the processor can do.
    """
    short_formula(monkeypatch, 0.1)
    budget *= KIB
    if short is not None:
        roomy = make(budget, options=RuntimeOptions(**ON_NVME))
        train(roomy, range(1))
        assert outcome(roomy)["result"] == "within the budget"
        budget = used_bytes(roomy) - short
    engine = make(budget, options=RuntimeOptions(**ON_NVME))
    account = engine._runtime.tiers.account(Tier.DEVICE)
    before = dict(account.holdings)
    train(engine)
    found = outcome(engine)
    assert found["result"] == result
    more = found["measured_bytes"] - found["planned_bytes"]
    assert account.holdings["activations"] - before["activations"] == more > 0
    given_up = before[SLACK] - account.holdings[SLACK]
    assert 0 < given_up <= more if short is None else given_up == short
    assert account.used_bytes <= account.capacity_bytes


AGAIN = {
    "from memory to NVMe": (3000 * KIB, {"options": RuntimeOptions(piece_elements=8192, fill=False)}),
    "fewer pieces in memory": (1600 * KIB, {"options": RuntimeOptions(piece_elements=8192, fill=False)}),
    "clipped": (3000 * KIB, {"max_grad_norm": 0.05, "options": RuntimeOptions(piece_elements=8192, fill=False)}),
    "behind backward": (1600 * KIB, KINDS["behind backward"]),
    "adapters in tiers": (1600 * KIB, KINDS["adapters in tiers"]),
}  # fmt: skip
"""Budgets in which the plan of a formula that is ten times too small does not fit, and another one does."""
AGAIN_QUICK = ("from memory to NVMe", "adapters in tiers")


@pytest.mark.parametrize(
    "kind", [name if name in AGAIN_QUICK else pytest.param(name, marks=pytest.mark.full) for name in AGAIN]
)
def test_a_plan_is_made_again_and_goes_on_with_the_same_bits(make, kind, tmp_path, monkeypatch):
    budget, arguments = AGAIN[kind]
    roomy = make(**arguments)
    expected = train(roomy)
    assert outcome(roomy)["result"] == "left out"
    roomy.close()
    short_formula(monkeypatch, 0.1)
    engine = make(budget, **arguments, folder=tmp_path / "nvme")
    before, optimizer, training = engine.plan, engine.optimizer, engine._training
    old = [slot.tensor(torch.uint8, (slot.num_bytes,)) for slot in training.home.weights.values()]
    old += [slot.tensor(torch.uint8, (slot.num_bytes,)) for slot in training.home.pieces.values()]
    assert all(memory.any() for memory in old)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine.track("schedule", schedule)
    num_commits = engine.report()["training"]["num_commits"]
    losses, state = train(engine)
    assert outcome(engine)["result"] == "planned again" and engine.plan != before
    assert losses == expected[0] and same(state, expected[1])
    assert used_bytes(engine) <= budget
    assert not any(memory.any() for memory in old), "their memory is given back, whoever sees it"
    assert engine.optimizer is optimizer and engine._training is not training
    assert engine.report()["training"]["num_commits"] > num_commits, "counts go on"
    schedule.step()
    engine.save_checkpoint(tmp_path / "saved")
    again = train(engine, range(3, 4))
    made_again = engine.plan
    engine.close()
    fresh = make(budget, **arguments, folder=tmp_path / "next")
    assert fresh.plan == made_again, "what was measured is planned with"
    fresh.track("schedule", torch.optim.lr_scheduler.LambdaLR(fresh.optimizer, lambda step: 1.0))
    fresh.load_checkpoint(tmp_path / "saved")
    assert train(fresh, range(3, 4))[0] == again[0] and same(values(fresh), again[1])
    assert outcome(fresh)["result"] in ("fits", "within the budget")


def test_a_run_that_goes_on_is_planned_again_too(make, tmp_path, monkeypatch):
    budget, arguments = AGAIN["fewer pieces in memory"]
    arguments = {**arguments, "folder": tmp_path / "nvme"}
    engine = make(**arguments, commit_every=1)
    train(engine, range(2))
    engine.close()
    short_formula(monkeypatch, 0.1)
    engine = make(budget, **arguments)
    with pytest.raises(ConfigError, match="holds step 2 of an earlier run"):
        engine(**batch(0))
    assert outcome(engine) is None, "it is still to come"
    engine.load_checkpoint(engine.commit_folder)
    losses, state = train(engine, range(2, 4))
    assert outcome(engine)["result"] == "planned again" and engine.step_number == 4
    engine.close()
    twin = make()
    expected = train(twin, range(4))
    assert losses == expected[0][2:] and same(state, expected[1])


def test_what_fits_no_plan_is_refused_before_training_starts(make, monkeypatch):
    short_formula(monkeypatch, 0.1)
    engine = make(980 * KIB, options=RuntimeOptions(piece_elements=8192))
    before = values(engine), files(engine)
    for _ in range(2):  # it stays refused
        with pytest.raises(PlanInfeasible) as refused:
            train(engine)
    assert refused.value.need_bytes > refused.value.have_bytes and refused.value.ways_out
    assert engine.step_number == 0 and same(before[0], values(engine)) and before[1] == files(engine)


@pytest.mark.parametrize("given", [False, True])
def test_without_a_drive_to_go_by_it_is_refused(make, monkeypatch, given):
    """By what any plan would need, or, for a plan that was given, by what the next engine plans with."""
    short_formula(monkeypatch, 0.1)
    in_memory = partial(make, nvme=None, options=RuntimeOptions(piece_elements=8192))  # what saving takes is no room
    with pytest.raises(PlanInfeasible) as least:
        in_memory(KIB)
    budget = least.value.need_bytes + 4 * KIB
    engine = in_memory(budget)
    if given:
        engine = in_memory(budget, plan=engine.plan)
    why, way_out = ("rehearsal of the longest step", "made again") if given else ("optimizer state", "device_memory of")
    with pytest.raises(PlanInfeasible, match=why) as refused:
        train(engine)
    assert any(way_out in way for way in refused.value.ways_out)


def test_a_change_over_that_fails_closes_the_engine(make, tmp_path, monkeypatch):
    """State is what was committed: the next engine goes on from it."""
    budget, arguments = AGAIN["from memory to NVMe"]
    short_formula(monkeypatch, 0.1)
    engine = make(budget, **arguments, folder=tmp_path / "nvme")
    before = values(engine)

    def fail(*arguments):
        raise BudgetExceeded("no room")

    monkeypatch.setattr(runtime_assembly.WeightsAssembly, "ring", fail)
    with pytest.raises(BudgetExceeded):
        train(engine)
    with pytest.raises(OffloadError, match="closed"):
        train(engine)
    monkeypatch.undo()
    again = make(**arguments, folder=tmp_path / "nvme")
    assert same(values(again), before)


def test_gradients_that_wait_already_put_it_off(make, monkeypatch):
    """A step that was begun in evaluation is not dropped."""
    monkeypatch.setattr(rehearsal, "ROOM", 1 << 40)
    engine = make(accumulation_steps=2)
    engine.model.eval()
    engine.model(**batch(0)).loss.backward()
    engine.model.train()
    engine.backward(engine(**batch(1)).loss)
    assert outcome(engine) is None
    engine.step()
    engine(**batch(2))
    assert outcome(engine)["measured_bytes"]
