"""One AdamW step in plain torch: the definition, to the bit, of what every faster path must give.

It works on flat CPU tensors in chunks and is written to be read. It chooses nothing and checks no user's argument:
that is `cpu_adam`.

[Note: AdamW, operation by operation]
torch 2.13's single-tensor AdamW (`foreach=False, fused=False`) on a CPU with FMA, found by experiment with its AVX2
and AVX-512 kernels, whose vector and scalar loops agree. Python's scalars become float32 first (`Scalars`); each
line rounds once, to float32:

    grad       = float32(grad) * grad_scale
    exp_avg    = fma(w, grad - exp_avg, exp_avg)        w = 1 - beta1; from w = 0.5 on: fma(w - 1, grad - exp_avg, grad)
    exp_avg_sq = fma((1 - beta2) * grad, grad, exp_avg_sq * beta2)
    denom      = sqrt(exp_avg_sq) / sqrt(1 - beta2^t) + eps
    master     = master * (1 - lr * weight_decay) + (-lr / (1 - beta1^t) * exp_avg) / denom
    weight     = master, rounded to the weight's dtype

torch's own result depends on the machine in two places. Its square root is the math library's: exact to half a unit
in the last place under some instruction sets, a unit away for 0.7 % of all numbers under others (MKL, AVX-512). Here
it is IEEE 754's. And without FMA torch rounds twice where the two `fma` stand. So the moments are torch's to the bit
on every processor with AVX2; the master differs from torch's by at most 2^-21 of its change plus one rounding; with an
IEEE square root in torch they are equal as well. The tests hold all of this.

Where the result is a NaN, which NaN it is stays open.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from offload_rt.adamw import blockwise
from offload_rt.adamw.blockwise import Quantized

_CHUNK_ELEMENTS = 1 << 14
"""Keeps the float64 temporaries in the caches, which was worth a factor of two."""


class Scalars(NamedTuple):
    """What is the same for all elements: float32 values. The native step takes them in the same order."""

    grad_scale: float
    decay: float
    exp_avg_weight: float
    exp_avg_sq_decay: float
    exp_avg_sq_weight: float
    bias_correction2_sqrt: float
    eps: float
    step_size: float


def step(
    scalars: Scalars,
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor | Quantized,
    exp_avg_sq: Tensor | Quantized,
    weight: Tensor | None,
) -> None:
    """Updates flat `master` (float32) and both moments in place and fills `weight`."""
    if isinstance(exp_avg, Quantized) or isinstance(exp_avg_sq, Quantized):
        first = blockwise.decode(Quantized(*exp_avg), signed=True)
        second = blockwise.decode(Quantized(*exp_avg_sq), signed=False)
        step(scalars, grad, master, first, second, weight)
        blockwise.encode_into(first, Quantized(*exp_avg), signed=True)
        blockwise.encode_into(second, Quantized(*exp_avg_sq), signed=False)
        return
    for begin in range(0, master.numel(), _CHUNK_ELEMENTS):
        chunk = slice(begin, begin + _CHUNK_ELEMENTS)
        weight_chunk = None if weight is None else weight[chunk]
        _step_chunk(scalars, grad[chunk], master[chunk], exp_avg[chunk], exp_avg_sq[chunk], weight_chunk)


def _step_chunk(
    scalars: Scalars, grad: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None
) -> None:
    grad = grad.float() * scalars.grad_scale
    before, way = exp_avg.float(), grad - exp_avg.float()
    if scalars.exp_avg_weight < 0.5:
        new_exp_avg = multiply_add(way, scalars.exp_avg_weight, before)
    else:
        new_exp_avg = multiply_add(way, scalars.exp_avg_weight - 1, grad)
    new_exp_avg_sq = multiply_add(grad * scalars.exp_avg_sq_weight, grad, exp_avg_sq.float() * scalars.exp_avg_sq_decay)
    denom = square_root(new_exp_avg_sq) / scalars.bias_correction2_sqrt + scalars.eps
    change = new_exp_avg * scalars.step_size / denom
    master.mul_(scalars.decay).add_(change)
    exp_avg.copy_(new_exp_avg)
    exp_avg_sq.copy_(new_exp_avg_sq)
    if weight is not None:
        weight.copy_(master)


def square_root(values: Tensor) -> Tensor:
    """float32 square roots, correctly rounded: a float64 root is near enough to the true one, whatever computed it."""
    return values.double().sqrt().float()


def multiply_add(left: Tensor, right: Tensor | float, addend: Tensor) -> Tensor:
    """left * right + addend of float32 values, rounded once.

    In float64 the product is exact and the sum is not. Rounding that sum to float32 would round twice; so it is first
    rounded to odd (Boldo and Melquiond, 2008): where it is inexact, to the neighbour whose last bit is set.
    """
    product = left.double() * (right.double() if isinstance(right, Tensor) else right)
    total = product + addend.double()
    addend_part = total - product
    error = (product - (total - addend_part)) + (addend.double() - addend_part)  # Knuth's two-sum
    bits = total.view(torch.int64)
    is_rounded_to_even = (error != 0) & torch.isfinite(error) & (bits & 1 == 0)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(is_rounded_to_even, bits + towards_error, bits).view(torch.float64).float()
