"""Copies of a model that an engine manages, and what is loaded into it: refused where it would be silently wrong."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch

from offload_rt.errors import ConfigError, OffloadError
from planners.plans.plan import Tier
from tests.conftest import build_base, build_lora, build_plain, language_batch


def test_a_managed_model_and_its_engine_are_neither_copied_nor_pickled(make_engine, disk_folder, tmp_path):
    model = build_plain()
    engine = make_engine(model, seq_len=8, nvme=disk_folder)
    for asked in (model, model.layers[0], model.layers[0].up, engine):
        for attempt in (copy.deepcopy, pickle.dumps, partial(torch.save, f=tmp_path / "model.pt")):
            with pytest.raises(ConfigError, match="cannot be copied or pickled"):
                attempt(asked)


@pytest.mark.parametrize("attempt", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_model_whose_engine_is_closed_is_copied_again_when_it_has_its_weights(attempt, make_engine, disk_folder):
    """Torch makes each placeholder a tensor of the weight's size, full of NaN."""
    model = build_plain()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    make_engine(model, seq_len=8, nvme=disk_folder).close()
    assert "load_state_dict" not in vars(model.layers[0])
    for asked in (model, model.layers, model.layers[0], model.layers[0].up):
        with pytest.raises(ConfigError, match=r"copy: the engine .* is closed, and \d+ of its weights .* have NaN"):
            attempt(asked)
    attempt(model.layers[0].dropout)
    model.load_state_dict(weights, assign=True)
    found = attempt(model)
    found = pickle.loads(found) if isinstance(found, bytes) else found
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())
    assert not any("__reduce_ex__" in vars(module) for each in (model, found) for module in each.modules())


def test_weights_at_rest_are_not_loaded_and_adapters_are(make_engine, disk_folder):
    model = build_lora(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = make_engine(model, nvme=disk_folder)
    adapters = {name: value + 1 for name, value in before.items() if "lora_" in name}
    for given in ({**before, **adapters}, {name: before[name] for name in before if "layers.1." in name}):
        with pytest.raises(ConfigError, match=r"load_state_dict: \d+ weights that an engine keeps elsewhere"):
            engine.model.load_state_dict(given, strict=False)
    with pytest.raises(ConfigError, match="assign=True"):
        engine.model.load_state_dict(adapters, strict=False, assign=True)
    parameters = dict(engine.model.named_parameters())
    assert all(torch.equal(parameters[name], before[name]) for name in adapters)
    found = engine.model.load_state_dict(adapters, strict=False)
    assert not found.unexpected_keys and all(torch.equal(parameters[name], adapters[name]) for name in adapters)


def test_what_a_managed_model_gives_as_its_state_can_be_loaded_again(make_engine, disk_folder):
    """Its state has no entry for a weight at rest: accelerate saves and loads such ones, strictly."""
    engine = make_engine(build_lora(dtype=torch.float32), nvme=disk_folder)
    state = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.backward(engine(**language_batch(0)).loss)
    engine.step()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    changed = dict(engine.model.named_parameters())[name]
    assert not torch.equal(changed, state[name])
    assert not engine.model.load_state_dict(state).missing_keys
    assert torch.equal(changed, state[name])
    with pytest.raises(ConfigError, match=f"1 entries are missing, 1 are not the model's, first: {name}"):
        engine.model.load_state_dict({"odd": state[name], **{n: v for n, v in state.items() if n != name}})


def test_weights_with_masters_are_not_loaded_though_they_are_in_memory(make_engine):
    """The next step would round them from masters that know nothing of it."""
    engine = make_engine(build_base("llama", torch.float32, 2))
    state = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.model.load_state_dict(state)
    engine.backward(engine(**language_batch(0)).loss)
    engine.step()
    for asked, given in ((engine.model, state), (engine.model.lm_head, {"weight": state["lm_head.weight"]})):
        with pytest.raises(ConfigError, match="keeps elsewhere"):
            asked.load_state_dict(given)


def test_transformers_own_save_is_refused_where_it_would_leave_out_weights(make_engine, disk_folder, tmp_path):
    engine = make_engine(build_lora(dtype=torch.float32), nvme=disk_folder)
    with pytest.raises(ConfigError, match=r"save_pretrained: \d+ of \d+ weights are not in memory"):
        engine.model.base_model.model.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    engine.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("inner", [False, True])
def test_a_model_whose_engine_is_closed_answers_nothing_until_it_has_its_weights(make_engine, disk_folder, inner):
    """It was NaN, and token 0."""
    model = build_lora(dtype=torch.float32)
    asked = (model.base_model.model if inner else model).eval()
    values, batch = {name: p.detach().clone() for name, p in model.named_parameters()}, language_batch(0)
    with torch.no_grad():
        expected = asked(**batch).loss
    make_engine(model, nvme=disk_folder).close()
    for call in (asked, asked.generate):
        with pytest.raises(OffloadError, match=r"forward: .* is closed, and \d+ of its weights .*checkpoint="):
            call(input_ids=batch["input_ids"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = values[name]
        assert asked(**batch).loss == expected, "somebody has put them back"


def test_a_model_that_keeps_its_weights_answers_when_its_engine_is_closed_and_a_next_one_takes_the_refusal_away(
    make_engine, disk_folder, tmp_path
):
    base = build_base("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    make_engine(base, nvme=disk_folder, options={"rest": Tier.NVME}, lr=None).close()
    with pytest.raises(OffloadError, match="is closed"):
        base(**language_batch(0))
    with make_engine(base, nvme=disk_folder, checkpoint=tmp_path / "base", lr=None) as engine:
        assert torch.isfinite(engine(**language_batch(0)).loss)


def test_a_closed_engine_leaves_no_model_that_saves_placeholders(make_engine, disk_folder, tmp_path):
    """All of its parameters train, and rest on NVMe: what of the model is in memory is no model any more."""
    model = build_base("llama", torch.float32, 2)
    engine = make_engine(model, {"rest": Tier.NVME, "stream_edges": True}, nvme=disk_folder)
    named = {name for name, p in model.named_parameters() if not any(p.stride())}
    before = set(model.state_dict())
    engine.close()
    assert named and not before & named
    assert set(model.state_dict()) == before
    with pytest.raises(ConfigError, match=rf"save_pretrained: {len(named)} of \d+ weights .*, before close"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    other = build_base("llama", torch.float32, 2)
    model.load_state_dict(other.state_dict(), assign=True)
    for each in (model, copy.deepcopy(model)):
        each.save_pretrained(tmp_path / "model")
        assert named < set(each.state_dict())
        saved = type(model).from_pretrained(tmp_path / "model").state_dict()
        assert all(torch.equal(saved[name], value) for name, value in other.state_dict().items())


def test_parts_of_a_managed_model_give_no_placeholders_as_their_state(make_engine, disk_folder):
    peft = pytest.importorskip("peft")
    base = build_base("llama", torch.float32, 2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    engine = make_engine(base, {"rest": Tier.NVME}, nvme=disk_folder, adapters=config)
    for asked in (base, base.model, engine.model.base_model, engine.model.get_base_model()):
        state = asked.state_dict()
        assert state and not any(bool(value.isnan().any()) for value in state.values())


def test_a_second_engine_needs_a_model_that_nobody_manages_and_that_has_its_weights(make_engine, disk_folder):
    model = build_plain()
    first = make_engine(model, seq_len=8, nvme=disk_folder)
    for asked in (model, torch.nn.Sequential(model)):
        with pytest.raises(ConfigError, match="an engine that is not closed manages it"):
            make_engine(asked, seq_len=8)
    first.close()
    with pytest.raises(ConfigError, match=r"\d+ weights are not in memory \(first: layers\.0\.norm\.weight"):
        make_engine(model, seq_len=8, nvme=disk_folder)
