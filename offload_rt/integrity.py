"""Cheap checks of the first steps against the bug of this field: training that is silently wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from offload_rt.errors import IntegrityError, NonFiniteLoss

CHECKED_STEPS = 2


def check_loss(loss: torch.Tensor, step: int) -> float:
    """The loss as a number, for which it waits for the device. Raises `NonFiniteLoss` before a backward pass could
    spread it.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"step {step}: the loss is {value}; no gradient was computed and nothing was updated. Usual causes: a "
            f"learning rate that is too high, a batch whose labels are all ignored, fp16 without scaling"
        )
    return value


def check_optimizer(optimizer: torch.optim.Optimizer, trainable: Mapping[str, torch.Tensor]) -> None:
    """Raises `IntegrityError` unless the optimizer updates the model's own parameters, all that train."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    strangers = len(held - set(names))
    if strangers:
        raise IntegrityError(
            f"the optimizer holds {strangers} tensors that are not trainable parameters of the model, which would "
            f"never change; build it over engine.model's parameters, or leave it to the engine"
        )
    missing = [name for key, name in names.items() if key not in held]
    if missing:
        raise IntegrityError(f"{len(missing)} trainable tensors are in no parameter group, first: {missing[0]}")


def check_gradients(trainable: Mapping[str, torch.Tensor], step: int) -> None:
    """Raises `IntegrityError` where a gradient is missing, or all are zero, or one is not finite.

    An expert that no token was sent to has none, rightly.
    """
    without = [name for name, p in trainable.items() if p.grad is None]
    unexplained = [name for name in without if ".experts." not in name]
    if unexplained or len(without) == len(trainable):
        raise IntegrityError(
            f"{len(without)} of {len(trainable)} trainable tensors received no gradient in step {step} (first: "
            f"{without[0]}). Usual causes: step() without backward(), a module that the forward skips (freeze what "
            f"does not train, or leave it out of the adapters' targets, before engine(...)), or reentrant "
            f"checkpointing around the model (use_reentrant=False)"
        )
    gradients = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    norms = torch.stack([gradient.detach().float().norm() for gradient in gradients.values()])
    bad = [name for name, norm in zip(gradients, norms.tolist(), strict=True) if not math.isfinite(norm)]
    if bad:
        raise IntegrityError(f"step {step}: the gradient of {bad[0]} is not finite ({len(bad)} tensors)")
    if not norms.any():
        raise IntegrityError(f"step {step}: all {len(trainable)} gradients are zero; the loss does not reach them")


def check_norm(norm: torch.Tensor, step: int) -> None:
    """Raises `IntegrityError` where the norm is not finite: clipping by it would make every parameter NaN."""
    if not bool(torch.isfinite(norm)):
        raise IntegrityError(
            f"step {step}: the gradients' norm is not finite ({float(norm)}); nothing was updated. Zero the gradients "
            f"to skip this batch"
        )


def check_moved(
    before: Mapping[str, torch.Tensor], trainable: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Raises `IntegrityError` where nothing differs from `before` after step 1, unless all learning rates are zero."""
    if not any(group.get("lr", 1) for group in optimizer.param_groups):
        return
    if all(torch.equal(before[name], p.detach()) for name, p in trainable.items()):
        raise IntegrityError("step 1 changed no parameter: the optimizer does not update this model's parameters")
