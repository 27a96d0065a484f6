"""What is left of a tensor to compare another one with, without keeping it."""

from __future__ import annotations

import torch

from offload_rt.checksum import crc32c

Fingerprint = tuple[float, ...]


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Equal for tensors whose elements are equal to the bit, however they lie, and hardly for others. Waits for a
    device, where it is of sums.
    """
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cpu":
        return (float(crc32c(tensor.view(-1).view(torch.uint8).numpy().data)),)
    if not tensor.is_floating_point():
        return (float(tensor.sum()),)
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return float(tensor.sum(dtype=torch.float64)), float(norm)
