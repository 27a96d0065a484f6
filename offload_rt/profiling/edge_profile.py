"""What is outside the layers takes on this machine: head and loss, a table that trains, torch's own AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from offload_rt.profiling.workbench import Workbench, or_the_cpu
from planners.problems.measured import MeasuredSeconds

HEAD_ROWS = 16384
"""Of the vocabulary, at most; the rest takes as long in proportion."""


def updates_per_second(parameters: Sequence[nn.Parameter], bench: Workbench | None = None) -> float:
    """Parameters that torch's AdamW steps in a second, in tensors of these shapes. Blocks.

    bench: the device that they are on, here and below; None is the CPU.
    """
    with or_the_cpu(bench) as place:
        stand_ins = [nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=place.device)) for p in parameters]
        for parameter in stand_ins:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(stand_ins)
        return sum(p.numel() for p in stand_ins) / place.median_seconds(optimizer.step)


def profile_head(
    *,
    hidden_size: int,
    vocabulary: int,
    num_tokens: int,
    tile_tokens: int,
    dtype: torch.dtype,
    trains: bool = False,
    bench: Workbench | None = None,
) -> MeasuredSeconds:
    """Times head and loss with their gradients, which tiles take in forward, for `num_tokens`, and beside it what of
    that a head by tiles of its rows does twice. Blocks.

    trains: the head's weights do, whose gradients are summed over tiles in float32.
    """
    rows, tile = min(vocabulary, HEAD_ROWS), min(num_tokens, tile_tokens)
    with or_the_cpu(bench) as place, torch.device(place.device):
        # Random, but nobody's: products of zeros take a GPU less power, which is what bounds its clock.
        numbers = torch.Generator(place.device).manual_seed(0)
        weight_VD = torch.randn(rows, hidden_size, dtype=dtype, generator=numbers).mul_(0.02).requires_grad_(trains)
        total_VD = torch.zeros(rows if trains else 0, hidden_size)
        hidden_ND = torch.randn(tile, hidden_size, dtype=dtype, generator=numbers).requires_grad_()
        labels_N = torch.zeros(tile, dtype=torch.long)

        def run() -> None:
            logits_NV = nn.functional.linear(hidden_ND, weight_VD).float()
            loss = nn.functional.cross_entropy(logits_NV, labels_N)
            _, *of_weights = torch.autograd.grad(loss, (hidden_ND, weight_VD) if trains else (hidden_ND,))
            for gradient_VD in of_weights:
                total_VD.add_(gradient_VD)

        @torch.no_grad()
        def product() -> None:
            nn.functional.linear(hidden_ND, weight_VD).float().logsumexp(-1)

        times = (vocabulary / rows) * (num_tokens / tile)
        return MeasuredSeconds(
            forward=place.median_seconds(run) * times, backward=0.0,
            product=0.0 if trains else place.median_seconds(product) * times,
        )  # fmt: skip


def profile_embedding(
    *, vocabulary: int, hidden_size: int, num_tokens: int, dtype: torch.dtype, bench: Workbench | None = None
) -> MeasuredSeconds:
    """Times the gradient of a table that `num_tokens` are looked up in. Blocks."""
    rows = min(vocabulary, HEAD_ROWS)
    with or_the_cpu(bench) as place, torch.device(place.device):
        weight_VD = torch.zeros(rows, hidden_size, dtype=dtype, requires_grad=True)
        ids_N = torch.arange(num_tokens) % rows
        found_ND = torch.zeros(num_tokens, hidden_size, dtype=dtype)

        def run() -> None:
            torch.autograd.grad(nn.functional.embedding(ids_N, weight_VD), weight_VD, found_ND)

        return MeasuredSeconds(forward=0.0, backward=place.median_seconds(run) * (vocabulary / rows))
