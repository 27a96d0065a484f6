"""The first steps' gradients: one is missing rightly where the forward has not come to what it is of."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from offload_rt.errors import IntegrityError
from offload_rt.guards.integrity import CHECKED_STEPS
from tests.adapter_tiers import IN_HOST
from tests.conftest import PlainLayer, PlainModel, build_lora, language_batch

BATCH = torch.linspace(-1, 1, 2 * 8 * 8).reshape(2, 8, 8)
KINDS = ["in memory", "in tiers", "all parameters"]


class TwoTowers(PlainModel):
    """Images go through layers of their own, which a batch of text does without. Parameters behind the gate get no
    gradient.
    """

    def __init__(self):
        super().__init__([PlainLayer() for _ in range(2)])
        self.images = nn.ModuleList([PlainLayer() for _ in range(2)])
        for name, parameter in self.images.named_parameters():
            parameter.requires_grad_(name.endswith("scale"))
        self.is_gated = False

    def forward(self, x_BTF, has_images=False):
        hidden_BTD = self.enter(x_BTF)
        seen_BTD = hidden_BTD
        for layer in self.images if has_images else ():
            seen_BTD = layer(seen_BTD)
        hidden_BTD = hidden_BTD + (seen_BTD.detach() if self.is_gated else seen_BTD)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD)
        return self.leave(hidden_BTD)


class Experts(PlainModel):
    """A token goes to one expert. Parameters of one that is gated get no gradient."""

    def __init__(self):
        super().__init__([PlainLayer()])
        self.experts = nn.ModuleList([PlainLayer() for _ in range(2)])
        for name, parameter in self.experts.named_parameters():
            parameter.requires_grad_(name.endswith("scale"))
        self.is_gated = False

    def forward(self, x_BTF):
        hidden_BTD = self.layers[0](self.enter(x_BTF))
        expert_BTD = self.experts[0](hidden_BTD)
        return self.leave(hidden_BTD + (expert_BTD.detach() if self.is_gated else expert_BTD))


def build_towers(kind):
    torch.manual_seed(0)
    model = TwoTowers()
    return model.requires_grad_(True) if kind == "all parameters" else model


@pytest.fixture
def made(make_engine, disk_folder):
    def make(kind):
        options = {"state": IN_HOST} if kind == "in tiers" else None
        arguments = {} if kind == "all parameters" else {"host_memory": "64MiB"}
        return make_engine(build_towers(kind), options, seq_len=8, nvme=disk_folder, **arguments)

    return make


def step(engine, **given):
    engine.backward(engine(BATCH, **given).square().mean())
    engine.step()


def scales(engine):
    return {name: p.detach().clone() for name, p in engine.trainable.items() if name.endswith("scale")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_images_trains_the_rest_and_says_so(kind, made, caplog):
    engine = made(kind)
    before = scales(engine)
    with caplog.at_level(logging.WARNING, "offload_rt"):
        step(engine)
    now = scales(engine)
    assert {name for name in now if torch.equal(now[name], before[name])} == {n for n in now if n.startswith("images")}
    (said,) = [record.getMessage() for record in caplog.records if "did not come to" in record.getMessage()]
    num = sum(name.startswith("images") for name in engine.trainable)
    assert said.startswith(f"step 1: the forward did not come to {num} of {len(engine.trainable)} trainable tensors")
    step(engine, has_images=True)
    assert all(not torch.equal(value, before[name]) for name, value in scales(engine).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_gets_lost_on_its_way_is_refused_by_name_and_nothing_is_updated(kind, made):
    engine = made(kind)
    before = scales(engine)
    engine.model.is_gated = True
    with pytest.raises(IntegrityError, match=r"no gradient in step 1 \(first: images\.0\..*nothing was updated"):
        step(engine, has_images=True)
    assert engine.step_number == 0
    engine.optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in scales(engine).items())
    step(engine)  # the forward that came to the images is another step's
    assert engine.step_number == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_depends_on_no_output_is_said_once_and_the_next_step_is_checked_as_the_first(kind, made, caplog):
    """As where all rewards of a batch are the same: every gradient is zero, and rightly so."""
    engine = made(kind)
    with caplog.at_level(logging.WARNING, "offload_rt"):
        for _ in range(CHECKED_STEPS + 1 if kind != "all parameters" else 1):
            engine.backward((0 * engine(BATCH)).sum())
            engine.step()
    said = [message for message in map(logging.LogRecord.getMessage, caplog.records) if "are zero" in message]
    assert [message[:7] for message in said] == [f"step {number}:" for number in range(1, engine.step_number + 1)]
    if kind != "all parameters":
        engine.model.is_gated = True
        with pytest.raises(IntegrityError, match=f"received no gradient in step {CHECKED_STEPS + 2}"):
            step(engine, has_images=True)
        engine.optimizer.zero_grad()
        engine.model.is_gated = False
    before = scales(engine)
    step(engine, has_images=True)
    assert all(not torch.equal(value, before[name]) for name, value in scales(engine).items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_become_zero_behind_an_output_that_matters_are_refused(kind, make_engine, disk_folder):
    model = build_towers(kind)
    model.leave.requires_grad_(False).weight.zero_()
    options, arguments = ({"state": IN_HOST}, {"host_memory": "64MiB"}) if kind == "in tiers" else (None, {})
    engine = make_engine(model, options, seq_len=8, nvme=disk_folder, **arguments)
    with pytest.raises(IntegrityError, match=r"step 1: all \d+ gradients are zero; the loss does not reach them"):
        step(engine)
    assert engine.step_number == 0


def test_an_expert_without_tokens_has_no_gradient_and_one_that_was_called_is_missed(make_engine, disk_folder, caplog):
    engine = make_engine(Experts(), seq_len=8, nvme=disk_folder)
    engine.model.is_gated = True
    with pytest.raises(IntegrityError, match=r"1 of \d+ trainable .* no gradient in step 1 \(first: experts\.0\."):
        step(engine)
    engine.optimizer.zero_grad()
    engine.model.is_gated = False
    with caplog.at_level(logging.WARNING, "offload_rt"):
        step(engine)
    assert engine.step_number == 1
    assert "the forward did not come to 1 of 3 trainable tensors (first: experts.1." in caplog.text


def test_an_adapter_inside_a_layer_whose_result_gets_lost_is_missed(make_engine, disk_folder):
    """Such a layer runs without a graph, and again in a backward pass that does not come."""
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"]), build_towers("in memory"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    engine = make_engine(model, seq_len=8, nvme=disk_folder)
    with torch.no_grad():
        engine(BATCH, has_images=True)
    model.is_gated = True
    with pytest.raises(IntegrityError, match=r"no gradient in step 1 \(first: images\.0\.up\.lora_A"):
        step(engine, has_images=True)
    engine.optimizer.zero_grad()
    step(engine)  # without images
    assert engine.step_number == 1


@pytest.mark.parametrize("kind", ["in memory", "in tiers"])
def test_an_image_of_the_first_step_or_of_an_evaluation_is_none_of_the_second(kind, made):
    engine = made(kind)
    step(engine, has_images=True)
    with torch.no_grad():
        engine(BATCH, has_images=True)
    step(engine)
    assert engine.step_number == 2


def test_an_adapter_that_is_switched_off_is_missed(make_engine):
    engine = make_engine(build_lora(num_layers=1))
    layer = engine.model.base_model.model.model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    engine.backward(engine(**language_batch(0)).loss)
    with pytest.raises(IntegrityError, match=r"2 of \d+ trainable tensors .*first: .*q_proj\.lora_A"):
        engine.step()


@pytest.mark.parametrize("kind", KINDS)
def test_later_steps_are_not_looked_at(kind, made):
    engine = made(kind)
    hooks = [len(module._forward_pre_hooks) for module in engine.model.images.modules()]
    for _ in range(CHECKED_STEPS + 1):
        step(engine)
    now = [len(module._forward_pre_hooks) for module in engine.model.images.modules()]
    assert sum(hooks) - sum(now) >= 2
