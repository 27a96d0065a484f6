"""`model.to` and its like: refused where they would change a model that an engine manages, passed on where not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offload_rt.errors import ConfigError
from offload_rt.guards.conversions import ConversionGuard
from tests.conftest import build_lora, build_plain, language_batch


def test_a_conversion_is_refused_and_leaves_every_weight_as_it_was(make_engine, disk_folder):
    model = build_plain()
    engine = make_engine(model, seq_len=8, nvme=disk_folder)
    frozen, trained = model.layers[0].up.weight, model.layers[0].scale
    assert frozen.untyped_storage().nbytes() == 4  # absent: one element
    empty = partial(model.to_empty, device="cpu")
    for convert in (model.half, model.double, model.bfloat16, partial(model.to, "meta"), empty):
        with pytest.raises(ConfigError, match=r"torch\.float32 on cpu"):
            convert()
    assert model.to("cpu") is model and model.float() is model
    assert frozen.untyped_storage().nbytes() == 4 and (frozen.dtype, trained.dtype) == (torch.float32, torch.float32)
    loss = engine(torch.ones(2, 8, 8)).sum()
    engine.backward(loss)
    engine.step()
    engine.close()
    assert model.half() is model and "_apply" not in vars(model)


def test_the_model_under_new_adapters_is_guarded_too(make_engine):
    peft = pytest.importorskip("peft")
    model = build_plain()
    engine = make_engine(model, seq_len=8, adapters=peft.LoraConfig(r=2, target_modules=["up"]))
    assert engine.model is not model
    for guarded in (model, engine.model):
        with pytest.raises(ConfigError, match="convert it before"):
            guarded.half()


def test_what_is_within_a_model_is_guarded_too(make_engine, disk_folder):
    model = build_lora(dtype=torch.float32)
    engine = make_engine(model, nvme=disk_folder)
    layer = model.base_model.model.model.layers[0]
    guarded = (model.base_model, model.base_model.model, layer, layer.self_attn.q_proj, layer.input_layernorm)
    for inner in guarded:
        with pytest.raises(ConfigError, match="convert it before"):
            inner.half()
        assert inner.float() is inner
    engine.backward(engine(**language_batch(0)).loss)
    engine.step()
    engine.close()
    assert all("_apply" not in vars(inner) for inner in model.modules()) and layer.half() is layer


def test_merging_adapters_is_refused_and_changes_no_weight(make_engine, disk_folder):
    model = build_lora(dtype=torch.float32)
    engine = make_engine(model, nvme=disk_folder)
    batch = language_batch(0)
    engine.model.eval()
    with torch.no_grad():
        before = engine(**batch).loss
        for name in ("merge_and_unload", "unload", "merge_adapter", "unmerge_adapter"):
            for asked in (engine.model, engine.model.base_model):
                with pytest.raises(ConfigError, match=f"{name}: the frozen weights"):
                    getattr(asked, name)()
        assert torch.equal(engine(**batch).loss, before)
    engine.close()
    assert "merge_adapter" not in vars(model.base_model)


def test_embeddings_are_not_made_larger(make_engine, disk_folder):
    engine = make_engine(build_lora(dtype=torch.float32), nvme=disk_folder)
    shape = engine.model.get_input_embeddings().weight.shape
    with pytest.raises(ConfigError, match=r"resize_token_embeddings: .* before engine"):
        engine.model.resize_token_embeddings(2 * shape[0])
    assert engine.model.get_input_embeddings().weight.shape == shape


def test_a_guard_that_is_removed_again_leaves_the_next_ones_in_place():
    """`close` may be called twice, and the model be another engine's by then."""
    model = build_plain()
    first = ConversionGuard(model)
    first.remove()
    second = ConversionGuard(model)
    first.remove()
    with pytest.raises(ConfigError, match="convert it before"):
        model.half()
    second.remove()
    assert model.half() is model


def test_methods_that_a_user_has_put_into_a_model_are_there_again_after_close(make_engine, disk_folder):
    """Libraries replace some in one model; the engine calls these, and leaves them."""
    model, asked = build_lora(dtype=torch.float32), []
    inner, layer = model.base_model.model, model.get_submodule("base_model.model.model.layers.0")
    own = {"load_state_dict": lambda *_, **__: asked.append("load"), "resize_token_embeddings": lambda *_: None}
    vars(inner).update(own)
    engine = make_engine(model, nvme=disk_folder)
    layer.load_state_dict = own["load_state_dict"]  # while it is managed
    engine.close()
    assert {name: vars(inner).get(name) for name in own} == own
    assert vars(layer)["load_state_dict"] == own["load_state_dict"] and asked == []


def test_what_is_compiled_is_refused_by_name_and_left_as_it_was(make_engine):
    class OptimizedModule(torch.nn.Module):
        """As `torch.compile` wraps a module, which imports much."""

        __module__ = "torch._dynamo.eval_frame"

        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

    with pytest.raises(ConfigError, match=r"^model: it is compiled.* do not compile engine\.model"):
        make_engine(OptimizedModule(build_plain(num_layers=1)), seq_len=8)
    model = build_plain(num_layers=1)
    model.layers[0]._compiled_call_impl = lambda *_: None  # as `Module.compile` does
    with pytest.raises(ConfigError, match=r"^model: layers\.0 is compiled"):
        make_engine(model, seq_len=8)
    model.layers[0]._compiled_call_impl = None
    engine = make_engine(model, seq_len=8)
    for module in (engine.model, engine.model.layers[0]):
        with pytest.raises(ConfigError, match=r"^compile: the compiler would trace"):
            module.compile()
