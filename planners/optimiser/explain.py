"""What an upgrade would buy, and the ways out where nothing fits. Every number is that of a plan that was made."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from planners.errors import PlanInfeasible, format_bytes
from planners.optimiser.mip import plan_any, plan_optimal
from planners.optimiser.orders import in_best_order
from planners.optimiser.rows import Freedoms
from planners.plans.plan import Plan
from planners.problems.hardware import Drive
from planners.problems.problem import Problem
from planners.simulator.static_memory import capacities

GIB = 2**30
NUM_WAYS_OUT = 3
FACTORS = (1.25, 1.5, 2, 3, 4, 8)
"""Of a memory that is short, in place of what there is."""


@dataclass(frozen=True)
class Advice:
    """A change, and what a step takes with it, found by planning again."""

    change: str
    step_seconds: float
    tokens_per_second: float
    gain: float
    """Tokens per second, over those of the plan as it is, less one."""
    ssd_bytes_written_per_step: int


def _upgrades(problem: Problem, plan: Plan) -> Iterator[tuple[str, Problem, Freedoms]]:
    hardware, workload = problem.hardware, problem.workload
    if not hardware.unified:
        more = max(32 * GIB, hardware.host.memory_bytes // 2 // GIB * GIB)
        host = replace(hardware.host, memory_bytes=hardware.host.memory_bytes + more)
        yield f"+{more // GIB} GiB RAM", replace(problem, hardware=replace(hardware, host=host)), Freedoms()
    if hardware.drives:
        second = replace(hardware, drives=(*hardware.drives, hardware.drives[-1]))
        yield "one more SSD", replace(problem, hardware=second), Freedoms()
    double = replace(workload, batch_size=2 * workload.batch_size)
    larger = f"batch {double.batch_size} instead of {workload.batch_size}"
    yield larger, replace(problem, workload=double), Freedoms()
    if any(split.nvme_tokens for entry in plan.classes for split in entry.tokens if split.name != "input"):
        yield "no activations on NVMe but inputs", problem, Freedoms(nvme_activations=False)


def advise(problem: Problem, plan: Plan) -> list[Advice]:
    """What more memory, another drive or a larger batch would buy; nothing is said of what does not fit."""
    now = plan.predicted["tokens_per_second"]
    found = []
    for change, other, freedoms in _upgrades(problem, plan):
        try:
            predicted = in_best_order(other, partial(plan_optimal, freedoms=freedoms))[1].predicted
        except PlanInfeasible:
            continue
        then = predicted["tokens_per_second"]
        written = predicted["ssd_bytes_written_per_step"]
        found.append(Advice(change, predicted["step_seconds"], then, then / now - 1, written))
    return sorted(found, key=lambda advice: -advice.gain)


Way = tuple[str, Problem]


def _ways(problem: Problem, short: PlanInfeasible) -> Iterator[list[Way]]:
    """Changes that might make it fit, the cheap ones first: those of one kind together, each of which helps wherever
    the one before it does.
    """
    hardware, workload = problem.hardware, problem.workload
    yield [
        (f"batch_size {one.batch_size}", replace(problem, workload=one))
        for size in _halved(workload.batch_size)
        if (one := replace(workload, batch_size=size))
    ]
    if workload.sums_gradients:  # whose gradients wait in HOST then; a batch goes through each layer by parts
        rows = workload.micro_batches * workload.batch_size
        at_once = replace(problem, workload=replace(workload, micro_batches=1, batch_size=rows))
        yield [(f"batch_size {rows} in place of {workload.micro_batches} accumulation_steps", at_once)]
    if workload.commit_every:
        without = replace(problem, workload=replace(workload, commit_every=None))
        yield [("no commits to the drive (commit_every 0)", without)]
    if len(short.needs) > 1:
        yield [_all_at_once(problem, short)]
    if "nvme" in short.needs or not hardware.drives:
        base = hardware.drives[-1] if hardware.drives else _usual_drive(2 * 10**12)
        have = capacities(problem)["nvme"]
        drives = [replace(base, capacity_bytes=size * 10**12) for size in (2, 4, 8, 16, 32)]
        yield [
            (
                f"{drive.capacity_bytes // 10**12} TB of NVMe",
                replace(problem, hardware=replace(hardware, drives=(drive,))),
            )
            for drive in drives
            if drive.capacity_bytes > have
        ]
    if not hardware.unified:
        sizes = [-(-int(hardware.host.memory_bytes * factor) // (8 * GIB)) * 8 * GIB for factor in FACTORS]
        hosts = [replace(hardware.host, memory_bytes=size) for size in dict.fromkeys(sizes)]
        yield [
            (f"host_memory {format_bytes(host.memory_bytes)}", replace(problem, hardware=replace(hardware, host=host)))
            for host in hosts
        ]
    sizes = [-(-int(hardware.device.memory_bytes * factor) // GIB) * GIB for factor in FACTORS]
    devices = [replace(hardware.device, memory_bytes=size) for size in dict.fromkeys(sizes)]
    yield [
        (f"device_memory {format_bytes(one.memory_bytes)}", replace(problem, hardware=replace(hardware, device=one)))
        for one in devices
    ]
    yield [
        (f"seq_len {size}", replace(problem, workload=replace(workload, seq_len=size)))
        for size in _halved(workload.seq_len)[:3]
    ]


def _halved(number: int) -> list[int]:
    """`number` halved, and halved again, down to 1."""
    return [number >> times for times in range(1, number.bit_length())]


def _all_at_once(problem: Problem, short: PlanInfeasible) -> tuple[str, Problem]:
    """Every tier that is short with what it lacks, and a tenth for what shows only when a step is simulated."""
    hardware, said = problem.hardware, []
    for tier, need in short.needs.items():
        size = -(-int(1.1 * need) // GIB) * GIB
        said.append(f"{tier}_memory {format_bytes(size)}" if tier != "nvme" else f"{format_bytes(size)} of NVMe")
        if tier == "device":
            size += hardware.device.reserve_bytes
            hardware = replace(hardware, device=replace(hardware.device, memory_bytes=size))
        elif tier == "host":
            hardware = replace(hardware, host=replace(hardware.host, memory_bytes=size))
        else:
            drive = replace(hardware.drives[-1], capacity_bytes=size) if hardware.drives else _usual_drive(size)
            hardware = replace(hardware, drives=(drive,))
    return " and ".join(said), replace(problem, hardware=hardware)


def _usual_drive(num_bytes: int) -> Drive:
    return Drive(capacity_bytes=num_bytes, read_bytes_per_second=6.8e9, write_bytes_per_second=5e9)


def ways_out(problem: Problem, short: PlanInfeasible) -> list[str]:
    """Up to three changes with which a plan was found, at most one of each kind: the least that helps."""
    found = (_least(ways) for ways in _ways(problem, short))
    return list(itertools.islice((change for change in found if change is not None), NUM_WAYS_OUT))


def _least(ways: list[Way]) -> str | None:
    """The first change with which there is a plan, None where there is none with the last.

    To find that there is no plan takes the longest, so that most of them are left out.
    """
    if not ways or plan_any(ways[-1][1]) is None:
        return None
    first = bisect_left(range(len(ways) - 1), True, key=lambda index: plan_any(ways[index][1]) is not None)
    return ways[first][0]


def binding(problem: Problem, plan: Plan) -> str:
    """The resource that works for the largest share of a step; what shares a link or the drives counts together."""
    busy: dict[str, float] = plan.predicted["busy_seconds"]
    hardware = problem.hardware
    shares = {
        "compute": busy["compute"] + busy["device_update"],
        "the link": (busy["host_to_device"] + busy["device_to_host"]) / (1 + hardware.links.duplex),
        "the drives": (busy["ssd_read"] + busy["ssd_write"]) / (1 + hardware.drive_mix),
        "the CPU": busy["cpu"],
    }
    most = max(shares, key=lambda name: shares[name])
    return f"{most} ({shares[most] / plan.predicted['step_seconds']:.0%} of a step)"
