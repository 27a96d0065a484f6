"""A change of plans on a device with memory of its own, without a drive: state stays in HOST, weights that train are
made of it, and the old plan's memory, HOST's and the device's, is back before the next plan takes any.

The device is that of `fake_device`, late with its copies and with its reports.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.memory import mapped
from offload_rt.transfers.device_cuda import CudaArena
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Plan, StatePlacement, Tier
from tests.changing_plans import FAILURES, decisions, fail_once, propose, results
from tests.fake_device import FakeDevice
from tests.killed_training import ADAPTERS, MAX_NORM, Position, Twin, built, one_step, scheduled
from tests.test_replanning_without_a_log import addresses, elsewhere, half_frozen
from tests.tiny_training import ROWS, TOKENS, Made, Plain, adamw, differences, engine, model, train


@pytest.fixture
def device() -> Any:
    made = FakeDevice(late_seconds=0.0005, kernels_are_late=False)
    yield made
    made.close()


def engine_on(device: FakeDevice, build: Any, folder: Path, **options: Any) -> Made:
    stress = {"device": device, "poison": True, "record": True, **options}
    return engine(build(), "from HOST", folder, max_grad_norm=MAX_NORM, options=stress)


def races(run: Engine) -> list[str]:
    recorder = run._runtime.recorder
    assert recorder is not None and recorder.operations
    return [str(race) for race in recorder.check()]


def other_plan(run: Made, how: str) -> Plan:
    """The plan of `run`, with something else elsewhere."""
    if how != "stepped on the device":
        return elsewhere(run, how)
    state = run.plan.state
    assert state is not None and not state.on_device
    (ring,) = run.plan.rings
    return replace(run.plan, state=replace(state, on_device={ring.blocks[-1]: 2}, device_slots=1))


@pytest.mark.parametrize("how", ["in DEVICE", "in parts", "one slot", "stepped on the device"])
def test_all_parameters_have_the_bits_of_a_run_that_does_not_change(
    how: str, device: FakeDevice, tmp_path: Path
) -> None:
    """To the second plan and back."""
    build = half_frozen if how == "one slot" else model
    twin = Plain(build(), max_grad_norm=MAX_NORM)
    with engine_on(device, build, tmp_path) as run:
        first, there, other = run.plan, addresses(run), other_plan(run, how)
        for number in range(5):
            assert train(run, [number]) == train(twin, [number])
            assert differences(run.state(), twin.state()) == [], number
            if number in (1, 2):
                assert races(run) == []
                propose(run, other if number == 1 else first)
            assert run.plan == (other if number == 2 else first) and addresses(run) == there
        assert races(run) == [] and results(run) == ["changed"] * 2
        report = run.report()
        assert report["peaks"]["over"] == []
        on_device = report["training"]["num_pieces_on_device"]
        assert on_device == (2 if how == "stepped on the device" else 0), "of the one step, counted on behind it"
        assert ("optimizer state, copied to DEVICE" in device.locked) == bool(on_device), "reachable for its copies"


def test_the_old_plans_memory_is_back_before_the_next_takes_any(device: FakeDevice, tmp_path: Path) -> None:
    """Though the runtime, and with it the training, is still seen."""
    with engine_on(device, half_frozen, tmp_path) as run:
        train(run, range(2))
        propose(run, elsewhere(run, "one slot"))
        runtime = run._runtime
        accounts = {id(account) for account in runtime.tiers.accounts.values()}
        arenas = sum(account.arena_bytes for account in runtime.tiers.accounts.values())
        kept = sum({id(slot.region): len(slot.region) for slot in runtime.only_copies()}.values())
        watch = mapped.Watch()
        train(run, [2])
        changes = [(id(m.account) in accounts, m.num_bytes, there) for m, there in watch.changes if m.num_bytes]
        watch.close()
        given_back = [num_bytes for old, num_bytes, there in changes if old and not there]
        assert results(run) == ["changed"] and sum(given_back) == arenas - kept > 0
        assert not any(not old and there for old, _, there in changes[: len(given_back)])


def test_adapters_whose_state_rests_in_host_change_over(device: FakeDevice) -> None:
    twin = Twin(ADAPTERS)
    torch.manual_seed(11)
    begin = torch.get_rng_state()
    state = StatePlacement(in_memory={"adapters": 3}, gradients=Tier.HOST)
    options = RuntimeOptions(state=state, device_share=1.0, piece_elements=150, device=device, record=True, poison=True)
    given = {"batch_size": ROWS, "seq_len": TOKENS, "optimizer": adamw, "max_grad_norm": MAX_NORM}
    with Made(built(ADAPTERS), host_memory="64MiB", options=options, **given) as run:
        torch.set_rng_state(begin)
        scheduler, position = scheduled(run), Position()
        there, other = addresses(run), elsewhere(run, "one slot")
        for step in range(4):
            twin.reach(step + 1)
            assert one_step(run, scheduler, position) == twin.losses[step]
            expected = twin.states[step + 1]
            assert all(torch.equal(parameter, expected[name][1]) for name, parameter in run.trainable.items())
            if step == 1:
                propose(run, other)
        assert results(run) == ["changed"] and run.plan == other and addresses(run) == there and races(run) == []
        assert run.report()["training"]["num_pieces_on_device"] == 4 * 3, "counted on"


@pytest.mark.parametrize("where", FAILURES)
def test_a_change_that_fails_goes_back_and_loses_no_step(
    where: str, device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is in the model, or when half of the weights are made of their masters."""
    twin = Plain(model(), max_grad_norm=MAX_NORM)
    with engine_on(device, model, tmp_path) as run:
        first, there, losses = run.plan, addresses(run), train(run, range(2))
        propose(run, elsewhere(run, "in DEVICE"))
        fail_once(monkeypatch, where)
        losses += train(run, range(2, 4))
        assert results(run) == ["kept"] and "there was none" in decisions(run)[0]["why"]
        assert run.plan == first and addresses(run) == there and races(run) == []
        assert losses == train(twin, range(4)) and differences(run.state(), twin.state()) == []


def test_memory_of_torchs_allocator_is_given_back_under_whoever_sees_it() -> None:
    class Card:
        device = torch.device("cpu")

    arena = CudaArena("a", 8192, Card(), poison=False)  # type: ignore[arg-type]
    slot, watch = arena.acquire(4096, "somebody"), mapped.Watch()
    arena.region.give_back()
    arena.region.give_back()
    assert slot.region is arena.region and arena.region.tensor.untyped_storage().nbytes() == 0
    assert [there for mapping, there in watch.changes if mapping.name == "a"] == [False], "told once"
    watch.close()
