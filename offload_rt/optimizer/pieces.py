"""What is trained, and the units in which its state moves.

A trained block is a layer, or what trains outside the layers. Its state is cut into *pieces* of about
`PIECE_ELEMENTS` parameters: small parameters together, large ones in ranges. A piece is one extent, read, stepped and
written as one:

    block    | q_proj.weight        | k_proj | ... | norm | ...           parameters, in the model's order
    pieces   [ q 0:1Mi ][ q 1Mi:2Mi ][ k 0:1Mi | norm ]                   segments: ranges of parameters
    a piece  | master of q 1Mi:2Mi | exp_avg | exp_avg_sq |               each from a 64-byte boundary on

The cut depends on the model and the rule alone, not on budgets or drives: state that one plan wrote, another reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from offload_rt.adamw.blockwise import QUANT_BLOCK_SIZE
from offload_rt.dtypes import dtype_name
from offload_rt.errors import ConfigError
from offload_rt.optimizer.rules import UpdateRule
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, BlockSpec, TensorSpec, align_up, layout_block

PIECE_ELEMENTS = 1 << 20
"""12 MiB of fp32 AdamW state: a few large requests, and small against any budget that trains at all."""
STATE_ALIGNMENT_BYTES = 64
"""Of a tensor in a piece: the format of logs and checkpoints, whatever weights that are computed with need."""
MASTER = "master"


class Masters(Enum):
    """What of a parameter is stepped, and what of it lies in its state besides moments."""

    FLOAT32 = "float32"
    """A float32 master is; the parameter is that, rounded."""
    COPIES = "copies"
    """The parameter itself is, as in memory; its state has a copy, in its dtype, which is what a commit holds of it."""
    NONE = "none"
    """The parameter itself is; nothing is committed."""


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that trains, under the first name it has in the model."""

    name: str
    parameter: nn.Parameter
    streamed: TensorSpec | None
    """Where its weights lie in the block's extent; None: they stay in memory, in the parameter itself."""

    @property
    def num_elements(self) -> int:
        return self.parameter.numel()


@dataclass(frozen=True)
class Segment:
    """Elements [begin, end) of one parameter, with the tensors of its state in the piece."""

    parameter: int
    """Index into the block's parameters."""
    begin: int
    end: int
    state: tuple[TensorSpec, ...]
    """The master first, where there is one. Offsets are in the piece."""

    @property
    def master(self) -> TensorSpec | None:
        first = next(iter(self.state), None)
        return first if first is not None and first.name == MASTER else None


@dataclass(frozen=True)
class Piece:
    """What is read, stepped and written as one."""

    name: str
    segments: tuple[Segment, ...]
    num_bytes: int
    """A multiple of 4096."""


@dataclass(frozen=True)
class TrainedBlock:
    """What is updated together: once the gradients of all of it are there."""

    name: str
    parameters: tuple[TrainedParameter, ...]
    pieces: tuple[Piece, ...]
    weights: BlockSpec | None
    """Of the parameters that stream; None where all stay in memory."""
    gradients: BlockSpec
    """How its gradients lie while they wait, each parameter whole."""
    masters: Masters = Masters.FLOAT32

    @property
    def num_elements(self) -> int:
        return sum(trained.num_elements for trained in self.parameters)

    @property
    def state_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def weights_bytes(self) -> int:
        """As they are stored where they stream, or in the parameters."""
        if self.weights is not None:
            return self.weights.stored_bytes
        return sum(trained.parameter.nbytes for trained in self.parameters)


def trained_block(
    name: str,
    parameters: Sequence[TrainedParameter],
    rule: UpdateRule,
    *,
    weights: BlockSpec | None = None,
    accumulates: bool,
    piece_elements: int = PIECE_ELEMENTS,
    masters: Masters = Masters.FLOAT32,
) -> TrainedBlock:
    """Cuts the state of `parameters` into pieces. With `accumulates`, gradients wait in float32.

    Raises ConfigError for a parameter that is not bfloat16 or float32, and what `rule.state` raises.
    """
    for trained in parameters:
        if trained.parameter.dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(
                f"{trained.name} is {trained.parameter.dtype}: full fine-tuning takes bfloat16 or float32 parameters; "
                f'load the model with dtype=torch.bfloat16 or float32 ("dtype" in its config.json)'
                if masters is Masters.FLOAT32
                else f"{trained.name} is {trained.parameter.dtype}: optimizer state rests in a tier for bfloat16 or "
                f"float32 adapters; convert them, or give more memory"
            )
        if masters is not Masters.FLOAT32 and not trained.parameter.is_contiguous():
            raise ConfigError(
                f"{trained.name} is not contiguous, so that no range of it can be stepped: make it contiguous"
            )
    gradients = [
        TensorSpec(
            name=trained.name, shape=tuple(trained.parameter.shape),
            dtype="F32" if accumulates else dtype_name(trained.parameter.dtype, of=trained.name),
        )
        for trained in parameters
    ]  # fmt: skip
    return TrainedBlock(
        name=name,
        parameters=tuple(parameters),
        pieces=tuple(_pieces(name, parameters, rule, piece_elements, masters)),
        weights=weights,
        masters=masters,
        gradients=layout_block(f"gradients of {name}", gradients),
    )


def _pieces(
    name: str, parameters: Sequence[TrainedParameter], rule: UpdateRule, piece_elements: int, masters: Masters
) -> Iterator[Piece]:
    ranges: list[tuple[int, int, int]] = []
    filled = 0
    number = 0
    for index, trained in enumerate(parameters):
        for begin, end in _ranges(trained.num_elements, rule, piece_elements):
            if ranges and filled + end - begin > piece_elements:
                yield _piece(f"{name}/{number}", ranges, parameters, rule, masters)
                ranges, filled, number = [], 0, number + 1
            ranges.append((index, begin, end))
            filled += end - begin
    if ranges:
        yield _piece(f"{name}/{number}", ranges, parameters, rule, masters)


def _ranges(num_elements: int, rule: UpdateRule, piece_elements: int) -> list[tuple[int, int]]:
    if not rule.elementwise or num_elements <= piece_elements:
        return [(0, num_elements)] if num_elements else []
    num_ranges = -(-num_elements // piece_elements)
    # of equal size, so that no range is left over that is all overhead; see `UpdateRule.elementwise`
    step = align_up(-(-num_elements // num_ranges), max(QUANT_BLOCK_SIZE, IO_ALIGNMENT_BYTES))
    return [(begin, min(begin + step, num_elements)) for begin in range(0, num_elements, step)]


def _piece(
    name: str,
    ranges: Sequence[tuple[int, int, int]],
    parameters: Sequence[TrainedParameter],
    rule: UpdateRule,
    masters: Masters,
) -> Piece:
    segments: list[Segment] = []
    offset = 0
    for index, begin, end in ranges:
        trained = parameters[index]
        whole = (begin, end) == (0, trained.num_elements)
        shape = tuple(trained.parameter.shape) if whole else (end - begin,)
        stepped = torch.float32 if masters is Masters.FLOAT32 else trained.parameter.dtype
        specs = [TensorSpec(name=MASTER, shape=(end - begin,), dtype=dtype_name(stepped, of=trained.name))]
        if masters is Masters.NONE:
            specs.clear()
        specs += [
            TensorSpec(name=state.name, shape=state.shape, dtype=dtype_name(state.dtype, of=state.name))
            for state in rule.state(shape, stepped)
        ]
        laid = layout_block(trained.name, specs, alignment_bytes=STATE_ALIGNMENT_BYTES).tensors
        moved = tuple(
            TensorSpec(name=s.name, shape=s.shape, dtype=s.dtype, offset_bytes=offset + s.offset_bytes) for s in laid
        )
        segments.append(Segment(index, begin, end, moved))
        if moved:
            offset = align_up(moved[-1].offset_bytes + moved[-1].stored_bytes, STATE_ALIGNMENT_BYTES)
    return Piece(name, tuple(segments), max(IO_ALIGNMENT_BYTES, align_up(offset, IO_ALIGNMENT_BYTES)))


def step_order(pieces: Sequence[Piece], on_device: Collection[str]) -> tuple[Piece, ...]:
    """The order in which a block's pieces are stepped: the device's evenly among the CPU's, so that both work."""
    ours = [piece for piece in pieces if piece.name in on_device]
    others = [piece for piece in pieces if piece.name not in on_device]
    due = [(number / len(ours), piece) for number, piece in enumerate(ours)]
    due += [((number + 1) / len(others), piece) for number, piece in enumerate(others)]
    return tuple(piece for _, piece in sorted(due, key=lambda one: one[0]))


def segment_shape(block: TrainedBlock, segment: Segment) -> tuple[int, ...]:
    """The parameter's own shape for the whole of it, flat for a range."""
    trained = block.parameters[segment.parameter]
    whole = math.prod(trained.parameter.shape) == segment.end - segment.begin
    return tuple(trained.parameter.shape) if whole else (segment.end - segment.begin,)
