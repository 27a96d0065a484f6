"""Checkpoints laid against models: each stream must be, bit for bit, what transformers' loader gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from offload_rt.checkpoint.mapping import Mapping, map_checkpoint
from offload_rt.checkpoint.safetensors_reader import open_checkpoint
from offload_rt.checkpoint.sources import TensorSource, materialise
from offload_rt.config import EngineConfig
from offload_rt.errors import CheckpointError
from offload_rt.wiring.workload import find_workload
from tests.tiny_checkpoints import CONFIGS, Plain, config, lora, meta_model, new_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def streamed(source: TensorSource) -> torch.Tensor:
    pieces = [slab.clone() for slab in source.slabs(1000, 2)]
    return torch.cat(pieces).view(source.shape)


def assert_maps_as_transformers_loads(mapping: Mapping, model: nn.Module, loaded: dict[str, torch.Tensor]) -> None:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert names <= set(mapping.sources)
    assert (mapping.missing, mapping.unused) == ([], [])
    for name, source in mapping.sources.items():
        found = streamed(source)
        assert found.dtype == loaded[name].dtype
        assert torch.equal(bits(found), bits(loaded[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_streams_equal_what_from_pretrained_loads(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = new_model(name, dtype)
    save(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    live = meta_model(name, dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(live, checkpoint)
        assert all(source.streamed for source in mapping.sources.values())
        assert_maps_as_transformers_loads(mapping, live, loaded.state_dict())
        assert mapping.casts == {}
    # the loader did load: the values are those that were saved
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_stacked_experts_come_from_a_checkpoint_with_a_tensor_per_expert(tmp_path: Path, name: str) -> None:
    save(new_model(name), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        per_expert = [key for key in checkpoint.tensors if ".experts.10." in key]
        assert len(per_expert) == 2 * 3  # layers times w1, w2, w3
        mapping = map_checkpoint(meta_model(name), checkpoint)
        stacks = [key for key in mapping.keys if key.endswith("experts.gate_up_proj")]
        assert [len(mapping.keys[key]) for key in stacks] == [24, 24]
        # an expert at a time: no slab crosses from one into the next
        source = mapping.sources[stacks[0]]
        per_expert_elements = source.shape[1] * source.shape[2]
        experts = [slab.clone() for slab in source.slabs(1 << 20, boundary=per_expert_elements)]
        assert [expert.numel() for expert in experts] == [per_expert_elements] * 12
        assert torch.equal(torch.stack(experts).view(source.shape), materialise(source))


def test_experts_stored_as_stacks_map_one_to_one(tmp_path: Path) -> None:
    model = new_model("mixtral")
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(meta_model("mixtral"), checkpoint)
        assert_maps_as_transformers_loads(mapping, model, model.state_dict())


def test_missing_expert_is_a_shape_error(tmp_path: Path) -> None:
    model = new_model("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".experts.3." not in k}, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"shape \(11, .*gate_up_proj of the model is \(12, "),
    ):
        map_checkpoint(meta_model("mixtral"), checkpoint)
    save_file({k: v for k, v in tensors.items() if ".experts.3.w1" not in k}, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match="do not convert into .*gate_up"),
    ):
        map_checkpoint(meta_model("mixtral"), checkpoint)


def test_tied_weights_share_one_source(tmp_path: Path) -> None:
    save(new_model("llama tied"), tmp_path)
    for live in (meta_model("llama tied"), new_model("llama tied")):
        with open_checkpoint(tmp_path) as checkpoint:
            assert "lm_head.weight" not in checkpoint.tensors
            mapping = map_checkpoint(live, checkpoint)
        assert mapping.ties == {"lm_head.weight": "model.embed_tokens.weight"}
        assert mapping.sources["lm_head.weight"] is mapping.sources["model.embed_tokens.weight"]


def test_tied_weights_are_found_under_the_other_name(tmp_path: Path) -> None:
    model = new_model("llama tied")
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != "model.embed_tokens.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(meta_model("llama tied"), checkpoint)
        assert mapping.ties == {"model.embed_tokens.weight": "lm_head.weight"}
        assert_maps_as_transformers_loads(mapping, model, model.state_dict())
        # two objects that transformers declares as tied: a source for both all the same
        untied = meta_model("llama tied")
        untied.lm_head.weight = nn.Parameter(torch.empty_like(untied.lm_head.weight))
        assert map_checkpoint(untied, checkpoint).ties == mapping.ties


def test_tied_weights_stored_twice_must_be_equal(tmp_path: Path) -> None:
    model = new_model("llama tied")
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(meta_model("llama tied"), checkpoint)
        assert (mapping.missing, mapping.unused) == ([], [])
        assert list(mapping.ties) == ["lm_head.weight"]
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match="tie_word_embeddings=False"),
    ):
        map_checkpoint(meta_model("llama tied"), checkpoint)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "mixtral"])
def test_base_model_checkpoint_maps_into_a_causal_model_and_back(tmp_path: Path, name: str) -> None:
    model = new_model(name)
    base = model.base_model
    save(base, tmp_path / "base")
    save(model, tmp_path / "causal")
    tied = config(name).tie_word_embeddings
    head = "lm_head.weight"
    with open_checkpoint(tmp_path / "base") as checkpoint:
        mapping = map_checkpoint(meta_model(name), checkpoint)
        assert mapping.missing == ([] if tied else [head])
        assert mapping.unused == []
        loaded = model.state_dict()
        assert set(mapping.sources) == set(loaded) - set(mapping.missing)
        for key, source in mapping.sources.items():
            assert torch.equal(streamed(source), loaded[key]), key
    with torch.device("meta"):
        live = transformers.AutoModel.from_config(config(name))
    with open_checkpoint(tmp_path / "causal") as checkpoint:
        mapping = map_checkpoint(live, checkpoint)
        assert mapping.missing == []
        assert mapping.unused == ([] if tied else [head])
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "causal").state_dict()
        assert set(mapping.sources) == set(loaded)
        for key, source in mapping.sources.items():
            assert torch.equal(streamed(source), loaded[key]), key


def test_old_gpt2_checkpoint_without_prefix_and_with_masks(tmp_path: Path) -> None:
    model = new_model("gpt2")
    old = {k.removeprefix("transformer."): v.clone() for k, v in model.state_dict().items() if "lm_head" not in k}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file({**old, **masks, "stranger": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(meta_model("gpt2"), checkpoint)
        assert (mapping.missing, mapping.unused) == ([], ["stranger"])
        for key, source in mapping.sources.items():
            assert torch.equal(streamed(source), model.state_dict()[key])


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("wrap", ["lora", "embedding", "experts", "trainable tokens", "injected", "prompt"])
def test_peft_model_maps_through_its_base_names(tmp_path: Path, name: str, wrap: str) -> None:
    model = new_model(name)
    save(model, tmp_path)
    live = meta_model(name)
    embedding = "wte" if name == "gpt2" else "embed_tokens"
    if wrap == "lora":
        wrapped = lora(live)
    elif wrap == "embedding":
        wrapped = lora(live, target_modules=[embedding])
    elif wrap == "experts":
        if name != "mixtral":
            pytest.skip("has no stacked experts")
        wrapped = lora(live, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    elif wrap == "trainable tokens":
        wrapped = lora(new_model(name), trainable_token_indices={embedding: [3, 4]})
    elif wrap == "injected":
        wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear"), live)
    else:
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        wrapped = peft.get_peft_model(new_model(name), settings)
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(wrapped, checkpoint)
    assert (mapping.missing, mapping.unused) == ([], [])
    adapters = ("lora_", "trainable_tokens_", "prompt_encoder")
    named = {**dict(wrapped.named_parameters(remove_duplicate=False)), **dict(wrapped.named_buffers())}
    parameters = [n for n, _ in wrapped.named_parameters(remove_duplicate=False)]
    assert any(mark in n for n in parameters for mark in adapters)
    wanted = {n for n in parameters if not any(mark in n for mark in adapters)}
    assert set(mapping.sources) == wanted
    loaded = model.state_dict()
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(wrapped, checkpoint)
        for key, source in mapping.sources.items():
            plain = key.removeprefix("base_model.model." if wrap != "prompt" else "base_model.")
            if wrap == "prompt" and plain == "word_embeddings.weight":
                plain = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
            for infix in (".base_layer", ".original_module", ".token_adapter"):
                plain = plain.replace(infix, "")
            assert source.shape == tuple(named[key].shape)
            assert torch.equal(streamed(source), loaded[plain]), key


def test_module_to_save_gets_the_modules_values_while_on_meta(tmp_path: Path) -> None:
    save(new_model("llama"), tmp_path)
    copy = "base_model.model.lm_head.modules_to_save.default.weight"
    original = "base_model.model.lm_head.original_module.weight"
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(lora(meta_model("llama"), modules_to_save=["lm_head"]), checkpoint)
        assert mapping.sources[copy] is mapping.sources[original]
        assert mapping.ties == {copy: original}
        trained = map_checkpoint(lora(new_model("llama"), modules_to_save=["lm_head"]), checkpoint)
        assert original in trained.sources
        assert copy not in trained.sources
        assert trained.missing == []


def test_dtype_casts_are_recorded_and_follow_the_model(tmp_path: Path) -> None:
    save(new_model("qwen2"), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(meta_model("qwen2", torch.bfloat16), checkpoint)
        assert set(mapping.casts) == set(mapping.sources)
        assert set(mapping.casts.values()) == {(torch.float32, torch.bfloat16)}
        assert mapping.sources["model.norm.weight"].dtype == torch.float32


def test_plain_module_maps_names_one_to_one(tmp_path: Path) -> None:
    model = Plain()
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}
    save_file({**tensors, "other": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(model, checkpoint)
        assert set(mapping.sources) == set(model.state_dict())
        assert "layers.1.num_batches_tracked" in mapping.sources
        assert (mapping.missing, mapping.unused) == ([], ["other"])
        assert mapping.ties == {"head.weight": "layers.0.weight"}
        for key, source in mapping.sources.items():
            assert torch.equal(materialise(source), model.state_dict()[key])
    del tensors["layers.0.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert map_checkpoint(model, checkpoint).missing == ["layers.0.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            torch.zeros(4, 5),
            r"model.safetensors: layers.0.weight: shape \(4, 5\), but layers.0.weight of the model is",
        ),
        (torch.zeros(4, 4, dtype=torch.int8), "torch.int8 data for layers.0.weight, which is torch.float32"),
        (torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn data for layers.0.weight"),
    ],
)
def test_what_does_not_fit_is_an_error_with_evidence(tmp_path: Path, change: torch.Tensor, message: str) -> None:
    save_file({"layers.0.weight": change, "layers.0.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        map_checkpoint(Plain(), checkpoint)


# ---------------------------------------------------------------- conversions other than stacks


def custom_rules(monkeypatch: pytest.MonkeyPatch, rules: Callable[[], list[Any]]) -> None:
    """Has transformers convert Llama checkpoints by `rules`, in its own loader and in ours."""
    import transformers.conversion_mapping as conversion_mapping

    real = conversion_mapping.get_checkpoint_conversion_mapping

    def get(kind: str) -> Any:
        return rules() if kind == "llama" else real(kind)

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", get)


@pytest.mark.parametrize("case", ["chunk", "transpose", "cat 1", "permute", "chunk and permute"])
def test_converters_of_every_kind_equal_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from transformers import core_model_loading as ops

    qkv = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    square = {"num_key_value_heads": 4}
    monkeypatch.setitem(CONFIGS, "llama", ("LlamaConfig", {"tie_word_embeddings": False, **square}))
    tensors = {k: v.clone() for k, v in new_model("llama").state_dict().items()}
    converter: Callable[[], Any]
    if case in ("chunk", "chunk and permute"):
        more = [ops.PermuteForRope(permute_layer_names=["q_proj", "k_proj"])] if "permute" in case else []
        converter = lambda: ops.WeightConverter("self_attn.qkv.weight", list(qkv), [ops.Chunk(dim=0), *more])  # noqa: E731
        for i in range(2):
            parts = [tensors.pop(f"model.layers.{i}.{name}") for name in qkv]
            tensors[f"model.layers.{i}.self_attn.qkv.weight"] = torch.cat(parts)
    elif case == "transpose":
        converter = lambda: ops.WeightConverter("mlp.down", "mlp.down_proj.weight", [ops.Transpose(0, 1)])  # noqa: E731
        for i in range(2):
            whole = tensors.pop(f"model.layers.{i}.mlp.down_proj.weight")
            tensors[f"model.layers.{i}.mlp.down"] = whole.T.contiguous()
    elif case == "cat 1":
        converter = lambda: ops.WeightConverter(  # noqa: E731
            ["mlp.left", "mlp.right"], "mlp.down_proj.weight", [ops.Concatenate(dim=1)]
        )
        for i in range(2):
            whole = tensors.pop(f"model.layers.{i}.mlp.down_proj.weight")
            tensors[f"model.layers.{i}.mlp.left"] = whole[:, :11].contiguous()
            tensors[f"model.layers.{i}.mlp.right"] = whole[:, 11:].contiguous()
    else:
        converter = lambda: ops.WeightConverter(  # noqa: E731
            "self_attn.wq.weight", "self_attn.q_proj.weight", [ops.PermuteForRope()]
        )
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.wq.weight"] = tensors.pop(f"model.layers.{i}.{qkv[0]}")
    custom_rules(monkeypatch, lambda: [converter()])
    config("llama").save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    live = meta_model("llama")
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(live, checkpoint)
        assert_maps_as_transformers_loads(mapping, live, loaded.state_dict())
        whole = {n for n, source in mapping.sources.items() if not source.streamed}
        if "permute" in case:
            wanted = qkv if case == "chunk and permute" else qkv[:1]
            assert whole == {f"model.layers.{i}.{name}" for i in range(2) for name in wanted}
        else:
            assert whole == set()


@pytest.mark.parametrize("has_bias", [True, False])
def test_what_a_checkpoint_holds_for_nothing_is_warned_of(
    tmp_path: Path, has_bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its biases it would be another model."""
    tensors = new_model("llama").state_dict()
    if has_bias:
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        find_workload(lora(meta_model("llama")), checkpoint, EngineConfig())
    said = "1 tensors are not used, as the model has none of their name, first: model.layers.1.self_attn.q_proj.bias"
    assert (said in caplog.text) == has_bias and ("not used" in caplog.text) == has_bias
