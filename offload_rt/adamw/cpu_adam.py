"""AdamW where the state lies: one pass over gradient, master and moments, by the native core or by its torch twin.

The arithmetic is written in `cpu_adam_torch`; both paths give the same bits, so the choice between them is never
visible in a result. Memory is the caller's; nothing is kept between calls. Nothing here knows modules, param groups of
a whole optimizer, blocks or tiers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from offload_rt.adamw import blockwise, cpu_adam_torch
from offload_rt.adamw.blockwise import QUANT_BLOCK_SIZE, Quantized
from offload_rt.adamw.cpu_adam_torch import Scalars
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.native import native_core, why_not
from offload_rt.native_call import buffer_of, thread_count

Backend = Literal["auto", "native", "torch"]
_CAST_ELEMENTS = 1 << 22
"""A gradient of at most so many is cast before its norm is taken: the same bits, in a third of the time."""
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The numbers of torch.optim.AdamW, checked."""

    lr: float = 1e-3
    """Learning rate, 0 or more."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator, 0 or more."""
    weight_decay: float = 1e-2
    """Decoupled: the master is multiplied by 1 - lr * weight_decay."""

    def __post_init__(self) -> None:
        for name, value, holds in (
            ("lr", self.lr, self.lr >= 0),
            ("betas[0]", self.betas[0], 0 <= self.betas[0] < 1),
            ("betas[1]", self.betas[1], 0 <= self.betas[1] < 1),
            ("eps", self.eps, self.eps >= 0),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0),
        ):
            if not (holds and math.isfinite(value)):
                allowed = "0 <= beta < 1" if name.startswith("betas") else "0 or more, finite"
                raise ConfigError(f"{name} is {value}, allowed: {allowed}")

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> AdamW:
        """The numbers in a param group of torch.optim.AdamW; ConfigError for an option that has no twin here."""
        for name in ("amsgrad", "maximize", "differentiable", "capturable", "fused"):
            if group.get(name):
                raise ConfigError(f"{name} is {group[name]!r}: the streamed AdamW does without it, allowed: False")
        if not group.get("decoupled_weight_decay", True):
            raise ConfigError("decoupled_weight_decay is False: the streamed AdamW decouples it, as torch's AdamW does")
        beta1, beta2 = group["betas"]
        return cls(
            lr=float(group["lr"]),
            betas=(float(beta1), float(beta2)),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
        )

    def scalars(self, step: int, grad_scale: float = 1.0) -> Scalars:
        """What step number `step` (the first is 1) multiplies and adds, computed in float64 as torch does it."""
        if step < 1:
            raise ConfigError(f"step is {step}, allowed: 1 or more")
        beta1, beta2 = self.betas
        exact = Scalars(
            grad_scale=grad_scale,
            decay=1 - self.lr * self.weight_decay,
            exp_avg_weight=1 - beta1,
            exp_avg_sq_decay=beta2,
            exp_avg_sq_weight=1 - beta2,
            bias_correction2_sqrt=(1 - beta2 ** float(step)) ** 0.5,
            eps=self.eps,
            step_size=-(self.lr / (1 - beta1 ** float(step))),
        )
        return Scalars(*(ctypes.c_float(value).value for value in exact))


def backend(requested: Backend = "auto") -> str:
    """What serves: `"native avx512"`, `"native avx2"`, `"native plain"` or `"torch"`.

    `OFFLOAD_RT_NATIVE=0` in the environment turns the native core off. Asking for `"native"` where it cannot be had
    raises `OffloadError` with the reason.
    """
    native = _native(requested)
    return "torch" if native is None else f"native {native.kernel_isas()[-1]}"


def update(
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor | Quantized,
    exp_avg_sq: Tensor | Quantized,
    weight: Tensor | None = None,
    *,
    step: int,
    numbers: AdamW,
    grad_scale: float = 1.0,
    backend: Backend = "auto",
    num_threads: int | None = None,
    streaming_stores: bool = True,
) -> None:
    """One AdamW step in place. Blocks until done; allocates nothing on the native path.

    All tensors are contiguous, on the CPU, of one size, and share no memory. `grad` is bfloat16 or float32 and is only
    read; `master` is float32; `weight`, bfloat16 or float32, receives the new master rounded to it. The moments are
    both float32; or, as declared variants with other results, both bfloat16, or both `Quantized` to 8 bits: then the
    master is updated with the float32 moments, and these are rounded behind it.

    `step` counts from 1. `grad_scale` multiplies the gradient in float32, see `clip_scale`. `num_threads` bounds the
    threads, None for torch's number. With `streaming_stores` the weight is written around the caches, which suits a
    weight that is not the next thing to be read; the bits are the same. Raises `ValueError` for wrong dtypes, sizes or
    strides before anything is written.
    """
    size, num_blocks = master.numel(), -(-master.numel() // QUANT_BLOCK_SIZE)
    checked = [("master", master, size, (torch.float32,)), ("grad", grad, size, _FLOATS)]
    if isinstance(exp_avg, Quantized) and isinstance(exp_avg_sq, Quantized):
        for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            checked.append((f"{name}.codes", moment.codes, size, (torch.uint8,)))
            checked.append((f"{name}.absmax", moment.absmax, num_blocks, (torch.float32,)))
    elif isinstance(exp_avg, Quantized) or isinstance(exp_avg_sq, Quantized):
        raise ValueError("exp_avg and exp_avg_sq must both be Quantized, or neither")
    else:
        checked += [("exp_avg", exp_avg, size, _FLOATS), ("exp_avg_sq", exp_avg_sq, size, (exp_avg.dtype,))]
    if weight is not None:
        checked.append(("weight", weight, size, _FLOATS))
    for each in checked:
        _check(*each)
    _check_disjoint({name: tensor for name, tensor, _, _ in checked})
    scalars, native, num_threads = numbers.scalars(step, grad_scale), _native(backend), thread_count(num_threads)
    grad, master, weight = _flat(grad), _flat(master), None if weight is None else _flat(weight)
    if native is None:
        cpu_adam_torch.step(scalars, grad, master, _flat_moment(exp_avg), _flat_moment(exp_avg_sq), weight)
        return
    native.adamw_step(
        buffer_of(grad),
        buffer_of(master),
        _native_moment(native, exp_avg, signed=True),
        _native_moment(native, exp_avg_sq, signed=False),
        None if weight is None else buffer_of(weight),
        scalars,
        num_threads=num_threads,
        streaming_stores=streaming_stores,
    )


def gradient_norm(grad: Tensor) -> Tensor:
    """The 2-norm of one whole parameter's gradient in float32, in the order of torch's sum: a float32 scalar tensor."""
    grad = grad.detach()
    if grad.numel() <= _CAST_ELEMENTS:
        grad = grad.float()
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float32)
    return norm


def clip_scale(norms: Iterable[Tensor], max_norm: float) -> tuple[float, float]:
    """The norm of all gradients, and the `grad_scale` that clips them to `max_norm`, as `clip_grad_norm_` computes it.

    `norms` are `gradient_norm` of each parameter, in the order of the parameters.
    """
    norms = list(norms)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
    return total.item(), torch.clamp(max_norm / (total + 1e-6), max=1.0).item()


def _check(name: str, tensor: Tensor, size: int, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}.dtype is {tensor.dtype}, allowed: {', '.join(map(str, dtypes))}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, it must be on the CPU")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    if tensor.numel() != size:
        raise ValueError(f"{name} has {tensor.numel()} elements, {size} are needed")


def _check_disjoint(tensors: Mapping[str, Tensor]) -> None:
    """What shares memory would be read after it was written."""
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name) for name, tensor in tensors.items())
    for (_, end, name), (begin, _, next_name) in pairwise(ranges):
        if begin < end:
            raise ValueError(f"{name} and {next_name} share memory")


def _native(requested: Backend) -> ModuleType | None:
    """The native core, or None where the twin serves."""
    if requested not in ("auto", "native", "torch"):
        raise ValueError(f"backend is {requested!r}, allowed: 'auto', 'native', 'torch'")
    core = native_core()
    if requested == "native" and core is None:
        raise OffloadError(f"the native AdamW was asked for, but it cannot serve: {why_not()}")
    return None if requested == "torch" else core


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _flat_moment(moment: Tensor | Quantized) -> Tensor | Quantized:
    return Quantized(*map(_flat, moment)) if isinstance(moment, Quantized) else _flat(moment)


def _native_moment(native: ModuleType, moment: Tensor | Quantized, *, signed: bool) -> object:
    if not isinstance(moment, Quantized):
        return buffer_of(_flat(moment))
    codes, absmax = map(_flat, moment)
    return codes.numpy(), absmax.numpy(), _native_map(native, signed=signed)


@cache
def _native_map(native: ModuleType, *, signed: bool) -> object:
    return native.DynamicMap(blockwise.map_of(signed=signed).numpy())
