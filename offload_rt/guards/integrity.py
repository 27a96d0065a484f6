"""Cheap checks of the first steps against the bug of this field: training that is silently wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.errors import IntegrityError, NonFiniteLoss

logger = logging.getLogger("offload_rt")

CHECKED_STEPS = 2


class Reached:
    """Which of the tensors that train a forward pass with gradients has come to, since `forget`; and whether the loss
    that came back from there was flat.

    A batch without images leaves a vision tower out, a token its expert: no gradient is right there. An adapter belongs
    to the layer that it stands on: of one that is switched off, a gradient is missing, but not of one that peft leaves
    out by chance (`module_dropout`). Where all rewards of a batch are the same, its loss depends on no output:
    gradients of zero are right there.
    """

    def __init__(
        self, model: nn.Module, trainable: Mapping[str, nn.Parameter], layers: Iterable[nn.Module] = ()
    ) -> None:
        """Puts hooks into `model`, until `remove`. `layers` of it run without a graph when they are called for one, and
        with one in backward.
        """
        self._names = {id(parameter): name for name, parameter in trainable.items()}
        self._users: dict[str, set[nn.Module]] = {name: set() for name in trainable}
        self._left_out_by_chance: set[str] = set()
        self._find(model, model, is_adapter=False, by_chance=False)
        self._called: set[nn.Module] = set()
        self._inside: set[nn.Module] = set()
        """Layers that are being called, for a graph."""
        self._slopes: list[torch.Tensor] = []
        """Of each of the model's outputs that a loss came back to: whether that depends on it."""
        self._handles: list[RemovableHandle] = [model.register_forward_hook(partial(_note_slopes, self._slopes))]
        for layer in layers:
            self._handles.append(layer.register_forward_pre_hook(self._layer_begins))
            self._handles.append(layer.register_forward_hook(self._layer_is_over, always_call=True))
        for user in set().union(*self._users.values()):
            self._handles.append(user.register_forward_pre_hook(self._is_called))

    def __contains__(self, name: object) -> bool:
        users = self._users.get(str(name), set())
        if name in self._left_out_by_chance:
            return False
        return not self._handles or not users or not self._called.isdisjoint(users)

    @property
    def is_flat(self) -> bool:
        """Whether a loss has come back to the model's outputs and depends on none of them. Waits for the device."""
        return bool(self._slopes) and not any(bool(slope) for slope in self._slopes)

    def forget(self) -> None:
        """The next forward passes are another step's."""
        self._called.clear()
        self._slopes.clear()

    def remove(self) -> None:
        """From here on everything counts as reached. May be called twice."""
        while self._handles:
            self._handles.pop().remove()

    def _find(self, module: nn.Module, user: nn.Module, *, is_adapter: bool, by_chance: bool) -> None:
        """`user` is what is called where `module` is used, if that is none that is called itself."""
        if not is_adapter and type(module).forward is not nn.Module.forward:
            user = module
        is_adapter = is_adapter or not {"base_layer", "original_module"}.isdisjoint(module._modules)  # peft's names
        chances = vars(module).get("module_dropout")  # peft's, by adapter
        by_chance = by_chance or (isinstance(chances, dict) and any(chances.values()))
        for parameter in module._parameters.values():
            if id(parameter) in self._names:
                self._users[self._names[id(parameter)]].add(user)
                if by_chance:
                    self._left_out_by_chance.add(self._names[id(parameter)])
        for inner in module.children():
            self._find(inner, user, is_adapter=is_adapter, by_chance=by_chance)

    def _layer_begins(self, layer: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            self._inside.add(layer)

    def _layer_is_over(self, layer: nn.Module, args: object, output: object) -> None:
        self._inside.discard(layer)

    def _is_called(self, module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled() or self._inside:
            self._called.add(module)


def _note_slopes(slopes: list[torch.Tensor], model: nn.Module, args: object, output: Any) -> None:
    """A hook of a model. It holds `slopes` alone: a loss that somebody keeps has it, and is to keep no engine."""
    if not torch.is_grad_enabled():
        return
    for tensor in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda gradient: slopes.append(gradient.any()))  # type: ignore[no-untyped-call]


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


def check_present(present: Collection[str], trainable: Collection[str], step: int, reached: Reached | None) -> None:
    """Raises `IntegrityError` where the gradient of a tensor that the forward came to is missing, or all are."""
    without = [name for name in trainable if name not in present]
    wrong = [name for name in without if reached is None or name in reached]
    if wrong or len(without) == len(trainable):
        raise IntegrityError(
            f"{len(wrong or without)} of {len(trainable)} trainable tensors received no gradient in step {step} "
            f"(first: {(wrong or without)[0]}); nothing was updated. Usual causes: step() without backward(), an "
            f"adapter that is switched off, a part of the model whose result the loss does not use (freeze what does "
            f"not train, or leave it out of the adapters' targets, before engine(...)), or reentrant checkpointing "
            f"around the model (use_reentrant=False)"
        )
    if without:
        logger.warning(
            "step %d: the forward did not come to %d of %d trainable tensors (first: %s), which stay as they are, as "
            "where a batch has no images, or no token for an expert. Freeze what is never to train",
            step, len(without), len(trainable), without[0],
        )  # fmt: skip


def check_gradients(trainable: Mapping[str, torch.Tensor], step: int, reached: Reached | None = None) -> None:
    """Raises `IntegrityError` where a gradient is missing, see `check_present`, or one not finite, or all are zero,
    see `check_slope`.
    """
    check_present([name for name, p in trainable.items() if p.grad is not None], trainable, step, reached)
    gradients = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    norms = torch.stack([gradient.detach().float().norm() for gradient in gradients.values()])
    bad = [name for name, norm in zip(gradients, norms.tolist(), strict=True) if not math.isfinite(norm)]
    if bad:
        raise IntegrityError(f"step {step}: the gradient of {bad[0]} is not finite ({len(bad)} tensors)")
    if not norms.any():
        check_slope(len(trainable), step, reached)


def check_slope(num_gradients: int, step: int, reached: Reached | None) -> None:
    """For gradients that are all zero. Raises `IntegrityError` unless the loss came back to the model's outputs so."""
    if reached is None or not reached.is_flat:
        raise IntegrityError(f"step {step}: all {num_gradients} gradients are zero; the loss does not reach them")
    logger.warning(
        "step %d: all %d gradients are zero, as the loss depends on none of the model's outputs: nothing is learned of "
        "this batch. So it is where all rewards are the same, or a weight of the loss is zero",
        step, num_gradients,
    )  # fmt: skip


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
