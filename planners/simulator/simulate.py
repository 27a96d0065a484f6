"""Discrete-event simulation of a plan: what a steady step takes, and the most that lies in memory.

The plain twin of what the executor does with the same schedule. Each resource does one thing at a time; among the
operations that are ready, the one with the least key runs. Reading and writing share the drives, and both directions
share the link, as the hardware's `drive_mix` and `duplex` say: two that run together each run at (1 + share) / 2 of
their rate; what computes on the device shares it. A step is built once (`timeline`) and repeated until it is steady.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush

from planners.plans.placement import UpdateMode
from planners.plans.plan import Plan
from planners.problems.problem import Problem
from planners.simulator.arenas import peak_bytes
from planners.simulator.passes import build_timeline
from planners.simulator.static_memory import static_bytes
from planners.simulator.timeline import MAX_SIMULATED_PASSES, PHASES, RESOURCES, Resource, Timeline

NUM_STEPS = {False: 3, True: 2}
"""Simulated steps, by whether a step waits for all of the one before; the last one is measured."""


class Deadlock(RuntimeError):
    """Operations wait for each other. A plan that does this must not run."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """An operation of the measured step, as it ran."""

    resource: Resource
    label: tuple[str, int, int]
    start_seconds: float
    """From the beginning of the measured step; what was fetched ahead began before it."""
    finish_seconds: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What came out."""

    step_seconds: float
    busy_seconds: dict[str, float]
    """By resource, in one step, at full rate."""
    peak_bytes: dict[str, float]
    """By tier: what the plan's layout takes."""
    live_bytes: dict[str, float]
    """By tier: the most that was live in it; at most `peak_bytes`, or the layout is not this plan's."""
    phase_peak_bytes: dict[str, dict[str, float]]
    """By tier and phase."""
    num_events: int
    events: tuple[Event, ...] = field(default=(), repr=False)
    memory: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict, repr=False)
    """By tier: times and bytes, where events were asked for."""


class Abandoned(RuntimeError):
    """The simulation was to stop when a step takes longer than somebody cares about."""


def simulate(
    problem: Problem, plan: Plan, *, keep_events: bool = False, abandon_seconds: float = float("inf")
) -> Simulation:
    """Runs `plan`. Raises `Deadlock`, and what `build_timeline` raises.

    `Abandoned` as soon as the measured step has taken `abandon_seconds`.
    """
    timeline = build_timeline(problem, plan)
    hardware = problem.hardware
    run = _Run(
        timeline,
        num_steps=NUM_STEPS[plan.update_mode is not UpdateMode.DEFERRED],
        link_rate=(1 + hardware.links.duplex) / 2,
        drive_rate=(1 + hardware.drive_mix) / 2,
        keep_events=keep_events,
        abandon_seconds=abandon_seconds,
    )
    run.run()
    static = {tier: sum(items.values()) for tier, items in static_bytes(problem, plan).items()}
    busy = dict.fromkeys((r.name.lower() for r in RESOURCES), 0.0)
    for resource, seconds, times in zip(timeline.resource, timeline.seconds, timeline.times, strict=True):
        if resource != Resource.NONE:
            busy[Resource(resource).name.lower()] += times * seconds
    tiers = ("device", "host")
    live = {tier: static[tier] + max(run.peaks[i]) for i, tier in enumerate(tiers)}
    phases = {tier: {p: static[tier] + run.peaks[i][k] for k, p in enumerate(PHASES)} for i, tier in enumerate(tiers)}
    begin = run.ends[-2]
    more = 0.0  # passes like that in the middle
    if timeline.middle is not None:
        more = (problem.workload.passes - MAX_SIMULATED_PASSES) * (run.middle[1] - run.middle[0])
    return Simulation(
        step_seconds=run.ends[-1] - run.ends[-2] + more,
        busy_seconds=busy,
        peak_bytes=peak_bytes(problem, plan),
        live_bytes={**live, "nvme": static["nvme"]},
        phase_peak_bytes=phases,
        num_events=run.num_events,
        events=tuple(
            Event(
                resource=Resource(timeline.resource[op]),
                label=timeline.label[op],
                start_seconds=start - begin,
                finish_seconds=finish - begin,
            )
            for op, start, finish in run.events
        ),
        memory={
            tier: tuple((at - begin, static[tier] + size) for at, size in run.history[i])
            for i, tier in enumerate(tiers)
        }
        if keep_events
        else {},
    )


class _Run:
    """The event loop over a repeated timeline. Operation `op` of step `s` is number `s * len(timeline) + op`."""

    def __init__(
        self,
        timeline: Timeline,
        *,
        num_steps: int,
        link_rate: float,
        drive_rate: float,
        keep_events: bool = False,
        abandon_seconds: float = float("inf"),
    ) -> None:
        self.timeline = timeline
        self.num_steps = num_steps
        self.link_rate, self.drive_rate = link_rate, drive_rate
        self.keep_events = keep_events
        self.abandon_seconds = abandon_seconds
        self.ends = [0.0] * num_steps
        self.middle = [0.0, 0.0]
        """When the operations of `Timeline.middle` were done, in the last step."""
        self.peaks = [[0.0] * len(PHASES) for _ in range(2)]
        self.events: list[tuple[int, float, float]] = []
        self.history: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        self.num_events = 0

    def run(self) -> None:
        t, n, num_steps = self.timeline, len(self.timeline), self.num_steps
        followers: list[list[tuple[int, int]]] = [[] for _ in range(n)]
        waiting_first, waiting = [0] * n, [0] * n
        for op, deps in enumerate(t.deps):
            for other, lag in deps:
                followers[other].append((op, lag))
                waiting[op] += 1
                waiting_first[op] += lag == 0
        waits = waiting_first + waiting * (num_steps - 1)
        resource, seconds, keys, span = t.resource, t.seconds, t.key, t.span
        acquire, release, at_start, at_finish, phase = t.acquire, t.release, t.at_start, t.at_finish, t.phase
        credit = list(t.pools)
        none = int(Resource.NONE)
        # Ready operations by resource; those that need a credit wait in a queue of their own.
        ready: list[list[tuple[float, int]]] = [[] for _ in range(none)]
        gated: dict[tuple[int, int], list[tuple[float, int]]] = {}
        queues: list[list[tuple[int, list[tuple[float, int]]]]] = [[] for _ in range(none)]
        memory, peaks = [0.0, 0.0], self.peaks
        now, done, total = 0.0, 0, n * num_steps
        started: dict[int, float] = {}

        def change(op: int, tier: int, num_bytes: float) -> None:
            memory[tier] += num_bytes
            if memory[tier] > peaks[tier][phase[op]]:
                peaks[tier][phase[op]] = memory[tier]
            if self.keep_events:
                self.history[tier].append((now, memory[tier]))

        def finish(number: int) -> None:
            nonlocal done
            stack = [number]
            while stack:
                current = stack.pop()
                step, op = divmod(current, n)
                done += 1
                for tier, num_bytes in at_finish[op]:
                    change(op, tier, num_bytes)
                given = release[op]
                if given is not None:
                    credit[given[0]] += given[1]
                if op == t.end:
                    self.ends[step] = now
                if t.middle is not None and op in t.middle:
                    self.middle[t.middle.index(op)] = now
                for follower, lag in followers[op]:
                    if step + lag >= num_steps:
                        continue
                    other = (step + lag) * n + follower
                    waits[other] -= 1
                    if not waits[other]:
                        offer(other, stack)

        def offer(number: int, stack: list[int]) -> None:
            """Queues what is ready; what takes no time is done at once."""
            step, op = divmod(number, n)
            if seconds[op] == 0.0 and acquire[op] is None:
                begun = at_start[op]
                if begun is not None:
                    change(op, *begun)
                stack.append(number)
                return
            wanted = acquire[op]
            entry = (keys[op] + step * span, number)
            if wanted is None:
                heappush(ready[resource[op]], entry)
                return
            where = resource[op] if resource[op] != none else int(Resource.COMPUTE)
            if (where, wanted[0]) not in gated:
                gated[where, wanted[0]] = []
                queues[where].append((wanted[0], gated[where, wanted[0]]))
            heappush(gated[where, wanted[0]], entry)

        first: list[int] = []
        for number in range(total):
            if not waits[number]:
                offer(number, first)
        for number in first:
            finish(number)

        active: list[int] = [-1] * none
        left = [0.0] * none
        link_in, link_out = int(Resource.HOST_TO_DEVICE), int(Resource.DEVICE_TO_HOST)
        read, write = int(Resource.SSD_READ), int(Resource.SSD_WRITE)
        compute, update = int(Resource.COMPUTE), int(Resource.DEVICE_UPDATE)
        rate = [1.0] * none
        while True:
            busy = False
            for r in range(none):
                if active[r] < 0:
                    best = ready[r] or None
                    for pool, queue in queues[r]:
                        if queue and (best is None or queue[0] < best[0]):
                            need = acquire[queue[0][1] % n]
                            if need is not None and need[1] <= credit[pool] + 1e-9:
                                best = queue
                    if best is None:
                        continue
                    number = heappop(best)[1]
                    op = number % n
                    wanted = acquire[op]
                    if wanted is not None:
                        credit[wanted[0]] -= wanted[1]
                    active[r], left[r] = number, seconds[op]
                    started[number] = now
                    begun = at_start[op]
                    if begun is not None:
                        change(op, *begun)
                busy = True
            if not busy:
                break
            both = active[link_in] >= 0 and active[link_out] >= 0
            rate[link_in] = rate[link_out] = self.link_rate if both else 1.0
            both = active[compute] >= 0 and active[update] >= 0
            rate[compute] = rate[update] = 0.5 if both else 1.0
            both = active[read] >= 0 and active[write] >= 0
            rate[read] = rate[write] = self.drive_rate if both else 1.0
            passed = min(left[r] / rate[r] for r in range(none) if active[r] >= 0)
            now += passed
            self.num_events += 1
            if num_steps > 1 and self.ends[-2] and now - self.ends[-2] > self.abandon_seconds:
                raise Abandoned(f"a step takes more than {self.abandon_seconds:.6g} s")
            ended = []
            for r in range(none):
                if active[r] >= 0:
                    left[r] -= passed * rate[r]
                    if left[r] <= 1e-12 * max(1.0, now):
                        ended.append(r)
            for r in ended:
                number = active[r]
                active[r] = -1
                if self.keep_events and number // n == num_steps - 1:
                    self.events.append((number % n, started[number], now))
                finish(number)
        if done != total:
            stuck = [t.label[number % n] for number in range(total) if waits[number] and not number // n]
            held = [t.label[q[0][1] % n] for queue in queues for _, q in queue if q]
            raise Deadlock(
                f"{total - done} of {total} operations never run; waiting for credits: {held[:4]}, behind them: "
                f"{stuck[:4]}"
            )
