"""An adapter merged into its base model, from files to files: to the bits of peft's merge in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload_rt.checkpoint import merge
from offload_rt.checkpoint.merge import main, merge_adapter
from offload_rt.checkpoint.safetensors_writer import SafetensorsWriter
from offload_rt.errors import CheckpointError, CheckpointVerifyError, ConfigError, UnsupportedModule
from offload_rt.memory.allocations import AllocationMeter
from tests.test_checkpoint_quantized import quantized
from tests.tiny_checkpoints import CONFIGS, lora, new_model, peft, transformers

torch.set_num_threads(1)
STACKS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "tied": ("llama tied", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 4}}),
    "fan_in_fan_out": ("gpt2", {"fan_in_fan_out": True}),
    "stacks of experts": ("qwen3 moe", STACKS),
    "stacks with biases": ("gpt_oss", STACKS),
    "experts as linears": ("mixtral", {}),
    "dora": ("llama", {"use_dora": True}),
    "head in full": ("llama", {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
}
DEFAULT = ("lora", "fan_in_fan_out", "stacks of experts", "dora", "head in full")


def make(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Path, Path]:
    """A base model and an adapter that changes all that it stands on."""
    base, adapter = folder / "base", folder / "adapter"
    model = new_model(name, dtype)
    model.save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("the base model's")
    tuned = lora(model, **options)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    tuned.save_pretrained(adapter)
    return base, adapter


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merged_in_memory(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    return tensors(out)


def odd(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys() and found
    return [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "case", [*DEFAULT, *(pytest.param(case, marks=pytest.mark.full) for case in CASES if case not in DEFAULT)]
)
def test_what_is_merged_is_what_peft_merges_in_memory(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, options = CASES[case]
    base, adapter = make(tmp_path, name, dtype, **options)
    expected = merged_in_memory(base, adapter, tmp_path / "peft")
    out = tmp_path / "out"
    assert merge_adapter(base, adapter, out, max_shard_bytes=20_000) == []
    found, before = tensors(out), tensors(base)
    assert odd(found, expected) == []
    assert 0 < len(odd(found, before)) < len(found)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists() and not (out / "README.md").exists()
    transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")


def test_an_adapter_in_16_bits_is_merged_in_32(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    merge_adapter(base, adapter, tmp_path / "out")
    assert odd(tensors(tmp_path / "out"), merged_in_memory(base, adapter, tmp_path / "peft")) == []


def test_each_weight_keeps_the_dtype_of_its_file(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    file, wide = base / "model.safetensors", ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")
    before = {name: tensor.float() if name in wide else tensor for name, tensor in load_file(file).items()}
    before[wide[0]] += 1e-6  # more than 16 bits hold
    save_file(before, file, metadata={"format": "pt"})
    merge_adapter(base, adapter, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in before.items()}
    assert sorted(odd(found, before)) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_name, changes = CONFIGS["llama"]
    peaks, sizes = [], []
    for num_layers in (1, 5):
        monkeypatch.setitem(CONFIGS, "llama", (class_name, {**changes, "num_hidden_layers": num_layers}))
        base, adapter = make(tmp_path / str(num_layers), "llama")
        with AllocationMeter() as meter:
            merge_adapter(base, adapter, tmp_path / str(num_layers) / "out")
        peaks.append(meter.peak_bytes)
        sizes.append((base / "model.safetensors").stat().st_size)
    largest = 96 * 32 * 2
    assert sizes[1] > 2 * sizes[0] and largest < peaks[0] <= peaks[1] <= peaks[0] + 1024 and peaks[1] < 6 * largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "changes one of model.embed_tokens.weight and lm_head.weight"),
        ({"modules_to_save": ["embed_tokens"]}, "are one tensor in the base model"),
    ],
)
def test_tied_weights_of_which_one_is_tuned_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama tied", **options)
    with pytest.raises(UnsupportedModule, match=message):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"], r=2), "'pissa' takes something"),
        (
            lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
            r"q_proj: .* \(Linear\): .* reads something that no",
        ),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING changes what the model reads"),
    ],
)
def test_adapters_that_their_files_do_not_say_all_of_are_refused(
    make_config: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    """Of weights that are not the base model's, with indices that are in no file, of nothing to merge."""
    model = new_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "base")
    config = make_config()
    config.task_type = "CAUSAL_LM"
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModule, match=message):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": "x"}, {"num_attention_heads": 0}, None])
def test_a_configuration_that_is_none_of_the_model_is_a_mistake(changes: Any, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    file = base / "config.json"
    file.write_text(json.dumps(changes and {**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigError, match="BASE: "):
        merge_adapter(base, adapter, tmp_path / "out")


def test_a_base_model_in_4_bits_is_refused(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama")
    file, name = base / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    values = load_file(file)
    save_file({**values, **quantized({name: values[name]})}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds weights in 4 bits; merge into the 16-bit model"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_a_base_model_that_only_its_configuration_calls_quantized_is_refused(tmp_path: Path) -> None:
    """Whoever loads what was merged would quantize it, or fail."""
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    file = base / "config.json"
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config .*\(bitsandbytes\)"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_word_on_quantization_is_none(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    file = base / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "quantization_config": {}}))
    merge_adapter(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # which refuses an entry that is empty


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama")
    out, file = tmp_path / "out", adapter / "adapter_model.safetensors"
    values = load_file(file)
    first = next(iter(values))

    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            merge_adapter(base, adapter, out)
        assert not out.exists()

    save_file({name: tensor for name, tensor in values.items() if name != first}, file)
    refused(CheckpointError, f"lacks 1 tensors that an adapter of this configuration has, first: {first}")
    save_file({**values, "more": torch.zeros(1)}, file)
    refused(CheckpointError, "has 1 tensors that an adapter of this configuration has not, first: more")
    save_file({**values, first: values[first][:, :-1].contiguous()}, file)
    refused(CheckpointError, "is it an adapter of this base model")
    save_file({**values, first: torch.full_like(values[first], torch.inf)}, file)
    refused(CheckpointError, "has values that are not finite")
    save_file(values, file)
    configuration = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**configuration, "target_modules": ["none_such"]}))
    refused(UnsupportedModule, "none_such")
    (adapter / "adapter_config.json").unlink()
    refused(ConfigError, "ADAPTER: .* has no adapter_config.json")


def test_a_merge_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(tmp_path, "llama")
    out = tmp_path / "out"
    merge_adapter(base, adapter, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = make(tmp_path / "other", "llama", target_modules=["q_proj"])[1]
    write = SafetensorsWriter._write

    def write_wrongly(writer: SafetensorsWriter, offset: int, data: memoryview) -> None:
        write(writer, offset, memoryview(bytes(len(data))) if offset > 10_000 else data)

    with monkeypatch.context() as broken:
        broken.setattr(SafetensorsWriter, "_write", write_wrongly)
        with pytest.raises(CheckpointVerifyError, match="reads back with checksum"):
            merge_adapter(base, other, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "other", "out"}
    with pytest.raises(ConfigError, match="is what would be read"):
        merge_adapter(base, adapter, base)


def test_the_command_says_what_it_has_done_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make(tmp_path, "llama")
    file = base / "model.safetensors"
    save_file({**load_file(file), "vision.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    words = [str(base), str(adapter), str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "merged into it" in shown.out and "1 tensors of BASE are none of the model's, first: vision" in shown.err
    shutil.rmtree(adapter)
    assert main(words) == 2 and "ADAPTER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--bits 4" in capsys.readouterr().out and merge.EPILOG
