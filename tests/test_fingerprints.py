"""Whether a recompute is seen to give what its forward gave."""

from __future__ import annotations

import logging

import pytest
import torch

from offload_rt.errors import UnsupportedModule
from offload_rt.layers import fingerprints
from offload_rt.layers.fingerprints import MOST_FORWARDS, Agreement, Fingerprint
from tests.conftest import build_plain


@pytest.fixture
def looked_at(monkeypatch):
    """The shapes of what fingerprints are taken of."""
    shapes = []

    class Seen(Fingerprint):
        def __init__(self, tensor):
            shapes.append(tuple(tensor.shape))
            super().__init__(tensor)

    monkeypatch.setattr(fingerprints, "Fingerprint", Seen)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool])
def test_equal_elements_are_the_same_however_they_lie_and_others_are_not(dtype):
    tensor = torch.arange(600).reshape(20, 30).remainder(7).to(dtype)
    turned = tensor.t().contiguous().t()
    other = tensor.clone()
    other[3, 4] = other[3, 4] == 0
    assert Fingerprint(tensor).is_same(Fingerprint(turned)) and Fingerprint(tensor).is_near(Fingerprint(turned))
    assert not Fingerprint(tensor).is_same(Fingerprint(other))
    assert Fingerprint(tensor[:0]).is_same(Fingerprint(turned[:0]))
    assert Fingerprint(tensor[0, 0]).is_same(Fingerprint(turned[0, 0]))


def test_nan_is_nothing_else_when_it_comes_again(caplog):
    given = [torch.tensor([1.0, float("nan"), float("inf")])]
    agreement = Agreement("a")
    of_forward = agreement.of_forward(given)
    agreement.check(given, of_forward)
    assert not caplog.records


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_in_the_recompute_alone_is_refused(value):
    agreement = Agreement("a")
    of_forward = agreement.of_forward([torch.ones(3)])
    with pytest.raises(UnsupportedModule, match="another output"):
        agreement.check([torch.tensor([1.0, 1.0, value])], of_forward)


def test_one_recompute_is_compared(make_engine, looked_at):
    engine = make_engine(build_plain(num_layers=2))
    for number in (4, 0, 0):
        engine.backward(engine(torch.ones(2, 6, 8)).square().mean())
        engine.step()
        assert len(looked_at) == number, "of two layers, forward and recompute, in the first step alone"
        looked_at.clear()


def test_layers_that_nobody_goes_back_through_are_looked_at_for_so_many_forwards(make_engine, looked_at):
    engine = make_engine(build_plain(num_layers=1))
    for _ in range(MOST_FORWARDS + 3):
        loss = engine(torch.ones(2, 6, 8)).square().mean()
    assert len(looked_at) == MOST_FORWARDS
    engine.backward(loss)
    assert len(looked_at) == MOST_FORWARDS, "there is nothing to compare with"
    engine.step()
    engine.backward(engine(torch.ones(2, 6, 8)).square().mean())
    assert len(looked_at) == MOST_FORWARDS + 2, "looked at again"


def test_rounding_is_warned_of_once_a_layer(caplog):
    agreement = Agreement("a")
    of_forward = agreement.of_forward([torch.ones(3)])
    with caplog.at_level(logging.WARNING, "offload_rt"):
        agreement.check([torch.tensor([1.0, 1.0, 1.0 + 1e-6])], of_forward)
    assert "in no fixed order" in caplog.text
    assert not agreement.is_open and not agreement.num_left
