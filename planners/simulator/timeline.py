"""One steady step of a plan as operations on resources: the data, and how an operation is added to it.

Operations name what they wait for as `(operation, lag)`; lag 1 is the same operation one step earlier, so that a step
is built once and repeated. What the operations are is said in `passes` and `updates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from planners.plans.placement import ClassPlan, UpdateMode
from planners.plans.plan import Plan
from planners.problems.cost import knobs_of
from planners.problems.problem import Problem


class Resource(IntEnum):
    """What does one thing at a time."""

    COMPUTE = 0
    HOST_TO_DEVICE = 1
    DEVICE_TO_HOST = 2
    SSD_READ = 3
    SSD_WRITE = 4
    CPU = 5
    DEVICE_UPDATE = 6
    """Optimizer steps on the device: a stream of high priority, whose kernels run between those of COMPUTE."""
    NONE = 7
    """Takes no time: a point where several things have happened."""


RESOURCES = tuple(r for r in Resource if r is not Resource.NONE)
DEVICE, HOST = 0, 1
"""Index of a tier in memory changes."""
PHASES = ("forward", "backward", "update")
MAX_SIMULATED_PASSES = 3
"""Of a step: the first one, which fetches what was updated, the last one, behind which updates are made, and between
them one for all others.
"""


@dataclass
class Timeline:
    """Operations of one step, as parallel lists."""

    resource: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    key: list[float] = field(default_factory=list)
    """Among the ready ones of a resource, the least runs first."""
    deps: list[list[tuple[int, int]]] = field(default_factory=list)
    at_start: list[tuple[int, float] | None] = field(default_factory=list)
    """Tier and bytes that its start takes."""
    at_finish: list[list[tuple[int, float]]] = field(default_factory=list)
    """Tiers and bytes that its end gives back (negative) or takes."""
    acquire: list[tuple[int, float] | None] = field(default_factory=list)
    """Pool and amount that its start takes."""
    release: list[tuple[int, float] | None] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    label: list[tuple[str, int, int]] = field(default_factory=list)
    """What it does, to which block (its position), which chunk or bucket."""
    pools: list[float] = field(default_factory=list)
    span: float = 0.0
    """What a step adds to the keys of the one before."""
    end: int = 0
    """The operation that ends the step."""
    times: list[int] = field(default_factory=list)
    """How many equal ones in a row each stands for: those of passes between the first and the last one."""
    middle: tuple[int, int] | None = None
    """The last operations before and of the pass that stands for several; None: none does."""

    def __len__(self) -> int:
        return len(self.resource)


class Operations:
    """Adds the operations of one plan's step to a timeline."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan = problem, plan
        self.workload, self.hardware = problem.workload, problem.hardware
        self.knobs = knobs_of(plan)
        self.placed: list[ClassPlan] = [plan.entry(entry.name) for entry in self.workload.classes]
        self.num_blocks = self.workload.num_blocks
        self.class_at = [
            c for _, c in sorted((p, c) for c, entry in enumerate(self.workload.classes) for p in entry.positions)
        ]
        self.num_passes = min(self.workload.passes, MAX_SIMULATED_PASSES)
        self.number = 0
        """Of the pass that is laid out."""
        self.timeline = Timeline(span=2.0 * self.num_blocks * self.num_passes + 4)
        self.barrier = plan.update_mode is not UpdateMode.DEFERRED
        hardware = self.hardware
        self.rates = [
            1.0,
            1e30 if hardware.unified else hardware.links.host_to_device_bytes_per_second,
            1e30 if hardware.unified else hardware.links.device_to_host_bytes_per_second,
            hardware.read_bytes_per_second,
            hardware.write_bytes_per_second,
        ]
        self.host = DEVICE if hardware.unified else HOST

    def op(
        self,
        resource: int,
        amount: float,
        key: float,
        deps: list[tuple[int, int]],
        phase: int,
        label: tuple[str, int, int],
        *,
        at_start: tuple[int, float] | None = None,
        at_finish: tuple[tuple[int, float], ...] = (),
        acquire: tuple[int, float] | None = None,
        release: tuple[int, float] | None = None,
    ) -> int:
        """Adds an operation: `amount` is bytes on links and drives, seconds elsewhere."""
        t = self.timeline
        moves = Resource.HOST_TO_DEVICE <= resource <= Resource.SSD_WRITE
        t.resource.append(resource)
        t.seconds.append(amount / self.rates[resource] if moves and amount else amount)
        t.key.append(key)
        t.deps.append(deps)
        t.at_start.append(at_start)
        t.at_finish.append(list(at_finish))
        t.acquire.append(acquire)
        t.release.append(release)
        t.phase.append(phase)
        t.label.append(label)
        stands_for_others = self.number == 1 and self.num_passes > 2
        t.times.append(1 + (self.workload.passes - self.num_passes if stands_for_others else 0))
        return len(t.resource) - 1

    def link_in(
        self, position: int, k: int, num_bytes: float, key: float, deps: list[tuple[int, int]], phase: int,
        *, at_finish: tuple[tuple[int, float], ...] = (),
    ) -> int:  # fmt: skip
        """Moves bytes from HOST to DEVICE; nothing to move where the two are one."""
        resource = Resource.NONE if self.hardware.unified else Resource.HOST_TO_DEVICE
        amount = 0.0 if self.hardware.unified else num_bytes
        return self.op(resource, amount, key, deps, phase, ("load", position, k), at_finish=at_finish)

    def link_out(
        self, position: int, k: int, num_bytes: float, key: float, deps: list[tuple[int, int]], phase: int,
        *, at_start: tuple[int, float] | None = None,
    ) -> int:  # fmt: skip
        """Moves bytes from DEVICE to HOST."""
        resource = Resource.NONE if self.hardware.unified else Resource.DEVICE_TO_HOST
        amount = 0.0 if self.hardware.unified else num_bytes
        return self.op(resource, amount, key, deps, phase, ("swap", position, k), at_start=at_start)

    def join(self, ops: list[int], key: float, label: tuple[str, int, int]) -> int:
        """The point where all of `ops` are done."""
        return self.op(Resource.NONE, 0.0, key, [(op, 0) for op in ops], 1, label)
