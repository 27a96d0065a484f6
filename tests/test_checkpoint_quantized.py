"""Checkpoints that hold quantized weights: bitsandbytes NF4 is given as raw streams, other formats are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offload_rt
from offload_rt.checkpoint.mapping import map_checkpoint
from offload_rt.checkpoint.safetensors_reader import open_checkpoint
from offload_rt.checkpoint.sources import materialise
from offload_rt.errors import CheckpointError
from tests.tiny_checkpoints import Plain, lora, meta_model, new_model


def quantized(tensors: dict[str, torch.Tensor], *, nested: bool = True) -> dict[str, torch.Tensor]:
    """The tensors as bitsandbytes stores them: 2-d weights of layers in NF4, the rest as they are."""
    functional = pytest.importorskip("bitsandbytes").functional
    result = {}
    for key, value in tensors.items():
        if "layers" not in key or value.dim() != 2:
            result[key] = value.clone()
            continue
        packed, state = functional.quantize_4bit(value, quant_type="nf4", compress_statistics=nested)
        result[key] = packed
        for suffix, part in state.as_dict(packed=True).items():
            result[f"{key}.{suffix}"] = part
    return result


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_weights_are_given_as_raw_streams(tmp_path: Path, nested: bool) -> None:
    tensors = quantized(new_model("llama", torch.bfloat16).state_dict(), nested=nested)
    save_file(tensors, tmp_path / "model.safetensors")
    live = lora(meta_model("llama", torch.bfloat16))
    with open_checkpoint(tmp_path) as checkpoint:
        mapping = map_checkpoint(live, checkpoint)
        assert (mapping.missing, mapping.unused, mapping.casts) == ([], [], {})
        assert len(mapping.prequantized) == 2 * 7
        assert not set(mapping.prequantized) & set(mapping.sources)
        name = "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"
        bnb = mapping.prequantized[name]
        key = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(materialise(bnb.packed), tensors[key])
        assert set(bnb.parts) == {
            "absmax",
            "quant_map",
            *(["nested_absmax", "nested_quant_map"] if nested else []),
        }
        for suffix, part in bnb.parts.items():
            assert torch.equal(materialise(part), tensors[f"{key}.{suffix}"])
        assert (bnb.state["quant_type"], bnb.state["blocksize"]) == ("nf4", 64)
        assert tuple(bnb.state["shape"]) == (32, 48)
        assert ("nested_offset" in bnb.state) == nested


def json_tensor(value: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_map": None}, "quant_map is missing"),
        ({"nested_absmax": None}, "nested_absmax is missing"),
        ({"quant_state.bitsandbytes__nf4": json_tensor({"shape": [4, 8]})}, r"says 32 elements \(4, 8\)"),
        ({"quant_state.bitsandbytes__nf4": json_tensor({})}, "no JSON with a shape"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, "no JSON with a shape"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(9)}, "is no JSON text"),
        (
            {"quant_state.bitsandbytes__nf4": json_tensor({"shape": [2, 8]})},
            r"shape \(2, 8\), but layers.0.weight",
        ),
        ({"quant_state.bitsandbytes__nf4": None, "quant_state.bitsandbytes__fp4": json_tensor({})}, "fp4"),
    ],
)
def test_broken_bitsandbytes_weights_are_errors(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = quantized({"layers.0.weight": torch.randn(4, 4)})
    for suffix, value in change.items():
        tensors.pop(f"layers.0.weight.{suffix}", None)
        if value is not None:
            tensors[f"layers.0.weight.{suffix}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        map_checkpoint(Plain(), checkpoint)


def test_quantized_experts_that_would_merge_are_refused(tmp_path: Path) -> None:
    new_model("mixtral", torch.bfloat16).save_pretrained(tmp_path)
    tensors = quantized(load_file(tmp_path / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match="cut or merged"),
    ):
        map_checkpoint(meta_model("mixtral", torch.bfloat16), checkpoint)


def test_codes_stored_under_another_dtype_are_taken_as_bytes(tmp_path: Path) -> None:
    tensors = quantized({"layers.0.weight": torch.randn(4, 4)})
    tensors["layers.0.weight"] = tensors["layers.0.weight"].view(-1).view(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        packed = map_checkpoint(Plain(), checkpoint).prequantized["layers.0.weight"].packed
        assert packed.dtype == torch.bfloat16
        assert torch.equal(materialise(packed).view(torch.uint8), tensors["layers.0.weight"].view(torch.uint8))


@pytest.mark.parametrize(("suffix", "kind"), [("qweight", "GPTQ"), ("weight_packed", "compressed-tensors")])
def test_other_quantized_formats_are_named(tmp_path: Path, suffix: str, kind: str) -> None:
    tensors = {k: v.clone() for k, v in Plain().state_dict().items()}
    del tensors["layers.0.weight"], tensors["head.weight"]
    tensors[f"layers.0.{suffix}"] = torch.zeros(2, 4, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=f"is stored as {kind}"):
        map_checkpoint(Plain(), checkpoint)


@pytest.mark.parametrize("shape", [(4, 4), (4, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_under_their_own_name_are_refused_by_their_dtype(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    tensors = {k: v.clone() for k, v in Plain().state_dict().items() if k != "head.weight"}
    tensors["layers.0.weight"] = torch.zeros(shape).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=f"{dtype} data for .*weight, .*only bitsandbytes NF4 is read"),
    ):
        map_checkpoint(Plain(), checkpoint)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized by 'hqq', and only bitsandbytes NF4 is read"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantized by 'bitsandbytes', and only bitsandbytes NF4 is read",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ""),
        ({"quantization_config": {}}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_weights_that_are_missing_are_explained_by_the_configuration(
    tmp_path: Path, config: object, words: str
) -> None:
    """HQQ and others have names of their own for all parts of a weight."""
    tensors = new_model("llama").state_dict()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file({**tensors, "model.layers.0.mlp.up_proj.W_q": torch.zeros(8)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has nothing for 1 tensors") as caught:
        offload_rt.engine(lora(meta_model("llama")), checkpoint=tmp_path, device="cpu", device_memory="100MiB")
    assert words in str(caught.value) and ("config.json" in str(caught.value)) == bool(words)


def test_mxfp4_experts_are_named(tmp_path: Path) -> None:
    tensors = {k: v.clone() for k, v in new_model("gpt_oss").state_dict().items()}
    for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
        del tensors[key]
        tensors[f"{key}_blocks"] = torch.zeros(4, 96, 1, 16, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.zeros(4, 96, 1, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="is stored as MXFP4"):
        map_checkpoint(meta_model("gpt_oss"), checkpoint)
