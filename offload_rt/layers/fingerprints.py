"""What is left of a tensor to compare another one with, without keeping it."""

from __future__ import annotations

import torch

from offload_rt.checksum import crc32c

Fingerprint = tuple[float, ...]

_PIECES, _LEAST = 64, 256
"""So many of a tensor are widened one after the other, of so many elements at least: a budget may have no room for all
of it in float64.
"""


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
    total = squares = torch.zeros((), dtype=torch.float64, device=tensor.device)
    pieces = tensor.view(-1).split(max(_LEAST, tensor.numel() // _PIECES))  # type: ignore[no-untyped-call]
    for piece in pieces:
        wide = piece.to(torch.float64)
        total, squares = total + wide.sum(), squares + torch.dot(wide, wide)
    return *bits, float(total), float(squares.sqrt())


def are_near(tensor: torch.Tensor, print_of_other: Fingerprint) -> bool:
    """Whether sums differ by half of the digits at most, as where kernels without a graph add up in another order."""
    if not tensor.is_floating_point():
        return fingerprint(tensor) == print_of_other
    *_, total, norm = fingerprint(tensor)
    *_, other_total, other_norm = print_of_other
    far = max(abs(total - other_total), abs(norm - other_norm))
    return not far > norm * torch.finfo(tensor.dtype).eps ** 0.5
