"""Where gradients wait, by itself: sums, norms, the order of blocks, who holds which slot, and what fails."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload_rt.adamw.cpu_adam import gradient_norm
from offload_rt.errors import BudgetExceeded, ConfigError, StorageError
from offload_rt.memory import arena as arena_module
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.gradients import Gradients, is_finite
from offload_rt.storage.scratch import Scratch
from offload_rt.transfers.links import Links
from offload_rt.transfers.transfer import Transfer
from tests.tiny_blocks import FailingIO, blocks, gradients_of
from tests.waiting import Waiting


def waiting(
    num_blocks: int, num_slots: int, folder: Path | None = None, *, accumulates: bool = False,
    wait_for_room: Callable[[], bool] = lambda: False,
) -> tuple[Gradients, Arena, FailingIO]:  # fmt: skip
    """Gradients of so many blocks in so many slots; with `folder`, they wait on the drive."""
    made = blocks(num_blocks, accumulates=accumulates)
    slot_bytes = made[0].gradients.stored_bytes
    arena = Arena(f"gradients {num_blocks}.{num_slots}", num_slots * slot_bytes)
    io = FailingIO()
    links = Links(io=io)
    scratch = None if folder is None else Scratch(folder, num_blocks * slot_bytes, links)
    found = Gradients(made, arena, scratch, links, accumulates=accumulates, wait_for_room=wait_for_room)
    found.made = made  # type: ignore[attr-defined]
    return found, arena, io


def made_of(gradients: Gradients) -> list:  # type: ignore[type-arg]
    return gradients.made  # type: ignore[attr-defined,no-any-return]


def test_blocks_are_in_the_order_of_their_arrival() -> None:
    gradients, _, _ = waiting(3, 3)
    first, second, third = made_of(gradients)
    for block in (second, third, first):
        gradients.add(block, gradients_of(block, 1.0), with_norms=True)
    assert gradients.blocks == [second, third, first]


def test_micro_batches_are_summed_in_float32_and_only_the_sum_has_norms() -> None:
    gradients, _, _ = waiting(1, 1, accumulates=True)
    (block,) = made_of(gradients)
    small = 2.0**-12  # lost in a sum of bfloat16
    gradients.add(block, gradients_of(block, 1.0), with_norms=False)
    gradients.add(block, {0: gradients_of(block, small)[0]}, with_norms=True)
    held = gradients.of(block, gradients.load(block), 0)
    assert held.dtype == torch.float32 and float(held[0]) == 1.0 + small
    expected = gradient_norm(held)
    del held
    gradients.keep_norms_only(block)  # none is taken of what is in memory now
    norms = gradients.norms()
    assert torch.equal(norms["0.large"], expected)
    assert torch.equal(norms["0.small"], gradient_norm(torch.ones(8))), "of what did not arrive again"
    assert gradients.num_arrivals(block) == 2


def test_a_second_micro_batch_where_one_was_declared_is_refused_and_changes_nothing() -> None:
    gradients, _, _ = waiting(1, 1)
    (block,) = made_of(gradients)
    gradients.add(block, gradients_of(block, 1.0), with_norms=True)
    with pytest.raises(ConfigError, match="0 received gradients twice before step"):
        gradients.add(block, gradients_of(block, 5.0), with_norms=True)
    assert float(gradients.of(block, gradients.load(block), 1)[0]) == 1.0


def test_what_was_put_away_comes_back_to_the_bit_and_holds_no_slot_meanwhile(tmp_path: Path) -> None:
    gradients, arena, _ = waiting(3, 1, tmp_path)
    torch.manual_seed(0)
    expected = {}
    for block in made_of(gradients):
        expected[block.name] = torch.randn(block.parameters[0].num_elements).to(torch.bfloat16)
        gradients.add(block, {0: expected[block.name]}, with_norms=True)
        gradients.put_away(block)
    for block in reversed(made_of(gradients)):
        assert torch.equal(gradients.of(block, gradients.load(block), 0), expected[block.name])
        assert gradients.present(block) == {0}
        gradients.release(block)
    assert arena.held_bytes() == 0


def test_where_no_slot_is_free_another_blocks_gradients_are_put_away(tmp_path: Path) -> None:
    gradients, _, io = waiting(2, 1, tmp_path)
    first, second = made_of(gradients)
    gradients.add(first, gradients_of(first, 1.0), with_norms=True)
    gradients.add(second, gradients_of(second, 2.0), with_norms=True)
    assert [kind for kind, _ in io.started] == ["write"]
    assert float(gradients.of(first, gradients.load(first), 0)[0]) == 1.0
    assert [kind for kind, _ in io.started] == ["write", "write", "read"]


def test_it_waits_for_who_else_holds_a_slot_and_says_who_does_where_nobody_will_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload_rt.memory.arena._GRACE_SECONDS", 0.0)
    held: list[Slot] = []
    asked = []

    def let_go() -> bool:
        asked.append(len(held))
        if held:
            held.pop()
            return True
        return False

    gradients, arena, _ = waiting(2, 1, wait_for_room=let_go)
    first, second = made_of(gradients)
    held.append(arena.acquire(first.gradients.stored_bytes, "an update under way"))
    gradients.add(first, gradients_of(first, 1.0), with_norms=True)
    assert asked == [1]
    with pytest.raises(BudgetExceeded, match="gradients of 0"):
        gradients.add(second, gradients_of(second, 1.0), with_norms=True)
    assert asked == [1, 0]


def test_a_slot_that_a_device_is_late_to_report_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_GRACE_SECONDS", 0.0)
    gradients, arena, _ = waiting(1, 1)
    (block,) = made_of(gradients)
    slot = arena.acquire(block.gradients.stored_bytes, "gradients that the device has taken")
    give_back = slot.lend("copy to the device")
    adding = Waiting(lambda: gradients.add(block, gradients_of(block, 1.0), with_norms=True))
    assert adding.still()
    del slot
    give_back()
    adding.result()
    assert float(gradients.of(block, gradients.load(block), 0)[0]) == 1.0


@pytest.mark.parametrize("num_slots", [2, 3])
def test_a_write_that_failed_is_an_error_when_the_gradients_are_wanted_and_none_when_they_are_dropped(
    num_slots: int, tmp_path: Path
) -> None:
    gradients, arena, io = waiting(2, num_slots, tmp_path)
    io.fails = {"write"}
    for block in made_of(gradients):
        gradients.add(block, gradients_of(block, 1.0), with_norms=True)
        gradients.put_away(block)
    with pytest.raises(StorageError, match="write failed"):
        gradients.load(made_of(gradients)[0])
    gradients.clear()
    gc.collect()  # of the error's own frames
    assert gradients.blocks == [] and arena.held_bytes() == 0


def test_what_is_forgotten_while_it_arrives_is_not_put_away_in_the_next_step(tmp_path: Path) -> None:
    gradients, arena, io = waiting(2, 2, tmp_path)
    first, second = made_of(gradients)
    gradients.add(first, gradients_of(first, 1.0), with_norms=True)
    gradients._waiting[first.name].arrivals.append(Arrival(Transfer("late", 0, lambda seconds: None, ()), lambda: None))
    gradients.put_away(first)
    gradients.clear()
    gradients.add(second, gradients_of(second, 1.0), with_norms=True)
    assert gradients.blocks == [second] and io.started == []


def test_of_gradients_that_are_gone_the_norms_are_left() -> None:
    gradients, arena, _ = waiting(1, 1)
    (block,) = made_of(gradients)
    gradients.add(block, gradients_of(block, 2.0), with_norms=True)
    gradients.keep_norms_only(block)
    assert gradients.is_gone(block) and arena.held_bytes() == 0
    assert float(gradients.norms()["0.small"]) == pytest.approx(32.0**0.5)


def test_norms_that_were_not_asked_for_are_taken_of_what_was_put_away(tmp_path: Path) -> None:
    gradients, arena, _ = waiting(2, 1, tmp_path)
    for block in made_of(gradients):
        gradients.add(block, gradients_of(block, float("inf") if block.name == "1" else 1.0), with_norms=False)
        gradients.put_away(block)
    norms = gradients.norms()
    assert list(norms) == ["0.large", "0.small", "1.large", "1.small"]
    assert not is_finite(norms) and is_finite({"0.large": norms["0.large"]})
    assert arena.held_bytes() == 0
