"""Whether a layer that runs again in backward gives what its forward gave: what is left of an output to compare with.

forward    output -> fingerprint, a few numbers       once a layer, until a recompute was compared
backward   output of the recompute -> fingerprint     the same, or warned of, or refused
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from offload_rt.checksum import crc32c
from offload_rt.errors import UnsupportedModule

logger = logging.getLogger("offload_rt")

MOST_FORWARDS = 16
"""Forwards of a layer that have fingerprints taken before a backward comes to any."""

_PIECES, _LEAST = 64, 256
"""So many of a tensor are widened one after the other, of so many elements at least: a budget may have no room for all
of it in float64.
"""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Agreement:
    """Of one layer: open until a recompute was compared with its forward, which happens once.

    At most `MOST_FORWARDS` forwards are looked at while no backward comes to any, so that a layer which nobody goes
    back through, or whose losses are let go, takes no more than so many; a backward of one beyond has the next ones
    looked at again.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.begin()

    def begin(self) -> None:
        """The layer is another one, or is run again without a fingerprint to compare with."""
        self.is_open = True
        self.num_left = MOST_FORWARDS
        """Forwards that are still looked at: none where this is not open."""

    def of_forward(self, outputs: Sequence[torch.Tensor]) -> list[Fingerprint]:
        """Of what a forward has given, for `check`; asked for while `num_left`. Does not wait for a device."""
        self.num_left -= 1
        return [Fingerprint(output) for output in outputs]

    def check(self, outputs: Sequence[torch.Tensor], of_forward: Sequence[Fingerprint]) -> None:
        """Raises `UnsupportedModule` where a recompute gave something else than its forward: gradients would be those
        of another function. On a GPU, whose sums need not come in one order, or by rounding alone, it is a warning.
        Waits for a device.
        """
        now = [Fingerprint(output) for output in outputs]
        if len(now) != len(of_forward) or not all(map(Fingerprint.is_same, now, of_forward)):
            said = f"{self._name}: run again in backward, the layer gave another output than in forward"
            causes = "it has random numbers of its own, changes with each call, or was changed since"
            near = len(now) == len(of_forward) and all(map(Fingerprint.is_near, now, of_forward))
            if not near and not any(output.is_cuda for output in outputs):
                raise UnsupportedModule(f"{said}: gradients would be those of another function. Something in {causes}")
            logger.warning(
                "%s. Either it adds up in no fixed order, and rounds otherwise, which does no harm; or gradients are "
                "those of another function: something in %s", said, causes,
            )  # fmt: skip
        self.is_open = False
        self.num_left = 0


class Fingerprint:
    """What is left of a tensor to compare another one with, without keeping it: some numbers, on a GPU one in its
    memory, so that whoever takes one does not wait.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().resolve_conj().contiguous()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        flat = tensor.view(-1)
        pieces = flat.split(max(_LEAST, flat.numel() // _PIECES))  # type: ignore[no-untyped-call]
        self._bits: int | torch.Tensor
        self._eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        self._sums: list[float] = []
        if tensor.device.type == "cpu":
            self._bits = crc32c(flat.view(torch.uint8).numpy().data)
            self._sums = _sums(pieces) if self._eps else []
        else:  # integers, whose sum is the same in any order
            integer = _INTEGERS[tensor.element_size()]
            self._bits = torch.stack([piece.view(integer).sum() for piece in pieces]).sum()

    def is_same(self, other: Fingerprint) -> bool:
        """Whether the elements of both are equal to the bit, however they lie: always where they are, and hardly where
        not. A NaN is equal to itself. Waits for a device.
        """
        return int(self._bits) == int(other._bits)

    def is_near(self, other: Fingerprint) -> bool:
        """Whether both are of floating-point numbers on the CPU whose sums differ by half of the digits at most, as
        where kernels without a graph add up in another order; or the same.
        """
        if not self._sums or not other._sums:
            return self.is_same(other)
        within = min(self._sums[-1], other._sums[-1]) * self._eps**0.5
        return all(
            one == another or (one != one and another != another) or abs(one - another) <= within
            for one, another in zip(self._sums, other._sums, strict=True)
        )


def _sums(pieces: Sequence[torch.Tensor]) -> list[float]:
    """The sum of all elements, and the root of the sum of their squares."""
    total = squares = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        wide = piece.to(torch.float64)
        total, squares = total + wide.sum(), squares + torch.dot(wide, wide)
    return [float(total), float(squares.sqrt())]
