"""A plan made again where state rests in memory alone: it is handed over, as frozen weights are.

masters, moments   | the same memory under every plan |
what trains        | masters, rounded, wherever the next plan has them |
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import OffloadError
from offload_rt.memory import mapped
from offload_rt.optimizer.stepper import Stepper
from offload_rt.plans.plan_options import with_shares
from offload_rt.vocabulary.loss_head import LossHead
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Plan, StatePlacement, Tier
from tests.changing_plans import FAILURES, decisions, fail_once, propose, results
from tests.conftest import build_base, language_batch
from tests.killed_training import ADAPTERS, MAX_NORM, Position, Twin, built, one_step, scheduled
from tests.tiny_training import (
    ROWS,
    TOKENS,
    Made,
    Plain,
    accumulated_step,
    adamw,
    adamw_of_groups,
    batch,
    differences,
    engine,
    model,
    train,
)

IN_PIECES = RuntimeOptions(
    state=StatePlacement(in_memory={"adapters": 3}, gradients=Tier.HOST), piece_elements=150
)  # fmt: skip
LAST = 6


def elsewhere(run: Made, how: str) -> Plan:
    """The plan of `run`, with what a change may move without a drive where `how` says."""
    plan = run.plan
    if how == "in DEVICE":
        (ring,) = plan.rings
        return replace(plan, rings=(), resident=ring.blocks)
    if how == "in parts":
        return with_shares(plan, run._runtime.made_of.workload.drafts, 0.5, 0.5)
    if how == "one slot":
        return replace(plan, rings=tuple(replace(ring, num_slots=1) for ring in plan.rings))
    return replace(plan, allocator_slack_bytes=plan.allocator_slack_bytes // 2)


def addresses(run: Made) -> dict[Any, Any]:
    """Of what memory alone has: state by piece, frozen weights by block and tier."""
    runtime = run._runtime
    found: dict[Any, Any] = {**runtime.state_left(), **runtime.resting}
    return {name: slot.buffer().obj for name, slot in found.items()}


def half_frozen() -> Any:
    made = model(dropout=0.2)
    made.layers[0].requires_grad_(False)
    made.layers[1].requires_grad_(False)
    return made


@pytest.mark.parametrize(
    ("place", "how", "accumulation", "build"),
    [
        ("from HOST", "in DEVICE", 2, model),
        ("from HOST", "in parts", 1, model),
        ("from HOST", "one slot", 1, half_frozen),
        ("in place", "less slack", 1, half_frozen),
    ],
)
def test_all_parameters_have_the_bits_of_a_run_that_does_not_change(
    place: str, how: str, accumulation: int, build: Any, tmp_path: Path
) -> None:
    """Clipped in some steps, with dropout, a scheduler and param groups, to the second plan and back; in parts with
    late transfers and poison, too.
    """
    made = {"dropout": 0.2} if build is model else {}
    twin = Plain(build(**made), adamw_of_groups, max_grad_norm=MAX_NORM)
    one = partial(accumulated_step, accumulation=accumulation)
    given = {"max_grad_norm": MAX_NORM, "accumulation_steps": accumulation, "optimizer": adamw_of_groups}
    late = {"options": {"poison": True, "record": True, "delay_seconds": 0.002}} if how == "in parts" else {}
    with engine(build(**made), place, tmp_path, **given, **late) as run:
        scheduler, expected, optimizer = scheduled(run), scheduled(twin), run.optimizer
        first, there = run.plan, addresses(run)
        other = elsewhere(run, how)
        assert other != first and there and run.report()["replanning"]["off"] is None
        for number in range(LAST):
            assert one(run, scheduler, number) == one(twin, expected, number), number
            assert differences(run.state(), twin.state()) == [], number
            if number in (1, 3):
                propose(run, other if number == 1 else first)
            assert run.plan == (other if number in (2, 3) else first)
            assert addresses(run) == there, "the same memory"
            recorder = run._runtime.recorder
            assert recorder is None or recorder.operations and [str(race) for race in recorder.check()] == []
        report = run.report()
        assert run.optimizer is optimizer and scheduler.get_last_lr() == expected.get_last_lr()
        assert results(run) == ["changed"] * 2 and [each["step"] for each in decisions(run)] == [2, 4]
        assert run.step_number == LAST and report["training"]["num_steps"] == LAST
        assert report["training"]["num_clipped"] > 0 and report["peaks"]["over"] == []
        run.save_checkpoint(tmp_path / "saved")
    with engine(build(**made), place, tmp_path, **given) as later:
        later.load_checkpoint(tmp_path / "saved")
        assert differences(later.state(), twin.state()) == []


def test_a_change_at_a_forward_in_inference_mode_leaves_weights_that_train(tmp_path: Path) -> None:
    twin = Plain(model())
    with engine(model(), "from HOST", tmp_path) as run:
        assert train(run, [0]) == train(twin, [0])
        propose(run, elsewhere(run, "in DEVICE"))
        with torch.inference_mode():
            run.model(**batch(9))
        assert train(run, [1, 2]) == train(twin, [1, 2])
        assert results(run) == ["changed"] and differences(run.state(), twin.state()) == []


def test_adapters_whose_state_rests_in_memory_change_over() -> None:
    twin = Twin(ADAPTERS)
    torch.manual_seed(11)
    begin = torch.get_rng_state()
    given = {"batch_size": ROWS, "seq_len": TOKENS, "optimizer": adamw, "max_grad_norm": MAX_NORM}
    with Made(built(ADAPTERS), host_memory="64MiB", options=IN_PIECES, **given) as run:
        torch.set_rng_state(begin)
        scheduler, position = scheduled(run), Position()
        first, there, other = run.plan, addresses(run), elsewhere(run, "one slot")
        assert len(there) == 3 + 5, "pieces, and three layers, embedding and head"
        for step in range(LAST):
            twin.reach(step + 1)
            assert one_step(run, scheduler, position) == twin.losses[step]
            expected = twin.states[step + 1]
            assert all(torch.equal(parameter, expected[name][1]) for name, parameter in run.trainable.items())
            if step in (1, 3):
                propose(run, other if step == 1 else first)
            assert run.plan == (other if step in (2, 3) else first) and addresses(run) == there
        assert results(run) == ["changed", "changed"]


def test_all_but_what_is_handed_over_is_back_before_the_next_plan_takes_any(tmp_path: Path) -> None:
    with engine(half_frozen(), "from HOST", tmp_path) as run:
        train(run, range(2))
        propose(run, elsewhere(run, "one slot"))
        runtime = run._runtime
        accounts = {id(account) for account in runtime.tiers.accounts.values()}
        arenas = sum(account.arena_bytes for account in runtime.tiers.accounts.values())
        kept = sum({id(slot.region): len(slot.region) for slot in runtime.only_copies()}.values())
        gc.disable()  # memory comes back without it
        try:
            watch = mapped.Watch()
            train(run, [2])
            changes = [(id(m.account) in accounts, m.num_bytes, there) for m, there in watch.changes if m.num_bytes]
            watch.close()
        finally:
            gc.enable()
        given_back = [num_bytes for old, num_bytes, there in changes if old and not there]
        assert results(run) == ["changed"] and sum(given_back) == arenas - kept > 0
        assert not any(not old and there for old, _, there in changes[: len(given_back)])


@pytest.mark.parametrize("where", FAILURES)
def test_a_change_that_fails_goes_back_and_loses_no_step(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is in the model, when half of the weights are made of their masters, or half of the hooks in."""
    twin = Plain(half_frozen(), max_grad_norm=MAX_NORM)
    with engine(half_frozen(), "from HOST", tmp_path, max_grad_norm=MAX_NORM) as run:
        first, there, losses = run.plan, addresses(run), train(run, range(2))
        propose(run, elsewhere(run, "one slot"))
        fail_once(monkeypatch, where)
        losses += train(run, range(2, 5))
        assert results(run) == ["kept"] and "there was none" in decisions(run)[0]["why"]
        assert run.plan == first and addresses(run) == there
        assert losses == train(twin, range(5)) and differences(run.state(), twin.state()) == []


def test_it_waits_for_gradients_and_for_no_commit(tmp_path: Path) -> None:
    twin = Plain(model(dropout=0.2))
    with engine(model(dropout=0.2), "from HOST", tmp_path, accumulation_steps=2) as run:
        assert train(run, range(2)) == train(twin, range(2))
        other = elsewhere(run, "one slot")
        for part in (run.model, run):  # the first one behind the engine's back
            torch.manual_seed(2)
            part(**batch(2)).loss.backward()
            assert run.plan != other, "gradients wait"
            propose(run, other)
        run.step()
        for _ in range(2):
            torch.manual_seed(2)
            twin.backward(twin(**batch(2)).loss)
        twin.step()
        run.save_checkpoint(tmp_path / "saved")
        run.load_checkpoint(tmp_path / "saved")
        assert train(run, [3]) == train(twin, [3])
        assert run.plan == other and results(run) == ["changed"], "what was loaded is in memory"
        assert train(run, [4]) == train(twin, [4]) and differences(run.state(), twin.state()) == []


@pytest.mark.parametrize("by", ["the engine", "the model"])
def test_it_waits_for_the_backward_pass_of_a_forward_that_is_ahead_of_it(by: str, tmp_path: Path) -> None:
    """It ended there: the forward had been before the change."""
    twin = Plain(model())
    with engine(model(), "from HOST", tmp_path, accumulation_steps=2) as run:
        part = run if by == "the engine" else run.model
        assert train(run, range(2)) == train(twin, range(2))
        other = elsewhere(run, "one slot")
        losses = [part(**batch(2)).loss]
        propose(run, other)
        losses.append(part(**batch(3)).loss)
        assert run.plan != other and not results(run)
        for loss in losses:
            run.backward(loss)
        for number in (2, 3):
            twin.backward(twin(**batch(number)).loss)
        for each in (run, twin):
            each.step()
        assert train(run, [4]) == train(twin, [4])  # the losses are still there, and their graphs
        assert run.plan == other and results(run) == ["changed"]
        assert differences(run.state(), twin.state()) == []
        kept = part(**batch(5)).loss
        propose(run, elsewhere(run, "less slack"))
        part(**batch(5))
        assert run.plan == other
        del kept
        part(**batch(5))
        assert run.plan != other, "nobody can go back through it any more"


def test_half_a_step_is_not_carried_on_by_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(model(), "from HOST", tmp_path) as run:
        train(run, range(2))
        plan = run.plan
        propose(run, elsewhere(run, "one slot"))
        run._changes.replanner._to_take, waiting = None, run._changes.replanner._to_take
        loss = run(**batch(2)).loss
        run.backward(loss)

        def breaks(*_: Any, **__: Any) -> None:
            raise OffloadError("a worker died")

        with monkeypatch.context() as broken:
            broken.setattr(Stepper, "_step_block", breaks)
            with pytest.raises(OffloadError, match="a worker died"):
                run.step()
        run._changes.replanner._to_take = waiting
        with pytest.raises(OffloadError, match="half a step was made"):
            run(**batch(3))
        assert run.plan == plan


def test_rings_count_on_by_name(tmp_path: Path) -> None:
    """In another order; and behind a plan that has none of them."""
    options = {"stream_edges": True, "look_up_rows": False}
    with engine(built(ADAPTERS), "from HOST", tmp_path, options=options) as run:
        train(run, range(2))
        plan, counters = run.plan, dict(run._runtime.counters_of_rings())
        assert [ring.name for ring in plan.rings] == ["layers", "edges"] == list(counters)
        counted = [counters[name].num_fetches for name in counters]
        assert min(counted) > 0 and counted[0] != counted[1]
        propose(run, replace(plan, rings=plan.rings[::-1]))
        train(run, [2])
        now = run._runtime.executors
        assert results(run) == ["changed"] and [executor.ring.name for executor in now] == ["edges", "layers"]
        assert all(executor.counters is counters[executor.ring.name] for executor in now)
    with engine(model(), "from HOST", tmp_path) as run:
        train(run, range(2))
        first, fetches = run.plan, run.report()["fetches"]
        propose(run, elsewhere(run, "in DEVICE"))
        train(run, [2])
        assert not run._runtime.executors and run.report()["fetches"] == fetches > 0
        propose(run, first)
        train(run, [3])
        assert run.report()["fetches"] > fetches


@pytest.mark.parametrize("by", ["the model's own forward", "a loss by tiles"])
def test_a_loop_that_calls_the_model_itself_takes_a_change(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has looked up the old head's forward by then."""
    tiles, heads = by == "a loss by tiles", list[object]()
    finish = LossHead._finish
    monkeypatch.setattr(
        LossHead,
        "_finish",
        lambda head, *arguments: heads.append(head) or finish(head, *arguments),  # type: ignore[func-returns-value]
    )

    def losses(changes: bool) -> list[float]:
        torch.manual_seed(0)
        made = build_base("llama", torch.float32).requires_grad_(True).train() if tiles else model(dropout=0.2)
        options = {"head_chunk_tokens": 5 if tiles else None}
        with engine(made, "in place", tmp_path, seq_len=12, options=options) as run:
            found, first = [], run.plan
            for number in range(3):
                torch.manual_seed(number)
                loss = run.model(**(language_batch(number) if tiles else batch(number))).loss
                loss.backward()
                run.step()
                found.append(float(loss.detach()))
                if changes and not number:
                    propose(run, elsewhere(run, "less slack"))
            assert results(run) == ["changed"] * changes and (run.plan != first) is changes
            assert not tiles or heads[-2] is heads[-1] is run._runtime.loss_head
        return found

    assert losses(changes=True) == losses(changes=False)
    assert len(heads) == 6 * tiles
