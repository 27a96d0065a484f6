"""Makes the places where activations are: while a layer runs, and between its forward and its backward.

What a plan says of them is planned bytes where it has classes (`planning_tokens.sizes_of`); otherwise it is estimated
here from what one whole layer saves.
"""

from __future__ import annotations

from offload_rt.errors import ConfigError
from offload_rt.layers.discover import BlockDraft
from offload_rt.memory.heap import is_tight
from offload_rt.memory.transients import Transients
from offload_rt.plans.plan_options import chunk_tokens_of, policy_of
from offload_rt.plans.planning_tokens import sizes_of
from offload_rt.plans.workload_sizes import largest_saved_bytes, places_transients
from offload_rt.storage.scratch import Scratch
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.device_stash import DeviceStash
from offload_rt.tiering.paced_stash import PacedStash
from offload_rt.tiering.stash import GRANULE_BYTES, HostStash, NvmeStash, Stash
from offload_rt.tiering.tiers import Tiers
from offload_rt.tokenwise.tiles import Places
from offload_rt.transfers.device_streams import Device
from offload_rt.transfers.links import Links
from offload_rt.wiring.workload import Workload
from planners.plans.activations import Action, ActivationPolicy, Treatment
from planners.plans.plan import Plan, Tier
from planners.rule.attempts import STAGING_PIECE_BYTES
from planners.rule.filling import KEPT_TENSORS
from planners.rule.streaming_problem import INPUTS_OF_CHUNKS, StreamingProblem

ROOM_FOR_GAPS = 4
"""Such a part of the activations is added to their arena, for gaps between them and what an estimate lacks. It is taken
from what the plan lets the C library hold back for the same reasons. A layer of TinyLlama's shape at 2048 tokens took
335 MiB of 280 estimated."""

TIGHT_DIVISOR = 8
"""Of the least result that lies in their arena, where the C library maps large blocks ([Note: mapped blocks]): there an
arena spares a page fault each 4 KiB, not a few now and then. Of 24 layers at 4096 tokens, with results of 1 to 6 MiB, a
step took 6.1 to 7.0 seconds of processor time with it, 8.7 without."""


class ActivationsAssembly:
    """Of one runtime. `transients` and `places` are called once each."""

    def __init__(
        self,
        workload: Workload,
        problem: StreamingProblem,
        plan: Plan,
        tiers: Tiers,
        links: Links,
        device: Device | None,
    ) -> None:
        self.scratch: Scratch | None = None
        """Room on NVME, which whoever assembles closes."""
        self.slack_bytes = plan.allocator_slack_bytes
        """Freed memory that the C library may hold back, less what `transients` has taken."""
        self._workload = workload
        self._problem = problem
        self._plan = plan
        self._tiers = tiers
        self._links = links
        self._device = device
        self.wanted_slack_bytes = problem.slack_bytes(chunk_tokens_of(plan, workload))
        """What `slack_bytes` would be where a budget has room."""
        self._together = workload.config.accumulation_steps if plan.layer_major else 1
        self._sizes = sizes_of(plan, workload.config.batch_size)
        self._chunk_tokens = chunk_tokens_of(plan, workload)

    def transients(self) -> Transients:
        """Room for what a layer, or a tile of the loss, holds while it runs: in an arena, where that gains."""
        num_bytes = self._transient_bytes()
        least_bytes = self._workload.placed_bytes
        if is_tight(self.slack_bytes, self.wanted_slack_bytes):
            least_bytes //= TIGHT_DIVISOR
        if self._plan.activations or not places_transients(self._workload, num_bytes, least_bytes):
            self._tiers.account(Tier.DEVICE).reserve("activations", num_bytes)
            return Transients()
        gaps = min(num_bytes // ROOM_FOR_GAPS, self._plan.allocator_slack_bytes // 2)
        gaps -= gaps % IO_ALIGNMENT_BYTES
        self.slack_bytes -= gaps
        self.wanted_slack_bytes -= gaps
        return Transients(self._tiers.arena(Tier.DEVICE, "activations", num_bytes + gaps), least_bytes)

    def places(self) -> Places:
        """Where layer inputs and swapped activations wait; None keeps them where they are."""
        home = self._plan.layer_inputs
        if home is Tier.HOST and self._tiers.unified:
            home = Tier.DEVICE
        each = align_up(self._problem.layer_input_bytes, IO_ALIGNMENT_BYTES)
        sizes = [self._input_bytes(draft, each) for draft in self._workload.layers]
        together = self._together
        inputs = together * sum(sizes)
        swapped = {tier: together * self._share_bytes(Action.SWAP, tier) for tier in (Tier.HOST, Tier.NVME)}
        on_nvme = 2 * inputs * (home is Tier.NVME) + swapped[Tier.NVME]
        if on_nvme:
            if not self._workload.config.nvme:
                raise ConfigError("plan: layer inputs or activations wait on NVME, but nvme= gives no folder")
            self._tiers.account(Tier.NVME).reserve("layer inputs, activations", on_nvme)
            self.scratch = Scratch(self._workload.config.nvme[0].path, on_nvme, self._links)
        device = self._tiers.account(Tier.DEVICE)
        if kept := together * self._share_bytes(Action.KEEP):
            device.reserve("kept activations", kept)
        if home is Tier.DEVICE:
            device.reserve("layer inputs", inputs)
        elif in_use := self._input_in_use_bytes(each):
            device.reserve("layer input in use", in_use)
        by_chunks = bool(self._policies()) if self._sizes is None else self._chunk_tokens is not None
        on_their_way = self._problem.on_their_way_bytes(home, by_chunks=by_chunks)
        if on_their_way:
            device.reserve("layer inputs on their way", on_their_way)
        if together > 1:
            device.reserve("hidden states of other micro-batches", 2 * together * each)
            if workspaces := (together - 1) * self._problem.thread_bytes:
                device.reserve("workspaces of other micro-batches", align_up(workspaces, IO_ALIGNMENT_BYTES))
        largest_input = max(sizes, default=each) if self._sizes is None else each
        largest = self._largest_saved_bytes()
        window_bytes = self._window_bytes(swapped)
        device.reserve("swapped activations on their way", window_bytes)
        windows, what = self._windows(swapped, window_bytes), "swapped activations"
        return Places(
            layer_inputs=self._stash(home, "layer inputs", inputs, largest_input, on_their_way or largest_input),
            layer_inputs_tier=home,
            swapped={
                tier: stash
                for tier, size in swapped.items()
                if size and (stash := self._stash(tier, what, size, largest, windows[tier], by_plan=True)) is not None
            },
        )

    def _input_in_use_bytes(self, each: int) -> int:
        """Of layer inputs that wait elsewhere, in DEVICE memory: as planned, or one of `each`."""
        if self._sizes is None:
            return each
        return self._plan.peak_bytes.get(Tier.DEVICE.value, {}).get("layer input in use", 0)

    def _transient_bytes(self) -> int:
        if self._sizes is not None:
            return self._sizes.transient_bytes
        return self._problem.transient_bytes(self._plan.head_chunk_tokens, self._chunk_tokens)

    def _input_bytes(self, draft: BlockDraft, each: int) -> int:
        """What waits of a layer from its forward to its backward in any case: as planned, or an estimate.

        With its input, a layer in chunks keeps the attention's result, which may be wider, and a log-sum-exp.
        """
        policy = policy_of(self._plan, draft)
        cut = policy is not None and len(policy.spans(self._workload.config.seq_len)) > 1
        if self._sizes is None:
            return each * (1 if policy is None else INPUTS_OF_CHUNKS)
        planned = self._sizes.input_bytes.get(draft.name, each)
        return max(planned, each * INPUTS_OF_CHUNKS) if cut and planned <= each else planned

    def _stash(
        self, home: Tier, name: str, num_bytes: int, largest_bytes: int, window_bytes: int, *, by_plan: bool = False
    ) -> Stash | None:
        """As `_place`; behind the emulated link, if there is one. by_plan: as deep a way as the plan has room for."""
        planned = self._sizes if by_plan else None
        staging_bytes = 0 if planned is None else planned.staging_bytes
        stash = self._place(home, name, num_bytes, largest_bytes, window_bytes, staging_bytes)
        link = self._links.throttle.link if self._links.throttle is not None else None
        if stash is None or link is None:
            return stash
        return PacedStash(
            stash, link, self._links.meter, window_bytes=None if planned is None else planned.window_bytes
        )

    def _place(
        self, home: Tier, name: str, num_bytes: int, largest_bytes: int, window_bytes: int, staging_bytes: int
    ) -> Stash | None:
        """A place for `num_bytes` in tensors of at most `largest_bytes`; a device has at most a window on their way.

        On the way to a drive they pass `staging_bytes` of HOST; 0: as little as serves.
        """
        if home is Tier.DEVICE:
            return None
        if home is Tier.HOST:
            if self._device is None:
                return HostStash(
                    self._tiers.arena(Tier.HOST, name, num_bytes, granule_bytes=GRANULE_BYTES), self._links
                )
            arena = self._tiers.arena(Tier.HOST, name, num_bytes, granule_bytes=GRANULE_BYTES)
            return DeviceStash(arena, self._links, window_bytes=window_bytes)
        if self.scratch is None:
            raise ConfigError(f"plan: {name} wait on NVME, but nvme= gives no folder")
        if self._device is not None:
            passing_bytes = staging_bytes // 2 or window_bytes
            staging = self._tiers.arena(Tier.HOST, f"staging for {name}", 2 * (passing_bytes + largest_bytes))
            return DeviceStash(staging, self._links, window_bytes=window_bytes, scratch=self.scratch)
        piece_bytes = min(largest_bytes, STAGING_PIECE_BYTES)
        if staging_bytes:  # what goes in smaller pieces needs no more
            piece_bytes = min(piece_bytes, max(staging_bytes // 4, IO_ALIGNMENT_BYTES))
        staging = self._tiers.arena(Tier.HOST, f"staging for {name}", max(4 * piece_bytes, staging_bytes))
        return NvmeStash(self.scratch, staging, self._links, piece_bytes=piece_bytes, ahead_bytes=staging_bytes // 2)

    def _share_bytes(self, action: Action, tier: Tier | None = None) -> int:
        """What all layers save of a call that is treated so: as planned, or an estimate from what one layer saves."""
        if self._sizes is not None:
            return self._sizes.kept_bytes if tier is None else self._sizes.swapped_bytes.get(tier, 0)
        seq_len = self._workload.config.seq_len
        treatment = Treatment(action=action, tier=tier)
        shares = [(s.end - s.start, s.share(treatment)) for policy in self._policies() for s in policy.spans(seq_len)]
        tokens = sum(num_tokens * share for num_tokens, share in shares)
        rounded_up = sum(share > 0 for _, share in shares) * KEPT_TENSORS * IO_ALIGNMENT_BYTES
        return align_up(int(self._problem.activation_bytes * tokens / seq_len) + rounded_up, IO_ALIGNMENT_BYTES)

    def _window_bytes(self, swapped: dict[Tier, int]) -> int:
        """Room in DEVICE memory for what is swapped, on its way: as planned; without a plan, where copies need it."""
        if self._sizes is not None:
            return self._sizes.window_bytes
        return self._largest_swapped_bytes() if self._device is not None and any(swapped.values()) else 0

    def _windows(self, swapped: dict[Tier, int], window_bytes: int) -> dict[Tier, int]:
        """What each tier has of it: NVME its share, or half, as far as that passes the staging; HOST the rest."""
        of_nvme = window_bytes * swapped[Tier.NVME] // max(1, sum(swapped.values()))
        if self._sizes is not None and of_nvme:
            of_nvme = min(max(of_nvme, window_bytes // 2), self._sizes.staging_bytes // 2)
        return {Tier.NVME: of_nvme, Tier.HOST: window_bytes - of_nvme}

    def _policies(self) -> list[ActivationPolicy]:
        """Of the layers that have one."""
        return [policy for draft in self._workload.layers if (policy := policy_of(self._plan, draft)) is not None]

    def _largest_swapped_bytes(self) -> int:
        """An estimate of what a layer saves of its largest chunk that is swapped."""
        seq_len = self._workload.config.seq_len
        spans = [span for policy in self._policies() for span in policy.spans(seq_len)]
        swapped = [s for s in spans if any(one.action is Action.SWAP for one in s.treatments())]
        largest = max((span.end - span.start for span in swapped), default=0)
        return align_up(self._problem.activation_bytes * largest // seq_len, IO_ALIGNMENT_BYTES)

    def _largest_saved_bytes(self) -> int:
        """One tensor of one chunk at most: the widest a layer has, in fp32."""
        seq_len = self._workload.config.seq_len
        spans = [span.end - span.start for policy in self._policies() for span in policy.spans(seq_len)]
        return largest_saved_bytes(self._workload, max(spans, default=1))
