"""What rows of the steady program are made of: work by phase and resource, bytes held by tier; what may be chosen."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from planners.optimiser.program import Program, Terms
from planners.plans.placement import UpdateMode
from planners.problems.cost import Knobs
from planners.problems.problem import Problem

GB = 1e9
FORWARD, BACKWARD, UPDATE, EARLIER_FORWARD, EARLIER_BACKWARD = 0, 1, 2, 3, 4
"""Phases of a step; the last two are those of all its passes but the last one, added up."""
EARLIER = {FORWARD: EARLIER_FORWARD, BACKWARD: EARLIER_BACKWARD}
RESOURCES = ("compute", "host_to_device", "device_to_host", "ssd_read", "ssd_write", "cpu")
PRICES = {"compute": 1.0, "host_to_device": 1.0, "device_to_host": 1.0, "ssd_read": 2.0, "ssd_write": 4.0}
"""What a second of work costs beside time, in units of `price`: ties go to the plan that moves less."""
PRICE_SUM = sum(PRICES.values())
LOW_PRICE = 1e-4


@dataclass(frozen=True)
class Freedoms:
    """What the optimiser may use. Each can be switched off, for ablations and for the policies of others."""

    nvme_activations: bool = True
    swaps: bool = True
    """Saved tensors other than layer inputs may be kept and swapped."""
    device_updates: bool = True
    tiles: bool = True
    """A head may go by tiles."""
    weights: tuple[bool, bool, bool] = (True, True, True)
    """Tiers in which weights may rest."""
    states: tuple[bool, bool, bool] = (True, True, True)


class Rows:
    """A program for one set of knobs, and the sums that become its rows."""

    def __init__(
        self,
        problem: Problem,
        knobs: Knobs,
        freedoms: Freedoms,
        room: dict[str, float],
        unit: float,
        price: float,
        elastic: bool,
    ) -> None:
        self.problem, self.knobs, self.freedoms, self.room = problem, knobs, freedoms, room
        self.unit, self.price, self.elastic = unit, price, elastic
        self.missing: dict[str, int] = {}
        self.workload, self.hardware = problem.workload, problem.hardware
        self.unified = problem.hardware.unified
        self.program = Program()
        after = knobs.update_mode is UpdateMode.AFTER or self.memory_steps_after
        self.phases = (FORWARD, BACKWARD, UPDATE) if after else (FORWARD, BACKWARD)
        self.earlier = problem.workload.passes - 1
        """Passes before the last one."""
        if self.earlier:
            self.phases = (EARLIER_FORWARD, EARLIER_BACKWARD, *self.phases)
        self.times = {phase: self.program.variable(1e6, cost=1.0) for phase in self.phases}
        self.busy: dict[tuple[int, str], Terms] = {key: [] for key in itertools.product(self.phases, RESOURCES)}
        self.fixed: dict[tuple[int, str], float] = dict.fromkeys(self.busy, 0.0)
        self.held: dict[str, Terms] = {"device": [], "host": [], "nvme": []}
        self.held_in_save: dict[str, Terms] = {"device": [], "host": [], "nvme": []}
        """Of these, what lies there while a model is saved, too."""
        self.most: dict[tuple[str, str], int] = {}
        self.serial: dict[tuple[int, str], Terms] = {}
        """What cannot hide behind computation, because there is one buffer for it; seconds over `unit`.

        By phase and by what it waits for: of several chains, each by itself bounds the phase.
        """
        self.redone: Terms = []
        """By one pass."""
        links, drives = self.hardware.links, bool(self.hardware.drives)
        self.rate = {
            "compute": 1.0,
            "cpu": 1.0,
            "host_to_device": links.host_to_device_bytes_per_second,
            "device_to_host": links.device_to_host_bytes_per_second,
            "ssd_read": self.hardware.read_bytes_per_second if drives else 1.0,
            "ssd_write": self.hardware.write_bytes_per_second if drives else 1.0,
        }

    @property
    def memory_steps_after(self) -> bool:
        """Whether state may be in memory that is stepped after the last backward."""
        return self.problem.capabilities.memory_steps_after and self.knobs.state_in_memory

    def work(self, phase: int, resource: str, variable: int | None, amount: float) -> None:
        """`amount` (bytes, or seconds) times the variable, on a resource in a phase, by each pass."""
        self.work_once(phase, resource, variable, amount)
        if self.earlier:
            self.work_once(EARLIER[phase], resource, variable, self.earlier * amount)

    def work_once(self, phase: int, resource: str, variable: int | None, amount: float) -> None:
        """The same of a step."""
        if self.unified and resource in ("host_to_device", "device_to_host"):
            return
        seconds = amount / self.rate[resource] / self.unit
        if variable is None:
            self.fixed[phase, resource] += seconds
        else:
            self.busy[phase, resource].append((variable, seconds))

    def wait(self, phase: int, chain: str, terms: Terms) -> None:
        """`terms` (seconds over `unit`) come between computations of a phase, one after the other within a chain; by
        each pass.
        """
        self.wait_once(phase, chain, terms)
        if self.earlier:
            self.wait_once(EARLIER[phase], chain, [(variable, self.earlier * seconds) for variable, seconds in terms])

    def wait_once(self, phase: int, chain: str, terms: Terms) -> None:
        """The same of a step."""
        self.serial.setdefault((phase, chain), []).extend(terms)

    def hold(self, tier: str, variable: int, num_bytes: float, *, passes: bool = False) -> None:
        """`num_bytes` times the variable in a tier. `passes`: it comes and goes within a step."""
        tier = "device" if self.unified and tier == "host" else tier
        self.held[tier].append((variable, num_bytes / GB))
        if not passes:
            self.held_in_save[tier].append(self.held[tier][-1])

    def largest(
        self, tier: str, name: str, terms: Terms, constant: float = 0.0, *, count: int = 1, passes: bool = False
    ) -> None:
        """`count` buffers, each of which must hold the largest of several needs, in bytes. `passes`: see `hold`."""
        tier = "device" if self.unified and tier == "host" else tier
        if (tier, name) not in self.most:
            self.most[tier, name] = self.program.variable(1e7)
            self.hold(tier, self.most[tier, name], count * GB, passes=passes)
        least = [(self.most[tier, name], -1.0), *((v, a / GB) for v, a in terms)]
        self.program.at_most(least, -constant / GB)
