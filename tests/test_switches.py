"""What is switched between a forward and its backward: gradients are those of the forward, whatever layers do again.

loss = model(...) | eval(), another adapter, none, frozen, autocast left | loss.backward()
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from offload_rt.guards.integrity import Reached
from offload_rt.layers.switches import Switches
from offload_rt.vocabulary.backbone import FinalNorm
from planners.plans.activations import Action, whole_batch
from planners.plans.plan import Tier
from tests.conftest import build_lora, language_batch
from tests.test_tokenwise_engine import LINEAR, SEQ_LEN, chunked
from tests.tokenwise import waiting_in


def freeze(model):
    for parameter in list(model.parameters()):
        parameter.requires_grad_(False)


def freeze_some(model):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


SWITCHES = {
    "eval": lambda model: model.eval(),
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "another adapter": lambda model: model.set_adapter("other"),
    "some frozen": freeze_some,
    "thawed": lambda model: (freeze(model), model.set_adapter("default")),
}


def made(dtype=torch.bfloat16):
    """With dropout, and an adapter that does not train."""
    model = build_lora(dtype=dtype, num_layers=2, dropout=0.2).train()
    torch.manual_seed(1)
    model.add_adapter("other", model.peft_config["default"])
    return model


def gradients_behind(run, model, switch):
    torch.manual_seed(5)
    loss = run(**language_batch(0)).loss
    random = torch.get_rng_state()
    switch(model)
    before = switches(model)
    loss.backward()
    assert switches(model) == before and torch.equal(torch.get_rng_state(), random), "as they were"
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    return found


def switches(model):
    modes = [(module.training, getattr(module, "_disable_adapters", None)) for module in model.modules()]
    return modes, [parameter.requires_grad for parameter in model.parameters()]


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["recomputed", "kept"])
def test_gradients_are_those_of_the_forward_whatever_is_switched_behind_it(kind, make_engine, disk_folder):
    plain = made()
    options = {"activations": whole_batch(Action.SWAP, Tier.NVME)} if kind == "kept" else None
    engine = make_engine(made(), options, nvme=disk_folder)
    for name, switch in SWITCHES.items():
        expected = gradients_behind(plain, plain, switch)
        assert bool(expected) is (name not in ("adapters off", "another adapter")), "peft freezes what is switched off"
        equal(gradients_behind(engine, engine.model, switch), expected)
    assert (engine.report()["recomputes"] > 0) is (kind == "recomputed")


@pytest.mark.parametrize("kind", ["recomputed", "kept"])
def test_hooks_of_a_forward_are_there_when_it_runs_again(kind, make_engine, disk_folder):
    """Each time others, as peft puts them there for one call of a model; by the backward they are gone."""
    options = {"activations": whole_batch(Action.SWAP, Tier.NVME)} if kind == "kept" else None
    plain, engine = made(), make_engine(made(), options, nvme=disk_folder)
    for factor in (2.0, 0.5):

        def scales(module, inputs, arguments, by=factor):
            return (inputs[0] * by,), arguments

        found = []
        for run, model in ((plain, plain), (engine, engine.model)):
            modules = [module for name, module in model.named_modules() if name.endswith("q_proj")]
            handles = [module.register_forward_pre_hook(scales, with_kwargs=True) for module in modules]
            found.append(gradients_behind(run, model, lambda model, gone=handles: [each.remove() for each in gone]))
            assert not any(scales in module._forward_pre_hooks.values() for module in modules)
            assert not any(module._forward_pre_hooks_with_kwargs for module in modules)
        equal(*found)


def test_chunks_that_run_again_are_switched_as_in_forward(make_engine, disk_folder):
    """Sums are in another order there: held against the same chunks without a switch."""
    found = []
    for switch in (lambda model: None, lambda model: model.eval()):
        options = {**LINEAR, "activations": waiting_in(chunked(0.5, 2), Tier.NVME)}
        engine = make_engine(made(torch.float32), options, seq_len=SEQ_LEN, nvme=disk_folder)
        found.append(gradients_behind(engine, engine.model, switch))
        assert engine.report()["tokenwise"]["num_first_replays"] > 0
        engine.close()
    equal(*found)


def test_gradients_under_autocast_are_taken_outside_of_it(make_engine, disk_folder):
    """As plain autograd takes them. GPT-2's activation has a power in it, which autocast makes float32 in backward."""
    plain = build_lora("gpt2", torch.float32, num_layers=2)
    engine = make_engine(build_lora("gpt2", torch.float32, num_layers=2), nvme=disk_folder)
    found = []
    for run, model in ((plain, plain), (engine, engine.model)):
        model.config.use_cache = False
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(**language_batch(4)).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    equal(*found)


def test_hooks_of_the_engines_own_stay_as_they_are_where_others_are_put_back():
    """Its guards put hooks in, and take them out, between a forward and its backward."""
    layer = torch.nn.Linear(2, 2)
    reached = Reached(layer, {})
    reached.remove()
    ours = layer.register_forward_hook(reached._layer_is_over)
    theirs = layer.register_forward_hook(lambda *_: None)
    switches = Switches([layer])
    ours.remove(), theirs.remove()
    later = layer.register_forward_pre_hook(reached._is_called)
    with switches.put_back([]):
        assert [*layer._forward_hooks] == [theirs.id]
        assert [*layer._forward_pre_hooks] == [later.id]
    assert [*layer._forward_hooks] == []
    assert [*layer._forward_pre_hooks] == [later.id]


def test_hooks_of_the_engines_own_are_not_held():
    """What looks for the final norm holds two hidden states."""
    layer, finds = nn.Linear(2, 2), FinalNorm(None)
    handle = layer.register_forward_hook(finds.saw)
    switches = Switches([layer])
    handle.remove()
    gone = weakref.ref(finds)
    del finds, handle
    assert gone() is None and not switches.are_still()
