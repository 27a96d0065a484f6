"""The release gate: an engine changes no bit of losses, gradients and updated parameters, wherever the weights rest."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from planners.plans.plan import DecodeScope
from planners.plans.schedule import num_fetches, ring_schedule, walk
from tests.parity import (
    STEPS,
    Case,
    Trace,
    covering,
    in_pairs,
    in_turns,
    more_cases,
    pairwise_cases,
    run_engine,
    run_plain,
)

SELECTED = pairwise_cases()


def differences(expected: list[Trace], found: list[Trace]) -> list[str]:
    odd = []
    for step, (want, got) in enumerate(zip(expected, found, strict=True), 1):
        if want.keys() != got.keys():
            odd.append(f"step {step}: other tensors: {sorted(want.keys() ^ got.keys())[:3]}")
        odd += [f"step {step}: {name}" for name in want.keys() & got.keys() if not torch.equal(want[name], got[name])]
    return odd


def check(case: Case, folder: Path) -> None:
    expected = run_plain(case)
    found, engine = run_engine(case, folder)
    with engine:
        assert differences(expected, found) == []
        assert any(name.startswith("gradient") for name in expected[0]), (
            "a gate that compares no gradient proves nothing"
        )
        _check_that_it_fired(case, engine)


def _check_that_it_fired(case: Case, engine) -> None:  # type: ignore[no-untyped-def]
    report = engine.report()
    micro_batches = STEPS * case.accumulation
    checkpoints_around = case.family == "plain" and case.checkpointing
    if not checkpoints_around:
        assert report["recomputes"] == 4 * micro_batches
    if case.weights == "nf4":
        assert report["decodes"] > 0
        assert report["decode_overflow_bytes"] == 0
        if not checkpoints_around:
            quantized = sum(b.spec.is_quantized for block in engine._runtime.blocks for b in block.bindings)
            twice = report["decodes"] == 2 * quantized * micro_batches  # and a third time where backward decodes again
            assert twice is (engine.plan.decode_scope is DecodeScope.LAYER)
    if case.place == "stress":
        assert report["transients"]["num_placed"] > 0
    recorder = engine._runtime.recorder
    if recorder is not None:
        assert recorder.operations
        assert [str(race) for race in recorder.check()] == []
    if "NVME" in case.place or case.place == "stress":
        ring = engine.plan.rings[0]
        executor = engine._runtime.executors[0]
        assert report["bytes_read"] > 0
        if not checkpoints_around:
            visits = walk(len(ring.blocks), training=True)
            resident = frozenset(range(ring.num_slots))
            first = num_fetches(ring_schedule(visits, ring.num_slots))
            then = num_fetches(ring_schedule(visits, ring.num_slots, resident))
            assert executor.counters.num_fetches == first + then * (micro_batches - 1)
            assert executor.counters.num_misses == 0
            assert then <= 2 * len(ring.blocks)


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_training_is_bit_equal_to_plain_pytorch(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in more_cases() if case not in SELECTED], ids=str)
def test_training_is_bit_equal_to_plain_pytorch_for_every_three_choices(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(5, 3, 2, 2, 2, 7), (4, 4, 4, 3, 2), (2, 2, 2, 2)], ids=str)
def test_a_covering_selection_has_every_combination_and_few_cells(lengths: tuple[int, ...], strength: int) -> None:
    axes = [[f"{axis}.{value}" for value in range(length)] for axis, length in enumerate(lengths)]
    dearest = lengths.index(2)
    plain, cheaper = covering(axes, strength), covering(axes, strength, dearest=dearest)
    least = math.prod(sorted(lengths)[-strength:])
    for cells in (plain, cheaper):
        found = {one for cell in cells for one in itertools.combinations(cell, strength)}
        assert found == {one for chosen in itertools.combinations(axes, strength) for one in itertools.product(*chosen)}
        assert least <= len(cells) <= 1.5 * least
    firsts = [sum(cell[dearest] == axes[dearest][0] for cell in cells) for cells in (plain, cheaper)]
    assert firsts[0] <= firsts[1]
    assert covering(axes, strength) == plain, "the same at every call"


def test_a_minority_of_the_cells_has_several_micro_batches() -> None:
    assert sum(case.accumulation == 1 for case in SELECTED) > 0.75 * len(SELECTED), "what takes long is chosen seldom"


def test_the_gate_sees_a_single_flipped_bit() -> None:
    case = Case("llama", "bf16", 1, False, False, "in place")
    expected = run_plain(case)
    changed = run_plain(case)
    name = next(name for name in changed[2] if name.startswith("parameter"))
    changed[2][name].view(torch.int32).view(-1)[0] ^= 1
    assert differences(expected, changed) == [f"step 3: {name}"]


def test_every_value_of_axes_by_turns_is_kept() -> None:
    cells = in_turns("abc", range(5), (None, "x"))
    kept = [cell.values for cell in cells if not cell.marks]
    assert len(cells) == 30 and len(kept) == 5
    assert [set(values) for values in zip(*kept, strict=True)] == [set("abc"), set(range(5)), {None, "x"}]


def test_every_other_cell_of_three_axes_has_every_pair() -> None:
    axes = (range(4), range(2), range(3))
    cells = in_pairs(*axes)
    kept = [cell.values for cell in cells if not cell.marks]
    assert len(cells) == 24 and len(kept) == 12
    for i, j in itertools.combinations(range(3), 2):
        assert {(values[i], values[j]) for values in kept} == set(itertools.product(axes[i], axes[j]))
