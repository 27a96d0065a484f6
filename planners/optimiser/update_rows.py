"""Updates in the steady program: which share of a block's parameters is stepped where and when."""

from __future__ import annotations

import itertools

from planners.optimiser.expand import UpdateKey
from planners.optimiser.rows import BACKWARD, EARLIER, FORWARD, UPDATE, Rows
from planners.plans.placement import Tier, UpdateMode, UpdatePlace
from planners.problems.problem import BlockClass
from planners.simulator.optimizer_state import buckets, state_copies, steps_after, whole_state_bytes


class UpdateRows:
    """Adds the variables of one class after the other."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.program = rows, rows.program
        self.problem, self.knobs = rows.problem, rows.knobs
        self.workload, self.hardware, self.unified = rows.workload, rows.hardware, rows.unified

    def add(self, entry: BlockClass, weights: tuple[int, int, int]) -> dict[UpdateKey, int]:
        """Shares of the class's parameters by what becomes of them, as columns; `weights` are those of its bytes."""
        params = float(entry.trainable_params)
        if not params:
            return {}
        mode, workload, program, n = self.knobs.update_mode, self.workload, self.program, entry.count
        state, gradient = float(whole_state_bytes(self.problem, entry)), workload.gradient_bytes_per_param * params
        new = workload.weight_bytes_per_param * params
        copies = state_copies(self.problem, mode)
        held = workload.waiting_gradient_bytes_per_param * params
        waiting = mode in (UpdateMode.AFTER, UpdateMode.SPECULATIVE) or self.rows.memory_steps_after
        waiting = waiting or workload.sums_gradients
        arrive = self.rows.work if workload.sums_gradients else self.rows.work_once
        wait = self.rows.wait if workload.sums_gradients else self.rows.wait_once
        leaving = gradient * (workload.together if workload.sums_gradients else 1)
        alone = entry.is_layer and self.knobs.buffers.gradient_slots == 1 and not workload.pinned
        found: dict[UpdateKey, int] = {}
        for key in self._update_keys():
            tier, place, deferred = key
            x = found[key] = program.variable(1.0)
            phase = UPDATE if steps_after(self.problem, mode, tier) else (FORWARD if deferred else BACKWARD)
            stays = waiting or deferred
            in_host = workload.in_host(tier, place)
            if place is UpdatePlace.CPU:
                self.rows.work_once(phase, "cpu", x, n * params / self.hardware.host.adamw_params_per_second)
            else:
                self.rows.work_once(phase, "compute", x, n * params / self.hardware.device.adamw_params_per_second)
                if workload.device_steps is not None:
                    self.rows.work_once(phase, "cpu", x, n * params * workload.device_steps.cpu_seconds_per_param)
                if tier is not Tier.DEVICE:
                    self.rows.work_once(phase, "host_to_device", x, n * (state + (held if in_host else 0.0)))
                    self.rows.work_once(phase, "device_to_host", x, n * state)
                    if alone and not stays and not in_host:
                        self._state_alone(x, n * state, tier)
                if stays and not workload.pinned and not in_host:
                    self.rows.hold("device", x, n * held, passes=True)
            if in_host:
                arrive(BACKWARD, "device_to_host", x, n * leaving)
                if alone:
                    out = n * leaving / self.rows.rate["device_to_host"] / self.rows.unit
                    wait(BACKWARD, "gradients", [(x, out)])
                if workload.sums_gradients:
                    summing = (workload.micro_batches - 1) * workload.summing_seconds_per_param
                    when = EARLIER[BACKWARD] if self.rows.earlier else BACKWARD
                    self.rows.work_once(when, "cpu", x, n * params * summing)
                if stays:
                    self.rows.hold("host", x, n * held, passes=True)
            if tier is Tier.NVME:
                self.rows.work_once(phase, "ssd_read", x, n * state)
                self.rows.work_once(phase, "ssd_write", x, n * state)
            committed = bool(workload.commit_every and self.hardware.drives)
            if workload.log_bytes is None and (tier is Tier.NVME or workload.commit_every):
                self.rows.hold("nvme", x, 2 * n * state)
            if tier is not Tier.NVME:
                self.rows.hold(tier.value, x, copies * n * state)
                if committed:
                    self.rows.work_once(phase, "ssd_write", x, n * state / (workload.commit_every or 1))
                    if tier is Tier.DEVICE:
                        self.rows.work_once(phase, "device_to_host", x, n * state / (workload.commit_every or 1))
        if not waiting:
            passing = [(x, gradient) for (tier, place, deferred), x in found.items()
                       if workload.in_host(tier, place) and not deferred]  # fmt: skip
            self.rows.largest("host", "gradients", passing, count=self.knobs.buffers.host_gradient_slots)
        program.row([(x, 1.0) for x in found.values()], 1.0, 1.0)
        self._staging(found, state)
        self._new_weights(entry, weights, found, new)
        if workload.pinned and workload.commit_every and self.hardware.drives:
            last = self.rows.phases[-1]
            self.rows.work_once(last, "ssd_write", None, n * new / workload.commit_every)
            self.rows.work_once(last, "device_to_host", None, n * new / workload.commit_every)
        return found

    def _state_alone(self, x: int, num_bytes: float, tier: Tier) -> None:
        """The gradients' one slot is free when the state has come to the device, and gone."""
        rows = self.rows
        if not self.unified:
            rows.wait_once(BACKWARD, "state", [(x, num_bytes / rows.rate["host_to_device"] / rows.unit)])
        if tier is Tier.NVME and self.knobs.update_mode is UpdateMode.DEFERRED:  # which does not read it ahead
            rows.wait_once(BACKWARD, "read", [(x, num_bytes / rows.rate["ssd_read"] / rows.unit)])

    def _update_keys(self) -> list[UpdateKey]:
        mode, freedoms = self.knobs.update_mode, self.rows.freedoms
        times = [False] if mode is not UpdateMode.DEFERRED else ([True] if self.workload.clips else [False, True])
        can = self.problem.capabilities.state_tiers
        tiers = [t for t, ok in zip(Tier, freedoms.states, strict=True) if ok and t in can]
        tiers = [t for t in tiers if t is Tier.NVME or self.knobs.state_in_memory]
        tiers = [t for t in tiers if not (t is Tier.HOST and self.unified) and (t is not Tier.NVME or self._drives)]
        on_device = freedoms.device_updates and self.problem.capabilities.device_updates
        keys: list[UpdateKey] = []
        for tier, deferred in itertools.product(tiers, times):
            if tier is not Tier.DEVICE and not self.unified:
                keys.append((tier, UpdatePlace.CPU, deferred))
            if self.unified or on_device or (tier is Tier.DEVICE and freedoms.device_updates):
                keys.append((tier, UpdatePlace.DEVICE, deferred))
        return keys

    @property
    def _drives(self) -> bool:
        return bool(self.hardware.drives)

    def _staging(self, found: dict[UpdateKey, int], state: float) -> None:
        pieces = max(map(buckets, self.workload.classes))
        each = self.workload.state_piece_bytes or state / pieces
        staged = [(x, self.knobs.buffers.state_slots * each) for key, x in found.items() if key[0] is Tier.NVME]
        self.rows.largest("host", "staging of state", staged)
        moved = [
            x for (tier, place, _), x in found.items()
            if place is UpdatePlace.DEVICE and tier is not Tier.DEVICE and not self.unified
        ]  # fmt: skip
        size, steps = 2 * state / pieces, self.workload.device_steps
        if steps is not None and moved:  # the slots are there, or they are not
            size, some = steps.num_slots * steps.slot_bytes, self.program.whole_number(1)
            self.program.at_most([*((x, 1.0) for x in moved), (some, -1.0)], 0.0)
            moved = [some]
        self.rows.largest("device", "state updated on the device", [(x, size) for x in moved])

    def _new_weights(
        self, entry: BlockClass, weights: tuple[int, int, int], found: dict[UpdateKey, int], new: float
    ) -> None:
        """What is updated on one side of the link and rests on the other; what goes back to the drive."""
        program, n, last = self.program, entry.count, self.rows.phases[-1]
        on_device = [(x, 1.0) for (_, place, _), x in found.items() if place is UpdatePlace.DEVICE]
        down, up = program.variable(1.0), program.variable(1.0)
        if self.workload.pinned:  # all of it is in DEVICE memory
            program.row([(down, 1.0), *on_device], 1.0, 2.0)
        else:
            program.row([(down, 1.0), (weights[0], -1.0), *on_device], 0.0, 2.0)
            program.row([(up, 1.0), (weights[0], 1.0), *((x, -1.0) for x, _ in on_device)], 0.0, 3.0)
        mode = self.knobs.update_mode
        either = {UpdateMode.DEFERRED: (BACKWARD, FORWARD)}.get(mode)
        if self.rows.memory_steps_after and mode is not UpdateMode.AFTER:
            either = (BACKWARD, UPDATE)
        if either is None:
            self.rows.work_once(last, "host_to_device", down, n * new)
            self.rows.work_once(last, "device_to_host", up, n * new)
            if self.workload.mutable:
                self.rows.work_once(last, "ssd_write", weights[2], n * float(entry.stored_bytes))
            return
        # Either phase, whichever is better: the simulator decides where it really falls.
        for whole, resource, size in (
            (down, "host_to_device", new), (up, "device_to_host", new), (weights[2], "ssd_write", entry.stored_bytes),
        ):  # fmt: skip
            if resource == "ssd_write" and not self.workload.mutable:
                continue
            early, late = program.variable(1.0), program.variable(1.0)
            program.row([(early, 1.0), (late, 1.0), (whole, -1.0)], 0.0, 2.0)
            self.rows.work_once(either[0], resource, early, n * float(size))
            self.rows.work_once(either[1], resource, late, n * float(size))
