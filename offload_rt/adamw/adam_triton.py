"""One AdamW step on the GPU: one Triton kernel, to the bit what `cpu_adam_torch` gives.

The operations and their order are written there, in [Note: AdamW, operation by operation]. Here every one of them is
named, because a compiler may choose otherwise: `tl.fma` where one rounding is meant, `tl.div_rn` and `tl.sqrt` for
IEEE 754's division and root, and `enable_fp_fusion=False` so that no other multiplication and addition become one. One
pass: 4 + 12 bytes read and 12 + 2 written for a weight (fp32 gradient, master and moments; bf16 weight).

Moments quantized to 8 bits are not stepped here. Triton is an optional dependency: this module is imported late.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_rt.adamw.cpu_adam_torch import Scalars

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass
class Counters:
    """Kernels launched since the start."""

    num_launches: int = 0
    stepped_elements: int = 0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the kernel is cut; the bits are the same for all. The default is a guess until a GPU has measured it."""

    elements: int = 1024
    """A program's; a power of two."""
    num_warps: int = 4


counters = Counters()
DEFAULT = Launch()


@triton.jit
def _step_kernel(
    grad,
    master,
    exp_avg,
    exp_avg_sq,
    weight,
    num_elements,
    grad_scale,
    decay,
    exp_avg_weight,
    exp_avg_sq_decay,
    exp_avg_sq_weight,
    bias_correction2_sqrt,
    eps,
    step_size,
    ELEMENTS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STARTS_FROM_GRAD: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * ELEMENTS
    element = tl.arange(0, ELEMENTS)
    is_there = element < num_elements - begin
    gradient = tl.load(grad + begin + element, mask=is_there, other=0.0).to(tl.float32) * grad_scale
    before = tl.load(exp_avg + begin + element, mask=is_there, other=0.0).to(tl.float32)
    squares = tl.load(exp_avg_sq + begin + element, mask=is_there, other=0.0).to(tl.float32)
    old = tl.load(master + begin + element, mask=is_there, other=0.0)

    way = gradient - before
    if STARTS_FROM_GRAD:
        first = tl.fma(way, tl.full(way.shape, exp_avg_weight - 1.0, tl.float32), gradient)
    else:
        first = tl.fma(way, tl.full(way.shape, exp_avg_weight, tl.float32), before)
    second = tl.fma(gradient * exp_avg_sq_weight, gradient, squares * exp_avg_sq_decay)
    root = tl.sqrt_rn(second)
    denom = tl.div_rn(root, tl.full(root.shape, bias_correction2_sqrt, tl.float32)) + eps
    new = old * decay + tl.div_rn(first * step_size, denom)

    tl.store(master + begin + element, new, mask=is_there)
    tl.store(exp_avg + begin + element, first.to(exp_avg.dtype.element_ty), mask=is_there)
    tl.store(exp_avg_sq + begin + element, second.to(exp_avg_sq.dtype.element_ty), mask=is_there)
    if HAS_WEIGHT:
        tl.store(weight + begin + element, new.to(weight.dtype.element_ty), mask=is_there)


def step(
    scalars: Scalars,
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    launch: Launch = DEFAULT,
) -> None:
    """As `cpu_adam_torch.step`, for tensors of one GPU: flat and contiguous, `master` float32, the others float32 or
    bfloat16. Asynchronous, on the current stream. Raises `ValueError` before anything is written.
    """
    num_elements = master.numel()
    tensors = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if weight is not None:
        tensors["weight"] = weight
    for name, tensor in tensors.items():
        allowed = (torch.float32,) if name == "master" else _FLOATS
        if tensor.dtype not in allowed:
            raise ValueError(f"{name}.dtype is {tensor.dtype}, allowed: {', '.join(map(str, allowed))}")
        if tensor.device != master.device or tensor.numel() != num_elements or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; needed: "
                f"{num_elements} contiguous elements on {master.device}"
            )
    counters.num_launches += num_elements > 0
    counters.stepped_elements += num_elements
    if not num_elements:
        return
    with torch.cuda.device_of(master):  # Triton launches on torch's current device
        _step_kernel[(triton.cdiv(num_elements, launch.elements),)](
            grad, master, exp_avg, exp_avg_sq, master if weight is None else weight, num_elements, *scalars,
            ELEMENTS=launch.elements, HAS_WEIGHT=weight is not None, STARTS_FROM_GRAD=scalars.exp_avg_weight >= 0.5,
            num_warps=launch.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
