"""A backward pass whose forward was before a step: torch refuses it in plain training, and what is run again says so.

forward 0 | forward 1, backward 1, step | backward 0      its layers would run again with the weights of now
"""

from __future__ import annotations

import pytest
import torch

from offload_rt.errors import IntegrityError
from planners.plans.plan import Tier
from tests.adapter_tiers import IN_HOST
from tests.conftest import build_lora, build_plain, language_batch
from tests.test_tokenwise_engine import LINEAR, SEQ_LEN, chunked
from tests.tokenwise import waiting_in

BATCHES = torch.linspace(-1, 1, 3 * 2 * 8 * 8).reshape(3, 2, 8, 8)
KINDS = ["in memory", "in tiers", "all parameters"]
FROM_BEFORE = r"layers\.\d.*: this backward pass is of a forward from before what trains was changed"


@pytest.fixture
def made(make_engine, disk_folder):
    def make(kind, **given):
        model = build_plain(num_layers=2)
        if kind == "all parameters":
            model.layers.requires_grad_(True)
        options = {"state": IN_HOST} if kind == "in tiers" else None
        return make_engine(model, options, seq_len=8, nvme=disk_folder, host_memory="64MiB", **given)

    return make


def loss_of(engine, number):
    return engine(BATCHES[number]).square().mean()


def values(engine):
    with torch.no_grad():
        return engine(BATCHES[2])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_and_what_comes_behind_it_goes_on(kind, made):
    engine = made(kind)
    late = loss_of(engine, 0)
    engine.backward(loss_of(engine, 1))
    engine.step()
    with pytest.raises(IntegrityError, match=FROM_BEFORE):
        engine.backward(late)
    assert not list(engine.gradients()), "none of them is wrong"
    before = values(engine)
    engine.backward(loss_of(engine, 1))
    engine.step()
    assert engine.step_number == 2 and not torch.equal(values(engine), before)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_behind_what_was_loaded(kind, made):
    engine = made(kind, commit_every=1)
    engine.backward(loss_of(engine, 0))
    engine.step()
    late = loss_of(engine, 0)  # behind the commit
    engine.load_checkpoint(engine.commit_folder)
    with pytest.raises(IntegrityError, match=FROM_BEFORE):
        engine.backward(late)


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_that_are_ahead_of_all_backward_passes_of_a_step_are_none(kind, made):
    engine = made(kind, accumulation_steps=2)
    for number in (1, 2):
        losses = [loss_of(engine, each) for each in (0, 1)]
        for loss in losses:
            engine.backward(loss)
        engine.step()
        assert engine.step_number == number


def test_what_somebody_changes_by_hand_counts_and_what_did_not_train_does_not(made):
    engine = made("in memory")
    first, *_ = engine.trainable.values()
    late = loss_of(engine, 0)
    with torch.no_grad():
        first.mul_(2)
    with pytest.raises(IntegrityError, match=FROM_BEFORE):
        engine.backward(late)
    first.requires_grad_(False)
    late = loss_of(engine, 0)
    with torch.no_grad():
        first.mul_(1)
    first.requires_grad_(True)
    engine.backward(late)


def test_layers_by_chunks_of_tokens_refuse_it_too(make_engine, disk_folder):
    model = build_lora(num_layers=2, dropout=0.0).train()
    options = {**LINEAR, "activations": waiting_in(chunked(0.5, 2), Tier.NVME)}
    engine = make_engine(model, options, seq_len=SEQ_LEN, nvme=disk_folder)
    late = engine(**language_batch(0, tokens=SEQ_LEN)).loss
    engine.backward(engine(**language_batch(1, tokens=SEQ_LEN)).loss)
    assert engine._runtime.tokenwise.tried, "by chunks"
    engine.step()
    with pytest.raises(IntegrityError, match=FROM_BEFORE):
        engine.backward(late)
