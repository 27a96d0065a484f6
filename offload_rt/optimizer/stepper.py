"""Steps blocks one after the other: reads their state ahead, updates it, writes it back behind.

    drive in    [piece 1][piece 2][piece 3][piece 4] ...         into slots, as many as the plan gives
    CPU                   [step 1] [step 2] [step 3] ...         where the slot lies
    drive out                      [piece 1][piece 2] ...        from the same slot, which is free when it is written

With `threaded`, updates run on a thread of their own while the caller computes the next block; without, inside
`submit`, which is the plain twin: the same operations in the same order, and the same bits. Pieces that a plan gives to
the device are stepped there meanwhile, see `on_device`. Reading, writing and their slots are `state_slots`.
"""

from __future__ import annotations

import queue
import threading
import traceback
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from offload_rt.memory.arena import Slot, SlotPool
from offload_rt.meter import CPU, UPDATES_WAIT, WAIT
from offload_rt.optimizer.arrivals import Arrival
from offload_rt.optimizer.job import GradientSource, Job
from offload_rt.optimizer.on_device import DeviceCounters, PiecesOnDevice
from offload_rt.optimizer.parted_weights import PartedRoom
from offload_rt.optimizer.pieces import MASTER, Masters, Piece, Segment, TrainedBlock, segment_shape
from offload_rt.optimizer.rules import Scalars, Update, UpdateRule
from offload_rt.optimizer.state import Part, StateHome, state_tensors, weights_from_masters
from offload_rt.optimizer.state_slots import StateSlots
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import HOST
from offload_rt.transfers.transfer import Transfer


@dataclass(kw_only=True)
class StepperCounters:
    """What the stepper did since the start."""

    num_pieces: int = 0
    """Updated where they lie or read, stepped and written."""
    num_elements: int = 0


@dataclass
class Progress:
    """How far each parameter is: what the rule needs besides tensors, by parameter name."""

    steps: dict[str, int] = field(default_factory=dict)
    scalars: dict[str, Scalars] = field(default_factory=dict)


class Stepper:
    """Used by one thread. `submit` order is the order of updates."""

    def __init__(
        self,
        rule: UpdateRule,
        home: StateHome,
        gradients: GradientSource,
        group_of: Callable[[str], Mapping[str, Any]],
        progress: Progress,
        links: Links,
        *,
        state_pool: SlotPool,
        weights_pool: SlotPool,
        threaded: bool,
        on_device: PiecesOnDevice | None = None,
    ) -> None:
        """`on_device` steps those pieces of `home` that are the device's, `rule` the others."""
        self.counters = StepperCounters()
        self._rule = rule
        self._home = home
        self._gradients = gradients
        self._group_of = group_of
        self._progress = progress
        self._links = links
        self.new_scalars: dict[str, Scalars] = {}
        """Of parameters stepped since `Progress` was last written; the owner takes them over with the step."""
        self._landing: deque[Transfer] = deque()
        """New weights on their way to DEVICE over an emulated link."""
        self._on_device = on_device
        self.device_counters = DeviceCounters() if on_device is None else on_device.counters
        self.slots = StateSlots(
            home, state_pool=state_pool, weights_pool=weights_pool, wait=self._wait,
            settle_one=self._settle_one_on_device,
        )  # fmt: skip
        self._jobs: queue.SimpleQueue[tuple[Stepper, Callable[[], None]] | None] = queue.SimpleQueue()
        self._num_open = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._waited: defaultdict[str, float] = defaultdict(float)
        """Seconds that the thread of its own has waited for transfers, by resource."""
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="offload_rt-updates", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None).atexit = False  # nobody may have closed it

    def expect(self, blocks: Sequence[TrainedBlock]) -> None:
        """Says in which order blocks will be submitted, and starts reading; see `StateSlots.expect`."""
        self.slots.expect(piece for block in blocks for piece in self._home.part(block, Part.ALL))

    def submit(self, block: TrainedBlock, part: Part = Part.ALL, *, grad_scale: float = 1.0) -> None:
        """Steps `part` of `block` with the gradients that it has now. Raises what an earlier block's update raised."""
        slot, arrivals = self._gradients.submitted(block)
        job = Job(
            block=block, pieces=self._home.part(block, part), gradients=slot, arrivals=arrivals,
            used=None if self._on_device is None else self._on_device.here(),
            present=frozenset(self._gradients.present(block)), grad_scale=grad_scale,
        )  # fmt: skip
        if self._thread is None:
            self._step_block(job)
            return
        with self._changed:
            self._raise_failure()
            self._num_open += 1
        self._jobs.put((self, partial(self._step_block, job)))

    def settle(self, arrival: Arrival) -> None:
        """Settles `arrival` behind what was submitted, where there is a thread; whoever wants it can do so before."""
        if self._thread is not None:
            with self._changed:
                self._num_open += 1
            self._jobs.put((self, partial(arrival.settle, self._wait)))

    def wait_for_one(self) -> bool:
        """Blocks until a block that was submitted is done; False where none is open."""
        with self._changed:
            self._raise_failure()
            before = self._num_open
            if not before:
                return False
            with self._computing_waits():
                self._changed.wait_for(lambda: self._num_open < before or self._failure is not None)
            self._raise_failure()
            return True

    def finish(self) -> None:
        """Blocks until every block that was submitted is stepped. Writes may be under way still: a commit waits.

        A device sees new weights in what it is given from now on.
        """
        with self._changed, self._computing_waits():
            self._changed.wait_for(lambda: not self._num_open)
            self._raise_failure()
        self._order_weights()

    def forget(self) -> None:
        """Drops what was read ahead, and the error of a block that failed. Blocks until nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open)
            self._failure = None
        self.slots.forget()

    def report(self) -> dict[str, int]:
        """What all counters of updates say."""
        return {**asdict(self.counters), **asdict(self.slots.counters), **asdict(self.device_counters)}

    def go_on_counting(self, before: Stepper) -> None:
        """Counts on where `before`, which is closed, has stopped."""
        self.counters, self.slots.counters = before.counters, before.slots.counters
        self.device_counters = before.device_counters
        if self._on_device is not None:
            self._on_device.counters = self.device_counters

    def close(self) -> None:
        """Ends the thread and waits for what is under way."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self.forget()

    def load_what_rests_in_memory(self, block: TrainedBlock) -> None:
        """Reads it from the log. Blocks."""
        for piece in block.pieces:
            resting = self._home.pieces.get(piece.name)
            if resting is not None:
                self._wait(self._home.fetch(piece, resting))

    def rebuild_weights(self, block: TrainedBlock) -> None:
        """Rounds the block's masters into its weights again. Blocks."""
        weights = self.slots.weights(block)
        for piece in block.pieces:
            slot = self._home.pieces.get(piece.name)
            if slot is None:
                slot = self.slots.read(piece)
            weights_from_masters(self._home, slot, piece, block, weights)
            del slot
        if weights is not None and self._home.collects_weights(block):
            self._wait(self._home.write_weights(block, weights))
        self._land(block, block.pieces)
        self._order_weights()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _step_block(self, job: Job) -> None:
        block = job.block
        pieces = [p for p in job.pieces if any(segment.parameter in job.present for segment in p.segments)]
        if not pieces:
            return
        for arrival in job.arrivals:
            arrival.settle(self._wait)
        weights = self.slots.weights(block)
        if weights is not None and self._home.collects_weights(block) and not job.changes_all_weights:
            self._wait(self._home.fetch_weights(block, weights))
        if self._links.recorder is not None:
            read = [] if job.gradients is None else [job.gradients.range]
            slot = weights.streamed if isinstance(weights, PartedRoom) else weights
            changed = [] if slot is None or slot.on_device else [slot.range]
            self._links.recorder.use(f"step {block.name}", reads=read, writes=changed, lane=HOST)
        device = self._on_device
        with nullcontext() if device is None else device.dropped_unless_done():
            for piece in pieces:
                if device is None or piece.name not in self._home.on_device:
                    self._step_piece(job, piece, weights)
                    continue
                self._settle_on_device(device.num_slots - 1)
                whole = None if isinstance(weights, PartedRoom) else weights  # plans give the device no others' pieces
                self.new_scalars |= device.start(
                    job, piece, self.slots.state(piece), whole, partial(self._update_of, job)
                )
            self._settle_on_device(0)
        if weights is not None and self._home.collects_weights(block):
            self.slots.write_weights(block, weights)
        self._land(block, pieces)

    def _land(self, block: TrainedBlock, pieces: Sequence[Piece]) -> None:
        """Lets the emulated link take time for the new weights of `pieces`, where they are used in DEVICE."""
        in_device = self._home.device_weights_bytes(block)
        if self._links.throttle is None or not in_device:
            return
        num_bytes = in_device * sum(map(_num_elements, pieces)) // sum(map(_num_elements, block.pieces))
        landing = self._links.pace(f"new weights of {block.name}", num_bytes, inward=True)
        if landing is not None:
            self._landing.append(landing)

    def _step_piece(self, job: Job, piece: Piece, weights: Slot | PartedRoom | None) -> None:
        slot = self.slots.state(piece)
        present = [segment for segment in piece.segments if segment.parameter in job.present]
        # Small parameters are stepped together, many to a piece; where new weights land, there is room for one.
        together = [present] if self._home.landing is None else [[segment] for segment in present]
        for segments in together:
            self._step_segments(job, segments, slot, weights)
        self._stepped(piece, slot)

    def _step_segments(
        self, job: Job, segments: Sequence[Segment], slot: Slot, weights: Slot | PartedRoom | None
    ) -> None:
        with ExitStack() as landing:
            updates = []
            for segment in segments:
                new = landing.enter_context(self._home.new_weights(job.block, segment, weights))
                gradient = self._gradients.of(job.block, job.gradients, segment.parameter, segment.begin, segment.end)
                updates.append(self._update_of(job, segment, state_tensors(slot, segment), gradient, new))
            meter = self._links.meter
            name = job.block.name
            with meter.inline(CPU, name) if self._thread is None else meter.busy(CPU, name):
                found = self._rule.update_all(updates)
            for segment, scalars in zip(segments, found, strict=True):
                self.new_scalars[job.block.parameters[segment.parameter].name] = scalars

    def _update_of(
        self, job: Job, segment: Segment, tensors: dict[str, Tensor], gradient: Tensor, new: Tensor
    ) -> Update:
        """The update of a segment with its state, its gradient, and where its new weights go, in whichever memory."""
        block = job.block
        name = block.parameters[segment.parameter].name
        shape = segment_shape(block, segment)
        held = tensors.pop(MASTER).view(shape) if segment.master is not None else None
        master, weight = new.view(shape), held
        if block.masters is Masters.FLOAT32 and held is not None:
            master, weight = held, new.view(shape)
        self.counters.num_elements += segment.end - segment.begin
        return Update(
            master=master, weight=weight, grad=gradient.view(shape), grad_scale=job.grad_scale, state=tensors,
            scalars=self._progress.scalars.get(name, {}), step=self._progress.steps.get(name, 0) + 1,
            group=self._group_of(name),
        )  # fmt: skip

    def _stepped(self, piece: Piece, slot: Slot) -> None:
        self.counters.num_pieces += 1
        self.slots.write_state(piece, slot)

    def _settle_on_device(self, num_left: int) -> None:
        """Blocks until the device is stepping `num_left` pieces at most."""
        while self._on_device is not None and self._on_device.num_under_way > num_left:
            self._stepped(*self._on_device.settle(self._wait))

    def _settle_one_on_device(self) -> bool:
        """As `StateSlots` asks for it."""
        if self._on_device is None or not self._on_device.num_under_way:
            return False
        self._settle_on_device(self._on_device.num_under_way - 1)
        return True

    def _wait(self, transfer: Transfer) -> None:
        """On a thread of its own a wait keeps nobody from computing, unless somebody waits for that thread."""
        if self._thread is None:
            self._links.wait(transfer)
            return
        meter = self._links.meter
        traced = meter.traced  # once: the thread that steps may begin or end it meanwhile
        begin = meter.clock()
        transfer.wait()
        end = meter.clock()
        for resource, seconds in transfer.stalls(begin, end):
            self._waited[resource] += seconds
        if traced is not None:
            traced.add(UPDATES_WAIT, transfer.moves, begin, end, of=transfer.waited_for(begin, end))

    @contextmanager
    def _computing_waits(self) -> Iterator[None]:
        """Computing waits inside for updates: for what these wait for meanwhile, and else for the processor."""
        meter = self._links.meter
        begin, before = meter.clock(), self._waited.copy()
        yield
        end = meter.clock()
        left = end - begin
        most, longest = 0.0, CPU
        for resource, seconds in self._waited.copy().items():  # its thread goes on
            seconds = min(left, seconds - before[resource])
            meter.stalled(resource, seconds)
            left -= seconds
            most, longest = max((most, longest), (seconds, resource))
        meter.stalled(CPU, left)
        if meter.traced is not None:
            meter.traced.add(WAIT, "updates", begin, end, of=CPU if left >= most else longest)

    def _order_weights(self) -> None:
        while self._landing:
            self._links.wait(self._landing.popleft())
        if self._home.landing is not None:
            self._home.landing.order()


def _work(jobs: queue.SimpleQueue[tuple[Stepper, Callable[[], None]] | None]) -> None:
    """What a stepper's thread does. It sees the stepper only while there is something to do."""
    while (given := jobs.get()) is not None:
        stepper, job = given
        del given
        try:
            with stepper._changed:
                skip = stepper._failure is not None  # what follows a failed block is not worth stepping
            if not skip:
                job()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            traceback.clear_frames(error.__traceback__)  # whoever keeps it must not keep slots with it
            with stepper._changed:
                stepper._failure = error
        finally:
            del job
            changed = stepper._changed
            with changed:
                stepper._num_open -= 1
                del stepper  # who is told may be the last to see it
                changed.notify_all()


def _num_elements(piece: Piece) -> int:
    return sum(segment.end - segment.begin for segment in piece.segments)
