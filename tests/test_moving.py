"""Frozen weights that a change of plans moves between DEVICE and HOST where no store has them.

DEVICE   |= A =|      |            |      |            |= B =|      |
HOST     |= B =|      |    ->      |= B =|= A =|   ->   |     |= A =|
"""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, OffloadError, StorageError
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.memory import mapped
from offload_rt.tiering import moving
from offload_rt.tiering.moving import Move, Mover, Room, in_order, moves_between, places_of, why_not_follow
from offload_rt.tiering.resting import Resting
from offload_rt.tiering.tiers import Tiers
from offload_rt.transfers.links import Links
from offload_rt.wiring import assembly, runtime_assembly
from offload_rt.wiring.runtime import Change
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import ClassPlan
from planners.plans.plan import Plan, Ring, Split, Tier
from tests.changing_plans import decisions, propose, results
from tests.fake_device import FakeDevice
from tests.parity import Case, Trace, build, decode_in_place, engine_of, in_turns, run_steps
from tests.test_parity import differences
from tests.test_replanning_without_a_log import elsewhere, half_frozen
from tests.tiny_training import Plain, engine, train
from tests.tiny_training import differences as state_differences

PAGE = 4096
DEVICE, HOST = Tier.DEVICE, Tier.HOST
CASE = Case("qwen", "nf4", 1, True, False, "from HOST")  # whose embedding and head are two blocks
STEPS = 6


def room(device: float, host: float, *, unified: bool = False) -> Room:
    """In pages."""
    return Room({DEVICE: device * PAGE, HOST: host * PAGE}, unified)


def down(name: str, pages: int) -> Move:
    return Move(name, {DEVICE: pages * PAGE}, {HOST: pages * PAGE})


def up(name: str, pages: int) -> Move:
    return down(name, pages).back


def are_in_order(moves: Sequence[Move], before: Room) -> bool:
    """By the slow way: what is held at each moment, of what there is in all."""
    free = dict(before.free_bytes)
    for move in moves:
        for tier in (DEVICE, HOST):
            if move.after.get(tier, 0) != move.before.get(tier, 0):
                free[tier] -= move.after.get(tier, 0)
                if move.after.get(tier, 0) and free[tier] < 0:
                    return False
        for tier in (DEVICE, HOST):
            if move.after.get(tier, 0) != move.before.get(tier, 0):
                free[tier] += move.before.get(tier, 0)
    return True


def test_a_block_goes_where_another_one_was() -> None:
    a, b = down("A", 4), up("B", 4)
    assert in_order([a, b], room(0, 4)) == [a, b] and in_order([a, b], room(4, 0)) == [b, a]
    assert in_order([a, b], room(3, 3)) is None, "a page short on both sides"
    assert in_order([a], room(-8, 4)) == [a], "what is over its budget already may still leave"
    assert in_order([b], room(-8, 99)) is None and in_order([b], room(4, -8)) == [b]
    assert in_order([a, b], room(4, inf, unified=True)) == [a, b] and in_order([a], room(3, inf, unified=True)) is None


def test_what_no_greedy_order_finds_its_reverse_may() -> None:
    """A, which fits at once, would take the room that B and C make for each other."""
    a, b, c = down("A", 1), up("B", 2), down("C", 2)
    assert in_order([a, b, c], room(0, 2)) == [c, b, a]


def test_a_part_that_stays_as_it_is_takes_no_room() -> None:
    part = Move("A", {DEVICE: PAGE, HOST: 3 * PAGE}, {DEVICE: PAGE + 64, HOST: 3 * PAGE})
    assert part.new == {DEVICE: PAGE + 64} and part.old == {DEVICE: PAGE}
    assert in_order([part], room(2, 0)) == [part] and in_order([part], room(1, 0)) is None


def test_orders_agree_with_all_that_there_are() -> None:
    """Of equal blocks one is found wherever there is one; of any, what is found fits, and backwards, too."""
    numbers, num_found, num_none = random.Random(5), 0, 0
    for _ in range(300):
        equal = numbers.random() < 0.5
        moves = [
            (down if numbers.random() < 0.5 else up)(f"{index}", 3 if equal else numbers.randint(1, 5))
            for index in range(numbers.randint(1, 5))
        ]
        before = room(numbers.randint(-3, 6), numbers.randint(-3, 6))
        found = in_order(moves, before)
        if found is None:
            num_none += 1
            assert not equal or not any(are_in_order(each, before) for each in itertools.permutations(moves))
            continue
        num_found += 1
        after = before
        for move in found:
            after = after.after(move)
        assert are_in_order(found, before) and sorted(map(str, found)) == sorted(map(str, moves))
        if min(before.free_bytes.values()) >= 0:
            assert are_in_order([move.back for move in reversed(found)], after)
    assert min(num_found, num_none) > 50


def traces(steps: int) -> list[Trace]:
    """Of the run in plain PyTorch."""
    model = build(CASE)
    decode_in_place(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-2)

    def update() -> None:
        nn.utils.clip_grad_norm_(list(trainable.values()), 0.05)
        optimizer.step()
        optimizer.zero_grad()

    return run_steps(1, model, lambda loss: loss.backward(), trainable, update, range(steps))  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def plain() -> list[Trace]:
    return traces(STEPS)


def placed(run: Engine, shares: Sequence[float], *, edges: Tier) -> Plan:
    """The plan of `run`, whose first ring has the layers, with such a share of each in DEVICE, the rest in HOST."""
    plan, specs = run.plan, {block.name: block.spec for block in run._runtime.blocks}
    layers = [name for name in specs if ".layers." in name]
    others = tuple(name for name in specs if name not in layers)
    splits = {}
    for name, share in zip(layers, shares, strict=True):
        total = specs[name].stored_bytes
        device = max(cut for cut in specs[name].cuts_bytes if cut <= share * total)
        splits[name] = Split(device_bytes=device, host_bytes=total - device, nvme_bytes=0)
    streamed = {name: split for name, split in splits.items() if split.host_bytes}
    rings = (
        Ring(
            name="layers", blocks=tuple(streamed), num_slots=2, rest=HOST,
            slot_bytes=max(split.host_bytes for split in streamed.values()),
        ),
    )  # fmt: skip
    kept = tuple(name for name in layers if name not in streamed)
    if edges is HOST:
        rings += tuple(ring for ring in plan.rings if ring.name == "edges")
    return replace(
        plan, rings=rings, resident=kept if edges is HOST else (*others, *kept),
        lookups=plan.lookups if edges is HOST else None,
        classes=tuple(ClassPlan(name=name, blocks=(name,), weights=split) for name, split in streamed.items()),
    )  # fmt: skip


def started(device: FakeDevice | None, **arguments: Any) -> Engine:
    """All in HOST."""
    options = {"stream_edges": True, "poison": True, "record": True, "delay_seconds": 0.001, "device": device}
    given = {"host_memory": "64MiB", "options": RuntimeOptions(**options), **arguments}
    return engine_of(CASE, **given)


def one(run: Engine, number: int) -> Trace:
    (trace,) = run_steps(1, run, run.backward, run.trainable, run.step, range(number, number + 1))
    return trace


def resting(run: Engine) -> dict[tuple[str, Tier], int]:
    return {place: slot.num_bytes for place, slot in run._runtime.resting.items()}


def planned(run: Engine, plan: Plan) -> dict[tuple[str, Tier], int]:
    places = places_of(plan, run._runtime.made_of.workload)
    return {(name, tier): size for name, sizes in places.items() for tier, size in sizes.items()}


@contextmanager
def most_mapped(run: Engine) -> Iterator[dict[Tier, int]]:
    """The most that arenas had of each tier at once, from here on; there when it is left."""
    tiers, most = run._runtime.tiers, dict[Tier, int]()
    live = {tier: account.arena_bytes for tier, account in tiers.accounts.items()}
    watch = mapped.Watch()
    yield most
    for mapping, there in watch.changes:
        tier: Tier | None = getattr(mapping.account, "tier", None)
        if tier is not None and mapping.num_bytes:
            live[tier] += mapping.num_bytes if there else -mapping.num_bytes
            most[tier] = max(most.get(tier, 0), live[tier])
    watch.close()


@pytest.mark.parametrize("has_streams", [False, True], ids=["two memories", "a device"])
def test_weights_move_and_no_number_changes(
    has_streams: bool, plain: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole blocks up and down, parts that grow and shrink, rows that are looked up, or not; and all back."""
    copy, under_way = Mover._copy, set[str]()

    def copied_whole(mover: Mover, *arguments: Any) -> None:
        copy(mover, *arguments)
        if mover._links.device is not None:
            under_way.add(mover._links.device.outstanding())

    monkeypatch.setattr(Mover, "_copy", copied_whole)
    device = FakeDevice(late_seconds=0.0005, kernels_are_late=False) if has_streams else None
    with started(device) as run:
        first, workload = run.plan, run._runtime.made_of.workload
        plans = [
            placed(run, (1.0, 1.0, 0.5, 0.0), edges=DEVICE),
            placed(run, (0.0, 0.6, 0.8, 1.0), edges=HOST),
            placed(run, (0.6, 0.3, 0.3, 1.0), edges=DEVICE),
            first,
        ]
        assert differences(plain[:1], [one(run, 0)]) == []
        for number, plan in enumerate(plans, 1):
            moves = moves_between(workload, run.plan, plan)
            assert len(moves) >= 3 and resting(run) == planned(run, run.plan)
            runtime, copied = run._runtime, run._runtime.links.counters.bytes_copied
            propose(run, plan)
            run._changes.begin_call(begins_step=True)
            within = sum(min(a, b) for m in moves for a, b in [(m.before.get(DEVICE, 0), m.new.get(DEVICE, 0))])
            moved = sum(size for move in moves for size in move.new.values()) - within * has_streams
            assert run._runtime.links.counters.bytes_copied - copied == moved > 0, "to the byte, and nothing else"
            assert run.plan == plan and resting(run) == planned(run, plan) and runtime.resting == {}
            for trace in (runtime.recorder, run._runtime.recorder):
                assert trace is not None and [str(race) for race in trace.check()] == []
            assert differences(plain[number : number + 1], [one(run, number)]) == []
        assert results(run) == ["changed"] * 4 and run.report()["peaks"]["over"] == []
        recorder = run._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
        if device is not None:
            assert "base_model.model.model.layers.0, moved" in device.locked, "in HOST, for its copies"
            assert under_way == {"nothing"}, "when memory is given back"
    if device is not None:
        device.close()


@pytest.mark.parametrize("exactly", [True, False])
def test_layers_change_places_within_their_budgets(exactly: bool, plain: list[Trace]) -> None:
    """HOST has no byte to spare, or a layer's more than the plans need; in DEVICE there is what they have beside their
    weights. Whoever sees the old place keeps nothing of it.
    """
    with started(None) as run:
        first, other = (placed(run, shares, edges=HOST) for shares in ((1.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0)))
    with started(None, plan=first) as run:
        used = {tier: account.used_bytes for tier, account in run._runtime.tiers.accounts.items()}
    with started(None, plan=first, **({"host_memory": used[HOST]} if exactly else {})) as run:
        beside = {tier: a.used_bytes - a.arena_bytes for tier, a in run._runtime.tiers.accounts.items()}
        assert differences(plain[:1], [one(run, 0)]) == []
        propose(run, other)
        seen = list(run._runtime.resting.values())
        with most_mapped(run) as most:
            run._changes.begin_call(begins_step=True)
        assert results(run) == ["changed"] and resting(run) == planned(run, other)
        in_host = sum(size for (_, tier), size in planned(run, first).items() if tier is HOST)
        assert most[HOST] == (used[HOST] if exactly else in_host + seen[0].num_bytes)
        assert (most[HOST] > used[HOST]) is not exactly
        assert most[DEVICE] + beside[DEVICE] <= used[DEVICE]
        assert differences(plain[1:2], [one(run, 1)]) == []
        assert [over for over in run.report()["peaks"]["over"] if over["phase"] == "step"] == []


def test_a_plan_without_room_to_move_in_is_not_taken(plain: list[Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    with started(None) as run:
        first, other = run.plan, placed(run, (1.0, 1.0, 0.0, 0.0), edges=HOST)
        made_of = run._runtime.made_of
        layer_bytes = sum(planned(run, other)[name, tier] for name, tier in planned(run, other) if tier is DEVICE)
        taken = made_of.problem.trainable_bytes
        for short, answer in ((0, ""), (1, "the other plan moves weights of 2 blocks, which are in no store")):
            problem = replace(made_of.problem, device_capacity_bytes=taken + layer_bytes - short)
            assert why_not_follow(made_of.workload, problem, first, other).startswith(answer)
            assert bool(why_not_follow(made_of.workload, problem, first, other)) is bool(short)
        assert differences(plain[:1], [one(run, 0)]) == []
        monkeypatch.setattr(moving, "in_order", lambda moves, _: None if moves else [])
        runtime = run._runtime
        with pytest.raises(ConfigError, match="no room to do it in"):
            assembly.change_over(runtime, Change(problem=made_of.problem, plan=other))
        assert run._runtime is runtime and differences(plain[1:2], [one(run, 1)]) == [], "nothing was taken apart"


def test_what_late_kernels_still_write_moves_whole() -> None:
    """By a device whose kernels are as late as its copies, poison included: there and back, in parts too."""
    device, num_bytes = FakeDevice(late_seconds=0.002), 3 * PAGE + 512
    links, tiers = Links(device=device), Tiers(2**20, 2**20, None, unified=False, poison=True, device=device)
    workload: Any = SimpleNamespace(draft=lambda _: SimpleNamespace(spec=SimpleNamespace(stored_bytes=num_bytes)))
    slot = tiers.arena(DEVICE, "weights", num_bytes).acquire(num_bytes, "A")
    expected = torch.arange(num_bytes, dtype=torch.int32).to(torch.uint8)
    device.compute.give(lambda: slot.tensor(torch.uint8, (num_bytes,)).copy_(expected))
    found: Resting = {("A", DEVICE): slot}
    mover = Mover(workload, found, [], tiers, links, device)  # type: ignore[arg-type]
    whole, parts = {HOST: num_bytes}, {DEVICE: PAGE + 64, HOST: num_bytes - PAGE}
    for move in (Move("A", {DEVICE: num_bytes}, whole), Move("A", whole, parts), Move("A", parts, whole)):
        mover.move(move)
        assert {tier: held.num_bytes for (_, tier), held in found.items()} == move.after
        for (_, tier), held in found.items():
            begin = 0 if tier is DEVICE else num_bytes - held.num_bytes
            bytes_held = held.tensor(torch.uint8, (held.num_bytes,))
            assert torch.equal(bytes_held, expected[begin : begin + held.num_bytes]), (move, tier)
            del bytes_held
    mover.finish()
    assert tiers.account(HOST).used_bytes == 0, "whoever takes it over books it"
    links.close()
    device.close()


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """By module, how many hooks it has of each kind, and what stands in place of its `forward`."""
    found = {}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        inner = getattr(forward, "_forward", None)
        found[name] = [len(module._forward_pre_hooks), len(module._forward_hooks), type(forward), type(inner)]
    return found


@pytest.mark.parametrize(
    "where, has_streams", in_turns(["booking", "the third copy", "attach", "hooks"], [False, True])
)
def test_a_change_that_fails_brings_back_what_had_moved(
    where: str, has_streams: bool, plain: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(late_seconds=0.0005, kernels_are_late=False) if has_streams else None
    of, name, calls = {
        "booking": (Mover, "move", 2), "the third copy": (Mover, "_copy", 3),
        "attach": (runtime_assembly.RuntimeAssembly, "_attach", 1),
        "hooks": (RecomputedLayer, "attach", 3),
    }[where]  # fmt: skip
    failures = list[str]()
    error = {
        "booking": OSError(12, "Cannot allocate memory"), "attach": torch.cuda.OutOfMemoryError("out of memory"),
        "the third copy": StorageError("torn", path="/dev/null", errno=5), "hooks": MemoryError("no room for hooks"),
    }[where]  # fmt: skip

    def fails(*arguments: Any, **named: Any) -> Any:
        failures.append(name)
        if len(failures) == calls:
            raise error
        return whole(*arguments, **named)

    with started(device) as run:
        first, moved, there = run.plan, list[str](), hooks_of(run.model)
        assert differences(plain[:1], [one(run, 0)]) == []
        move = Mover.move
        monkeypatch.setattr(Mover, "move", lambda mover, each: moved.append(each.block) or move(mover, each))  # type: ignore[func-returns-value]
        whole = getattr(of, name)
        monkeypatch.setattr(of, name, fails)
        propose(run, placed(run, (1.0, 1.0, 0.5, 0.0), edges=DEVICE))
        run._changes.begin_call(begins_step=True)
        assert results(run) == ["kept"] and str(error) in decisions(run)[0]["why"]
        assert run.plan == first and resting(run) == planned(run, first) and run._runtime.moved == []
        done = {"booking": 1, "the third copy": 2}.get(where, 5)
        went = moved[: len(moved) - done]
        assert moved[-done:] == went[:done][::-1], "backwards"
        assert hooks_of(run.model) == there
        assert differences(plain[1:2], [one(run, 1)]) == [] and run.report()["peaks"]["over"] == []
        recorder = run._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
    if device is not None:
        device.close()


@pytest.mark.parametrize(("of", "name"), [(Mover, "_copy"), (RecomputedLayer, "attach")])
def test_where_the_way_back_fails_too_the_engine_ends_and_says_so(
    of: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is as any is when an engine is closed: without hooks, and without weights that were at rest."""
    with started(None) as run:
        first, other = run.plan, placed(run, (1.0, 1.0, 0.5, 0.0), edges=DEVICE)
    with started(None, plan=other) as run:
        one(run, 0)
        num_calls = itertools.count(1)
        whole = getattr(of, name)

        def fails(*arguments: Any) -> None:
            if next(num_calls) > 2:
                raise StorageError("torn", path="/dev/null", errno=5)
            whole(*arguments)

        monkeypatch.setattr(of, name, fails)
        propose(run, first)
        with pytest.raises(StorageError, match="torn"):
            one(run, 1)
        with pytest.raises(OffloadError, match="the engine is closed"):
            one(run, 1)
    monkeypatch.undo()
    with started(None) as closed:
        pass
    assert hooks_of(run.model) == hooks_of(closed.model)
    stored = [entry.parameter for draft in run._runtime.made_of.workload.drafts for entry in draft.parameters]
    assert stored and not any(any(parameter.stride()) for parameter in stored), "one element stands for each"


@pytest.mark.parametrize("has_streams", [False, True], ids=["two memories", "a device"])
def test_who_keeps_a_state_dict_goes_on_seeing_its_weights(
    has_streams: bool, plain: list[Trace], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever number of plans later they move; and what nobody sees any more is free."""
    device = FakeDevice(late_seconds=0.0005, kernels_are_late=False) if has_streams else None
    with started(device) as run:
        first = run.plan
        plans = [
            placed(run, (1.0, 1.0, 0.5, 0.0), edges=DEVICE),
            placed(run, (1.0, 0.0, 0.5, 0.0), edges=DEVICE),
            first,
        ]
        assert differences(plain[:1], [one(run, 0)]) == []
        for number, plan in enumerate(plans, 1):
            propose(run, plan)
            assert differences(plain[number : number + 1], [one(run, number)]) == []
            if number == 1:
                left = [weakref.ref(slot.region) for (_, tier), slot in run._runtime.resting.items() if tier is DEVICE]
                state = {n: value for n, value in run.model.state_dict().items() if n not in run.trainable}
                before = {name: value.clone() for name, value in state.items()}
                assert len(state) > 10 and "sees" not in caplog.text
            assert all(torch.equal(state[name], before[name]) for name in state)
            assert caplog.text.count("sees") == number - 1
        assert results(run) == ["changed"] * 3
        state.clear()
        gc.collect()
        assert [region for region in left if region() is not None] == []
    if device is not None:
        device.close()


def test_in_one_memory_weights_may_change_their_tier_too(plain: list[Trace]) -> None:
    """Nobody's rule makes such plans, a given one may be so: they stream through a ring, and count once."""
    options = RuntimeOptions(poison=True, record=True)
    with engine_of(CASE, options=options) as run:
        first = run.plan
        assert run._runtime.tiers.unified and not first.rings
        assert differences(plain[:1], [one(run, 0)]) == []
        used = run._runtime.tiers.account(DEVICE).holdings["resident blocks"]
        for number, plan in enumerate((placed(run, (0.0, 0.5, 0.0, 1.0), edges=DEVICE), first), 1):
            propose(run, plan)
            assert differences(plain[number : number + 1], [one(run, number)]) == []
            assert run.plan == plan and resting(run) == planned(run, plan)
        assert run._runtime.tiers.account(DEVICE).holdings["resident blocks"] == used
        assert results(run) == ["changed"] * 2 and run.report()["peaks"]["over"] == []


@pytest.mark.parametrize("has_streams", [False, True], ids=["two memories", "a device"])
def test_state_stays_where_weights_move(has_streams: bool, tmp_path: Any) -> None:
    """All parameters of half of the layers train: their weights are made anew, masters and moments stay."""
    twin = Plain(half_frozen(), max_grad_norm=1.0)
    device = FakeDevice(late_seconds=0.0005, kernels_are_late=False) if has_streams else None
    options = {"poison": True, "record": True, "device": device}
    with engine(half_frozen(), "from HOST", tmp_path, max_grad_norm=1.0, options=options) as run:
        state = {name: slot.buffer().obj for name, slot in run._runtime.state_left().items()}
        first, other = run.plan, elsewhere(run, "in DEVICE")
        for number in range(5):
            assert train(run, [number]) == train(twin, [number])
            assert state_differences(run.state(), twin.state()) == []
            if number in (1, 2):
                propose(run, other if number == 1 else first)
            assert {tier for _, tier in resting(run)} == {DEVICE if number == 2 else HOST}
            assert {name: slot.buffer().obj for name, slot in run._runtime.state_left().items()} == state
        recorder = run._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
        assert results(run) == ["changed"] * 2 and run.report()["peaks"]["over"] == []
    if device is not None:
        device.close()
