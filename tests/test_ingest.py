"""From a checkpoint on disk to a model that trains: mapped, quantized, cached, and equal to the model in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from offload_rt._engine import Engine
from offload_rt.checkpoint import ingest
from offload_rt.errors import CheckpointError, QuantCoverageError
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, TARGETS, decode_in_place, in_turns, micro_batch


def saved_model(family: str, folder: Path) -> nn.Module:
    """A tiny checkpoint in several shards, and the model that transformers makes of it."""
    torch.manual_seed(3)
    model: Any = FAMILIES[family]().to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    return type(model).from_pretrained(folder, dtype=torch.bfloat16).train()  # type: ignore[no-any-return]


def on_meta(model: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)._from_config(model.config, dtype=torch.bfloat16).train()


def lora(family: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")


def losses(forward: Any) -> list[torch.Tensor]:
    found = []
    for index in range(2):
        torch.manual_seed(index)
        found.append(forward(**micro_batch(0, index)).loss.detach())
    return found


@pytest.mark.parametrize("family, bits", in_turns(["llama", "qwen", "gpt2", "moe"], [4, None]))
def test_a_meta_model_with_a_checkpoint_equals_the_model_in_memory(
    family: str, bits: int | None, tmp_path: Path
) -> None:
    (tmp_path / "nvme").mkdir()
    model = saved_model(family, tmp_path / "model")
    arguments: dict[str, Any] = {"checkpoint": tmp_path / "model", "bits": bits, "nvme": tmp_path / "nvme"}
    shape = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
    with Engine(on_meta(model), adapters=lora(family), **arguments, **shape) as engine:
        found = losses(engine)
        first = engine.report()
        engine.backward(engine(**micro_batch(0, 0)).loss)
        engine.step()
    if bits:
        decode_in_place(get_peft_model(model, lora(family)))
    assert not first["store_was_cached"]
    assert first["bytes_written"] == first["stored_bytes"]
    for got, want in zip(found, losses(model), strict=True):
        assert torch.equal(got, want)
    with Engine(on_meta(model), adapters=lora(family), **arguments, **shape) as again:
        assert again.report()["store_was_cached"]
        assert again.report()["bytes_written"] == 0
        assert all(torch.equal(a, b) for a, b in zip(losses(again), found, strict=True))


def test_adapters_on_meta_start_as_peft_starts_them_and_buffers_are_rebuilt(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path / "model")
    with Engine(on_meta(model), checkpoint=tmp_path / "model", adapters=lora("llama"), seq_len=SEQ_LEN) as engine:
        weights = dict(engine.model.named_parameters())
        reference = dict(get_peft_model(model, lora("llama")).named_parameters())
        for name, parameter in engine.trainable.items():
            if "lora_B" in name:
                assert not parameter.any()
            else:
                bound = reference[name].abs().max()
                assert 0.5 * bound < parameter.abs().max() < 2 * bound, name
            assert parameter.dtype == reference[name].dtype
        assert weights.keys() == reference.keys()
        want = dict(model.named_buffers())
        for name, buffer in engine.model.named_buffers():
            assert torch.equal(buffer, want[name.removeprefix("base_model.model.")]), name


def test_a_checkpoint_that_bitsandbytes_quantized_loads_unchanged(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    model = saved_model("llama", tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    quantized: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            packed, state = functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True, blocksize=64)
            quantized[name] = packed
            quantized.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
        else:
            quantized[name] = tensor
    other = tmp_path / "quantized"
    other.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in quantized.items()}, other / "model.safetensors")
    (other / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    with Engine(on_meta(model), checkpoint=other, adapters=lora("llama"), batch_size=2, seq_len=SEQ_LEN) as engine:
        found = losses(engine)
        assert engine.report()["decodes"] > 0
    decode_in_place(get_peft_model(model, lora("llama")))
    assert all(torch.equal(got, want) for got, want in zip(found, losses(model), strict=True))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(shard)
        name = "model.layers.2.mlp.up_proj.weight"
        if name in tensors:
            tensors[name][3, 5] = float("nan")
            save_file(tensors, shard)
    (tmp_path / "nvme").mkdir()
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\..*weight 197 "):
        Engine(
            on_meta(model), checkpoint=tmp_path / "model", adapters=lora("llama"), bits=4, nvme=tmp_path / "nvme",
            seq_len=SEQ_LEN,
        )  # fmt: skip
    # Nothing half-written: the store has no manifest, and a good checkpoint is encoded afresh.
    assert not list((tmp_path / "nvme").glob("*/manifest.json"))


def test_missing_tensors_are_named_and_the_model_is_left_alone(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path / "model")
    index_path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = tmp_path / "model" / index["weight_map"].pop(name)
    index_path.write_text(json.dumps(index))
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj"):
        Engine(on_meta(model), checkpoint=tmp_path / "model", adapters=lora("llama"), seq_len=SEQ_LEN)


class Convolutional(nn.Module):
    """A model most of whose frozen bytes are in tensors that are not quantized."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Conv1d(32, 32, 5, padding=2), nn.Linear(16, 16))
        self.layers = nn.ModuleList([layer]).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(1))


def test_bits_4_that_leaves_most_bytes_in_16_bits_is_an_error() -> None:
    with pytest.raises(QuantCoverageError, match=r"95%|9\d%"):
        Engine(Convolutional(), bits=4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "moe"])
def test_slabs_of_any_size_give_the_same_store(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small slabs, as a 70B model has them, against one per tensor."""
    model = saved_model(family, tmp_path / "model")
    weights = []
    for slab_bytes in (ingest.SLAB_BYTES, 1024):
        monkeypatch.setattr(ingest, "SLAB_BYTES", slab_bytes)
        nvme = tmp_path / str(slab_bytes)
        nvme.mkdir()
        Engine(
            on_meta(model), checkpoint=tmp_path / "model", adapters=lora(family), bits=4, nvme=nvme, seq_len=SEQ_LEN
        ).close()
        weights.append(next(nvme.glob("*/weights.bin")).read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("trains", [False, True], ids=["adapters", "all parameters"])
def test_the_weights_of_a_model_in_memory_are_let_go_of(trains: bool, tmp_path: Path) -> None:
    model = FAMILIES["llama"]().train()
    if not trains:
        model = get_peft_model(model, lora("llama"))
    held: list[weakref.ref[Any]] = []
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.requires_grad == trains:
            values = np.array(parameter.detach().numpy())  # lives as long as its memory is somebody's
            parameter.data = torch.from_numpy(values)
            held.append(weakref.ref(values))
            del values
    with Engine(model, nvme=tmp_path, batch_size=BATCH_SIZE, seq_len=SEQ_LEN) as engine:
        gc.collect()
        assert held and not any(reference() is not None for reference in held)
        assert torch.isfinite(engine(**micro_batch(0, 0)).loss)


def test_two_drives_share_the_blocks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    model = saved_model("llama", tmp_path / "model")
    nvme = [tmp_path / "a", tmp_path / "b"]
    with Engine(
        on_meta(model), checkpoint=tmp_path / "model", adapters=lora("llama"), bits=4, nvme=nvme, batch_size=2,
        seq_len=SEQ_LEN,
    ) as engine:  # fmt: skip
        found = losses(engine)
    sizes = [sum(file.stat().st_size for file in folder.glob("*/weights.bin")) for folder in nvme]
    assert min(sizes) > 0
    decode_in_place(get_peft_model(model, lora("llama")))
    assert all(torch.equal(got, want) for got, want in zip(found, losses(model), strict=True))


def test_a_model_without_adapters_does_not_import_peft():
    code = (
        "import sys, torch; from offload_rt.checkpoint.materialise import materialise_rest as rest;"
        "rest(torch.nn.Linear(2, 2, device='meta'), {}, set()); sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
