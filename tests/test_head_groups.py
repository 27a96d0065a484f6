"""Attention by groups of heads, alone: what it holds at once is that of a group, to the byte."""

import pytest
import torch

from offload_rt.tokenwise.attention import AttentionCall
from offload_rt.tokenwise.graphs import Sums
from offload_rt.tokenwise.middle import Middle
from offload_rt.tokenwise.saved import Place, SavedCounters, SavedTensors
from tests.test_long_context import peak_bytes

HEADS, KV_HEADS, TOKENS, WIDTH = 8, 4, 64, 16


def eager(query, key, value, args, kwargs):
    """Every operation takes memory in proportion to its heads."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, 1) for tensor in (key, value))
    return torch.softmax(query @ key.transpose(2, 3), -1) @ value


class NoBlock:
    """A block that owns none of the tensors."""

    def view_of(self, tensor):
        return None


def attend(num_groups):
    """Gradients of queries, keys and values, and the most that was held during backward above what was before."""
    torch.manual_seed(0)
    qkv = tuple(torch.randn(1, heads, TOKENS, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    counters, middle = SavedCounters(), Middle(TOKENS, num_groups)
    middle.gather(qkv, 0, empty=False)
    call = AttentionCall(qkv, ((), {}), eager, -2)
    middle.attend(call, {}, lambda: SavedTensors(NoBlock(), frozenset(), Place("attention"), counters))
    middle.hold([(0, TOKENS, Place("result"))], counters)
    middle.load()
    middle.gather(qkv, 0, empty=False)
    of_result = middle.new_gradient().copy_(torch.randn(1, HEADS, TOKENS, WIDTH))
    found = []

    def backward():
        found.extend(middle.backward(of_result, Sums([], in_fp32=True), keep_graph=False))

    return peak_bytes(backward), found


@pytest.mark.parametrize("num_groups", [2, 4])
def test_backward_by_groups_of_heads_takes_a_groups_share_of_memory(num_groups):
    """Its gradients go where its operands were, and the last group's are gone by then."""
    whole_bytes, expected = attend(1)
    group_bytes, found = attend(num_groups)
    assert group_bytes * num_groups == whole_bytes > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
