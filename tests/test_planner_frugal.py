"""What fits in less memory fits in more; what is said to be needed is enough, and next to nothing less is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planners.errors import PlanInfeasible
from planners.optimiser.mip import plan_any, plan_optimal
from planners.problems.hardware import Drive, named_hardware
from planners.problems.model_workload import make_workload
from planners.problems.problem import Problem
from planners.shapes.architectures import shape_from_config
from tests.planner_cases import TINY

KIB = 1 << 10
LESS = 64 * KIB
PLENTY = 1 << 34


def question(seed: int) -> Problem:
    """Adapters or all parameters of a tiny model, with and without clipping, commits and drives, on any machine."""
    r = random.Random(seed)
    full = r.random() < 0.5
    sizes = {"hidden_size": r.choice((128, 256)), "num_hidden_layers": r.choice((2, 6))}
    hardware = named_hardware(r.choice(("rtx4090", "cpu")))
    drive = Drive(capacity_bytes=PLENTY, read_bytes_per_second=7e9, write_bytes_per_second=5e9)
    drives = (drive,) if r.random() < 0.7 else ()
    workload = make_workload(
        shape_from_config({**TINY, **sizes, "vocab_size": r.choice((1000, 8000))}, "tiny"),
        batch_size=r.choice((1, 4)), seq_len=r.choice((64, 256)), bits=None if full else r.choice((4, None)),
        rank=None if full else 8, clips=r.random() < 0.4, commit_every=1 if drives and r.random() < 0.5 else None,
    )  # fmt: skip
    return Problem(hardware=replace(hardware, drives=drives), workload=workload)


def with_memory(p: Problem, **given: int) -> Problem:
    """`p` with so many bytes of these tiers, all of it to be used."""
    hardware = p.hardware
    for tier, size in given.items():
        changed = replace(getattr(hardware, tier), memory_bytes=size)
        hardware = replace(hardware, **{tier: replace(changed, reserve_bytes=0) if tier == "device" else changed})
    return replace(p, hardware=hardware)


def short_of(p: Problem) -> dict[str, int]:
    """What each tier that is short would have to hold; nothing where a plan is made."""
    try:
        plan_optimal(p)
    except PlanInfeasible as short:
        return short.needs
    return {}


@pytest.mark.parametrize("seed", [19, *(pytest.param(seed, marks=pytest.mark.full) for seed in (*range(19), 132))])
def test_what_would_fit_fits_and_so_does_more_and_nothing_less(seed):
    """Of each tier that is short by itself, and of both where both are."""
    p = question(seed)
    tiers = ["device"] if p.hardware.unified else ["device", "host"]
    for short in ([tier] for tier in tiers) if len(tiers) == 1 else ([tiers[0]], [tiers[1]], tiers):
        asked = with_memory(p, **{tier: LESS if tier in short else PLENTY for tier in tiers})
        needs = short_of(asked)
        if not needs:
            continue  # what is not needed at all
        assert set(needs) <= set(short)
        enough = with_memory(asked, **needs)
        assert plan_any(enough) is not None and not short_of(enough)
        for tier, size in needs.items():
            assert short_of(with_memory(enough, **{tier: size - LESS}))
            for more in (KIB, 17 * KIB, 200 * KIB, 1500 * KIB):
                assert not short_of(with_memory(enough, **{tier: size + more})), f"refused with {more} more of {tier}"
