"""What is put away costs whoever computes more on a drive than in HOST: measured apart, charged by all views alike."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest

from offload_rt.layers.discover import find_blocks
from offload_rt.meter import COMPUTE
from offload_rt.plans.asked import asked
from offload_rt.profiling import block_profile, chunk_profile, drive_profile
from offload_rt.profiling.block_profile import profile_layer
from offload_rt.profiling.chunk_profile import profile_chunked_layer
from offload_rt.profiling.drive_profile import drive_pair, sample
from offload_rt.profiling.workbench import RUNS, Workbench
from planners.errors import format_bytes
from planners.optimiser.choices import combinations
from planners.optimiser.expand import Fractions, expand
from planners.optimiser.mip import plan_optimal
from planners.optimiser.rows import BACKWARD, FORWARD
from planners.plans.placement import Tier, UpdatePlace
from planners.simulator.division import divided
from planners.simulator.simulate import simulate
from planners.simulator.step_work import busy_seconds
from planners.simulator.validate import check
from tests.conftest import build_lora
from tests.fake_device import FakeDevice
from tests.test_planner_budgets import KIB, LAYERS, builder, problem

OUT, BACK = 0.003, 0.007
"""Seconds of a layer, all of which goes on to a drive."""
SIZES = [300, 4096, 70_000, 4096]


def with_price(p, out, back):
    (entry,) = p.workload.classes
    kept = replace(entry.measured.kept, put_on_drive=out, taken_off_drive=back)
    classes = (replace(entry, measured=replace(entry.measured, kept=kept)),)
    return replace(p, workload=replace(p.workload, classes=classes))


def by_hand(p, nvme, host):
    """A plan of so many shares of what layers save; the rest is kept."""
    knobs = next(k for group in combinations(p) for k in group if k.inputs is Tier.DEVICE)
    shares = (0.0, nvme, host, 1.0 - nvme - host)
    fractions = Fractions(
        weights=(1.0, 0.0, 0.0), tokens=((0.0, 0.0, 0.0, 1.0), shares),
        updates={(Tier.DEVICE, UpdatePlace.DEVICE, False): 1.0},
    )  # fmt: skip
    return expand(p, knobs, [fractions], planner="by hand")


@pytest.mark.parametrize(("nvme", "host"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25)])
def test_only_what_goes_on_to_a_drive_has_its_price_in_simulator_and_sum_by_hand(nvme, host):
    found = []
    for out, back in ((0.0, 0.0), (OUT, BACK)):
        p = with_price(problem(device=4096 * KIB, host=4096 * KIB), out, back)
        plan = by_hand(p, nvme, host)
        simulated = simulate(divided(p, plan), plan).busy_seconds["compute"]
        assert simulated == pytest.approx(busy_seconds(divided(p, plan), plan)["compute"])
        check(p, plan)
        found.append(simulated)
    assert found[1] - found[0] == pytest.approx(nvme * LAYERS * (OUT + BACK))


def test_the_program_charges_it_where_the_simulator_does():
    p = with_price(problem(device=900 * KIB, host=400 * KIB), OUT, BACK)
    program, (columns,) = builder(p, next(itertools.chain.from_iterable(combinations(p))))
    _, nvme, host, _ = columns.tokens[1]
    kept = p.workload.classes[0].measured.kept
    for phase, in_host, on_drive in ((FORWARD, kept.put_away, OUT), (BACKWARD, kept.taken_back, BACK)):
        seconds = {column: own * program.unit for column, own in program.busy[phase, "compute"]}
        assert seconds[host] == pytest.approx(LAYERS * in_host)
        assert seconds[nvme] == pytest.approx(LAYERS * (in_host + on_drive))


def test_no_plan_goes_to_a_drive_whose_price_is_more_than_computing_again():
    """Computing again takes 12 ms a layer here, and the drive itself next to nothing."""
    deep, moved = 12, []
    for price in (0.0, 0.02):
        p = with_price(problem(device=2000 * KIB, drive=1e12), price, 0.0)
        (entry,) = p.workload.classes
        entry = replace(entry, blocks=tuple(f"layers.{i}" for i in range(deep)), positions=tuple(range(deep)))
        plan = plan_optimal(replace(p, workload=replace(p.workload, classes=(entry,))))
        moved.append(sum(len(one.blocks) * split.nvme_tokens for one in plan.classes for split in one.tokens[1:]))
    assert moved[0] > 0 == moved[1]


def test_a_machine_that_computes_slower_pays_it_slower():
    p = with_price(problem(device=900 * KIB), OUT, BACK)
    slower = asked(p).measured({COMPUTE: 3.0}).question.workload.classes[0].measured.kept
    assert (slower.put_on_drive, slower.taken_off_drive) == pytest.approx((3 * OUT, 3 * BACK))


@pytest.mark.parametrize("on_a_device", [False, True])
def test_a_pair_is_timed_by_tensors_that_really_go_to_the_drive_and_back(on_a_device, tmp_path, caplog):
    """The clock counts the drive's bytes, of which the way in HOST has none. The log says how many were written."""
    caplog.set_level("INFO", "offload_rt")
    device = FakeDevice(kernels_are_late=False) if on_a_device else None
    with Workbench(device, drive=tmp_path) as place:
        room = place.stash("put away", 2 * sum(SIZES))
        counters = place.counters
        pair = drive_pair(room, SIZES, place, lambda: float(counters.bytes_written + counters.bytes_read))
        pages = sum(-(-size // 4096) * 4096 for size in SIZES)
        assert counters.bytes_written == counters.bytes_read == (1 + RUNS) * pages
        assert f"{format_bytes(counters.bytes_written)} were written to the drive" in caplog.text
        assert not any(tmp_path.iterdir())
    if device is None:
        assert pair == (pages, pages)
    else:
        assert pair[0] == pair[1], "of a device the host is timed as it asks: it asks for both as fast"
        device.close()


def test_without_a_drive_there_is_no_price_and_a_drive_that_fails_is_said(tmp_path, caplog):
    for drive in (None, tmp_path / "missing" / "folder"):
        with Workbench(drive=drive) as place:
            room = place.stash("put away", 2 * sum(SIZES))
            assert drive_pair(room, SIZES, place) == drive_pair(room, [], place) == (0.0, 0.0)
        assert ("could not be measured" in caplog.text) is (drive is not None)


def test_a_layer_that_saves_much_is_sampled_and_its_price_in_proportion(tmp_path, monkeypatch):
    assert sample(SIZES, 1 << 20) == SIZES and sample([], 1) == []
    assert sample([10, 20] * 50, 300) == [10, 20] * 10 and sample([1000], 64) == [64]
    monkeypatch.setattr(drive_profile, "sample", lambda sizes: sizes[::2])
    with Workbench(drive=tmp_path) as place:
        room, counters = place.stash("put away", 1 << 20), place.counters
        pair = drive_pair(room, [4096] * 8, place, lambda: float(counters.bytes_written))
    assert pair == (8 * 4096, 0.0)


@pytest.mark.parametrize("chunk_tokens", [None, pytest.param(16, marks=pytest.mark.full)])
def test_a_profile_asks_for_the_price_of_what_a_layer_puts_away(chunk_tokens, tmp_path, monkeypatch):
    """By chunks, of the first two, from where it is in proportion to the tokens."""
    noted = []
    for module in (block_profile, chunk_profile):
        monkeypatch.setattr(module, "drive_pair", lambda room, sizes, bench: noted.append(sizes) or (OUT, BACK))
    model = build_lora("llama")
    draft = next(draft for draft in find_blocks(model, bits=None) if draft.is_layer)
    profile = profile_layer if chunk_tokens is None else partial(profile_chunked_layer, chunk_tokens=chunk_tokens)
    kept = profile(model, draft, batch_size=2, seq_len=64).kept
    times = 1 if chunk_tokens is None else 64 / (2 * chunk_tokens)
    assert times * sum(noted[0]) == kept.saved_bytes > 0
    assert (kept.put_on_drive, kept.taken_off_drive) == pytest.approx((times * OUT, times * BACK))
