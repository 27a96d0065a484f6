"""The public class: a model that trains in less memory than its weights and state take. Wiring only: what it wires is
made in `wiring.assembly`, and stands around the model by `attachments`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt.arguments import OptimizerSpec, Trained, WantedPlan
from offload_rt.attachments import Attachments
from offload_rt.checkpoint.original import Original
from offload_rt.checkpoint.pretrained import save_pretrained
from offload_rt.closing import all_close
from offload_rt.config import EngineConfig, parse_bytes, parse_nvme
from offload_rt.emulation import emulated_config, emulated_hardware
from offload_rt.errors import ConfigError, OffloadError, nearest
from offload_rt.guards.conversions import check_unmanaged
from offload_rt.guards.integrity import check_loss
from offload_rt.guards.quantized import check_not_quantized
from offload_rt.memory.heap import Base
from offload_rt.optimizer.interface import Training
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.report import report, summary
from offload_rt.running.changes import Changes
from offload_rt.running.micro_batches import MicroBatches
from offload_rt.running.peaks import RESUME, SAVE, Peaks
from offload_rt.running.tracked import Tracked
from offload_rt.transfers.device_cuda import find_device
from offload_rt.wiring.assembly import assemble
from offload_rt.wiring.runtime import Runtime
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.store_assembly import Progress
from planners.plans.plan import Plan

logger = logging.getLogger("offload_rt")


def engine(model: nn.Module, **arguments: Any) -> Engine:
    """Wraps `model` so that it trains with its weights, and the state of what trains, in HOST memory or on NVMe.

    model: nn.Module, materialised or on the meta device. A transformers or peft model works as it is, and so does any
        module whose layers sit in a ModuleList. What requires grad trains.
    checkpoint: safetensors file or folder in Hugging Face layout; streamed, never held whole. None takes the model's
        own values.
    bits: 4 stores the frozen weights of linears and experts as NF4 with double quantization; None keeps their dtype.
    adapters: for a model that has none yet: a peft configuration, or a folder that peft saved an adapter to. That
        adapter goes on training, with the configuration in its folder.
    device: "cuda", "cuda:N" or "cpu"; "auto" is the current GPU where there is one. The engine orders its copies with
        the stream that is current now; batches may come from the CPU.
    device_memory, host_memory: hard budgets, "22GiB" or bytes; None is what is free. On the CPU device,
        host_memory=None makes DEVICE and HOST one tier.
    nvme: a folder, "folder:500GiB", or a list with one per drive; None keeps everything in memory.
    batch_size, seq_len: rows and tokens of the largest batch that will come; larger ones are refused.
    accumulation_steps: backward passes per step, as the loop will make them.
    max_grad_norm: the global norm that `step` clips to; None does not clip.
    optimizer: None is AdamW; a torch.optim class, or a function of the list of parameters that returns an optimizer.
    lr: learning rate, unless `optimizer` is a function; None is the optimizer's own default.
    commit_every: steps between commits, which are written beside the store. A step's commit is made when the next
        forward begins, so that schedulers stepped after `step` are part of it. None commits every step where state
        rests on NVMe, and otherwise leaves saving to the caller.
    plan: "auto" takes the fixed rule's plan; on a machine that `offload-rt calibrate` has measured, the faster of that
        and the optimiser's, for which it times one layer (some seconds). "optimise" takes the optimiser's, by this
        machine's calibrated rates. Or a Plan, or the path of one.
    emulate: on the CPU device: the name or the file of a hardware profile, whose tier sizes are budgets, and whose
        links and drives say how long transfers take.
    progress: called with (phase, bytes done, bytes in all) while the store is built.

    Outputs of a call with labels have no `logits`: the loss is taken in tiles of tokens. Call without labels for them.

    Blocks until the store is built, or found. A call that fails leaves the model as it was. Raises ConfigError for a
    wrong argument, PlanInfeasible where no plan fits the budgets, UnsupportedModule for a model that cannot be
    streamed, QuantCoverageError where `bits=4` would quantize too little of it, CheckpointError for files that are bad
    or do not fit the model, StoreInUse, StoreCorrupt, StorageError (StorageFull where there is no room).
    """
    allowed = set(inspect.signature(Engine.__init__).parameters) - {"self", "model", "options"}
    for name in arguments:
        if name not in allowed:
            raise ConfigError(f"engine: unknown argument {name!r}; {nearest(name, allowed)}")
    return Engine(model, **arguments)


class Engine:
    """See `engine`. A context manager; `close` gives memory, files and hooks back."""

    def __init__(
        self,
        model: nn.Module,
        *,
        checkpoint: str | Path | None = None,
        bits: int | None = None,
        adapters: Any = None,
        device: str = "auto",
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        nvme: str | Path | Sequence[str | Path] | None = None,
        batch_size: int = 1,
        seq_len: int = 4096,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        optimizer: OptimizerSpec | None = None,
        lr: float | None = None,
        commit_every: int | None = None,
        plan: Plan | str | Path = "auto",
        emulate: Any = None,
        progress: Progress | None = None,
        options: RuntimeOptions | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: expected an nn.Module, got {type(model).__name__}")
        check_unmanaged(model)
        check_not_quantized(model)
        self.config = EngineConfig(
            bits=bits,
            device=find_device(device),
            device_memory_bytes=None if device_memory is None else parse_bytes(device_memory, field="device_memory"),
            host_memory_bytes=None if host_memory is None else parse_bytes(host_memory, field="host_memory"),
            nvme=parse_nvme(nvme),
            batch_size=batch_size,
            seq_len=seq_len,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            commit_every=commit_every,
        )
        emulated = None if emulate is None else emulated_hardware(emulate)
        if emulated is not None:
            self.config = emulated_config(self.config, emulated)
        wanted = WantedPlan.read(plan, self.config, emulated)
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._peaks = Peaks()
        original = Original(model)
        runtime: Runtime | None = None
        attached: Attachments | None = None
        try:
            trained = Trained.of(model, self._checkpoint, adapters=adapters, optimizer=optimizer, lr=lr)
            self.model = trained.model
            self.trainable = trained.parameters
            """What trains, by name. Parameters keep their identity when those on meta become real."""
            # What a first optimizer makes torch import is the base's, as peft is; what the model holds is the plan's.
            self._base = Base.now(besides_bytes=trained.held_bytes)
            runtime = assemble(
                trained, self._checkpoint, self.config, wanted, options or RuntimeOptions(), progress, base=self._base
            )
            self._closed = False
            self._tracked = Tracked()
            runtime.training.carry(lambda: self._tracked.values(self._runtime.cuts), self._tracked.with_schedulers)
            self._changes = Changes(
                runtime,
                self.config,
                self.model,
                base_bytes=self._base.resident_bytes,
                followed_by=self._look_after,
                give_up=self.close,
            )
            self.step_meter = self._changes.meter
            self._wear_from = (0, runtime.links.counters.bytes_written)
            """The step and the bytes written when steps of this process began."""
            self._attached = attached = Attachments(self.model, model, self.trainable, self.config, self._changes)
            attached.attach()
            self._micro_batches = MicroBatches(
                self, self._changes, attached.steps, accumulation_steps=accumulation_steps
            )
            original.let_go()
            runtime.heap.trim()  # of what the weights and their encoding have left
            self._look_after(runtime)
            logger.info("%s", self.summary())
        except BaseException:  # the same call with other arguments works
            made = () if runtime is None else (runtime.close, partial(runtime.give_back, resident=True))
            put_in = () if attached is None else (attached.remove,)
            all_close(*made, *put_in, original.restore, self._peaks.close)
            raise

    def _look_after(self, runtime: Runtime) -> None:
        """What the engine sees of the runtime in effect."""
        runtime.training.check_by(self._attached.reached)
        self._peaks.follow(runtime, self._base.resident_bytes)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What schedulers work on; None where nothing trains. A loop's own, once that has stepped in its place."""
        return self._training.optimizer

    @property
    def _runtime(self) -> Runtime:
        return self._changes.runtime

    @property
    def _training(self) -> Training:
        return self._runtime.training

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError("copy: an engine has files and threads; it cannot be copied or pickled")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        if self._closed:
            raise OffloadError("the engine is closed: the model's frozen weights are not in memory any more")
        args, kwargs = self._runtime.on_device(args, kwargs)
        return self.model(*args, **kwargs)  # a hook does the rest, as for a loop that calls the model itself

    def backward(self, loss: torch.Tensor) -> None:
        """As `loss.backward()`, after checking that the loss is finite, for which it waits for the device.

        Raises `NonFiniteLoss`, and `ConfigError` for what is no tensor.
        """
        if not isinstance(loss, torch.Tensor):
            raise ConfigError(f"backward: expected the loss as a tensor, got {type(loss).__name__}")
        check_loss(loss, self.step_number + 1)
        self._attached.steps.backward(loss)

    @property
    def step_number(self) -> int:
        """Steps since the run began, including those of the run that it was resumed from."""
        return self._training.step_number

    def step(self) -> None:
        """Clips if `max_grad_norm` was declared, updates, zeroes gradients. The next forward commits what is due.

        Blocks. Raises `IntegrityError` where no gradient has arrived or nothing would train; of adapters, in the first
        steps only. Gradients that are not finite: a step of layers that train is left out, with a warning, and five in
        a row raise; of adapters they raise in the first steps, and whenever they are clipped.
        """
        self._check_open("step")
        self._attached.steps.take()

    def _check_open(self, asked: str) -> None:
        if self._closed:
            raise OffloadError(f"{asked}: the engine is closed; nothing was done")

    def train_batch(self, batches: Sequence[dict[str, Any]]) -> float:
        """One step of several micro-batches: gradients of the mean of their losses. Returns that mean. Blocks.

        A batch is the model's arguments by name. As many as `accumulation_steps` or fewer may be taken through the
        layers together, where the plan says so. Raises as `backward` and `step` do, and `ConfigError` for an empty
        list; then there are no gradients.
        """
        self._check_open("train_batch")
        return self._micro_batches.step(batches)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clips the gradients of the coming step to a global norm of `max_norm`; returns the norm before. Exact.

        For layers that train, once a step: they are scaled as they are stepped. `max_grad_norm=` does it in `step`.
        """
        self._check_open("clip_grad_norm_")
        return self._training.clip_grad_norm_(max_norm)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and gradient of every parameter that has one, one after the other. Of layers that train they are copies,
        in float32 where micro-batches are summed; of adapters the tensors themselves.
        """
        self._check_open("gradients")
        return self._training.gradient_items()

    def track(self, name: str, tracked: Any) -> None:
        """Makes anything with `state_dict` and `load_state_dict` a part of every commit and checkpoint.

        Raises `ConfigError` for what has neither.
        """
        self._tracked.add(name, tracked)

    @property
    def commit_folder(self) -> Path:
        """Where commits are written. Raises `ConfigError` without `nvme=`."""
        return self._training.commit_folder

    @property
    def committed(self) -> Mapping[str, Any] | None:
        """The newest commit in the log, where state rests on NVMe: its `step`, what was `tracked`, and more. None
        without a log.

        What is tracked is in it as it was when `step` returned, schedulers as the next forward found them. Step 0 is a
        state that was just made.
        """
        return self._training.committed

    def save_checkpoint(self, folder: str | Path) -> None:
        """Writes parameters that train, the optimizer's state, random numbers and everything tracked. Atomic, durable.

        Blocks. Where state rests in tiers, `commit_folder` as the folder makes a commit and copies nothing. Raises
        `StorageError`, `StorageFull` where there is no room, and `ConfigError` where nothing trains, or where the
        updates of gradients that have arrived cannot be taken back.
        """
        if isinstance(self._training, TieredTraining):
            self._check_open("save_checkpoint")
        with self._peaks.phase(SAVE, Path(folder)):
            self._training.save(Path(folder))

    def load_checkpoint(self, folder: str | Path) -> None:
        """Continues from a checkpoint: the next step is bit-equal to that of the run that wrote it. Blocks.

        `folder` may also be where commits are: this run's, which copies nothing, or those of another run, which must
        have ended. Raises `CheckpointError` where what is saved does not fit, and `ConfigError` where other things
        were tracked; the engine is unchanged then. Warns where the plan takes sums in another order than that run's:
        the bits differ then, by what such an order changes.
        Gradients of a step that is under way are dropped.
        """
        self._check_open("load_checkpoint")

        def check(values: Mapping[str, Any]) -> None:
            self._tracked.check(folder, values, self._runtime.cuts)

        with self._peaks.phase(RESUME):
            values = self._training.load(Path(folder), check)
        self._attached.drop_step()  # what was loaded has begun none
        self._tracked.load(values)
        self._wear_from = (self.step_number, self._runtime.links.counters.bytes_written)

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int | str | None = None) -> None:
        """Writes the adapter as peft does, or the whole model as transformers does; reads it back and compares. Blocks.

        A whole model is streamed block by block into shards of at most `max_shard_bytes` ("5GB" unless given); a model
        that `folder` held stays whole until the new one replaces it. Raises `StorageFull` before the first byte,
        `CheckpointVerifyError`, `UnsupportedModule` for a whole model with weights in 4 bits, and `ConfigError` where
        `folder` is the checkpoint that the run began from.
        """
        with self._peaks.phase(SAVE, Path(folder)):
            save_pretrained(
                self.model,
                None if self._closed else [(b, self._runtime.accesses[b.name]) for b in self._runtime.blocks],
                Path(folder),
                max_shard_bytes=max_shard_bytes,
                began_from=self._checkpoint,
                before_weights_are_read=self._changes.before_weights_are_read,
            )

    def report(self) -> dict[str, Any]:
        """What has moved since the start, what it took, and who holds memory. Bytes, seconds; see `report.report`."""
        return report(
            self._runtime,
            self.config,
            step=self.step_number,
            wear_from=self._wear_from,
            base_bytes=self._base.resident_bytes,
            step_meter=self.step_meter,
            rehearsal=self._changes.rehearsal,
            replanning=self._changes.replanner.report(),
            peaks=self._peaks.report(),
        )

    def trace(
        self, path: str | Path, *, steps: int = 1, wait: int = 2, on_ready: Callable[[str], object] | None = None
    ) -> None:
        """Records the timeline of `steps` steps, after `wait` others, and writes it to `path`, for Perfetto.

        Call it between two steps, and go on stepping. The file has Chrome's trace format, compressed where its name
        ends in .gz: see `running.tracing`. After the last of these steps `on_ready` is called with some lines about
        them; None logs the lines. Does not block; but a GPU is waited for before the first of these steps and after
        the last one. Bits stay the same. Raises `ConfigError` where `path` cannot be written, or a trace is under way.
        """
        self._changes.tracing.ask(Path(path), steps=steps, wait=wait, on_ready=on_ready)

    def summary(self) -> str:
        """What is in effect, in a few lines."""
        return summary(self._runtime, self.config, self.step_meter, self._peaks.report())

    @property
    def plan(self) -> Plan:
        """The plan in effect."""
        return self._runtime.plan

    def close(self) -> None:
        """Waits for what is under way; gives memory, files and hooks back. May be called twice.

        Weights that never leave DEVICE, and are not in 4 bits, stay in the model; others are not in memory. Adapters
        can be saved as ever; masters and moments are where they were committed, or saved, last.

        Makes the commit that is due, unless the loop has failed (it is called while an exception is handled) before
        the next forward began: then the last step stays uncommitted, and a run that is resumed takes it again.
        """
        self._closed = True
        self._training.abandon()
        all_close(
            self._changes.close, self._runtime.close, self._runtime.give_back, self._attached.remove, self._peaks.close
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
