"""Adapters that peft saved go on training: to the bits of plain peft, or refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload_rt.errors import CheckpointError, ConfigError, TargetNotMatched, UnsupportedModule
from planners.plans.activations import Action, whole_batch
from tests.test_merge import make
from tests.tiny_checkpoints import meta_model, new_model, peft, transformers

torch.set_num_threads(1)
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 7}},
    "dora": {"use_dora": True, "target_modules": ["q_proj"]},
    "modules in full": {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def in_plain_peft(base: Path, adapter: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and what trains, by name, behind one step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tuned = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    loss = tuned(**batch()).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach()), {name: p.detach() for name, p in tuned.named_parameters() if p.requires_grad}


def configuration(adapter: Path) -> dict[str, Any]:
    """With the targets, which peft has as a set, in order."""
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return {**found, "target_modules": sorted(found["target_modules"])}


def placed(place: str, base: Path, name: str = "llama") -> tuple[Any, Path | None]:
    if place == "on meta":
        return meta_model(name, torch.bfloat16), base
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), None


def goes_on_as_in_peft(
    place: str, name: str, base: Path, adapter: Path, make_engine: Callable[..., Any], **options: Any
) -> Any:
    """The engine, behind one step that has the bits of plain peft's."""
    loss, expected = in_plain_peft(base, adapter)
    model, checkpoint = placed(place, base, name)
    engine = make_engine(model, adapters=adapter, checkpoint=checkpoint, device="cpu", **options)
    engine.model.train()
    assert engine.train_batch([batch()]) == loss
    assert expected.keys() == engine.trainable.keys()
    for parameter, value in expected.items():
        assert torch.equal(engine.trainable[parameter].detach(), value), parameter
    return engine


@pytest.mark.parametrize("place", ["on meta", "in memory"])
@pytest.mark.parametrize("case", list(CASES))
def test_its_first_step_has_the_bits_of_plain_peft(
    case: str, place: str, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    base, adapter = make(tmp_path, "llama", **CASES[case])
    engine = goes_on_as_in_peft(place, "llama", base, adapter, make_engine)
    engine.save_pretrained(tmp_path / "out")
    before, after = (configuration(folder) for folder in (adapter, tmp_path / "out"))
    assert after == {**before, "base_model_name_or_path": after["base_model_name_or_path"]}
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert again.keys() >= load_file(adapter / "adapter_model.safetensors").keys() - {
        f"base_model.model.{name}.base_layer.weight" for name in ("lm_head", "model.embed_tokens")
    }


COMPUTED_BY_PEFT: dict[str, tuple[Any, str]] = {
    "places from a seed": (peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]), ""),
    "projections": (peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False), "vera_A.default is not in"),
    "indices": (peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]), "oft_R.default.rows is not in its file"),
    "ranks": (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "ranknum.default is not in its file"),
    "a decomposition": (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="mica"), "LORA: peft computes"),
}


@pytest.mark.parametrize("place", ["on meta", "in memory"])
@pytest.mark.parametrize("case", list(COMPUTED_BY_PEFT))
def test_what_peft_computes_and_no_file_has_is_there_or_named(
    case: str, place: str, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    (config, refused), base, adapter = COMPUTED_BY_PEFT[case], tmp_path / "base", tmp_path / "adapter"
    config.task_type = "CAUSAL_LM"
    model = new_model("llama", torch.bfloat16)
    model.save_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    if place == "in memory" or not refused:
        goes_on_as_in_peft(place, "llama", base, adapter, make_engine)
        return
    with pytest.raises(UnsupportedModule, match=f"{refused}.*on the meta device"):
        make_engine(placed(place, base)[0], adapters=adapter, checkpoint=base, device="cpu")


@pytest.mark.parametrize("action", [Action.RECOMPUTE, Action.KEEP])
def test_a_sparse_adapter_trains(action: Action, make_engine: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = new_model("llama", torch.bfloat16)
    model.save_pretrained(base)
    config = peft.ShiraConfig(r=2, target_modules=["q_proj"], random_seed=3, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(adapter)
    options = {"activations": whole_batch(action)} if action is Action.KEEP else {}
    engine = goes_on_as_in_peft("in memory", "llama", base, adapter, make_engine, options=options)
    assert ("activations kept" in engine.summary()) == (action is Action.KEEP)


@pytest.mark.parametrize("is_cast", [True, False], ids=["float32", "bfloat16"])
def test_replicated_layers_have_the_losses_of_peft_or_are_refused(
    is_cast: bool, make_engine: Callable[..., Any]
) -> None:
    """Their weights are those of other layers, and adapters are all that they have of their own."""

    def made() -> Any:
        config = peft.LoraConfig(
            target_modules=["q_proj"], task_type="CAUSAL_LM", layer_replication=[[0, 2], [0, 2]],
            init_lora_weights=False,
        )  # fmt: skip
        model = new_model("llama", torch.bfloat16)
        torch.manual_seed(5)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=is_cast).train()

    if not is_cast:
        with pytest.raises(UnsupportedModule, match=r"lora_A.*bfloat16.*layer_replication.*autocast_adapter_dtype"):
            make_engine(made(), device="cpu")
        return
    plain = made()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    engine = make_engine(made(), device="cpu")
    for _ in range(2):
        optimizer.zero_grad()
        loss = plain(**batch()).loss
        loss.backward()
        optimizer.step()
        assert engine.train_batch([batch()]) == float(loss.detach())


def test_an_adapter_that_was_put_on_a_model_on_meta_is_refused(make_engine: Callable[..., Any], tmp_path: Path) -> None:
    base, _ = make(tmp_path, "llama", target_modules=["q_proj"])
    config = peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModule, match=r"q_proj\.hada_w1_a\.default: .* gave it no values; give its config"):
        make_engine(peft.get_peft_model(meta_model("llama", torch.bfloat16), config), checkpoint=base, device="cpu")


def test_biases_that_train_in_their_place_go_on_in_memory(make_engine: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama tied", target_modules=["q_proj"], bias="all")
    goes_on_as_in_peft("in memory", "llama tied", base, adapter, make_engine)
    with pytest.raises(UnsupportedModule, match=r"q_proj.base_layer.bias trains in a module of the base model's"):
        make_engine(placed("on meta", base, "llama tied")[0], adapters=adapter, checkpoint=base, device="cpu")


def weights_with(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(Q_A), f"lacks 1 tensors that an adapter of this configuration has, first: {Q_A}"),
        (lambda w: w.update({"odd": w[Q_A].clone()}), "has 1 tensors .* has not, first: odd"),
        (lambda w: w.update({Q_A: w[Q_A][:1].clone()}), rf"{Q_A} has shape \(1, 32\), the model's has \(2, 32\)"),
        (lambda w: w[Q_A].fill_(float("inf")), f"{Q_A} has values that are not finite"),
        (lambda w: w.update({Q_A: w[Q_A].to(torch.int32)}), f"{Q_A} is torch.int32"),
        (
            lambda w: w["base_model.model.lm_head.base_layer.weight"].add_(1),
            "lm_head.base_layer.weight is a weight of the base model's, and not equal",
        ),
    ],
)
@pytest.mark.parametrize("place", ["on meta", "in memory"])
def test_what_does_not_fit_is_named_and_the_model_is_as_it_was(
    place: str, change: Callable[[dict[str, torch.Tensor]], object], words: str, make_engine: Any, tmp_path: Path
) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])
    weights_with(adapter, change)
    model, checkpoint = placed(place, base)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=words):
        make_engine(model, adapters=str(adapter), checkpoint=checkpoint, device="cpu")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")


def test_a_folder_that_is_none_or_cannot_go_on_is_refused(make_engine: Any, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    model = meta_model("llama", torch.bfloat16)

    def refuses(kind: type[Exception], words: str, folder: Path = adapter) -> None:
        with pytest.raises(kind, match=words):
            make_engine(model, adapters=folder, checkpoint=base, device="cpu")

    def configured(**changes: Any) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    refuses(ConfigError, "none is not a folder", tmp_path / "none")
    refuses(ConfigError, "has no adapter_config.json", base)
    configured(target_modules=["w_q"])
    refuses(TargetNotMatched, "does not fit the model.*w_q")
    configured(target_modules=["q_proj"], init_lora_weights="pissa")
    refuses(UnsupportedModule, "init_lora_weights='pissa' takes something out")
    configured(init_lora_weights=True)
    config = (adapter / "adapter_config.json").read_text()
    for broken, words in (("{", "cannot be read"), ("[]", "has no peft_type"), ('{"peft_type": "NEW"}', "NEW")):
        (adapter / "adapter_config.json").write_text(broken)
        refuses(ConfigError, f"adapter_config.json:? .*{words}")
    (adapter / "adapter_config.json").write_text(config)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refuses(ConfigError, "has no adapter_model.safetensors; its adapter_model.bin can hold code")


@pytest.mark.parametrize(
    ("made_for", "is_warned_of"),
    [("meta-llama/Llama-9", True), ("somebody/base", False), ("/elsewhere/base/", False), ("", False)],
)
def test_a_base_of_another_name_is_warned_of(
    made_for: str, is_warned_of: bool, make_engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": made_for}))
    with caplog.at_level(logging.WARNING, logger="offload_rt"):
        make_engine(meta_model("llama", torch.bfloat16), adapters=adapter, checkpoint=base, device="cpu")
    assert (f"the adapter was made for {made_for}, the model is" in caplog.text) is is_warned_of
