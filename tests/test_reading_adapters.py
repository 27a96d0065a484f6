"""Adapters that read a quantized weight beside calling its module (DoRA): they have the bits of plain peft."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from offload_rt.errors import UnsupportedModule
from offload_rt.layers.autograd import CHECKED_CALLS
from tests.conftest import PlainModel, build_lora, decode_in_place, language_batch

peft = pytest.importorskip("peft")


def with_dora(family, dropout):
    model = build_lora(family, num_layers=2, dropout=dropout)
    base = model.unload()
    torch.manual_seed(1)
    model = peft.get_peft_model(base, replace(model.peft_config["default"], use_dora=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def pass_through(model, number):
    inputs = language_batch(number)
    torch.manual_seed(number)
    loss = model(**inputs).loss
    loss.backward()
    return loss


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.1), ("gpt2", 0.0)])
def test_dora_over_quantized_weights_has_the_bits_of_peft(family, dropout, make_engine):
    """With dropout, DoRA multiplies by the weight itself; without, by the result of its module."""
    twin = decode_in_place(with_dora(family, dropout))
    engine = make_engine(with_dora(family, dropout), bits=4, batch_size=2, seq_len=12)
    for number in range(CHECKED_CALLS + 1):
        assert torch.equal(pass_through(engine, number), pass_through(twin, number))
    found = dict(engine.gradients())
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert any("magnitude" in name for name in expected) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(b.parameter.isnan().all() for b in engine._runtime.layers[0].block.bindings if b.spec.is_quantized)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "o_proj"]])
def test_dora_that_is_loaded_into_a_running_engine_has_the_bits_of_peft(targets, make_engine, tmp_path):
    def built(targets, **options):
        model = build_lora(num_layers=2)
        base = model.unload()
        torch.manual_seed(1)
        return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, **options)).eval()

    saved = built(targets, use_dora=True, init_lora_weights=False)
    for name, parameter in saved.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    saved.save_pretrained(tmp_path)
    twin = decode_in_place(built(["q_proj"]))
    engine = make_engine(built(["q_proj"]), bits=4, batch_size=2, seq_len=12)
    inputs = language_batch(0)
    with torch.no_grad():
        for _ in range(CHECKED_CALLS):
            engine(**inputs)
        for model in (twin, engine.model):
            model.load_adapter(tmp_path, "late")
            model.set_adapter("late", inference_mode=True)
        expected = twin(**inputs).logits
        assert torch.equal(engine(**inputs).logits, expected)
        engine.model.set_adapter("default", inference_mode=True)
        assert not torch.equal(engine(**inputs).logits, expected)


class ReadingLayer(nn.Module):
    """Computes with a weight of a linear that it does not call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, hidden_BTD):
        return torch.nn.functional.linear(hidden_BTD, self.inner.weight) * self.scale


def test_calls_that_gave_nan_are_refused_however_many_come(make_engine):
    torch.manual_seed(0)
    engine = make_engine(PlainModel([ReadingLayer() for _ in range(2)], width=64), bits=4)
    for _ in range(CHECKED_CALLS + 1):
        with pytest.raises(UnsupportedModule, match="gave NaN for finite inputs"):
            engine(torch.ones(2, 3, 8))
