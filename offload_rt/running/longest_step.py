"""The longest step of a model, forward and backward, run once while its tensors are counted; no trace of it stays."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload_rt.checkpoint.values import restore_rng, rng_state
from offload_rt.config import EngineConfig
from offload_rt.memory.allocations import AllocationMeter, together
from offload_rt.optimizer.rehearsed import rehearsed, update_peak_bytes
from offload_rt.optimizer.tiered_training import TieredTraining
from offload_rt.optimizer.training import FullTraining
from offload_rt.running.representatives import Unlike, representatives, run_alone, whole_step
from offload_rt.wiring.runtime import Runtime
from offload_rt.wiring.runtime_options import MemoryMeter
from planners.plans.placement import UpdateMode

logger = logging.getLogger("offload_rt")


def longest(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], config: EngineConfig
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The call with its tensors, of [rows, tokens, ...], repeated to the largest batch; None where one has another
    shape. What has no dimension stays.
    """
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not tensors or tensors[0].ndim < 2:
        return None
    first = kwargs.get("input_ids")
    rows, tokens = (first if isinstance(first, torch.Tensor) else tensors[0]).shape[:2]
    if not rows or not tokens or any(tensor.shape[:2] != (rows, tokens) for tensor in tensors):
        return None

    def stretched(tensor: torch.Tensor) -> torch.Tensor:
        repeats = (-(-config.batch_size // rows), -(-config.seq_len // tokens), *[1] * (tensor.ndim - 2))
        return tensor.detach().repeat(repeats)[: config.batch_size, : config.seq_len].contiguous()

    longer = [stretched(leaf) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf for leaf in leaves]
    found_args, found_kwargs = pytree.tree_unflatten(longer, structure)
    return found_args, found_kwargs


def measure(
    runtime: Runtime, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int | None]:
    """The most that the call's forward and backward, and the update, have allocated at once, and how many layers were
    run for all of them, if not each was.
    """
    peak_bytes, num_layers = _peak_bytes(runtime, model, args, kwargs)
    training = runtime.training
    full = training if isinstance(training, FullTraining) else None
    if not isinstance(training, TieredTraining) or runtime.device is not None:  # HOST's, or slots' in an arena
        return peak_bytes, num_layers
    of_update = update_peak_bytes(training)
    behind_backward = full is not None and full.ahead.mode is not UpdateMode.AFTER
    return peak_bytes + of_update if behind_backward else max(peak_bytes, of_update), num_layers


def _peak_bytes(
    runtime: Runtime, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int | None]:
    """Of forward and backward, as `measure`."""
    if runtime.device is not None:
        meter = runtime.device.meter()
        _step(runtime, model, args, kwargs, meter)
        return meter.peak_bytes, None
    run_for = representatives(runtime.layers)
    if run_for is not None:
        counted = AllocationMeter()
        try:
            with run_alone(runtime.layers, run_for):
                _step(runtime, model, args, kwargs, counted)
            return together(whole_step(counted.stretches, run_for))[1], len(set(run_for))
        except Unlike as why:
            logger.info("every layer is rehearsed: %s", why)
    counted = AllocationMeter()
    _step(runtime, model, args, kwargs, counted)
    return counted.peak_bytes, None


def _step(
    runtime: Runtime, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], meter: MemoryMeter
) -> None:
    """Forward and backward, counted by `meter`. Gradients are dropped."""
    full = runtime.training if isinstance(runtime.training, FullTraining) else None
    with nullcontext() if full is None else rehearsed(full), meter:
        loss = _loss(model(*args, **kwargs))
        if full is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            wanted = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            del gradients
        del loss


def _loss(output: Any) -> torch.Tensor:
    """The model's own, or a sum of what it gives."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = pytree.tree_leaves(output)
    results = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return torch.stack([result.float().sum() for result in results]).sum()


@contextmanager
def unchanged(runtime: Runtime, model: nn.Module) -> Iterator[None]:
    """What a call of `model` changes inside, besides memory and time, is as before afterwards."""
    counters = [(entry, {f.name: getattr(entry, f.name) for f in fields(entry)}) for entry in runtime.counters()]
    num_passed_on = runtime.turns.num_passed_on
    with model_unchanged(model):
        try:
            yield
        finally:
            for executor in runtime.executors:
                executor.drain()
            for entry, values in counters:
                for name, value in values.items():
                    setattr(entry, name, value)
            runtime.turns.num_passed_on = num_passed_on


@contextmanager
def model_unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and plain attributes of its modules, whether they train among them, and all random numbers go on
    afterwards as if nothing had been called inside.
    """
    random = rng_state()
    modules = [(module, _plain_values(module), _buffer_values(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, plain, buffers in modules:
            for name, value in plain.items():
                if vars(module).get(name) != value:
                    setattr(module, name, value)
            for name, (buffer, before) in buffers.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        restore_rng(random)


def _plain_values(module: nn.Module) -> dict[str, Any]:
    """Attributes that a forward may change: counts, lengths seen, flags."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}


def _buffer_values(module: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None}
