"""Pieces cover all that trains, once, whatever its shapes; budgets have no say in them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offload_rt import optim
from offload_rt.errors import ConfigError
from offload_rt.optimizer.pieces import TrainedParameter, segment_shape, trained_block
from offload_rt.optimizer.rules import AdamWRule, rule_for

RULES = {
    "float32": AdamWRule("float32"),
    "bfloat16": AdamWRule("bfloat16"),
    "8bit": AdamWRule("8bit"),
    "lion": rule_for(optim.Lion([nn.Parameter(torch.ones(1))])),
    "adafactor": rule_for(torch.optim.Adafactor([nn.Parameter(torch.ones(1))])),
}
shapes = st.lists(st.lists(st.integers(1, 130), max_size=3).map(tuple), min_size=1, max_size=6)


def block_of(shapes_given, rule, piece_elements, *, accumulates=False):  # type: ignore[no-untyped-def]
    parameters = [
        TrainedParameter(f"p{index}", nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")), None)
        for index, shape in enumerate(shapes_given)
    ]
    return trained_block("block", parameters, rule, accumulates=accumulates, piece_elements=piece_elements)


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes, rule=st.sampled_from(sorted(RULES)), piece_elements=st.sampled_from([1, 100, 4096, 5000, 1 << 20])
)
def test_pieces_cover_every_element_once_in_tensors_that_do_not_overlap(shapes, rule, piece_elements) -> None:  # type: ignore[no-untyped-def]
    block = block_of(shapes, RULES[rule], piece_elements)
    covered: Counter[int] = Counter()
    place = (0, 0)
    for piece in block.pieces:
        assert piece.num_bytes % 4096 == 0
        end_of_last = 0
        for segment in piece.segments:
            assert (segment.parameter, segment.begin) >= place, "in the order of the parameters"
            place = (segment.parameter, segment.end)
            covered[segment.parameter] += segment.end - segment.begin
            assert segment.begin % 256 == 0, "8-bit moments have one scale for 256 elements"
            if not RULES[rule].elementwise:
                assert (segment.begin, segment.end) == (0, block.parameters[segment.parameter].num_elements)
            assert segment.state[0].name == "master" and segment.state[0].shape == (segment.end - segment.begin,)
            shape = segment_shape(block, segment)
            assert [(t.name, t.shape) for t in segment.state[1:]] == [
                (t.name, t.shape) for t in RULES[rule].state(shape)
            ]
            for tensor in segment.state:
                assert tensor.offset_bytes >= end_of_last and tensor.offset_bytes % 64 == 0
                end_of_last = tensor.offset_bytes + tensor.stored_bytes
        assert end_of_last <= piece.num_bytes < end_of_last + 4096
        held = sum(segment.end - segment.begin for segment in piece.segments)
        assert held <= piece_elements or len(piece.segments) == 1
    assert covered == {index: p.num_elements for index, p in enumerate(block.parameters)}
    assert len({piece.name for piece in block.pieces}) == len(block.pieces)
    assert block.state_bytes == sum(piece.num_bytes for piece in block.pieces)


@settings(max_examples=30, deadline=None)
@given(shapes=shapes, accumulates=st.booleans())
def test_gradients_lie_whole_in_the_dtype_that_they_are_summed_in(shapes, accumulates) -> None:  # type: ignore[no-untyped-def]
    block = block_of(shapes, RULES["float32"], 4096, accumulates=accumulates)
    assert [tensor.shape for tensor in block.gradients.tensors] == [tuple(shape) for shape in shapes]
    assert {tensor.dtype for tensor in block.gradients.tensors} == {"F32" if accumulates else "BF16"}


def test_a_large_parameter_is_cut_into_ranges_of_equal_size() -> None:
    def ranges(num_elements: int) -> list[tuple[int, int]]:
        pieces = block_of([(num_elements,)], RULES["8bit"], 8192).pieces
        return [(segment.begin, segment.end) for piece in pieces for segment in piece.segments]

    assert ranges(8192) == [(0, 8192)]
    assert ranges(8193) == [(0, 8192), (8192, 8193)]  # from multiples of 4096 on
    assert ranges(16385) == [(0, 8192), (8192, 16384), (16384, 16385)]
    assert ranges(20000) == [(0, 8192), (8192, 16384), (16384, 20000)]


def test_half_precision_is_refused_by_name() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float16))
    words = r"layers\.0\.up is torch.float16: .* takes bfloat16 or float32 .* with dtype=torch.bfloat16"
    with pytest.raises(ConfigError, match=words):
        trained_block("b", [TrainedParameter("layers.0.up", parameter, None)], RULES["lion"], accumulates=False)
