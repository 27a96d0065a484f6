"""What a block was measured to take, and to hold, on the machine at hand. It counts in place of FLOPs and rates."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class MeasuredSeconds:
    """What one block took on the machine at hand, with a step's whole batch and its weights in memory."""

    forward: float
    backward: float
    """With what backward computes again of the block."""
    decode: float = 0.0
    """Of all its quantized weights, once."""
    kept: KeptPass | None = None
    """Where all that backward needs is kept; None where that was not measured, and cannot be asked for."""
    chunks: MeasuredChunks | None = None
    """Of a layer that ran by chunks of tokens; None: whole."""
    product: float = 0.0
    """Of a head, its logits and their sums: what they take once more where it goes by tiles."""

    def times(self, factor: float) -> MeasuredSeconds:
        """Of a machine that is so many times as slow, or of so many batches one after the other."""
        kept = self.kept
        if kept is not None:
            kept = replace(
                kept, forward=kept.forward * factor, backward=kept.backward * factor, put_away=kept.put_away * factor,
                taken_back=kept.taken_back * factor, put_on_drive=kept.put_on_drive * factor,
                taken_off_drive=kept.taken_off_drive * factor,
            )  # fmt: skip
        return replace(
            self, forward=self.forward * factor, backward=self.backward * factor, decode=self.decode * factor,
            kept=kept, product=self.product * factor,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeasuredChunks:
    """How a layer ran by chunks of tokens, and what it held of a step's whole batch."""

    num_tokens: int
    """Of every sequence, in a chunk."""
    with_input_bytes: int
    """What waits with the layer's input from forward to backward: the attention's result, what its kernel saves."""
    peak_bytes: int
    """The most that a forward and backward have held at once which compute all chunks again."""


@dataclass(frozen=True, kw_only=True)
class KeptPass:
    """What one block took, and saved, that computes nothing again. Decoding apart, which each pass does once."""

    forward: float
    """Seconds."""
    backward: float
    saved_bytes: int
    """That backward needs of a step's whole batch, beside the block's input: what can be kept, swapped, made again."""
    small_bytes: int = 0
    """Beside those: in tensors too small to be worth a transfer, which stay in DEVICE memory wherever the rest goes."""
    put_away: float = 0.0
    """Seconds for which swapping out keeps from computing, whatever a link takes besides; in forward."""
    taken_back: float = 0.0
    """The same of swapping in, in backward."""
    put_on_drive: float = 0.0
    """More of it where what is swapped out goes on to a drive: staging, asking for writes. Beside the drive's time."""
    taken_off_drive: float = 0.0
    """The same of swapping in."""
    groups: tuple[SavedGroup, ...] = ()
    """What is saved where the layer runs by chunks: together `saved_bytes`. Empty: all of it is one."""


@dataclass(frozen=True, kw_only=True)
class SavedGroup:
    """A group of what a layer by chunks saves, see `activations.Group`. Of a step's whole batch."""

    name: str
    num_bytes: int
    again: float
    """Seconds that computing it again takes; of the price of all groups, its part."""
