"""What is left of a tensor to compare another one with, without keeping it."""

from __future__ import annotations

import torch

from offload_rt.checksum import crc32c

Fingerprint = tuple[float, ...]


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Equal for tensors whose elements are equal to the bit, however they lie, and hardly for others. Waits for a
    device, where it is of sums.
    """
    tensor = tensor.detach().resolve_conj().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits: Fingerprint = ()
    if tensor.device.type == "cpu":
        bits = (float(crc32c(tensor.view(-1).view(torch.uint8).numpy().data)),)
    if not tensor.is_floating_point():
        return (*bits, float(tensor.sum()))
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return *bits, float(tensor.sum(dtype=torch.float64)), float(norm)


def are_near(tensor: torch.Tensor, print_of_other: Fingerprint) -> bool:
    """Whether sums differ by half of the digits at most, as where kernels without a graph add up in another order."""
    if not tensor.is_floating_point():
        return fingerprint(tensor) == print_of_other
    *_, total, norm = fingerprint(tensor)
    *_, other_total, other_norm = print_of_other
    far = max(abs(total - other_total), abs(norm - other_norm))
    return not far > norm * torch.finfo(tensor.dtype).eps ** 0.5
