"""An engine that could not be made, however far it came, leaves the user's model as it was."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.running.steps import StepMeter
from offload_rt.wiring.model_assembly import ModelAssembly
from tests.conftest import build_base, build_plain, language_batch

peft = pytest.importorskip("peft")

PLACES = {
    "while assembling": (ModelAssembly, "_loss_head"),
    "while the engine is put around it": (StepMeter, "attach"),
}


def everything(model):
    """What there is of `model`, by module: attributes and entries of its dictionaries, and of each tensor its bits."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }, {
        name: (id(p), p.requires_grad, p.device, None if p.is_meta else p.detach().clone())
        for name, p in model.named_parameters()
    }  # fmt: skip


def unchanged(model, before):
    (modules, tensors), (now_modules, now_tensors) = before, everything(model)
    assert now_modules == modules
    assert now_tensors.keys() == tensors.keys()
    for name, (*facts, value) in tensors.items():
        *now_facts, now_value = now_tensors[name]
        assert now_facts == facts, name
        assert value is None or torch.equal(now_value, value), name


def fails(monkeypatch, place):
    kind, name = PLACES[place]
    work = getattr(kind, name)

    def broken(*arguments, **options):
        work(*arguments, **options)
        raise OSError("broken")

    monkeypatch.setattr(kind, name, broken)


class Archive(UserDict):
    """Of a user's: what is taken out of it is lost."""

    def clear(self):
        raise AssertionError("cleared")


def adapted(folder):
    model = build_base("llama", torch.float32, num_layers=2)
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    model.own, model.archive = SimpleNamespace(), Archive(first=1)
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    return model, {"adapters": lora, "bits": 4, "nvme": folder}


def on_meta(folder):
    source = build_base("llama", torch.float32, num_layers=2)
    source.save_pretrained(folder / "model")
    with torch.device("meta"):
        model = build_base("llama", torch.float32, num_layers=2)
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    return model, {"adapters": lora, "checkpoint": folder / "model", "nvme": folder}


def full(folder):
    return build_base("llama", torch.float32, num_layers=2), {"nvme": folder}


@pytest.mark.parametrize("made", [adapted, on_meta, full])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_whose_engine_fails_late_is_as_it_was_and_the_same_call_works(made, place, disk_folder, monkeypatch):
    model, arguments = made(disk_folder)
    before = everything(model)
    arguments |= {"batch_size": 2, "seq_len": 12}
    with monkeypatch.context() as now:
        fails(now, place)
        with pytest.raises(OSError, match="broken"):
            Engine(model, **arguments)
    unchanged(model, before)
    with Engine(model, **arguments) as engine:
        engine.backward(engine(**language_batch(0)).loss)
        engine.step()


def test_adapters_that_stop_half_way_leave_none():
    """What peft cannot adapt comes behind what it can."""
    model = build_plain(num_layers=2)
    model.layers[1].odd = torch.nn.LayerNorm(8)
    before = everything(model)
    with pytest.raises(ValueError, match="not supported"):
        Engine(model, adapters=peft.LoraConfig(r=2, target_modules=["up", "odd"]), batch_size=2, seq_len=8)
    unchanged(model, before)
