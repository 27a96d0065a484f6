"""peft's kinds of adapters: each trains to the bits of plain peft and goes on from a save, or is refused at the start.

plain peft   | step 1 | step 2 | step 3 |
engine       | step 1 | step 2 | saved  | files, which peft loads
another      |                 | loaded | step 3 |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import ConfigError, UnsupportedModule
from tests.adapter_tiers import ON_NVME
from tests.conftest import build_base, decode_in_place, language_batch
from tests.tiny_checkpoints import meta_model, new_model

peft = pytest.importorskip("peft")

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
QO: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj"]}


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **QV, **options})


def kind(name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        if not hasattr(peft, name):
            pytest.skip(f"this peft has no {name}")
        return getattr(peft, name)(task_type="CAUSAL_LM", **options)

    return made


def of_tuners(option: str, name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        from peft.tuners.lora import config

        if not hasattr(config, name):
            pytest.skip(f"this peft has no {name}")
        return lora(**{option: getattr(config, name)(**options)})()

    return made


KINDS: dict[str, Callable[[], Any]] = {
    "rslora and patterns": lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "lora_bias": lora(lora_bias=True),
    "all biases": lora(bias="all"),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "mica": lora(init_lora_weights="mica"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "eva without data": lora(init_lora_weights="eva"),
    "dora": lora(use_dora=True, target_modules="all-linear", lora_dropout=0.1),
    "qalora": lora(use_qalora=True),
    "alora": lora(alora_invocation_tokens=[5]),
    "velora": of_tuners("velora_config", "VeloraConfig", num_groups=4),
    "bdlora": of_tuners(
        "use_bdlora", "BdLoraConfig", target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
    ),
    "kasa": of_tuners("kasa_config", "KasaConfig"),
    "rows of the embedding": lora(trainable_token_indices=[3, 4, 5]),
    "head in full": lora(modules_to_save=["lm_head"]),
    "norms and a linear in full": lora(modules_to_save=["input_layernorm", "down_proj"]),
    "embedding and head": lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "all but one": lora(target_modules="all-linear", exclude_modules=["up_proj"]),
    "experts": lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "weights by name": lora(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"]),
    "trained tokens": kind("TrainableTokensConfig", token_indices=[3, 4, 5], target_modules=["embed_tokens"]),
    "adalora": kind("AdaLoraConfig", init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=8, **QV),
    "loha": kind("LoHaConfig", r=4, **QV),
    "lokr": kind("LoKrConfig", r=4, **QV),
    "loha left out by chance": kind("LoHaConfig", r=4, module_dropout=0.5, **QV),
    "ia3": kind("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": kind("VeraConfig", **QO),
    "pvera": kind("PveraConfig", **QO),
    "randlora": kind("RandLoraConfig", r=4, **QV),
    "fourierft": kind("FourierFTConfig", n_frequency=20, **QV),
    "waveft": kind("WaveFTConfig", n_frequency=20, **QV),
    "oft": kind("OFTConfig", oft_block_size=8, **QV),
    "boft": kind("BOFTConfig", boft_block_size=4, **QV),
    "hra": kind("HRAConfig", r=4, **QV),
    "ln tuning": kind("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "miss": kind("MissConfig", r=4, **QV),
    "miss, bat": kind("MissConfig", r=4, init_weights="bat", target_modules=["q_proj"]),
    "shira": kind("ShiraConfig", r=4, random_seed=1, **QV),
    "c3a": kind("C3AConfig", block_size=16, **QV),
    "road": kind("RoadConfig", group_size=8, **QV),
    "poly": kind("PolyConfig", r=4, n_tasks=2, n_skills=2, **QV),
    "prompt tuning": kind("PromptTuningConfig", num_virtual_tokens=4),
    "p-tuning": kind("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=8),
    "adaption prompt": kind("AdaptionPromptConfig", adapter_len=4, adapter_layers=1),
    "delora": kind("DeloraConfig", r=4, **QV),
    "deft": kind("DeftConfig", r=4, **QV),
    "frod": kind("FrodConfig", target_modules=["q_proj", "o_proj"], progressbar=False),
    "glora": kind("GloraConfig", r=4, **QV),
    "gralora": kind("GraloraConfig", r=4, hybrid_r=2, **QV),
    "hira": kind("HiraConfig", r=4, **QV),
    "lily": kind("LilyConfig", r=4, **QV),
    "osf": kind("OSFConfig", **QV),
    "peanut": kind("PeanutConfig", r=4, **QV),
    "psoft": kind("PsoftConfig", r=4, **QV),
    "supertuning": kind("SupertuningConfig", sparsity=0.9, **QV),
    "tinylora": kind("TinyLoraConfig", r=2, u=8, **QV),
    "beft": kind("BeftConfig", **QV),
}
DEFAULT = ("alora", "experts")
PLACES = {"streamed": {}, "state on NVMe": {"state": ON_NVME, "piece_elements": 1024}}


def named(chosen: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.full) for name in KINDS]


def base(name: str) -> Any:
    torch.manual_seed(0)
    biased = {"attention_bias": True} if name in ("all biases", "beft") else {}
    return build_base("moe" if name == "experts" else "llama", torch.bfloat16, 2, **biased)


def tuned(name: str) -> Any:
    """With first values that are no zeros."""
    model = base(name)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, KINDS[name]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.train()


def batch(name: str, number: int) -> dict[str, Any]:
    inputs: dict[str, Any] = language_batch(number)
    inputs["input_ids"][:, 6] = 5  # where aLoRA begins
    return {**inputs, "task_ids": torch.tensor([0, 1])} if name == "poly" else inputs


def step(name: str, model: Any, run: Any, optimizer: Any, number: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and parameters, as any loop takes a step."""
    torch.manual_seed(number)
    loss = run(**batch(name, number)).loss
    loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    found = {f"gradient of {key}": p.grad.clone() for key, p in trained.items() if p.grad is not None}
    optimizer.step()
    if name == "adalora":
        model.base_model.update_and_allocate(number)
    optimizer.zero_grad()
    return {"loss": loss.detach(), **found, **{key: p.detach().clone() for key, p in trained.items()}}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def adapter(model: Any) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: value.detach().cpu() for key, value in values.items()}


def check(name: str, bits: int | None, place: str, make_engine: Any, folder: Path) -> None:
    for drive in ("one", "two"):
        (folder / drive).mkdir()
    plain = tuned(name)
    if bits == 4:
        decode_in_place(plain)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    expected = [step(name, plain, plain, optimizer, number) for number in range(3)]
    engine = make_engine(tuned(name), PLACES[place], bits=bits, nvme=folder / "one")
    for number in range(2):
        same(step(name, engine.model, engine, engine.optimizer, number), expected[number])
    engine.save_checkpoint(folder / "checkpoint")
    same(step(name, engine.model, engine, engine.optimizer, 2), expected[2])
    engine.save_pretrained(folder / "adapter")
    same(peft.load_peft_weights(str(folder / "adapter"), device="cpu"), adapter(plain))
    again = peft.PeftModel.from_pretrained(base(name), str(folder / "adapter"))
    assert adapter(again).keys() == adapter(plain).keys()
    engine.close()
    if name == "adalora":
        return  # its ranks are peft's own, and no part of a checkpoint
    engine = make_engine(tuned(name), PLACES[place], bits=bits, nvme=folder / "two")
    engine.load_checkpoint(folder / "checkpoint")
    same(step(name, engine.model, engine, engine.optimizer, 2), expected[2])


@pytest.mark.parametrize("name", named(DEFAULT))
def test_a_kind_over_4_bits_has_the_bits_of_peft_and_goes_on(name: str, make_engine: Any, disk_folder: Path) -> None:
    check(name, 4, "streamed", make_engine, disk_folder)


@pytest.mark.full
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize(("bits", "place"), [(None, "streamed"), (4, "state on NVMe")])
def test_a_kind_has_the_bits_of_peft_in_16_bits_and_with_its_state_on_nvme(
    name: str, bits: int | None, place: str, make_engine: Any, disk_folder: Path
) -> None:
    check(name, bits, place, make_engine, disk_folder)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "prefix tuning": (kind("PrefixTuningConfig", num_virtual_tokens=3), "Prefix tuning is not supported.*PromptTuning"),
    "cartridge": (kind("CartridgeConfig", num_virtual_tokens=3), "CARTRIDGE: it is a prefix"),
    "shadow": (kind("ShadowConfig", r=4, shadow_num_hidden_layers=1), "SHADOW: its layers hand on an object"),
    "samples": (of_tuners("monteclora_config", "MontecloraConfig", num_samples=2), "monteclora_config.*leave"),
    "projected": (kind("OFTConfig", oft_block_size=8, coft=True, **QV), "OFT: with coft=True each forward writes"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_kind_that_a_recompute_would_change_is_refused_at_the_start(name: str, make_engine: Any) -> None:
    made, words = REFUSED[name]
    model = base(name)
    with pytest.raises(UnsupportedModule, match=f"adapters: 'default' is .*{words}"):
        make_engine(model, adapters=made())
    with pytest.raises(UnsupportedModule, match=words):
        make_engine(peft.get_peft_model(model, made()))


def test_what_took_something_out_of_the_base_is_refused_beside_a_checkpoint(make_engine: Any, tmp_path: Path) -> None:
    """Which would bring it back: each adapter would have it too."""
    base("pissa").save_pretrained(tmp_path / "base")
    for name in ("pissa", "kasa"):
        with pytest.raises(ConfigError, match=r"takes something out of .* leave checkpoint= out"):
            make_engine(base(name), adapters=KINDS[name](), checkpoint=tmp_path / "base")
        with pytest.raises(ConfigError, match=r"takes something out of .* leave checkpoint= out"):
            make_engine(tuned(name), checkpoint=tmp_path / "base")


ON_META = (
    "qalora", "alora", "orthogonal", "eva without data", "velora", "bdlora", "head in full", "embedding and head",
    "adalora", "loha", "lokr", "ia3", "vera", "pvera", "randlora", "fourierft", "waveft", "oft", "boft", "hra", "miss",
    "shira", "c3a", "road", "poly", "prompt tuning", "p-tuning", "glora", "gralora", "hira", "lily", "peanut",
)  # fmt: skip
NEED_WEIGHTS = (
    "pissa", "olora", "mica", "dora", "kasa", "rows of the embedding", "ln tuning", "delora", "deft", "frod", "osf",
    "psoft", "supertuning", "tinylora",
)  # fmt: skip
DRAWN_HERE = ("qalora", "alora", "head in full", "embedding and head")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in ("oft", "vera") else pytest.mark.full) for each in ON_META]
)
def test_on_the_meta_device_an_adapter_begins_as_peft_begins_it(name: str, make_engine: Any, tmp_path: Path) -> None:
    """To the bit, but for plain LoRA's numbers, which are drawn when weights come: these are in their range."""
    new_model("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    plain = peft.get_peft_model(new_model("llama", torch.bfloat16), KINDS[name]()).eval()
    torch.manual_seed(0)  # as `new_model` leaves it
    new_model("llama", torch.bfloat16)
    engine = make_engine(meta_model("llama", torch.bfloat16), adapters=KINDS[name](), checkpoint=tmp_path / "base")
    found = {key: parameter.detach() for key, parameter in plain.named_parameters() if parameter.requires_grad}
    assert found.keys() == engine.trainable.keys()
    for key, parameter in found.items():
        begun = engine.trainable[key].detach()
        assert begun.dtype == parameter.dtype
        if name not in DRAWN_HERE:
            assert torch.equal(begun, parameter), key
        assert bool(begun.any()) == bool(parameter.any()), key
        parameter.data = begun.clone()
    inputs = {key: value for key, value in batch(name, 0).items() if key != "labels"}
    with torch.no_grad():
        torch.manual_seed(4)
        expected = plain(**inputs).logits
        torch.manual_seed(4)
        assert torch.equal(engine.model.eval()(**inputs).logits, expected)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in ("dora", "olora") else pytest.mark.full) for each in NEED_WEIGHTS]
)
def test_on_the_meta_device_what_begins_with_weights_is_refused(name: str, make_engine: Any, tmp_path: Path) -> None:
    new_model("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    model = meta_model("llama", torch.bfloat16)
    before = {key: (id(parameter), parameter.shape) for key, parameter in model.named_parameters()}
    with pytest.raises((ConfigError, UnsupportedModule), match="on the meta device"):
        make_engine(model, adapters=KINDS[name](), checkpoint=tmp_path / "base")
    assert {key: (id(parameter), parameter.shape) for key, parameter in model.named_parameters()} == before
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", ["dora", pytest.param("olora", marks=pytest.mark.full), "supertuning"])
def test_what_begins_with_weights_is_not_added_to_a_running_engine(
    name: str, make_engine: Any, disk_folder: Path
) -> None:
    first = "supertuning" if name == "supertuning" else "qalora"  # a model has adapters of one kind
    engine = make_engine(tuned(first), bits=4, nvme=disk_folder)
    with torch.no_grad():
        expected = engine(**batch(name, 0)).loss
        with pytest.raises(ConfigError, match=r"add_adapter: .* at rest .*Add it before engine"):
            engine.model.add_adapter("late", KINDS[name]())
        assert list(engine.model.peft_config) == ["default"]
        assert not any("late" in key for key, _ in engine.model.named_parameters())
        if name != "olora":  # that one wrote into weights, which the next call refuses
            assert torch.equal(engine(**batch(name, 0)).loss, expected)
