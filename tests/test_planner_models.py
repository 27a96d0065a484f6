"""Model shapes are exact: every family and well-known name against the parameters that transformers creates."""

import json

import pytest

from planners.shapes.architectures import FAMILIES, shape_from_config
from planners.shapes.model import Attention, Linear, stored_bytes
from planners.shapes.models import find_model, read_config
from planners.shapes.well_known import NAMED
from planners.units import ProblemError

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 97}
GQA = {**SMALL, "num_key_value_heads": 2}
LOW_RANK = {
    **SMALL, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10, "v_head_dim": 12, "moe_intermediate_size": 20, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
EXPERTS = {**GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}

CASES = {
    "llama": GQA,
    "llama biased": {**GQA, "attention_bias": True, "mlp_bias": True},
    "llama tied": {**GQA, "tie_word_embeddings": True, "head_dim": 20},
    "mistral": {**GQA, "sliding_window": 8},
    "qwen2": GQA,
    "qwen3": {**GQA, "head_dim": 16},
    "granite": GQA,
    "olmo2": {**GQA, "num_key_value_heads": 2},
    "phi": GQA,
    "phi3": {**GQA, "pad_token_id": 0},
    "gemma": {**GQA, "head_dim": 20},
    "gemma2": {**GQA, "head_dim": 20, "sliding_window": 8},
    "gemma3_text": {**GQA, "head_dim": 20, "sliding_window": 8},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64},
    "opt": {**SMALL, "ffn_dim": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 48},
    "opt narrow": {
        **SMALL, "ffn_dim": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 24,
        "do_layer_norm_before": False,
    },
    "falcon": {**SMALL},
    "falcon grouped": {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon serial": {**SMALL, "parallel_attn": False, "multi_query": False, "bias": True},
    "mixtral": EXPERTS,
    "qwen2_moe": {
        **GQA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        **GQA, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
    },
    "gpt_oss": EXPERTS,
    "deepseek_v2": LOW_RANK,
    "deepseek_v3": LOW_RANK,
    "deepseek_v2 full query": {**LOW_RANK, "q_lora_rank": None},
}  # fmt: skip


def created_params(config):
    """How many parameters transformers creates, on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_a_family_counts_what_transformers_creates(case):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(case.split()[0], **CASES[case])
    assert shape_from_config(json.loads(config.to_json_string(use_diff=False)), case).params == created_params(config)


def test_every_family_has_a_case():
    assert {case.split()[0] for case in CASES} | {"gemma3"} == set(FAMILIES)


@pytest.mark.parametrize("name", ["llama3-8b", "gpt3-13b", "qwen2.5-7b", "gemma2-9b", "gpt-oss-20b", "smollm2-135m"])
def test_a_well_known_name_is_exact(name):
    transformers = pytest.importorskip("transformers")
    settings = dict(NAMED[name])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    assert find_model(name).params == created_params(config)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMED)
def test_every_well_known_name_is_exact(name):
    test_a_well_known_name_is_exact(name)


@pytest.mark.parametrize(
    "name, params",
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3-405b", 405_853_388_800),
     ("mixtral-8x7b", 46_702_792_704), ("qwen2.5-72b", 72_706_203_648), ("smollm2-135m", 134_515_008)],
)  # fmt: skip
def test_published_counts(name, params):
    assert find_model(name).params == params


def test_nf4_bytes_are_those_of_the_codec():
    """4096 weights: 2048 bytes of codes, 64 scales of a byte, one float for 256 of them."""
    linear = Linear(name="x", in_features=64, out_features=64)
    assert stored_bytes(linear, 4) == 2048 + 64 + 4
    assert stored_bytes(linear, None) == 8192


def test_causal_attention_counts_the_keys_each_query_meets():
    """Four tokens meet 1 + 2 + 3 + 4 keys; with a window of two, 1 + 2 + 2 + 2."""
    sizes = {"query_features": 1, "key_features": 1, "value_features": 1, "output_features": 1, "kv_heads": 1}
    assert Attention(**sizes).flops_per_token(4) == 2 * 2 * 10 / 4
    assert Attention(**sizes, window=2).flops_per_token(4) == 2 * 2 * 7 / 4
    assert Attention(**sizes, window=9).flops_per_token(4) == Attention(**sizes).flops_per_token(4)


def test_a_folder_and_a_nested_configuration_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {**CASES["gemma3_text"]}}))
    assert (
        read_config(tmp_path).params
        == shape_from_config({"model_type": "gemma3_text", **CASES["gemma3_text"]}, "g").params
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json:1: not JSON"),
        ("[]", "expected an object, got list"),
        ('{"hidden_size": 4}', "has no key 'model_type'"),
        ('{\n"model_type": "lama"}', "config.json:2: model_type: unknown 'lama'; did you mean 'llama'"),
        ('{\n"model_type": "llama",\n"hidden_size": -4}', "config.json:3: hidden_size: must be between 1"),
        ('{"model_type": "llama",\n"hidden_size": "4"}', "config.json:2: hidden_size: expected a number"),
        ('{"model_type": "llama", "hidden_size": 4.5}', "expected a whole number"),
        ('{"model_type": "llama", "hidden_size": 1e99}', "must be between"),
        ('{"model_type": "llama", "hidden_size": true}', "expected a number"),
        ('{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}', "has no key"),
    ],
)
def test_a_bad_configuration_names_path_line_and_key(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ProblemError) as caught:
        read_config(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ProblemError, match="did you mean 'llama3-70b'"):
        find_model("llama-70b")
    with pytest.raises(ProblemError, match="no file"):
        find_model("nowhere/config.json")


def test_a_model_is_called_as_its_folder_or_its_well_known_name(tmp_path, monkeypatch):
    folder = tmp_path / "tiny-1.5b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **GQA}))
    monkeypatch.chdir(folder)
    for asked in (folder, folder / "config.json", "config.json", "."):
        assert find_model(str(asked)).name == "tiny-1.5b", asked
    (folder / "other.json").write_text((folder / "config.json").read_text())
    assert (find_model(str(folder / "other.json")).name, find_model("Llama3.2-1B").name) == ("other", "llama3.2-1b")
